"""Whether a video follows an earlier stretch of itself.

A few small thumbnails of each second are remembered. A second is compared with all that came before, frame by
frame in order, at every distance in time ("lag"). A repetition is a lag at which the video is nearer to
itself than it is on average at shorter lags: it has left and come back. So a still video repeats nothing, and
neither does a slow pan.

Legend: F frames of a second, D numbers of a thumbnail.
"""

import torch
from torch import Tensor

THUMBNAIL = 8
"""Cells along each side of a thumbnail."""

KEPT_PER_SECOND = 4
"""Thumbnails of each second that are remembered; all frames of the latest second are compared with them."""

MEMORY_SECONDS = 3600
"""How far back is remembered: an hour in 3 MB."""

LEAST_LAG_SECONDS = 1.0
"""Shortest repetition looked for."""

_FLOOR = 0.006
"""Distance (root mean square, of [0, 1]) that means nothing: noise and coding."""

_AS_GOOD = 0.95
"""Share of the best nearness at which a shorter lag is preferred: what is back after 3 s is after 6 s too."""


def thumbnails(cells: Tensor) -> Tensor:
    """Return pictures as thumbnails ``(F, D)``, free of their mean brightness.

    Args:
        cells: Mean colours in [0, 1] of a grid, ``(F, 3, THUMBNAIL, THUMBNAIL)``.
    """
    return (cells - cells.mean(dim=(1, 2, 3), keepdim=True)).flatten(1)


class Repetition:
    """Remembers a video and says how near its latest second is to an earlier stretch."""

    def __init__(self, fps: float) -> None:
        """Start with nothing remembered.

        Args:
            fps: Frames per second.
        """
        self._stride = max(1, round(fps / KEPT_PER_SECOND))
        self._least = round(LEAST_LAG_SECONDS * fps)
        self._most = round(MEMORY_SECONDS * fps / self._stride)
        self._kept = torch.zeros(0, 3 * THUMBNAIL**2, dtype=torch.uint8)
        self._frames = 0
        self._first = 0

    @property
    def remembered_bytes(self) -> int:
        """Memory taken by the thumbnails."""
        return self._kept.nbytes

    def add(self, latest: Tensor) -> tuple[float, int]:
        """Take the thumbnails ``(F, D)`` of the next frames.

        Returns:
            Nearness from 0 (as far as ever) to 1 (the same as an earlier stretch), and its lag in frames;
            both 0 while there is nothing to compare with.
        """
        start, self._frames = self._frames, self._frames + len(latest)
        offset = -start % self._stride
        kept = ((latest[offset :: self._stride] + 1) * 127.5).round().byte()
        self._kept = torch.cat((self._kept, kept))
        surplus = max(0, len(self._kept) - self._most)
        self._kept, self._first = self._kept[surplus:].clone(), self._first + surplus
        distance = self._by_lag(latest, start)
        if len(distance) <= self._least:
            return 0.0, 0
        before = distance.cumsum(0) / torch.arange(1, len(distance) + 1)
        nearness = 1 - (distance[1:] + _FLOOR) / (before[:-1] + _FLOOR)
        nearness = nearness[self._least - 1 :].clamp(min=0)
        best = float(nearness.max())
        if best <= 0:
            return 0.0, 0
        place = int((nearness >= _AS_GOOD * best).nonzero()[0])
        # The smallest lag that is good enough may lie on the slope beside its valley: go down it.
        while place + 1 < len(nearness) and nearness[place + 1] > nearness[place]:
            place += 1
        return float(nearness[place]), place + self._least

    def _by_lag(self, latest: Tensor, start: int) -> Tensor:
        """Return the mean distance of ``latest`` to what lies 0, 1, 2, ... frames before it."""
        memory = self._kept.float() / 127.5 - 1
        squared = torch.cdist(latest, memory).square() / latest.shape[1]
        now = torch.arange(start, start + len(latest))
        then = (self._first + torch.arange(len(memory))) * self._stride
        lag = now[:, None] - then[None]
        past = lag >= 0
        length = int(lag.max()) + 1
        total = torch.zeros(length).index_add_(0, lag[past], squared[past].sqrt())
        pairs = torch.zeros(length).index_add_(0, lag[past], torch.ones(int(past.sum())))
        # The longest lags reach before the first frame for a part of the second: too few pairs to count.
        usable = (pairs >= max(1, len(latest) // self._stride // 2)).long().cumprod(0).bool()
        return (total / pairs.clamp(min=1))[usable]
