"""Where a run keeps what it does not need any more; nothing is ever deleted."""

import errno
import time
from pathlib import Path

from ..durable import copy_file
from ..errors import OutputError

ASIDE = "aside"
"""Name of the folder in a run for what is put aside."""


def move_aside(path: Path, aside: Path) -> None:
    """Move a file or folder into ``aside``, under a name of its own there.

    Raises:
        OutputError: It cannot be moved.
    """
    target, further = aside / path.name, 1
    while target.exists():
        further += 1
        target = aside / f"{path.stem}_{further}{path.suffix}"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        _move(path, target)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{path} cannot be moved to {aside}: {error.strerror or error}; it stays where it is."
        ) from error


def _move(path: Path, target: Path) -> None:
    """Move a file or folder; a file to another disk, too."""
    try:
        path.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV or not path.is_file():
            raise
        copy_file(path, target)
        path.unlink()


def aside_folder(run: Path) -> Path:
    """Return a folder in ``run``, not made yet, for what is put aside at this moment."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    folder, further = run / ASIDE / stamp, 1
    while folder.exists():
        further += 1
        folder = run / ASIDE / f"{stamp}_{further}"
    return folder
