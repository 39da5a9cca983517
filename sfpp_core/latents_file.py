"""The latents of a run on disk, to be decoded again: with a better decoder, or after a crash.

A folder with one safetensors file per chunk. Each file appears under its name once it is whole, and says by
itself what video it belongs to: whatever ends a run, all chunks saved until then can be decoded.

Legend: B batch, C channels, T latent frames, F frames, H and W pixels, h and w latent cells.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import from_table
from .decoder import StreamingDecoder
from .errors import CheckpointError, OutputError, SettingsError
from .geometry import VideoGeometry
from .latent_space import SPACES, LatentSpace
from .outputs import check_folder, make_folder
from .weights_file import DTYPES, Header, read_header, read_tensor, write

METADATA_KEY = "sfpp_latents"
"""Name of what is known of the video in the metadata of each file."""

LINK_KEY = "sfpp_run"
"""Name, in the metadata, of what ties a chunk of a run to the one before."""

TENSOR = "latents"
"""Name of the one tensor of each file."""

FOLDER = "latents"
"""Name of the folder in that of a run."""

NAME = "chunk_%06d.safetensors"
"""Names of the files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentsInfo:
    """What video the latents of a folder belong to."""

    space: str
    """Name of the space they live in, as in ``latent_space.SPACES``; they are normalised."""

    width: int
    """Pixels."""

    height: int
    """Pixels."""

    frames: int
    """Frames the video has; the last chunk may hold a few more, which are not shown."""

    chunks: int
    """Chunks the whole video has."""

    seed: int
    """Of the noise."""

    prompt: str = ""
    """What the video shows."""

    run: str = ""
    """Digest of whatever else decides the video: student, settings, start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What ties a chunk of a run to the one before. Such chunks may say different things of their video: its
    length, prompt and seed can change on the way."""

    key: str
    """Digest of all that decides this chunk."""

    before: str
    """Key of the chunk before; empty for the first."""

    checksum: str = ""
    """Digest of the numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latents:
    """The saved chunks of a video, read one at a time.

    Use::

        latents = load_latents(folder)
        for frames in decode_latents(latents, decoder):
            writer.write(frames)
    """

    folder: Path

    info: LatentsInfo

    chunks: int
    """Chunks that were saved: all from the first on, without a gap."""

    latent_frames: int
    """Latent frames in them."""

    @property
    def frames(self) -> int:
        """Frames that the saved chunks hold, of those the video has."""
        return min(self.info.frames, VideoGeometry.frames_of(self.latent_frames))

    @property
    def complete(self) -> bool:
        """Whether the whole video was saved."""
        return self.chunks == self.info.chunks

    @property
    def space(self) -> LatentSpace:
        """What the latents live in."""
        return SPACES[self.info.space]

    def chunk(self, chunk: int) -> Tensor:
        """Return the normalised latents ``(B, C, T, h, w)`` of one chunk, float32.

        Raises:
            CheckpointError: The file was damaged or removed, or holds numbers that are not finite.
        """
        return read_chunk(self.folder / (NAME % chunk))


def read_chunk(path: Path) -> Tensor:
    """Return the normalised latents ``(B, C, T, h, w)`` of one file, float32.

    Raises:
        CheckpointError: The file was damaged or removed, or holds numbers that are not finite.
    """
    header = read_header(path)
    if TENSOR not in header.tensors:
        raise CheckpointError(f"{path} holds no latents; generate the video again.")
    latents = read_tensor(path, header, TENSOR)
    link = read_link(path, header)
    if link is not None and link.checksum != checksum_of(latents):
        raise CheckpointError(f"{path} is damaged: its numbers are not those that were written.")
    latents = latents.float()
    if not torch.isfinite(latents).all():
        raise CheckpointError(f"{path} holds latents that are not finite; generate the video again.")
    return latents


def checksum_of(*tensors: Tensor) -> str:
    """Return a digest of the numbers of tensors, bit by bit."""
    digest = blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_link(path: Path, header: Header) -> Link | None:
    """Return what ties a chunk to the one before, or ``None`` where it is of no run.

    Raises:
        CheckpointError: It says something impossible.
    """
    table = header.table(LINK_KEY, where=str(path))
    if table is None:
        return None
    if table.keys() != {"key", "before", "checksum"} or not all(isinstance(v, str) for v in table.values()):
        raise CheckpointError(f"{path} does not say which chunk of a run it is; it is damaged.")
    return Link(**table)


def save_latents(
    folder: Path, chunk: int, latents: Tensor, info: LatentsInfo, *, link: Link | None = None
) -> None:
    """Save one chunk of a video; the folder is made for the first.

    A chunk that is already there is replaced: all that decides a video is in ``info``.

    Args:
        folder: Of this video alone.
        chunk: Its number, from 0.
        latents: Normalised, ``(B, C, T, h, w)``; kept in their dtype.
        info: What video it is; the same for every chunk that has no link.
        link: Ties a chunk of a run to the one before; its checksum is made here.

    Raises:
        OutputError: The folder holds another video, or cannot be written.
    """
    make_folder(folder)
    metadata = {METADATA_KEY: json.dumps(asdict(info), sort_keys=True)}
    if link is None:
        _refuse_another(folder, info)
    else:
        tied = {**asdict(link), "checksum": checksum_of(latents)}
        metadata[LINK_KEY] = json.dumps(tied, sort_keys=True)
    write(folder / (NAME % chunk), {TENSOR: latents}, metadata)


def check_latents_folder(folder: Path, info: LatentsInfo) -> None:
    """Refuse a folder that holds the latents of another video: mixed, neither could be decoded.

    Raises:
        OutputError: It does; or it is a file, or cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; name a folder for the latents.")
    check_folder(folder if folder.exists() else folder.parent)
    _refuse_another(folder, info)


