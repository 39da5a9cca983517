"""Weights on disk, whatever they are kept in: tensors by name, read one at a time.

One safetensors file, one PyTorch pickle, shards of either behind an index, or a folder that holds one of
these. What kind of file it is, its content decides and never its name.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .errors import CheckpointError
from .pickle_file import PICKLE, ZIP, PickleFile, dtype_name, read_pickle
from .weights_file import Header, metadata_table, read_header, read_tensor, read_tensors

LARGEST_INDEX = 50_000_000
"""Bytes of the largest index accepted."""

SUFFIXES = ((".safetensors", ".sft"), (".pt", ".pth", ".bin", ".ckpt"))
"""How files of weights are called in a folder; the first kind found counts."""

SUBFOLDER = "transformer"
"""Where a pipeline of diffusers keeps the model that generates."""


class Described(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def dtype(self) -> str:
        """Name of the dtype, e.g. ``BF16``."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""
        ...

    @property
    def numbers(self) -> int:
        """Numbers the tensor holds."""
        ...


class Contents(Protocol):
    """What is known of weights before one is read: ``Weights``, or the header of one safetensors file."""

    @property
    def entries(self) -> Mapping[str, Described]:
        """The tensors, by name."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """Free text by key."""
        ...

    @property
    def container(self) -> str:
        """What holds the tensors, for people."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Tables at the top of a pickle."""
        ...

    @property
    def file_bytes(self) -> int:
        """Size of all files together."""
        ...

    def table(self, key: str, *, where: str) -> dict[str, Any] | None:
        """Return the JSON table under ``key`` of the metadata, or ``None`` if there is none."""
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    """Dtype and shape of a tensor in a pickle."""

    dtype: str

    shape: tuple[int, ...]

    numbers: int
    """Numbers the tensor holds."""


