"""One safetensors file: its header without its weights, and writing it whole or not at all.

A file that is something else is named for what it is, since that is the mistake people make.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .durable import whole_file
from .errors import CheckpointError

LARGEST_HEADER = 100_000_000
"""Bytes of the largest header accepted, the limit of the safetensors format."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Floating dtypes that can be computed with or converted, by their name in the file."""

STORED: dict[str, torch.dtype] = {
    **DTYPES,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
"""All dtypes that can be read, by their name in the file."""

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a PyTorch pickle or a zip archive; only safetensors files are read"),
    (b"\x80\x02", "an old PyTorch pickle; only safetensors files are read"),
    (b"GGUF", "a GGUF file, which is read by ComfyUI's GGUF loader alone; take the model as safetensors"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights themselves; run `git lfs pull`"),
    (b"<", "a web page, perhaps the one you meant to download the file from"),
)
"""What other files begin with, and what to tell whoever chose one."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of one tensor."""

    dtype: str
    """Name in the file, e.g. ``BF16``."""

    shape: tuple[int, ...]

    start: int
    """Byte of the file at which the numbers begin."""

    stop: int
    """Byte of the file after the last number."""

    @property
    def numbers(self) -> int:
        """Numbers the tensor holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself."""

    tensors: dict[str, TensorInfo]
    """By name, in the order of the file."""

    metadata: dict[str, str]
    """Free text by key."""

    file_bytes: int
    """Size of the file."""

    @property
    def entries(self) -> dict[str, TensorInfo]:
        """The tensors, under the name they have in every container."""
        return self.tensors

    @property
    def container(self) -> str:
        """What holds the tensors, for people."""
        return "safetensors"

    @property
    def parts(self) -> tuple[str, ...]:
        """Tables at the top of the file: none."""
        return ()

    def table(self, key: str, *, where: str) -> dict[str, Any] | None:
        """Return the JSON table under ``key`` of the metadata, or ``None`` if there is none.

        Raises:
            CheckpointError: The value is not a JSON table.
        """
        return metadata_table(self.metadata, key, where=where)


def metadata_table(metadata: Mapping[str, str], key: str, *, where: str) -> dict[str, Any] | None:
    """Return the JSON table under ``key`` of the metadata, or ``None`` if there is none.

    Raises:
        CheckpointError: The value is not a JSON table.
    """
    if key not in metadata:
        return None
    try:
        table = json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: the metadata {key!r} is not JSON ({error}); save it again."
        ) from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{where}: the metadata {key!r} is not a JSON table; save it again.")
    return table


