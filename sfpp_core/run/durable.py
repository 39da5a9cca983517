"""Files that are whole or not there, whatever ends the process or the machine."""

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from ..errors import OutputError

ASIDE = "aside"
"""Name of the folder in a run for what it does not need any more; nothing is ever deleted."""


def write_text(path: Path, text: str) -> None:
    """Write a file that appears under its name once it is whole and on the disk, in place of an earlier one.

    Raises:
        OutputError: The folder is missing, not writable, or full.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        part = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.chmod(0o644)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error


def sync_folder(folder: Path) -> None:
    """Bring the names of a folder to the disk, where the system can do that."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks refuse, and keep names safe by themselves
            os.fsync(handle)
    finally:
        os.close(handle)


def move_aside(path: Path, aside: Path) -> None:
    """Move a file or folder into ``aside``, under a name of its own there; nothing is ever deleted.

    Raises:
        OutputError: It cannot be moved.
    """
    target, further = aside / path.name, 1
    while target.exists():
        further += 1
        target = aside / f"{path.stem}_{further}{path.suffix}"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be moved to {aside}: {error.strerror or error}; nothing was changed."
        ) from error


def aside_folder(run: Path) -> Path:
    """Return a folder in ``run``, not made yet, for what is put aside at this moment."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    folder, further = run / ASIDE / stamp, 1
    while folder.exists():
        further += 1
        folder = run / ASIDE / f"{stamp}_{further}"
    return folder


def share_file(source: Path, target: Path) -> None:
    """Let ``target``, which is not there yet, be the same file as ``source``; a copy where that cannot be.

    Raises:
        OutputError: Neither is possible.
    """
    with contextlib.suppress(OSError):
        target.hardlink_to(source)
        return
    part = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, part)
        part.replace(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be made of {source}: {error.strerror or error}.") from error
    finally:
        part.unlink(missing_ok=True)
