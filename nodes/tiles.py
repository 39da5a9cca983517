"""A picture decoded in squares that overlap, for cards on which a whole one does not fit.

Legend: T latent frames, F frames, H and W pixels, h and w latent cells.
"""

from collections.abc import Callable
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from ..sfpp_core.tiling import spans

SMALLEST = 128
"""Smallest side of a square, in pixels."""


class Stream(Protocol):
    """A decoder with the memory of one video, which can be put aside."""

    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames ``(F, 3, H, W)`` of the next ``(1, C, T, h, w)``: 1 + 4(T - 1), later 4T."""
        ...

    def park(self) -> None:
        """Put what is remembered into main memory until the next chunk."""
        ...


class TiledStream:
    """One stream for each square of the picture; where squares overlap, one fades into the other.

    Each square remembers its own past, so there is no seam in time. Squares are decoded one after the other,
    and those that wait are in main memory.
    """

    def __init__(self, open_stream: Callable[[], Stream], tile: int, stride: int) -> None:
        """Prepare squares of ``tile`` pixels, for latent cells of ``stride`` pixels."""
        self._open = open_stream
        self._tile, self._stride = tile // stride, stride
        self._streams: dict[tuple[int, int], Stream] = {}

    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames ``(F, 3, H, W)`` of the next ``(1, C, T, h, w)``."""
        stride = self._stride
        rows, columns = (spans(cells, self._tile, self._tile // 4, stride) for cells in chunk.shape[3:])
        whole = torch.empty(0)
        for row, column in product(rows, columns):
            part = chunk[..., row.start : row.stop, column.start : column.stop]
            frames = self._frames((row.start, column.start), part)
            if not whole.numel():
                whole = frames.new_zeros(*frames.shape[:2], *(cells * stride for cells in chunk.shape[3:]))
            area = (slice(side.start * stride, side.stop * stride) for side in (row, column))
            whole[(..., *area)] += frames * (row.share[:, None] * column.share)
        return whole

    def park(self) -> None:
        """Do nothing: what waits is in main memory already."""

    def _frames(self, corner: tuple[int, int], part: Tensor) -> Tensor:
        """Decode the next chunk of one square."""
        if corner not in self._streams:
            self._streams[corner] = self._open()
        stream = self._streams[corner]
        frames = stream.decode(part)
        stream.park()
        return frames
