"""Digests that know a file by what it holds, wherever it lies: quickly, for weights of any size."""

import os
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

from ..errors import CheckpointError

WHOLE_BYTES = 1 << 23
"""Bytes up to which a file is read whole."""

SAMPLES, SAMPLE_BYTES = 64, 1 << 14
"""Pieces of a larger file that are read, evenly spread, and the bytes of each. Two trainings of one model
differ in every piece."""


def fingerprint(path: Path) -> str:
    """Return a digest of a file, or of all files in a folder.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        if not path.is_dir():
            return _of_file(path, *_state(path))
        files = sorted(file for file in path.rglob("*") if file.is_file())
        parts = [(str(file.relative_to(path)), _of_file(file, *_state(file))) for file in files]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    return blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _state(path: Path) -> tuple[int, int]:
    """Return what changes when a file is written to: its size and its time."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=256)
def _of_file(path: Path, size: int, changed: int) -> str:  # noqa: ARG001 - a file that changed is another
    """Return a digest of one file."""
    digest = blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            step = (size - SAMPLE_BYTES) // (SAMPLES - 1)
            for sample in range(SAMPLES):
                file.seek(sample * step, os.SEEK_SET)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
