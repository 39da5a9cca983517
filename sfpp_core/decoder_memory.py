"""How much memory a decoder will take, before it is loaded.

Weights are counted exactly. The rest grows with the pixels of a picture, or of a tile, and was measured once
per kind of decoder: the peak of all tensors alive during a later chunk, decoded on the CPU at 128x96 pixels
with the published widths. Tests measure Wan 2.1 and the tiny ones again.
"""

import math
from dataclasses import dataclass

import torch

from .decoder import DecoderInfo
from .taehv import TinySizes
from .tiling import check_tiles, spans
from .wan_autoencoder import WanSizes, weight_bytes

FLOAT32 = 4
"""Bytes of a number in single precision."""

PICTURE = 3 * 4 * FLOAT32
"""Bytes per pixel of the frames of one latent frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Appetite:
    """What a decoder holds, in numbers per pixel."""

    kept: int
    """Between chunks."""

    at_work: int
    """At the widest place of one latent frame, besides what is kept."""

    longer: int
    """At the widest place, for each further latent frame of a chunk."""

    drawn: int
    """Bytes per pixel of the frames drawn so far, for each latent frame of a chunk."""

    width: int
    """Channels that this was measured with; the others are in proportion."""


WAN_2_1 = Appetite(kept=2365, at_work=2926, longer=0, drawn=64, width=96)
WAN_2_2 = Appetite(kept=1785, at_work=4234, longer=0, drawn=64, width=256)
TINY_2_1 = Appetite(kept=84, at_work=919, longer=76, drawn=0, width=64)
TINY_2_2 = Appetite(kept=21, at_work=232, longer=28, drawn=0, width=64)
DEMO = Appetite(kept=9, at_work=140, longer=33, drawn=0, width=96)
PREVIEW = Appetite(kept=0, at_work=0, longer=0, drawn=60, width=1)


def decoder_bytes(
    info: DecoderInfo,
    *,
    width: int,
    height: int,
    latent_frames: int = 3,
    dtype: torch.dtype = torch.float32,
    tile: int | None = None,
    overlap: int = 64,
    rest_elsewhere: bool = False,
) -> int:
    """Return the bytes a decoder holds at work: weights, memory of the video, and the widest place.

    Args:
        info: The decoder, as from ``check_decoder``.
        width: Pixels of the video.
        height: Pixels.
        latent_frames: Of one chunk.
        dtype: What it computes in.
        tile: Pixels along a side of a tile; ``None`` decodes whole pictures.
        overlap: Pixels that tiles share.
        rest_elsewhere: Whether the memory of the tiles not at work is kept on another device.

    Raises:
        SettingsError: The tiles are impossible.
    """
    appetite, share = _appetite(info)
    size = dtype.itemsize if isinstance(info.sizes, WanSizes | TinySizes) else FLOAT32
    area, areas = width * height, width * height
    if tile is not None:
        stride = info.space.spatial_stride
        check_tiles(tile, overlap, stride)
        counts = [
            len(spans(side // stride, tile // stride, overlap // stride, stride)) for side in (width, height)
        ]
        area = min(tile, width) * min(tile, height)
        areas = area if rest_elsewhere else area * math.prod(counts)
    at_work = appetite.at_work + appetite.longer * (latent_frames - 1)
    numbers = share * (area * at_work + areas * appetite.kept)
    frames = latent_frames * (appetite.drawn * area + (PICTURE * width * height if tile else 0))
    return _weights(info, dtype) + round(size * numbers) + frames


def _appetite(info: DecoderInfo) -> tuple[Appetite, float]:
    """Return what a decoder of this kind holds, and how wide this one is compared with that."""
    sizes = info.sizes
    if isinstance(sizes, WanSizes):
        appetite = WAN_2_2 if sizes.patch > 1 else WAN_2_1
        return appetite, sizes.decoder_width / appetite.width
    if isinstance(sizes, TinySizes):
        appetite = TINY_2_2 if sizes.patch > 1 else TINY_2_1
        return appetite, sizes.widths[-1] / appetite.width
    if sizes is None:
        return PREVIEW, 1.0
    return DEMO, sizes.coarse / DEMO.width


def _weights(info: DecoderInfo, dtype: torch.dtype) -> int:
    """Return the bytes of the weights."""
    sizes = info.sizes
    if isinstance(sizes, WanSizes):
        return weight_bytes(sizes, "decoder", dtype)
    if info.weights is None:
        return 0
    names = info.weights.entries.items()
    if isinstance(sizes, TinySizes):
        return dtype.itemsize * sum(entry.numbers for name, entry in names if not name.startswith("encoder."))
    return FLOAT32 * sum(entry.numbers for _, entry in names)
