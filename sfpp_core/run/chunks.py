"""The chunks of a run on disk: which of them can be gone on from, reading and adding.

Legend: B batch, C channels, T latent frames of a chunk, h and w latent cells.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from torch import Tensor

from ..durable import share_file, sync_folder
from ..errors import CheckpointError
from ..geometry import VideoGeometry
from ..latent_space import LatentSpace
from ..latents_file import NAME, TENSOR, LatentsInfo, Link, chunk_files, read_chunk, read_link, save_latents
from ..weights_file import Header, read_header


def good_chunks(
    folder: Path, keys: Iterator[str], *, geometry: VideoGeometry, space: LatentSpace
) -> tuple[int, str]:
    """Return how many chunks are whole and those of ``keys``, from the first; and what the next one lacks.

    Every number of every chunk is read and compared with its checksum.

    Raises:
        CheckpointError: A chunk cannot be read, whatever it may hold.
    """
    good, before = 0, ""
    for key in keys:
        path = folder / (NAME % good)
        if not path.is_file():
            return good, ""
        try:
            check_chunk(path, good, Link(key=key, before=before), geometry=geometry, space=space)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError):  # nothing is known of what it holds
                raise CheckpointError(f"{error} See that it can be read, and start again.") from error
            return good, str(error)
        good, before = good + 1, key
    return good, ""


def check_chunk(
    path: Path, chunk: int, expected: Link, *, geometry: VideoGeometry, space: LatentSpace
) -> None:
    """Refuse a chunk that is damaged, or another than the one with the expected key.

    Raises:
        CheckpointError: It is so.
    """
    header = read_header(path)
    link = read_link(path, header)
    if link is None or (link.key, link.before) != (expected.key, expected.before):
        raise CheckpointError(f"{path} was made otherwise than the run is now.")
    if _shape(header) != (1, space.channels, *_size(chunk, geometry)):
        raise CheckpointError(f"{path} holds latents {_shape(header)}, which the run has not; it is damaged.")
    read_chunk(path)


def add_chunk(folder: Path, chunk: int, latents: Tensor, info: LatentsInfo, link: Link) -> None:
    """Save one chunk ``(1, C, T, h, w)``; it is on the disk when this returns.

    Raises:
        OutputError: The disk is full, or the folder cannot be written to.
    """
    save_latents(folder, chunk, latents, info, link=link)


def share_chunks(source: Path, target: Path, *, chunks: int) -> None:
    """Let a folder hold the first chunks of another; they take no further room where the disk can do that.

    Raises:
        OutputError: The folder cannot be written to, or the disk is full.
    """
    for file in islice(chunk_files(source), chunks):
        if not (target / file.name).exists():
            share_file(file, target / file.name)
    sync_folder(target)


def _shape(header: Header) -> tuple[int, ...]:
    """Return the shape of the latents in a file."""
    entry = header.tensors.get(TENSOR)
    return entry.shape if entry is not None else ()


def _size(chunk: int, geometry: VideoGeometry) -> tuple[int, int, int]:
    """Return ``(T, h, w)`` of one chunk; the lead comes with the first."""
    latent_frames, height, width = geometry.chunk_shape
    return latent_frames + (geometry.lead if chunk == 0 else 0), height, width