class _File(Protocol):
    """One file with tensors."""

    @property
    def path(self) -> Path: ...

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]: ...

    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _SafetensorsFile:
    """One safetensors file."""

    path: Path
    header: Header

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of these names."""
        tensors = {name: info for name, info in self.header.tensors.items() if name in names}
        return read_tensors(self.path, replace(self.header, tensors=tensors))

    def tensor(self, name: str) -> Tensor:
        """Return one tensor."""
        return read_tensor(self.path, self.header, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Tensors on disk, known by name, dtype and shape.

    Use::

        weights = open_weights(path)
        shapes = {name: entry.shape for name, entry in weights.entries.items()}
        for name, tensor in weights.read():     # one in memory at a time
            ...
    """

    path: Path
    """What was opened: a file, an index, or a folder."""

    container: str
    """What holds the tensors, for people, e.g. ``safetensors, 6 shards``."""

    entries: Mapping[str, Described]
    """Dtype and shape by name. Tables within tables of a pickle have their names joined by dots."""

    metadata: Mapping[str, str]
    """Free text by key."""

    file_bytes: int
    """Size of all files together."""

    parts: tuple[str, ...] = ()
    """Tables at the top of a pickle, e.g. ``generator`` and ``generator_ema``."""

    files: tuple[tuple[_File, frozenset[str]], ...] = field(repr=False)
    """What reads the tensors, and the names of those each can read."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(file.path for file, _ in self.files)

    def table(self, key: str, *, where: str) -> dict[str, Any] | None:
        """Return the JSON table under ``key`` of the metadata, or ``None`` if there is none.

        Raises:
            CheckpointError: The value is not a JSON table.
        """
        return metadata_table(self.metadata, key, where=where)

    def read(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors by name, in the order of the files, each in memory of its own.

        Args:
            names: Those to read; ``None`` for all.

        Raises:
            CheckpointError: A file cannot be read, or has changed since it was opened.
        """
        for file, there in self.files:
            yield from file.read(there if names is None else there.intersection(names))

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, in memory of its own.

        Raises:
            CheckpointError: There is none of this name, or the file cannot be read.
        """
        for file, names in self.files:
            if name in names:
                return file.tensor(name)
        raise CheckpointError(f"{self.path} has no tensor {name!r}.")


def open_weights(path: Path) -> Weights:
    """Read the names, dtypes and shapes of weights; no weight of a safetensors file or a zip pickle is read.

    Args:
        path: A safetensors file, a pickle of ``torch.save``, an index of shards, or a folder that holds one
            of these, itself or in ``transformer``.

    Raises:
        CheckpointError: There is no such thing, it is damaged or something else, or it holds more than
            weights.
    """
    if path.is_dir():
        return _open_folder(path)
    if _head(path).lstrip().startswith(b"{"):
        return _open_index(path)
    return _open_file(path)


def _head(path: Path) -> bytes:
    """Return the first bytes of a file; none if it cannot be read, which its reader then says."""
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError:
        return b""


def _open_file(path: Path) -> Weights:
    """Open one file with tensors."""
    head = _head(path)
    # The length of a safetensors header may begin as a pickle does; the brace after it tells them apart.
    if head.startswith((ZIP, *PICKLE)) and head[8:9] != b"{":
        return _open_pickle(path)
    header = read_header(path)
    return Weights(
        path=path,
        container="safetensors",
        entries=header.tensors,
        metadata=header.metadata,
        file_bytes=header.file_bytes,
        files=((_SafetensorsFile(path, header), frozenset(header.tensors)),),
    )


def _open_pickle(path: Path) -> Weights:
    """Open a file of `torch.save`."""
    file: PickleFile = read_pickle(path)
    return Weights(
        path=path,
        container="PyTorch pickle" if file.mapped else "old PyTorch pickle",
        entries={
            name: Entry(dtype_name(tensor), tuple(tensor.shape), tensor.numel())
            for name, tensor in file.tensors.items()
        },
        metadata={},
        file_bytes=path.stat().st_size,
        parts=file.parts,
        files=((file, frozenset(file.tensors)),),
    )


def _open_folder(folder: Path) -> Weights:
    """Open the only weights of a folder."""
    indices = sorted(folder.glob("*.index.json"))
    kinds = [sorted(path for path in folder.iterdir() if path.suffix in kind) for kind in SUFFIXES]
    found = next(filter(None, [indices, *kinds]), [])
    if len(found) == 1:
        return open_weights(found[0])
    if found:
        names = ", ".join(path.name for path in found[:4])
        raise CheckpointError(f"{folder} is a folder with several weights: {names}; name the one to load.")
    if (folder / SUBFOLDER).is_dir():
        return _open_folder(folder / SUBFOLDER)
    raise CheckpointError(f"{folder} is a folder without weights; name the .safetensors file.")


def _open_index(path: Path) -> Weights:
    """Open the shards that an index names."""
    place = _read_index(path)
    shards = {name: _open_file(path.parent / name) for name in dict.fromkeys(place.values())}
    entries: dict[str, Described] = {}
    for file, shard in shards.items():
        for name, entry in shard.entries.items():
            if place.get(name) != file:
                said = place.get(name, "none")
                raise CheckpointError(
                    f"{path.parent / file} holds {name[:80]}, which the index {path.name} expects in {said}: "
                    "shards of two models may be mixed. Get all of them again."
                )
            entries[name] = entry
    if missing := [name for name in place if name not in entries]:
        raise CheckpointError(
            f"{path.parent / place[missing[0]]} lacks {missing[0][:80]}, which the index {path.name} expects "
            "in it: shards of two models may be mixed. Get all of them again."
        )
    (container,) = {shard.container for shard in shards.values()} or {""}
    return Weights(
        path=path,
        container=f"{container}, {len(shards)} shards",
        entries=entries,
        metadata={key: value for shard in shards.values() for key, value in shard.metadata.items()},
        file_bytes=sum(shard.file_bytes for shard in shards.values()),
        files=tuple(file for shard in shards.values() for file in shard.files),
    )


def _read_index(path: Path) -> dict[str, str]:
    """Return the file that an index names for each tensor."""
    if path.stat().st_size > LARGEST_INDEX:
        raise CheckpointError(f"{path} is too large for an index of shards; is it another file?")
    try:
        place = json.loads(path.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not an index of shards ({error!r:.80}); name a weights file or its folder."
        ) from error
    if not isinstance(place, dict) or not place or not all(isinstance(name, str) for name in place.values()):
        raise CheckpointError(f"{path} is not an index of shards; name a weights file or its folder.")
    for name in dict.fromkeys(place.values()):
        # A name with a folder in it could reach any file of the machine.
        if name != Path(name).name or "\\" in name or name in ("..", path.name):
            raise CheckpointError(
                f"{path} names {name[:80]!r}, which is no weights file beside it; get it again."
            )
        if not (path.parent / name).is_file():
            raise CheckpointError(
                f"{path.parent / name} does not exist; {path.name} names it: get all shards, "
                f"{len(set(place.values()))} in number."
            )
    return place
