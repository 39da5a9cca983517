"""Fragmented MP4 as bytes: where its fragments end, and moving them in time.

Such a file is a head (``ftyp``, ``moov``) and any number of pairs (``moof``, ``mdat``), each with a few
frames that need nothing but what came since the last keyframe (ISO/IEC 14496-12).
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO

LARGEST_INDEX = 1 << 24
"""Bytes of the largest ``moof`` or ``moov`` that is read; a larger one is damage."""


@dataclass(frozen=True, slots=True)
class Box:
    """One box of a file."""

    kind: str
    start: int
    size: int

    @property
    def stop(self) -> int:
        """Byte after the last."""
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class Fragment:
    """A few frames, whole in their file."""

    start: int
    """Byte of the file."""

    stop: int
    """Byte after the last."""

    frames: int
    """Frames in the file up to here, its own included."""


@dataclass(frozen=True, slots=True)
class Part:
    """A run of fragments whose bytes are those that were written."""

    stop: int
    """Byte of the file after it, its seal included."""

    frames: int
    """Frames in the file up to here."""

    fragments: int
    """Fragments in the file up to here."""


def boxes(file: IO[bytes], start: int, stop: int) -> Iterator[Box]:
    """Yield the whole boxes between two bytes of a file; ends at the first that is torn or makes no sense."""
    while start + 8 <= stop:
        file.seek(start)
        head = file.read(16)
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size < 8 or start + size > stop:
            return
        yield Box(head[4:8].decode("latin-1"), start, size)
        start += size


def head_of(path: Path) -> bytes:
    """Return the head of an MP4: all before its first fragment. Empty where there is none."""
    with path.open("rb") as file:
        stop = 0
        for box in boxes(file, 0, path.stat().st_size):
            if box.kind not in ("ftyp", "moov") or box.size > LARGEST_INDEX:
                break
            stop = box.stop
        file.seek(0)
        return file.read(stop)


def fragments(path: Path) -> Iterator[Fragment]:
    """Yield the fragments of an MP4 that are whole, up to the first that is not."""
    frames, index = 0, None
    with path.open("rb") as file:
        for box in boxes(file, 0, path.stat().st_size):
            if box.kind == "moof" and box.size <= LARGEST_INDEX:
                index = box
            elif box.kind == "mdat" and index is not None:
                file.seek(index.start)
                frames += samples(file.read(index.size))
                yield Fragment(index.start, box.stop, frames)
                index = None


def seal(digest: bytes) -> bytes:
    """Return a box that players skip, with the digest of the part before it."""
    return (8 + len(digest)).to_bytes(4, "big") + b"free" + digest


def parts(path: Path) -> Iterator[Part]:
    """Yield the parts of an MP4 that are whole, up to the first that has no seal or not the right one."""
    found, start = fragments(path), 0
    count, frames = 0, 0
    with path.open("rb") as file:
        for box in boxes(file, 0, path.stat().st_size):
            if box.kind != "free":
                continue
            file.seek(start)
            digest = _digest(file, box.start - start)
            if file.read(box.size) != seal(digest):
                return
            for fragment in found:
                count, frames = count + 1, fragment.frames
                if fragment.stop == box.start:
                    break
            start = box.stop
            yield Part(stop=box.stop, frames=frames, fragments=count)


def _digest(file: IO[bytes], size: int) -> bytes:
    """Return the digest of the next bytes of a file."""
    digest = new_digest()
    while size and (piece := file.read(min(size, 1 << 20))):
        digest.update(piece)
        size -= len(piece)
    return digest.digest()


def new_digest() -> blake2b:
    """Return what makes the digest of a part."""
    return blake2b(digest_size=16)


def read_box(stream: IO[bytes]) -> tuple[str, bytes]:
    """Return the kind and all bytes of the next box of a stream; both are empty at its end."""
    head = stream.read(8)
    size = int.from_bytes(head[:4], "big")
    if len(head) < 8 or size < 8:
        return "", b""
    body = stream.read(size - 8)
    return ("", b"") if len(body) < size - 8 else (head[4:].decode("latin-1"), head + body)


def moved(index: bytes, *, number: int, ticks: int) -> bytes:
    """Return a ``moof`` with the sequence number ``number``, later in time by ``ticks``."""
    changed = bytearray(index)
    for kind, start in _fields(index):
        if kind == "mfhd":
            changed[start + 4 : start + 8] = number.to_bytes(4, "big")
        elif kind == "tfdt":
            wide = 8 if changed[start] == 1 else 4
            place = slice(start + 4, start + 4 + wide)
            changed[place] = (int.from_bytes(changed[place], "big") + ticks).to_bytes(wide, "big")
    return bytes(changed)


def codec_of(head: bytes) -> bytes:
    """Return what a decoder of H.264 is told before the first frame; empty where there is no such thing."""
    place = head.find(b"avcC")
    return head[place : place - 4 + int.from_bytes(head[place - 4 : place], "big")] if place >= 4 else b""


def ticks_per_frame(index: bytes) -> int:
    """Return the duration of a frame, as the first ``moof`` of a video says it."""
    for kind, start in _fields(index):
        if kind == "tfhd":
            # The duration is the first optional field of ours: flags name neither offset nor description.
            return int.from_bytes(index[start + 8 : start + 12], "big")
    return 0


def samples(index: bytes) -> int:
    """Return the frames of one fragment, by its ``moof``."""
    counts = (index[start + 4 : start + 8] for kind, start in _fields(index) if kind == "trun")
    return sum(int.from_bytes(count, "big") for count in counts)


def _fields(index: bytes) -> Iterator[tuple[str, int]]:
    """Yield the kinds of the boxes in a ``moof`` and the byte at which the content of each begins."""
    file = io.BytesIO(index)
    for box in boxes(file, 8, len(index)):
        if box.kind != "traf":
            yield box.kind, box.start + 8
            continue
        for inner in boxes(file, box.start + 8, box.stop):
            yield inner.kind, inner.start + 8
