"""A video measured second by second while it is made: what its pictures are like and how they move.

Frames go in chunk by chunk and are forgotten; what stays is one row per second and a few thumbnails. Faults
are found in the rows by ``drift_faults``.

Legend: F frames, H and W pixels.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, interpolate

from .errors import GeometryError, NumericsError, SettingsError
from .geometry import FPS, TEMPORAL_STRIDE
from .motion import step_measure
from .repetition import THUMBNAIL, Repetition, thumbnails

CHUNK_FRAMES = 3 * TEMPORAL_STRIDE
"""Frames of a chunk of three latent frames."""

REDUCED_SIDE = 160
"""Pixels of the shorter side at which changes and motion are measured."""

GRID = 4
"""Cells along each side of the grid in which flicker is looked for."""

LEAST_SIDE = 8
"""Pixels along each side of the smallest picture that is measured."""

BLACK, WHITE = 0.02, 0.98
"""Luma up to which a pixel counts as crushed, and from which as blown."""

STILL_CHANGE = 2e-4
"""Mean change, of [0, 1], below which two frames are one and the same."""

_CODING = 1e-3
"""Mean change, of [0, 1], that coding alone makes: it keeps the ratio of two small changes finite."""

_LUMA = (0.2126, 0.7152, 0.0722)
_PIXELS_AT_ONCE = 1 << 21


@dataclass(frozen=True, slots=True, kw_only=True)
class Second:
    """One second of video. ``None``: there was nothing to measure it by."""

    second: int
    """Counted from 0."""

    frames: int
    """Frames measured; fewer in the last second."""

    luma: float
    """Mean of Rec. 709 luma, in [0, 1]."""

    contrast: float
    """Standard deviation of luma within a picture, in [0, 0.5]."""

    saturation: float
    """Brightest minus darkest channel, over the brightest, in [0, 1]; darker pictures do not change it."""

    blue: float
    """Mean Cb, in [-0.5, 0.5]: towards blue, or yellow where negative."""

    red: float
    """Mean Cr, in [-0.5, 0.5]: towards red, or cyan where negative."""

    crushed: float
    """Share of pixels with a luma of at most ``BLACK``."""

    blown: float
    """Share of pixels with a luma of at least ``WHITE``."""

    sharpness: float
    """Mean absolute Laplacian of luma over contrast: how much of the contrast is between neighbours."""

    motion: float | None
    """Mean motion, in shorter sides of the picture per second."""

    change: float | None
    """Mean absolute change from frame to frame, in [0, 1]."""

    still: float | None
    """Share of frames that are the frame before again."""

    flicker: float
    """Largest departure of a frame from those around it, in red, green or blue: the median over a grid of
    cells, so that what passes through a part of the picture does not count."""

    flash: int
    """Frame, counted from 0, where it begins: the first of the second that departs half as far."""

    seam: float | None
    """Change across the borders of chunks over the change inside them; 1 where no border shows."""

    repetition: float
    """How much nearer this second is to an earlier stretch than usual: 0 not at all, 1 the same."""

    lag: int
    """How many frames before that stretch lies; 0 where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Borders:
    """Where the chunks of a video meet."""

    period: int = CHUNK_FRAMES
    """Frames of a chunk; 0 for a video that was not made in chunks."""

    first: int | None = None
    """Frames of the first chunk. ``None``: three fewer than the others, as its first latent frame holds one
    frame; with a start image, it is one more."""

    def __post_init__(self) -> None:
        if self.period < 0 or (self.first is not None and self.first < 1):
            raise SettingsError(
                f"chunks have {self.period} frames, the first one {self.first}; use at least 1, or 0 frames "
                "for a video that was not made in chunks."
            )

    @property
    def first_frames(self) -> int:
        """Frames of the first chunk."""
        return max(1, self.period - TEMPORAL_STRIDE + 1) if self.first is None else self.first

    def at(self, frame: int) -> bool:
        """Return whether a chunk begins with this frame, the first frame of all excepted."""
        return (
            self.period > 0 and frame >= self.first_frames and (frame - self.first_frames) % self.period == 0
        )


@dataclass(frozen=True, slots=True)
class _Picture:
    """What is kept of one frame for a few seconds."""

    values: tuple[float, ...]
    """luma, contrast, saturation, crushed, blown, sharpness, red, blue."""

    cells: Tensor
    """Mean colours of a coarse grid, ``(3, GRID, GRID)``."""

    thumbnail: Tensor

    motion: float | None
    """Pixels at the reduced size."""

    change: float | None


