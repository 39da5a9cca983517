"""Digests that tell whether a file is still the one that something was made from."""

import hashlib
from functools import lru_cache
from pathlib import Path

_PART = 2**24


def digest(*paths: Path) -> str:
    """Return a digest of what files hold, and all files of folders; it is remembered while they stay."""
    files: list[Path] = []
    for path in paths:
        files += [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return _digest(tuple((file, stamp(file)) for file in files))


def stamp(path: Path) -> tuple[int, int]:
    """Return what changes when a file is written again: its time and its size."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@lru_cache
def _digest(files: tuple[tuple[Path, tuple[int, int]], ...]) -> str:
    """Return a digest of the contents of files."""
    made = hashlib.blake2b(digest_size=8)
    for file, _ in files:
        with file.open("rb") as content:
            while part := content.read(_PART):
                made.update(part)
    return made.hexdigest()
