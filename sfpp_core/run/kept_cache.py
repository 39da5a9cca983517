"""The keys and values of a run on disk, so that it goes on exactly, and at once."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..kv_cache import RollingKVCache
from ..latents_file import checksum_of
from ..weights_file import STORED, read_header, read_tensor, write

METADATA_KEY = "sfpp_cache"
"""Name of what is known of the keys in the metadata."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptCache:
    """Keys and values on disk."""

    path: Path

    chunk: int
    """Last chunk they remember."""

    key: str
    """Of that chunk."""

    checksum: str
    """Digest of the numbers."""

    def restore(self, cache: RollingKVCache) -> None:
        """Bring ``cache``, in which the chunk is open, to where it was after the clean pass of it.

        Raises:
            CheckpointError: The file was damaged since it was read.
        """
        header = read_header(self.path)
        for place, tensor in enumerate(cache.storage.tensors()):
            read = read_tensor(self.path, header, _name(place))
            tensor.copy_(read.view(torch.uint8).view(tensor.dtype).view(tensor.shape))


def save_cache(path: Path, cache: RollingKVCache, *, chunk: int, key: str) -> None:
    """Write the keys and values of a cache whose last remembered chunk is ``chunk``.

    Raises:
        OutputError: The disk is full, or the folder cannot be written to.
    """
    # As pairs of bytes, whatever they are: 8-bit floats are nothing a weights file is written with.
    tensors = [
        tensor.detach().cpu().contiguous().flatten().view(torch.uint8).view(torch.float16)
        for tensor in cache.storage.tensors()
    ]
    table = {"chunk": chunk, "key": key, "checksum": checksum_of(*tensors)}
    named = {_name(place): tensor for place, tensor in enumerate(tensors)}
    write(path, named, {METADATA_KEY: json.dumps(table, sort_keys=True)})


def find_cache(path: Path) -> KeptCache | None:
    """Return the keys and values in a file, or ``None`` where there are none. Every number is read.

    Raises:
        CheckpointError: The file is damaged.
    """
    if not path.is_file():
        return None
    header = read_header(path)
    table = header.table(METADATA_KEY, where=str(path))
    if table is None or {name: type(value) for name, value in table.items()} != {
        "chunk": int,
        "key": str,
        "checksum": str,
    }:
        raise CheckpointError(f"{path} does not say which keys and values it holds; it is damaged.")
    names = [_name(place) for place in range(len(header.tensors))]
    if set(names) != set(header.tensors) or any(header.tensors[name].dtype not in STORED for name in names):
        raise CheckpointError(f"{path} holds something else than keys and values; it is damaged.")
    if checksum_of(*(read_tensor(path, header, name) for name in names)) != table["checksum"]:
        raise CheckpointError(f"{path} is damaged: its numbers are not those that were written.")
    return KeptCache(path=path, **table)


def _name(place: int) -> str:
    """Return the name of a tensor."""
    return f"part_{place}"
