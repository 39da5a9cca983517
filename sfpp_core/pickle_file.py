"""One file of `torch.save`: its tensors by name, and no code of it ever run.

The pickle inside names what is to be rebuilt. `torch.load` with ``weights_only`` rebuilds tensors and plain
containers and refuses everything else before it is called.
"""

import ctypes
import mmap
import re
import sys
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError
from .weights_file import STORED

ZIP = b"PK\x03\x04"
"""What files of `torch.save` begin with since PyTorch 1.6."""

PICKLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""What older ones begin with: the protocol of the pickle."""

LARGEST_PICKLE = 100_000_000
"""Bytes of the largest pickle accepted, that is of all names and shapes together, without the weights."""

DEEPEST = 8
"""Tables within tables that are looked into."""

_NAMES = {dtype: name for name, dtype in STORED.items()}
_CALLED = re.compile(r"GLOBAL ([\w.]+)")
_REFUSED = re.compile(r"WeightsUnpickler error: (.{1,120})")


@dataclass(frozen=True, slots=True)
class PickleFile:
    """The tensors of one pickle, where possible still on disk."""

    path: Path

    tensors: dict[str, Tensor]
    """By name; names of tables within tables are joined by dots."""

    parts: tuple[str, ...]
    """Tables at the top that hold tensors, e.g. ``generator``."""

    mapped: bool
    """Whether the tensors are mapped, not read."""

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of these names, in the order of the file, as ``tensor`` returns them."""
        for name in self.tensors:
            if name in names:
                yield name, self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor; of a mapped file, in memory of its own."""
        stored = self.tensors[name]
        if not self.mapped:
            return stored.contiguous()
        copy = stored.clone(memory_format=torch.contiguous_format)
        _forget_pages(stored)
        return copy


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's dtype, as safetensors has it where it has one."""
    return _NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def read_pickle(path: Path) -> PickleFile:
    """Read the names and shapes of a file of ``torch.save``; mapped weights stay on disk.

    Files older than PyTorch 1.6 cannot be mapped and are read whole.

    Raises:
        CheckpointError: The file is cut short or damaged, is another kind of archive, holds no tensors, or
            holds more than weights: something that loading it would run.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        mapped = file.read(4) == ZIP
    if mapped:
        _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on what an error will say
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped or None)
    except Exception as error:  # a damaged pickle can raise anything
        raise _explained(path, error) from error
    tensors: dict[str, Tensor] = {}
    parts = []
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not tensors by name; save the state dict of the model."
        )
    for key, value in content.items():
        before = len(tensors)
        _flatten(path, str(key), value, tensors, depth=1)
        if isinstance(value, Mapping) and len(tensors) > before:
            parts.append(str(key))
    if not tensors:
        raise CheckpointError(f"{path} is a PyTorch pickle without a tensor in it; choose another file.")
    _check_tensors(path, tensors, size)
    return PickleFile(path, tensors, tuple(parts), mapped)


def _check_archive(path: Path) -> None:
    """Refuse zip archives that `torch.save` did not write, or not to their end."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    # A name may be no text, and a damaged archive may ask for a version of the format there is none of.
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} is a PyTorch pickle or zip archive that is cut short or damaged ({error}); copy or "
            "download it again."
        ) from error
    pickles = [record for record in records if record.filename.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise CheckpointError(f"{path} is a zip archive that holds no PyTorch weights; unpack it.")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise CheckpointError(f"{path} is a compressed zip archive; unpack it and zip nothing inside again.")
    if pickles[0].file_size > LARGEST_PICKLE:
        raise CheckpointError(
            f"{path} has {pickles[0].file_size:,} bytes of names and shapes; at most {LARGEST_PICKLE:,} make "
            "sense."
        )


def _explained(path: Path, error: Exception) -> CheckpointError:
    """Say in plain words why `torch.load` refused a file."""
    if isinstance(error, OSError) and error.strerror:
        return CheckpointError(f"{path} cannot be read: {error.strerror}.")
    told = str(error)
    if called := _CALLED.search(told):
        return CheckpointError(
            f"{path} holds more than weights: loading it would call {called[1]}. Nothing of it was run. Get "
            "the weights as safetensors, from a source you trust."
        )
    # Before its own reason, torch explains at length how to take the risk.
    refused = _REFUSED.search(told)
    told = refused[1] if refused else told.rpartition("a trusted source.")[2]
    reason = (told.strip().splitlines() or [""])[0][:120] or type(error).__name__
    return CheckpointError(f"{path} is a damaged PyTorch pickle ({reason}); copy or download it again.")


def _flatten(path: Path, name: str, value: Any, tensors: dict[str, Tensor], *, depth: int) -> None:
    """Add the tensors below ``value`` to ``tensors``; other values say nothing about weights."""
    if isinstance(value, Mapping):
        if depth > DEEPEST:
            raise CheckpointError(f"{path} nests tables deeper than {DEEPEST}; save the state dict alone.")
        for key, inner in value.items():
            _flatten(path, f"{name}.{key}", inner, tensors, depth=depth + 1)
    elif isinstance(value, Tensor):
        if name in tensors:
            raise CheckpointError(f"{path} has two tensors of the name {name[:80]!r}; save it again.")
        tensors[name] = value.detach() if isinstance(value, nn.Parameter) else value


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], size: int) -> None:
    """Refuse tensors that are no plain numbers, or claim more of them than the file can hold."""
    for name, tensor in tensors.items():
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name[:80]} is no plain tensor; save plain weights.")
        if tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(
                f"{path}: {name[:80]} claims {tuple(tensor.shape)}, more than the {size:,} bytes of the file "
                "hold; the file is damaged, get it again."
            )


def _forget_pages(tensor: Tensor) -> None:
    """Let the system drop the pages of a mapped tensor; they would stay beside the copy otherwise.

    Only Linux counts them as the process's own for long. A page that is asked for again is read again.
    """
    if sys.platform != "linux" or not tensor.numel():
        return
    storage = tensor.untyped_storage()
    start = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = storage.data_ptr() + storage.nbytes() - start
    advise = ctypes.CDLL(None).madvise
    advise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