class DriftMeter:
    """Measures a video while it is made, in memory that does not depend on its length.

    Use::

        meter = DriftMeter(fps=16)
        for frames in video:            # (F, 3, H, W) in [0, 1]
            for second in meter.add(frames):
                ...                     # a second or so after its last frame
        rest = meter.finish()
    """

    def __init__(self, *, fps: float = FPS, borders: Borders | None = None) -> None:
        """Measure from the first frame on.

        Args:
            fps: Frames per second.
            borders: Where chunks meet; by default those of three latent frames.
        """
        if not 1 <= fps < 1000:
            raise SettingsError(f"fps is {fps:g}; it must be at least 1 and below 1000, e.g. {FPS}.")
        self.fps = fps
        self.borders = Borders() if borders is None else borders
        self.motion_by = ""
        self.frames = 0
        self._half = max(1, round(fps / 2))
        self._ahead = max(self._half, self.borders.period)
        self._kept: deque[_Picture] = deque()
        self._first = 0
        self._done = 0
        self._repetition = Repetition(fps)
        self._before: tuple[Tensor, Tensor] | None = None  # reduced picture (3, H, W) and its luma
        self._size: tuple[int, ...] = ()

    @property
    def remembered_bytes(self) -> int:
        """Memory of thumbnails, which grows for an hour of video and no longer."""
        return self._repetition.remembered_bytes

    def add(self, frames: Tensor) -> list[Second]:
        """Take the next frames ``(F, 3, H, W)`` in [0, 1] on any device; return the seconds now known.

        Raises:
            GeometryError: They are no frames, or of another size than those before.
            NumericsError: They hold numbers that are not finite.
        """
        fits = frames.ndim == 4 and frames.shape[1] == 3 and min(frames.shape[2:]) >= LEAST_SIDE
        if not fits or self._size not in ((), tuple(frames.shape[2:])):
            raise GeometryError(
                f"frames are {tuple(frames.shape)}; give (F, 3, height, width), all of the same size and at "
                f"least {LEAST_SIDE} pixels along each side."
            )
        self._size = tuple(frames.shape[2:])
        for part in frames.split(max(1, _PIXELS_AT_ONCE // math.prod(self._size))):
            self._take(part.detach().float())
        return list(self._ready(self.frames - self._ahead))

    def finish(self) -> list[Second]:
        """Return the seconds not yet returned; the last may be a part of one."""
        seconds = list(self._ready(self.frames))
        if (start := self._start(self._done)) < self.frames:
            seconds.append(self._second(start, self.frames))
            self._done += 1
        return seconds

    def _take(self, frames: Tensor) -> None:
        """Measure frames one by one and keep the numbers."""
        reduced = _reduced(frames)
        values, small = _values(frames).cpu(), reduced.cpu()
        if not values.isfinite().all():
            raise NumericsError(f"frame {self.frames} or one soon after holds numbers that are not finite.")
        greys = _luma(small)
        if not self.motion_by:
            self.motion_by, self._step = step_measure(*small.shape[2:])
            self._side = min(small.shape[2:])
        fine = adaptive_avg_pool2d(small, THUMBNAIL)
        cells, thumbs = avg_pool2d(fine, THUMBNAIL // GRID), thumbnails(fine)
        rows = zip(values.tolist(), small, greys, cells, thumbs, strict=True)
        for row, picture, grey, cell, thumbnail in rows:
            motion = change = None
            if self._before is not None:
                earlier, earlier_grey = self._before
                change = float((picture - earlier).abs().mean())
                motion = self._step(earlier_grey, grey) if change > STILL_CHANGE else 0.0
            self._kept.append(_Picture(tuple(row), cell, thumbnail, motion, change))
            self._before = picture, grey
            self.frames += 1

    def _ready(self, until: int) -> Iterable[Second]:
        """Yield the seconds that end at frame ``until`` or before."""
        while (stop := self._start(self._done + 1)) <= until:
            yield self._second(self._start(self._done), stop)
            self._done += 1
            while self._first < stop - self._ahead:
                self._kept.popleft()
                self._first += 1

    def _start(self, second: int) -> int:
        """Return the first frame of a second."""
        return math.ceil(second * self.fps - 1e-6)

    def _second(self, start: int, stop: int) -> Second:
        """Return the row of the frames ``start`` to ``stop - 1``."""
        kept = list(self._kept)
        inside = kept[start - self._first : stop - self._first]
        luma, contrast, saturation, crushed, blown, sharpness, red, blue = (
            statistics.fmean(column) for column in zip(*(picture.values for picture in inside), strict=True)
        )
        motions = [picture.motion for picture in inside if picture.motion is not None]
        changes = [picture.change for picture in inside if picture.change is not None]
        repetition, lag = self._repetition.add(torch.stack([picture.thumbnail for picture in inside]))
        flicker, flash = self._flicker(kept, start, stop)
        return Second(
            second=self._done,
            frames=stop - start,
            luma=luma,
            contrast=contrast,
            saturation=saturation,
            blue=(blue - luma) / (2 * (1 - _LUMA[2])),
            red=(red - luma) / (2 * (1 - _LUMA[0])),
            crushed=crushed,
            blown=blown,
            sharpness=sharpness,
            motion=statistics.fmean(motions) * self.fps / self._side if motions else None,
            change=statistics.fmean(changes) if changes else None,
            still=sum(change <= STILL_CHANGE for change in changes) / len(changes) if changes else None,
            flicker=flicker,
            flash=flash,
            seam=self._seam(kept, start, stop),
            repetition=repetition,
            lag=lag,
        )

    def _flicker(self, kept: Sequence[_Picture], start: int, stop: int) -> tuple[float, int]:
        """Return the largest departure from the median of a second around, and the frame where it begins.

        A median follows a slope and a step, and knows nothing of a flash of less than half a second.
        """
        low = max(self._first, start - self._half)
        high = min(self._first + len(kept), stop + self._half)
        tones = torch.stack([kept[frame - self._first].cells for frame in range(low, high)])
        departures = []
        for frame in range(start, stop):
            reach = min(self._half, frame - low, high - 1 - frame)  # even on both sides: a slope stays out
            around = tones[frame - low - reach : frame - low + reach + 1]
            away = (tones[frame - low] - around.median(dim=0).values).flatten(1)
            departures.append(float(away.median(dim=1).values.abs().max()))
        worst = max(departures)
        return worst, start + next(i for i, departure in enumerate(departures) if departure >= worst / 2)

    def _seam(self, kept: Sequence[_Picture], start: int, stop: int) -> float | None:
        """Return the mean ratio of the change at a border to the usual change around it."""
        ratios = []
        for frame in filter(self.borders.at, range(start, stop)):
            low = max(self._first, frame - self.borders.period + 1)
            high = min(self._first + len(kept), frame + self.borders.period)
            near = [kept[other - self._first].change for other in range(low, high) if other != frame]
            usual = [change for change in near if change is not None]
            across = kept[frame - self._first].change
            if usual and across is not None:
                ratios.append((across + _CODING) / (statistics.median(usual) + _CODING))
        return statistics.fmean(ratios) if ratios else None


def _values(frames: Tensor) -> Tensor:
    """Return the numbers ``_Picture.values`` of frames ``(F, 3, H, W)``, ``(F, 8)``."""
    luma = _luma(frames)
    contrast = luma.std(dim=(1, 2), correction=0)
    high, low = frames.amax(dim=1), frames.amin(dim=1)
    brightest = high.mean(dim=(1, 2))
    saturation = (high - low).mean(dim=(1, 2)) / brightest.clamp(min=1e-3)
    centre = luma[:, 1:-1, 1:-1] * 4
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    sharpness = (centre - around).abs().mean(dim=(1, 2)) / contrast.clamp(min=0.01)
    crushed, blown = (luma <= BLACK).float().mean(dim=(1, 2)), (luma >= WHITE).float().mean(dim=(1, 2))
    means = frames.mean(dim=(2, 3))
    columns = [luma.mean(dim=(1, 2)), contrast, saturation, crushed, blown, sharpness]
    return torch.stack((*columns, means[:, 0], means[:, 2]), dim=1)


def _luma(frames: Tensor) -> Tensor:
    """Return the luma ``(F, H, W)`` of frames ``(F, 3, H, W)``."""
    red, green, blue = frames.unbind(1)
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def _reduced(frames: Tensor) -> Tensor:
    """Return frames ``(F, 3, H, W)`` with a shorter side of at most ``REDUCED_SIDE`` pixels."""
    scale = REDUCED_SIDE / min(frames.shape[2:])
    if scale >= 1:
        return frames
    return interpolate(frames, size=[max(1, round(side * scale)) for side in frames.shape[2:]], mode="area")
