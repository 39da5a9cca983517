"""What is right and wrong in a video of the demo world, measured against its caption, second by second.

How it is measured is in ``world_cut``. What the caption does not name (exposure, tint, gradation) is compared
with the world's support and with the video's own first second; so are the object's colour and its speed where
the caption leaves them open.

The limits of ``clip_ok`` were fixed before any student was trained; what is left open is held to the same.

Legend: F frames, H and W pixels. Luma and chroma are Rec. 709, of values in [0, 1].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from training.world import DIRECTIONS, FPS, Wanted, parse_caption
from training.world_cut import background, cut_out, hue, look, luma_chroma, match, track


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a second of video must satisfy to count as right."""

    present: float = 0.9
    """Least share of frames that show one object of a plausible size."""

    iou: float = 0.75
    """Least mean overlap with the template of the shape."""

    motion: float = 0.4
    """Largest error of the velocity, as a share of the wanted speed."""

    jump: float = 8.0
    """Largest error of one frame-to-frame displacement, in pixels."""

    colour: float = 0.2
    """Largest RGB distance between the object and the wanted colour."""

    contrast: float = 0.6
    """Least contrast of object against background, as a share of the true one."""

    sharpness: tuple[float, float] = (0.4, 2.0)
    """Least and largest gradient energy of the outline, as a share of the true one."""

    roughness: float = 0.02
    """Largest mean absolute Laplacian of the background's luma; the world's own stays below 0.002."""

    overshoot: float = 0.03
    """Largest distance of the background from the world's support, in luma or chroma."""

    clipped: float = 0.05
    """Largest share of crushed and blown pixels."""

    drift: float = 0.1
    """Largest change of exposure, or twice that of tint, since the first second; for ``steady`` only."""


LIMITS = Limits()
"""The limits every table uses."""

STILL = 0.25
"""Pixels per frame below which an object stands still; the world's slowest moves by 1."""

HERE = 0.5
"""Least share of a second's frames that show an object, for it to be compared with the first second's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Second:
    """The measurements of one second of video: means over its frames unless said otherwise."""

    present: float
    """Share of frames that show one object of a plausible size."""

    shape: str
    """The shape whose template fits best in most frames."""

    iou: float
    """Overlap with the template of the wanted shape, or of the best if none is named; 1 = truth."""

    velocity: tuple[float, float]
    """Pixels per frame along x and y, from the object's track on the torus."""

    motion: float
    """Velocity along the wanted one over the wanted speed, or the world's nearest if only the direction is
    named: 1 = truth, 0 = frozen; nan if neither is."""

    motion_error: float
    """Length of the velocity's error as a share of the same speed; nan if no direction is named."""

    jump: float
    """Largest deviation of one displacement from the wanted one, or from the mean, in pixels."""

    colour: str
    """The named colour nearest to the object's."""

    colour_error: float
    """RGB distance between the object and the wanted colour, or the nearest if none is named."""

    contrast: float
    """RGB distance between object and background as a share of the wanted colour's."""

    sharpness: float
    """Gradient energy of the object's mask as a share of the template's: below 1 soft, above 1 ragged."""

    roughness: float
    """Mean absolute Laplacian of the background's luma."""

    luma: float
    """Luma of the background."""

    tint: tuple[float, float]
    """(Cb, Cr) of the background."""

    gradation: float
    """Standard deviation of the background's luma times the root of two: a cosine's amplitude."""

    luma_drift: float
    """``luma`` minus that of the first second."""

    tint_drift: float
    """Length of the change of ``tint`` since the first second."""

    flicker: float
    """Largest change of the background's luma from one frame to the next."""

    overshoot: float
    """Distance of exposure, tint or gradation, whichever is farthest, from the world's support."""

    crushed: float
    """Share of the background's pixels that are nearly black."""

    blown: float
    """Share of the background's pixels that are nearly white."""

    seen: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    """RGB of the object. This and what follows is nan in measurements made before it was measured."""

    colour_drift: float = math.nan
    """RGB distance between the object and itself in the first second. This and what follows is nan where an
    object is there in less than ``HERE`` of the frames of this second or of the first."""

    hue_drift: float = math.nan
    """Change of the object's hue since the first second, in degrees from 0 to 180."""

    pace: float = math.nan
    """Speed along the named direction over that of the first second: 1 = as in it, 0 = frozen; nan too if no
    direction is named. A first second slower than ``STILL`` counts as that fast."""


class Measuring:
    """Measures one video that is given second by second, so that none has to be held whole."""

    def __init__(self, caption: str | Wanted) -> None:
        """Begin a video that ``caption`` asked for."""
        self._wanted = parse_caption(caption) if isinstance(caption, str) else caption
        self._first: Second | None = None
        self._before: Tensor | None = None

    def add(self, frames: Tensor) -> Second:
        """Return the measurements of the next second, ``(F, 3, H, W)`` in [0, 1]."""
        before = frames[:0] if self._before is None else self._before
        second = _measure_second(frames, before, self._wanted, self._first)
        self._first = self._first or second
        self._before = frames[-1:].clone()  # a view would keep the whole second alive
        return second


