"""A picture decoded in squares that overlap, for cards on which a whole one does not fit.

Legend: T latent frames, F frames, H and W pixels, h and w latent cells.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..sfpp_core.geometry import SPATIAL_STRIDE

SMALLEST = 16
"""Smallest side of a square, in latent cells; half of it and more would be overlap otherwise."""


class Parked(Protocol):
    """A decoder with the memory of one video, which can be put aside."""

    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames ``(F, 3, H, W)`` of the next ``(1, C, T, h, w)``."""
        ...

    def park(self) -> None:
        """Put what is remembered into main memory until the next chunk."""
        ...


class TiledStream:
    """One stream for each square of the picture; where squares overlap, one fades into the other.

    Each square remembers its own past, so there is no seam in time. Squares are decoded one after the other,
    and those that wait are in main memory.
    """

    def __init__(self, open_stream: Callable[[], Parked], tile: int) -> None:
        """Prepare squares of ``tile`` latent cells."""
        self._open = open_stream
        self._tile = max(tile, SMALLEST)
        self._streams: dict[tuple[int, int], Parked] = {}

    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames ``(F, 3, H, W)`` of the next ``(1, C, T, h, w)``."""
        height, width = chunk.shape[3:]
        canvas = weights = None
        for top, left in self._corners(height, width):
            part = chunk[..., top : top + self._tile, left : left + self._tile]
            frames = self._frames((top, left), part)
            if canvas is None or weights is None:
                size = height * SPATIAL_STRIDE, width * SPATIAL_STRIDE
                canvas, weights = frames.new_zeros(*frames.shape[:2], *size), frames.new_zeros(size)
            rows = _ramp(top, part.shape[3], height, self._overlap)
            columns = _ramp(left, part.shape[4], width, self._overlap)
            share = rows[:, None] * columns
            y, x = top * SPATIAL_STRIDE, left * SPATIAL_STRIDE
            place = (..., slice(y, y + share.shape[0]), slice(x, x + share.shape[1]))
            canvas[place] += frames * share
            weights[place] += share
        assert canvas is not None
        return canvas / weights

    @property
    def _overlap(self) -> int:
        """Latent cells two neighbours share."""
        return self._tile // 4

    def _frames(self, corner: tuple[int, int], part: Tensor) -> Tensor:
        """Decode the next chunk of one square."""
        if corner not in self._streams:
            self._streams[corner] = self._open()
        stream = self._streams[corner]
        frames = stream.decode(part)
        stream.park()
        return frames

    def _corners(self, height: int, width: int) -> Iterator[tuple[int, int]]:
        """Yield the top left corner of every square."""
        for top in _starts(height, self._tile, self._overlap):
            for left in _starts(width, self._tile, self._overlap):
                yield top, left


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Return where the squares along one side start. Of 60 cells, tiles of 32 start at 0, 24 and 28."""
    if size <= tile:
        return [0]
    starts = list(range(0, size - tile, tile - overlap))
    return [*starts, size - tile]


def _ramp(start: int, cells: int, size: int, overlap: int) -> Tensor:
    """Return the share of a square along one side, per pixel: full inside, fading towards neighbours."""
    pixels, fade = cells * SPATIAL_STRIDE, overlap * SPATIAL_STRIDE
    near = torch.arange(1, pixels + 1).float() / (fade + 1)
    before = near if start else torch.ones(pixels)
    after = near.flip(0) if start + cells < size else torch.ones(pixels)
    return torch.minimum(before, after).clamp(max=1)