def _refuse_another(folder: Path, info: LatentsInfo) -> None:
    """Refuse a folder that holds the latents of another video."""
    first = folder / (NAME % 0)
    if first.exists() and _info(first, read_header(first)) != info:
        raise OutputError(f"{folder} holds the latents of another video; choose another folder or remove it.")


def chunk_files(folder: Path) -> list[Path]:
    """Return the files of all chunks in a folder, in order."""
    return sorted(folder.glob(NAME.replace("%06d", "[0-9]" * 6)))


def load_latents(path: Path) -> Latents:
    """Return the chunks saved in a folder; only headers are read.

    Args:
        path: The folder, a file in it, or the folder of a run.

    Raises:
        CheckpointError: There are no latents, a chunk is missing between others, or a file is damaged or
            belongs to another video.
    """
    folder = path.parent if path.is_file() else path
    if (folder / FOLDER).is_dir():
        folder /= FOLDER
    if not folder.is_dir():
        raise CheckpointError(f"{path} does not exist; name the folder of latents that a run has left.")
    files = chunk_files(folder)
    if not files:
        raise CheckpointError(f"{folder} holds no latents ({NAME % 0}, ...); name the folder a run has left.")
    headers = {file: read_header(file) for file in files}
    info, before = _info(files[0], headers[files[0]]), files[0]
    shape, latent_frames = _shape(files[0], headers[files[0]], info), 0
    for chunk, file in enumerate(files):
        if file.name != NAME % chunk:
            raise CheckpointError(
                f"{folder / (NAME % chunk)} is missing; what comes after it cannot be decoded."
            )
        same = _shape(file, headers[file], info)
        own = _info(file, headers[file])
        if _tied(before, file, headers):
            info = own
        if own != info or (same[0], *same[3:]) != (shape[0], *shape[3:]):
            raise CheckpointError(
                f"{file} belongs to another video than {files[0].name}; remove one of them."
            )
        latent_frames, before = latent_frames + same[2], file
    return Latents(folder=folder, info=info, chunks=len(files), latent_frames=latent_frames)


def _tied(before: Path, file: Path, headers: dict[Path, Header]) -> bool:
    """Return whether a chunk goes on from the one before, in a run that may have changed in between."""
    link, last = read_link(file, headers[file]), read_link(before, headers[before])
    return link is not None and last is not None and (file == before or link.before == last.key)


def decode_latents(latents: Latents, decoder: StreamingDecoder) -> Iterator[Tensor]:
    """Yield the frames ``(F, 3, H, W)`` in [0, 1] of chunk after chunk, up to the end of the video.

    Raises:
        SettingsError: The decoder is made for other latents.
        CheckpointError: A chunk is damaged.
    """
    if decoder.space.name != latents.info.space:
        raise SettingsError(
            f"the decoder is made for latents of {decoder.space.name}, these are of {latents.info.space}; "
            "choose the one of the model that made them."
        )
    decoder.reset()
    shown = 0
    for chunk in range(latents.chunks):
        frames = decoder.decode(latents.chunk(chunk))[0, : latents.info.frames - shown]
        shown += len(frames)
        yield frames


def _info(path: Path, header: Header) -> LatentsInfo:
    """Return what video a chunk belongs to."""
    table: dict[str, Any] | None = header.table(METADATA_KEY, where=str(path))
    if table is None:
        raise CheckpointError(f"{path} holds no latents of a video; name the folder that a run has left.")
    try:
        info = from_table(LatentsInfo, table, where=str(path))
    except SettingsError as error:
        raise CheckpointError(f"{path} says something impossible: {error}") from error
    kinds = (type(getattr(info, name)) is kind for name, kind in LatentsInfo.__annotations__.items())
    if not all(kinds) or info.space not in SPACES or min(info.width, info.height, info.frames) < 1:
        raise CheckpointError(f"{path} does not say what video it belongs to; generate it again.")
    return info


def _shape(path: Path, header: Header, info: LatentsInfo) -> tuple[int, ...]:
    """Return the shape of the latents in a file, after a check that it is possible."""
    entry, space = header.tensors.get(TENSOR), SPACES[info.space]
    size = (info.height // space.spatial_stride, info.width // space.spatial_stride)
    if entry is None or entry.dtype not in DTYPES or len(entry.shape) != 5 or not all(entry.shape):
        raise CheckpointError(f"{path} holds no latents; generate the video again.")
    if entry.shape[1] != space.channels or entry.shape[3:] != size:
        raise CheckpointError(
            f"{path} holds latents {entry.shape}, and {info.width}x{info.height} of {info.space} has "
            f"(1, {space.channels}, latent frames, {size[0]}, {size[1]}); it is damaged."
        )
    return entry.shape
