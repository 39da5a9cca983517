"""Files that are whole or not there, whatever ends the process or the machine."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import OutputError

PART = ".part."
"""How the name of a file begins that is not whole yet; it ends as that of the whole one does."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a place to write a file at; after that it is on the disk, in place of an earlier one at ``path``.

    After an error there is no trace of it.

    Raises:
        OutputError: The folder is missing, not writable, or full.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=PART, suffix=f".{path.name}")
        os.close(handle)
        part = Path(name)
        try:
            yield part
            with part.open("r+b") as file:
                os.fsync(file.fileno())
            part.chmod(0o644)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OutputError:
        raise
    except OSError as error:
        raise unwritable(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write a text as a whole file, in UTF-8.

    Raises:
        OutputError: As ``whole_file``.
    """
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def share_file(source: Path, target: Path) -> None:
    """Let ``target``, which is not there yet, be the same file as ``source``; a copy where that cannot be.

    Raises:
        OutputError: Neither is possible.
    """
    with contextlib.suppress(OSError):
        target.hardlink_to(source)
        return
    copy_file(source, target)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, as a whole one.

    Raises:
        OutputError: It cannot be read, or as ``whole_file``.
    """
    try:
        with source.open("rb") as there, whole_file(target) as part, part.open("wb") as file:
            shutil.copyfileobj(there, file)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{target} cannot be made of {source}: {error.strerror or error}.") from error


def sync_folder(folder: Path) -> None:
    """Bring the names of a folder to the disk, where the system can do that."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):  # some network disks refuse, and keep names safe by themselves
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def unwritable(path: Path, error: OSError) -> OutputError:
    """Return the error of a file that the system does not let us write, with what to do about it."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some room or write to another disk" if full else "choose another folder"
    return OutputError(f"{path} cannot be written: {error.strerror or error}; {remedy}.")


def remove_parts(folder: Path) -> None:
    """Remove what processes that were killed have left of files that never became whole.

    Nobody else may write to the folder meanwhile.
    """
    for part in folder.glob(f"{PART}*"):
        with contextlib.suppress(OSError):  # it is in nobody's way
            part.unlink()
