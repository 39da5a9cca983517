"""One process at a time works on a run.

The lock is the system's own on an open file, which ends with the process, however that ends. Where a disk
knows no such locks, the file says which process it is and since when: one that is gone, or began at another
time, holds nothing.
"""

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO, Any

from ..durable import unwritable
from ..errors import OutputError

NAME = "lock"
"""Name of the file in the folder of a run."""

LOOKS, PAUSE_SECONDS = 25, 0.02
"""How often, and how far apart, a lock is asked for that nobody alive says is his."""


class RunLock:
    """The right to write to a run; ``release`` gives it back."""

    def __init__(self, folder: Path) -> None:
        """Take the lock of a run.

        Raises:
            OutputError: Another process has it, or the folder cannot be written to.
        """
        self._path = folder / NAME
        try:
            self._file: IO[str] = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"the folder {folder} cannot be written to ({error.strerror}); choose another."
            ) from error
        try:
            locked, owner = _taken(self._file)
            if locked is False or (locked is None and _lives(owner)):
                gone = "" if locked is False else f" If it is gone, remove {self._path}."
                raise OutputError(
                    f"{folder} is being worked on by process {owner.get('process', 'unknown')} of "
                    f"{owner.get('machine', 'this machine')}; wait for it, end it, or choose another folder."
                    + gone
                )
            self._sign()
        except BaseException:
            self._file.close()
            raise

    def _sign(self) -> None:
        """Write who has it."""
        mine = {"process": os.getpid(), "began": process_start(os.getpid()), "machine": socket.gethostname()}
        try:
            self._file.truncate(0)
            self._file.write(json.dumps(mine))
            self._file.flush()
        except OSError as error:  # a full disk
            raise unwritable(self._path, error) from error

    def release(self) -> None:
        """Give the lock back; harmless if it was given back."""
        if self._file.closed:
            return
        with contextlib.suppress(OSError):
            self._file.truncate(0)
        self._file.close()


def is_locked(folder: Path) -> bool:
    """Return whether a process works on a run."""
    try:
        with (folder / NAME).open("r+", encoding="utf-8") as file:
            locked = _lock(file)
            return locked is False or (locked is None and _lives(_owner(file)))
    except OSError:
        return False


def process_start(process: int) -> str:
    """Return when a process began, in the words of the system; nothing where it is gone or none can say."""
    try:
        # After the name, which may hold anything but ends with the last bracket, the 20th field.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _taken(file: IO[str]) -> tuple[bool | None, dict[str, Any]]:
    """Lock an open file as ``_lock`` does; return that, and who wrote it last.

    Somebody who only looks whether it is locked holds it for a moment, and does not write who that is.
    """
    locked, owner = _lock(file), _owner(file)
    for _ in range(LOOKS):
        if locked is not False or _lives(owner):
            break
        time.sleep(PAUSE_SECONDS)
        locked, owner = _lock(file), _owner(file)
    return locked, owner


def _lock(file: IO[str]) -> bool | None:
    """Lock an open file; return whether that is done, or ``None`` where the disk knows no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 30)  # far behind the text, which others may read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _owner(file: IO[str]) -> dict[str, Any]:
    """Return who wrote an open lock last."""
    file.seek(0)
    try:
        table = json.loads(file.read(1000))
    except ValueError:
        return {}
    return table if isinstance(table, dict) else {}


def _lives(owner: dict[str, Any]) -> bool:
    """Return whether the process that wrote a lock is still there."""
    process = owner.get("process")
    if not isinstance(process, int) or owner.get("machine") != socket.gethostname():
        return bool(owner)  # of another machine nothing can be known
    began = process_start(process)
    if began:
        return began == owner.get("began")
    if os.name == "nt":  # where a signal of 0 would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not owner.get("began")