def read_header(path: Path) -> Header:
    """Read what a safetensors file says of itself; no weight is loaded.

    Raises:
        CheckpointError: There is no such file, it is no safetensors file, or it is cut short or damaged.
    """
    try:
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            return _parse(path, file, size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _open(path: Path) -> BufferedReader:
    """Open ``path``, or say why that is no file to open."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name the .safetensors file in it.")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; check the path.")
    if not path.is_file():
        raise CheckpointError(f"{path} is not an ordinary file; name a .safetensors file.")
    return path.open("rb")


def _parse(path: Path, file: BufferedReader, size: int) -> Header:
    """Parse the header of an open file of ``size`` bytes."""
    head = file.read(32)
    if not head:
        raise CheckpointError(f"{path} is empty; it was probably never downloaded to its end.")
    length = int.from_bytes(head[:8], "little")
    # A header is a JSON table, so its ninth byte is a brace.
    if len(head) < 10 or head[8:9] != b"{" or not 2 <= length <= LARGEST_HEADER:
        raise CheckpointError(f"{path} is not a safetensors file; it looks like {_guess(head)}.")
    if 8 + length > size:
        raise CheckpointError(
            f"{path} is cut short inside its header, at {size:,} bytes; copy or download it again."
        )
    file.seek(8)
    try:
        table = json.loads(file.read(length), object_pairs_hook=_without_twins)
        metadata = _metadata(table.pop("__metadata__", {}))
        tensors = {name: _tensor(name, entry, 8 + length) for name, entry in table.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header ({error}); copy or download it again.") from error
    _check_extent(path, tensors, 8 + length, size)
    return Header(tensors, metadata, size)


def _guess(head: bytes) -> str:
    """Say what a file that begins with ``head`` looks like."""
    for start, what in _FOREIGN:
        if head.lstrip().startswith(start):
            return what
    if head[4:8] == b"ftyp":
        return "an MP4 video"
    readable = all(byte >= 32 or byte in b"\t\r\n" for byte in head)
    return "a text file" if readable else "another kind of file"


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a table; two entries of one name could hide one another."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name appears twice")
    return table


def _metadata(table: Any) -> dict[str, str]:
    """Check that the metadata is text by key."""
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise ValueError("metadata that is not text")
    return table


def _tensor(name: str, entry: Any, start: int) -> TensorInfo:
    """Check the entry of one tensor; ``start`` is the byte at which the weights begin."""
    if not isinstance(entry, dict) or entry.get("dtype") not in _BITS:
        raise ValueError(f"no dtype known here for {name[:80]!r}")
    shape, span = _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if shape is None or span is None or len(span) != 2:
        raise ValueError(f"no shape and place for {name[:80]!r}")
    info = TensorInfo(entry["dtype"], shape, start + span[0], start + span[1])
    if info.numbers * _BITS[info.dtype] != 8 * (info.stop - info.start):
        raise ValueError(f"shape and bytes of {name[:80]!r} disagree")
    return info


def _counts(values: Any) -> tuple[int, ...] | None:
    """Return ``values`` if it is a list of integers from 0 up."""
    if isinstance(values, list) and all(type(value) is int and value >= 0 for value in values):
        return tuple(values)
    return None


def _check_extent(path: Path, tensors: Mapping[str, TensorInfo], start: int, size: int) -> None:
    """Refuse a file that holds fewer or more bytes than its tensors, or tensors that share bytes."""
    end = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            raise CheckpointError(
                f"{path} has a damaged header ({name[:80]!r} is misplaced); download it again."
            )
        end = info.stop
    if end > size:
        raise CheckpointError(f"{path} is cut short: {size:,} of {end:,} bytes; copy or download it again.")
    if end < size:
        raise CheckpointError(f"{path} has {size - end:,} bytes too many; copy or download it again.")


def read_tensors(path: Path, header: Header) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor by name, in the order of the file, each in memory of its own.

    Read, not mapped: pages of a mapped file would stay beside the converted weights until the last is read.

    Raises:
        CheckpointError: The file cannot be read, or is not the one the header was read from.
    """
    try:
        with _open(path) as file:
            for name, info in sorted(header.tensors.items(), key=lambda item: item[1].start):
                yield name, _read(path, file, name, info)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_tensor(path: Path, header: Header, name: str) -> Tensor:
    """Return one tensor, in memory of its own.

    Raises:
        CheckpointError: As ``read_tensors``.
    """
    return dict(read_tensors(path, replace(header, tensors={name: header.tensors[name]})))[name]


def _read(path: Path, file: BufferedReader, name: str, info: TensorInfo) -> Tensor:
    """Read one tensor from the open file."""
    if info.dtype not in STORED:
        raise CheckpointError(f"{path}: {name} is {info.dtype}; what can be read is {', '.join(STORED)}.")
    content = torch.empty(info.stop - info.start, dtype=torch.uint8)
    file.seek(info.start)
    if file.readinto(content.numpy().data) < len(content):
        raise CheckpointError(f"{path} was changed while it was read; try again.")
    return content.view(STORED[info.dtype]).view(info.shape)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; the same contents always give the same bytes.

    The file appears under its name only once it is whole, in place of an earlier one.

    Raises:
        CheckpointError: A tensor has a dtype that is not in ``DTYPES``.
        OutputError: The folder does not exist, is not writable, or is full.
    """
    header = _header_bytes(tensors, metadata)
    with whole_file(path) as part, part.open("wb") as file:
        file.write(header)
        for key in sorted(tensors):
            file.write(_bytes_of(tensors[key]))


def _header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the length and the JSON of the header, tensors in the order of their names."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **dict(sorted(metadata.items()))}}
    end = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"{name} is {tensor.dtype}; save floating point weights.")
        start, end = end, end + tensor.numel() * tensor.element_size()
        table[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    # Padded so that the weights start on a multiple of 8 bytes, as readers that map the file want.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> bytes:
    """Return the numbers of ``tensor`` as the file holds them: little endian, row after row."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
