"""What is right and wrong in a video of the demo world, measured against its caption, second by second.

The world is known, so nothing is learned here: the shape is cut out by its chroma, matched with the templates
it was drawn from and followed around the torus. What the caption does not name (exposure, tint, gradation) is
compared with the world's support and with the video's own first second.

The limits of ``clip_ok`` were fixed before any student was trained.

Legend: F frames, H and W pixels. Luma and chroma are Rec. 709, of values in [0, 1].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from training.world import (
    COLOURS,
    DIRECTIONS,
    FPS,
    GRADATION,
    LUMA,
    LUMA_WEIGHTS,
    SHAPES,
    SPEEDS,
    TINT,
    Wanted,
    parse_caption,
    template,
)


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

PRESENT_CHROMA = 0.12
"""Least chroma distance between object and background; the world's own is at least 0.23."""

PRESENT_AREA = (0.5, 1.6)
"""Plausible area of the object, as a share of the template's."""

CRUSHED, BLOWN = 0.04, 0.96
"""Luma below and above which a pixel has lost its detail; the world's backgrounds stay within 0.1 and 0.9."""


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
    """Velocity along the wanted one over the wanted speed: 1 = truth, 0 = frozen; nan if not named."""

    motion_error: float
    """Length of the velocity's error as a share of the wanted speed; nan if not named."""

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
    """Return the names of the measurements that break a limit, none if the second is right."""
    least, largest = limits.sharpness
    broken = {
        "present": second.present < limits.present,
        "shape": wanted.shape not in (None, second.shape) or not second.iou >= limits.iou,
        "motion": second.motion_error > limits.motion,
        "jump": second.jump > limits.jump,
        "colour": wanted.colour not in (None, second.colour) or not second.colour_error <= limits.colour,
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


@dataclass(frozen=True, slots=True)
class _Cut:
    """Frames taken apart into object and background."""

    mask: Tensor
    """Share of the object in each pixel, ``(F, H, W)``."""

    present: Tensor
    """Whether one object of a plausible size is there, ``(F,)``."""

    behind: Tensor
    """Pixels that are surely background, ``(F, H, W)``, 1 or 0."""


def _cut(frames: Tensor, chroma: Tensor) -> _Cut:
    """Separate the object by its chroma: the background of a frame has one, whatever its gradation."""
    area = float(template("circle").sum())
    difference = (chroma - chroma.flatten(2).median(-1).values[..., None, None]).flatten(2)
    strongest = difference.square().sum(1).topk(int(area / 2), dim=-1).indices
    # Rendering mixes linearly, so the share of the object's chroma in a pixel is its coverage.
    towards = difference.gather(2, strongest[:, None].expand(-1, 2, -1)).mean(-1)
    length = towards.square().sum(1).clamp_min(1e-6)
    mask = ((difference * towards[..., None]).sum(1) / length[:, None]).clamp(0, 1)
    mask = torch.where(mask < 0.1, 0.0, mask).unflatten(1, frames.shape[2:])
    share = mask.sum((1, 2)) / area
    present = (length.sqrt() > PRESENT_CHROMA) & (share > PRESENT_AREA[0]) & (share < PRESENT_AREA[1])
    near = mask
    for axis in (1, 2):
        near = torch.maximum(near, torch.maximum(near.roll(1, axis), near.roll(-1, axis)))
    return _Cut(mask, present, (near < 0.1).float())


def _measure_second(frames: Tensor, before: Tensor, wanted: Wanted, first: Second | None) -> Second:
    joined = torch.cat([before, frames]).float()
    luma, chroma = _luma_chroma(joined)
    cut = _cut(joined, chroma)
    kept = slice(len(before), None)
    shape, iou = _match(cut.mask[kept], wanted.shape)
    backdrop = _backdrop(luma, chroma, cut.behind, kept)
    tint, mean = backdrop["tint"], backdrop["luma"]
    return Second(
        present=float(cut.present[kept].float().mean()),
        shape=shape,
        iou=iou,
        **_track(cut.mask, cut.present, wanted),
        **_look(joined[kept], cut.mask[kept], cut.behind[kept], wanted),
        **backdrop,
        luma_drift=mean - first.luma if first else 0.0,
        tint_drift=math.dist(tint, first.tint) if first else 0.0,
    )


def _match(mask: Tensor, wanted: str | None) -> tuple[str, float]:
    """Return the best shape and the mean overlap with the wanted one (or the best) at its best place."""
    sides = (mask.shape[1], mask.shape[2])
    spectrum, overlaps = torch.fft.rfft2(mask), []
    rows, columns = torch.arange(sides[0]), torch.arange(sides[1])
    for shape in SHAPES:
        drawn = template(shape, sides).to(mask.device)
        fit = torch.fft.irfft2(spectrum * torch.fft.rfft2(drawn).conj(), s=sides).flatten(1).argmax(1).cpu()
        y, x = fit // sides[1], fit % sides[1]
        placed = drawn[
            ((rows - y[:, None]) % sides[0])[:, :, None], ((columns - x[:, None]) % sides[1])[:, None]
        ]
        overlaps.append(torch.minimum(mask, placed).sum((1, 2)) / torch.maximum(mask, placed).sum((1, 2)))
    overlap = torch.stack(overlaps)
    best = int(torch.bincount(overlap.argmax(0), minlength=len(SHAPES)).argmax())
    return SHAPES[best], float(overlap[best if wanted is None else SHAPES.index(wanted)].mean())


def _track(mask: Tensor, present: Tensor, wanted: Wanted) -> dict[str, Any]:
    """Follow the object's centroid, which on a torus is an angle, and compare with the wanted velocity."""
    where = torch.stack([_angle(mask.sum(1)), _angle(mask.sum(2))], -1).double()
    turns = torch.remainder(where.diff(dim=0) + math.pi, 2 * math.pi) - math.pi
    sides = torch.tensor([mask.shape[2], mask.shape[1]], dtype=torch.double, device=mask.device)
    moves = (turns * sides / (2 * math.pi))[present[1:] & present[:-1]]
    if not len(moves):
        return {"velocity": (0.0, 0.0), "motion": 0.0, "motion_error": 1.0, "jump": math.inf}
    velocity = moves.mean(0)
    if wanted.direction is None or wanted.speed is None:
        jump = (moves - velocity).norm(dim=1).max()
        motion, error = math.nan, math.nan
    else:
        true = velocity.new_tensor(DIRECTIONS[wanted.direction]) * SPEEDS[wanted.speed]
        jump = (moves - true).norm(dim=1).max()
        motion, error = float(velocity @ true / (true @ true)), float((velocity - true).norm() / true.norm())
    pair = (float(velocity[0]), float(velocity[1]))
    return {"velocity": pair, "motion": motion, "motion_error": error, "jump": float(jump)}


def _angle(profile: Tensor) -> Tensor:
    """Return the mean angle of profiles ``(F, L)`` around the torus."""
    turn = torch.arange(profile.shape[1], device=profile.device) * (2 * math.pi / profile.shape[1])
    return torch.atan2((profile * turn.sin()).sum(1), (profile * turn.cos()).sum(1))


def _look(frames: Tensor, mask: Tensor, behind: Tensor, wanted: Wanted) -> dict[str, Any]:
    """Measure colour, contrast and outline of the object."""
    inside = (mask > 0.9).float()[:, None]
    seen = (frames * inside).sum((0, 2, 3)) / inside.sum().clamp_min(1)
    backdrop = (frames * behind[:, None]).sum((0, 2, 3)) / behind.sum().clamp_min(1)
    colours = torch.tensor(list(COLOURS.values()), device=frames.device)
    distances = (colours - seen).norm(dim=1)
    nearest = tuple(COLOURS)[int(distances.argmin())]
    named = tuple(COLOURS).index(wanted.colour or nearest)
    drawn = template(wanted.shape or "circle", (mask.shape[1], mask.shape[2])).to(mask)
    return {
        "colour": nearest,
        "colour_error": float(distances[named]),
        "contrast": float((seen - backdrop).norm() / (colours[named] - backdrop).norm().clamp_min(1e-6)),
        "sharpness": float(_gradient_energy(mask) / _gradient_energy(drawn[None])),
    }


def _backdrop(luma: Tensor, chroma: Tensor, behind: Tensor, kept: slice) -> dict[str, Any]:
    """Measure the background: exposure, tint, gradation, roughness, flicker and what the support says."""
    weight = behind.sum((1, 2)).clamp_min(1)
    means = (luma * behind).sum((1, 2)) / weight
    spread = ((luma - means[:, None, None]).square() * behind).sum((1, 2)) / weight
    around = luma.roll(1, 1) + luma.roll(-1, 1) + luma.roll(1, 2) + luma.roll(-1, 2)
    tints = ((chroma * behind[:, None]).sum((2, 3)) / weight[:, None])[kept].mean(0)
    inner, share = behind[kept], weight[kept].sum()
    exposure, gradation = float(means[kept].mean()), float((2 * spread[kept]).sqrt().mean())
    tint = (float(tints[0]), float(tints[1]))
    beyond = (LUMA[0] - exposure, exposure - LUMA[1], math.hypot(*tint) - TINT, gradation - GRADATION[1])
    return {
        "luma": exposure,
        "tint": tint,
        "gradation": gradation,
        "roughness": float(((around - 4 * luma)[kept].abs() * inner).sum() / share),
        "flicker": float(means.diff().abs().max()) if len(means) > 1 else 0.0,
        "overshoot": max(0.0, *beyond),
        "crushed": float(((luma[kept] < CRUSHED) * inner).sum() / share),
        "blown": float(((luma[kept] > BLOWN) * inner).sum() / share),
    }


def _luma_chroma(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Return the luma ``(F, H, W)`` and the (Cb, Cr) ``(F, 2, H, W)``."""
    red, green, blue = frames.unbind(1)
    luma = LUMA_WEIGHTS[0] * red + LUMA_WEIGHTS[1] * green + LUMA_WEIGHTS[2] * blue
    pair = [(blue - luma) / (2 - 2 * LUMA_WEIGHTS[2]), (red - luma) / (2 - 2 * LUMA_WEIGHTS[0])]
    return luma, torch.stack(pair, 1)


def _gradient_energy(x: Tensor) -> Tensor:
    return ((x - x.roll(1, 1)).square() + (x - x.roll(1, 2)).square()).sum((1, 2)).mean()
