"""A decoder for small cards: each chunk is drawn tile by tile, and the tiles fade into each other.

Legend: B batch, C channels, T latent frames, F frames, H and W pixels, h and w latent cells.
"""

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from .decoder import StreamingDecoder
from .errors import RolloutOrderError, SettingsError
from .latent_space import InSpace


@dataclass(frozen=True, slots=True)
class Span:
    """Where a tile lies along one side of the picture, and its share of each place there."""

    start: int
    """First latent cell."""

    stop: int
    """Latent cell after the last."""

    share: Tensor
    """``(pixels,)``; at each place the shares of all tiles sum to 1."""


class TiledDecoder(InSpace):
    """Decodes one tile of a chunk after the other, with a memory per tile.

    At work it needs the memory of one tile, not of the whole picture; what the tiles remember together is a
    little more than the whole picture's and can rest elsewhere. An autoencoder that looks at the whole
    picture, as Wan's does at its coarsest place, draws tiles that differ a little; they are blended linearly.

    Use::

        decoder = TiledDecoder(load_decoder(path), tile=256, overlap=64)
        for chunk in latents.split(3, dim=2):
            frames = decoder.decode(chunk)
    """

    def __init__(
        self,
        decoder: StreamingDecoder,
        *,
        tile: int,
        overlap: int = 64,
        rest_on: torch.device | str | None = None,
    ) -> None:
        """Wrap a decoder.

        Args:
            decoder: What draws the tiles.
            tile: Pixels along a side of a tile.
            overlap: Pixels that neighbours share at least.
            rest_on: Device for the memory of the tiles not at work; ``None`` leaves it where it is.

        Raises:
            SettingsError: The sizes do not fit the decoder or each other.
        """
        check_tiles(tile, overlap, decoder.spatial_stride)
        self.space = decoder.space
        self._decoder = decoder
        self._tile, self._overlap = tile // decoder.spatial_stride, overlap // decoder.spatial_stride
        self._rest_on = rest_on
        self._size: tuple[int, ...] | None = None
        self._rows: list[Span] = []
        self._columns: list[Span] = []
        self._tiles: list[StreamingDecoder] = []
        self._shares: list[Tensor] = []
        self._broken = False

    @torch.inference_mode()
    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames ``(B, F, 3, H, W)`` in [0, 1], float32, of the next latents ``(B, C, T, h, w)``.

        Raises:
            GeometryError: The latents are not of the decoder's shape.
            RolloutOrderError: The chunk has another size than the video so far, or the chunk before was
                interrupted.
        """
        self.space.check(chunk, self._size)
        if self._broken:
            raise RolloutOrderError("the chunk before was interrupted between two tiles; call reset() first.")
        if self._size is None:
            self._begin(chunk)
        self._broken = True
        whole = torch.empty(0)
        places = [(row, column) for row in self._rows for column in self._columns]
        for place, (decoder, (row, column)) in enumerate(zip(self._tiles, places, strict=True)):
            frames = decoder.decode(chunk[..., row.start : row.stop, column.start : column.stop])
            if self._rest_on is not None:
                decoder.rest(self._rest_on)
            if not whole.numel():
                size = (side * self.spatial_stride for side in chunk.shape[3:])
                whole = frames.new_zeros(*frames.shape[:3], *size)
            area = (
                slice(side.start * self.spatial_stride, side.stop * self.spatial_stride)
                for side in (row, column)
            )
            if len(self._shares) < len(places):
                # Copied to the device once: each copy makes a GPU wait.
                self._shares.append((row.share[:, None] * column.share).to(frames.device))
            whole[(..., *area)] += frames.mul_(self._shares[place])
        self._broken = False
        return whole

    def rest(self, device: torch.device | str) -> None:
        """Keep the memory of the video on ``device`` until the next chunk."""
        for decoder in self._tiles:
            decoder.rest(device)

    def reset(self) -> None:
        """Forget the video decoded so far."""
        self._size, self._tiles, self._shares, self._broken = None, [], [], False

    def _begin(self, chunk: Tensor) -> None:
        """Lay the tiles over a video of the size of ``chunk``."""
        self._size = (chunk.shape[0], *chunk.shape[3:])
        self._rows, self._columns = (
            spans(cells, self._tile, self._overlap, self.spatial_stride) for cells in chunk.shape[3:]
        )
        for _ in range(len(self._rows) * len(self._columns)):
            # The weights are shared; only what is remembered is each tile's own.
            decoder = copy(self._decoder)
            decoder.reset()
            self._tiles.append(decoder)


def check_tiles(tile: int, overlap: int, stride: int) -> None:
    """Refuse tiles that cannot be laid.

    Args:
        tile: Pixels along a side of a tile.
        overlap: Pixels that neighbours share.
        stride: Pixels along a side of one latent cell.

    Raises:
        SettingsError: A size is no multiple of a cell, or the overlap is more than three quarters of a tile.
    """
    for name, size, least in (("tile", tile, stride), ("overlap", overlap, 0)):
        if size < least or size % stride:
            nearest = max(least, round(size / stride) * stride)
            raise SettingsError(f"{name} is {size} pixels; use a multiple of {stride}, e.g. {nearest}.")
    if 4 * overlap > 3 * tile:
        least = -(-4 * overlap // (3 * stride)) * stride
        raise SettingsError(
            f"tile is {tile} pixels and neighbours share {overlap}; use tiles of at least {least}."
        )


def spans(cells: int, tile: int, overlap: int, stride: int) -> list[Span]:
    """Return the tiles along one side: equally long, evenly spread, overlapping by ``overlap`` or more.

    Args:
        cells: Latent cells along the side.
        tile: Latent cells of a tile.
        overlap: Latent cells that neighbours share at least.
        stride: Pixels per cell.
    """
    tile = min(tile, cells)
    tiles = 1 if tile == cells else -(-(cells - overlap) // (tile - overlap))
    starts = [round(index * (cells - tile) / max(1, tiles - 1)) for index in range(tiles)]
    weights = torch.zeros(tiles, cells * stride, dtype=torch.float64)
    for index, start in enumerate(starts):
        place = torch.arange(tile * stride, dtype=torch.float64) + 0.5
        rising = (starts[index - 1] + tile - start) * stride if index else 0
        falling = (start + tile - starts[index + 1]) * stride if index + 1 < tiles else 0
        weight = torch.ones_like(place)
        if rising:
            weight = torch.minimum(weight, place / rising)
        if falling:
            weight = torch.minimum(weight, (tile * stride - place) / falling)
        weights[index, start * stride : (start + tile) * stride] = weight
    shares = (weights / weights.sum(0)).float()
    return [
        Span(start, start + tile, shares[index, start * stride : (start + tile) * stride])
        for index, start in enumerate(starts)
    ]