def measure(video: Tensor, caption: str | Wanted) -> list[Second]:
    """Return the measurements of each whole second of ``(F, 3, H, W)`` in [0, 1].

    A video shorter than a second counts as one; a rest after the last whole second is left out.
    """
    measuring = Measuring(caption)
    return [measuring.add(frames) for frames in video[: max(1, len(video) // FPS) * FPS].split(FPS)]


def failures(second: Second, wanted: Wanted, limits: Limits = LIMITS) -> tuple[str, ...]:
    """Return the names of the measurements that break a limit, none if the second is right.

    A colour or a speed that is not wanted by name has to stay that of the first second.
    """
    least, largest = limits.sharpness
    broken = {
        "present": second.present < limits.present,
        "shape": wanted.shape not in (None, second.shape) or not second.iou >= limits.iou,
        "motion": second.motion_error > limits.motion,
        "jump": second.jump > limits.jump,
        "colour": wanted.colour not in (None, second.colour) or not second.colour_error <= limits.colour,
        "identity": wanted.colour is None and second.colour_drift > limits.colour,
        "pace": wanted.speed is None and abs(second.pace - 1) > limits.motion,
        "contrast": not second.contrast >= limits.contrast,
        "sharpness": not least <= second.sharpness <= largest,
        "roughness": second.roughness > limits.roughness,
        "support": second.overshoot > limits.overshoot,
        "clipped": second.crushed + second.blown > limits.clipped,
    }
    return tuple(name for name, is_broken in broken.items() if is_broken)


def clip_ok(seconds: Sequence[Second], caption: str | Wanted, limits: Limits = LIMITS) -> bool:
    """Return whether every second shows what the caption asks for, inside the world's support."""
    wanted = parse_caption(caption) if isinstance(caption, str) else caption
    return not any(failures(second, wanted, limits) for second in seconds)


def steady(seconds: Sequence[Second], limits: Limits = LIMITS) -> bool:
    """Return whether the background stays what it was in the first second: stricter than ``clip_ok`` asks."""
    return all(abs(s.luma_drift) <= limits.drift and s.tint_drift <= limits.drift / 2 for s in seconds)


def mean_seconds(seconds: Sequence[Second]) -> dict[str, float]:
    """Return the mean of every measurement that is one number, over many seconds; nan is left out."""
    means = {}
    for field in fields(Second):
        values = [getattr(second, field.name) for second in seconds]
        numbers = [value for value in values if isinstance(value, float) and not math.isnan(value)]
        if numbers:
            means[field.name] = sum(numbers) / len(numbers)
    return means


def _measure_second(frames: Tensor, before: Tensor, wanted: Wanted, first: Second | None) -> Second:
    joined = torch.cat([before, frames]).float()
    luma, chroma = luma_chroma(joined)
    cut = cut_out(joined, chroma)
    kept = slice(len(before), None)
    shape, iou = match(cut.mask[kept], wanted.shape)
    backdrop = background(luma, chroma, cut.behind, kept)
    tint, mean = backdrop["tint"], backdrop["luma"]
    tracked = track(cut.mask, cut.present, wanted)
    looked = look(joined[kept], cut.mask[kept], cut.behind[kept], wanted)
    present = float(cut.present[kept].float().mean())
    return Second(
        present=present,
        shape=shape,
        iou=iou,
        **tracked,
        **looked,
        **backdrop,
        luma_drift=mean - first.luma if first else 0.0,
        tint_drift=math.dist(tint, first.tint) if first else 0.0,
        **_since_the_first(present, looked["seen"], tracked["velocity"], wanted, first),
    )


def _since_the_first(
    present: float,
    seen: tuple[float, float, float],
    velocity: tuple[float, float],
    wanted: Wanted,
    first: Second | None,
) -> dict[str, Any]:
    """Compare the object of a second with that of the first."""
    if min(present, first.present if first else present) < HERE:
        return {}
    turned = abs(hue(seen) - hue(first.seen if first else seen))
    along = speed_along(velocity, wanted)
    along_first = speed_along(first.velocity, wanted) if first else along
    return {
        "colour_drift": math.dist(seen, first.seen if first else seen),
        "hue_drift": min(turned, 360 - turned),
        "pace": along / max(along_first, STILL),
    }


def speed_along(velocity: tuple[float, float], wanted: Wanted) -> float:
    """Return the speed along the wanted direction, in pixels per frame along each axis that it moves on.

    nan if none is wanted.
    """
    if wanted.direction is None:
        return math.nan
    x, y = DIRECTIONS[wanted.direction]
    return (velocity[0] * x + velocity[1] * y) / (x * x + y * y)
