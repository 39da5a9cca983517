"""Frames of the demo world taken apart: the object, the background, and what is measured on each.

The world is known, so nothing is learned here: the shape is cut out by its chroma, matched with the templates
it was drawn from and followed around the torus.

Legend: F frames, H and W pixels. Luma and chroma are Rec. 709, of values in [0, 1].
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.world import (
    COLOURS,
    DIRECTIONS,
    GRADATION,
    LUMA,
    LUMA_WEIGHTS,
    SHAPES,
    SPEEDS,
    TINT,
    Wanted,
    template,
)

PRESENT_CHROMA = 0.12
"""Least chroma distance between object and background; the world's own is at least 0.23."""

PRESENT_AREA = (0.5, 1.6)
"""Plausible area of the object, as a share of the template's."""

CRUSHED, BLOWN = 0.04, 0.96
"""Luma below and above which a pixel has lost its detail; the world's backgrounds stay within 0.1 and 0.9."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Frames taken apart into object and background."""

    mask: Tensor
    """Share of the object in each pixel, ``(F, H, W)``."""

    present: Tensor
    """Whether one object of a plausible size is there, ``(F,)``."""

    behind: Tensor
    """Pixels that are surely background, ``(F, H, W)``, 1 or 0."""


def cut_out(frames: Tensor, chroma: Tensor) -> Cut:
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
    return Cut(mask, present, (near < 0.1).float())


def match(mask: Tensor, wanted: str | None) -> tuple[str, float]:
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


def track(mask: Tensor, present: Tensor, wanted: Wanted) -> dict[str, Any]:
    """Follow the object's centroid, which on a torus is an angle, and compare with the wanted velocity.

    Where a direction is wanted and no speed, that is the world's nearest one.
    """
    where = torch.stack([_angle(mask.sum(1)), _angle(mask.sum(2))], -1).double()
    turns = torch.remainder(where.diff(dim=0) + math.pi, 2 * math.pi) - math.pi
    sides = torch.tensor([mask.shape[2], mask.shape[1]], dtype=torch.double, device=mask.device)
    moves = (turns * sides / (2 * math.pi))[present[1:] & present[:-1]]
    if not len(moves):
        return {"velocity": (0.0, 0.0), "motion": 0.0, "motion_error": 1.0, "jump": math.inf}
    velocity = moves.mean(0)
    pair = (float(velocity[0]), float(velocity[1]))
    if wanted.direction is None:
        jump = (moves - velocity).norm(dim=1).max()
        return {"velocity": pair, "motion": math.nan, "motion_error": math.nan, "jump": float(jump)}
    speeds = SPEEDS.values() if wanted.speed is None else (SPEEDS[wanted.speed],)
    trues = [velocity.new_tensor(DIRECTIONS[wanted.direction]) * speed for speed in speeds]
    errors = [float((velocity - true).norm() / true.norm()) for true in trues]
    error = min(errors)
    true = trues[errors.index(error)]
    jump = (moves - true).norm(dim=1).max()
    motion = float(velocity @ true / (true @ true))
    return {"velocity": pair, "motion": motion, "motion_error": error, "jump": float(jump)}


def _angle(profile: Tensor) -> Tensor:
    """Return the mean angle of profiles ``(F, L)`` around the torus."""
    turn = torch.arange(profile.shape[1], device=profile.device) * (2 * math.pi / profile.shape[1])
    return torch.atan2((profile * turn.sin()).sum(1), (profile * turn.cos()).sum(1))


def look(frames: Tensor, mask: Tensor, behind: Tensor, wanted: Wanted) -> dict[str, Any]:
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
        "seen": (float(seen[0]), float(seen[1]), float(seen[2])),
        "colour": nearest,
        "colour_error": float(distances[named]),
        "contrast": float((seen - backdrop).norm() / (colours[named] - backdrop).norm().clamp_min(1e-6)),
        "sharpness": float(_gradient_energy(mask) / _gradient_energy(drawn[None])),
    }


def background(luma: Tensor, chroma: Tensor, behind: Tensor, kept: slice) -> dict[str, Any]:
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


def luma_chroma(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Return the luma ``(F, H, W)`` and the (Cb, Cr) ``(F, 2, H, W)``."""
    red, green, blue = frames.unbind(1)
    luma = LUMA_WEIGHTS[0] * red + LUMA_WEIGHTS[1] * green + LUMA_WEIGHTS[2] * blue
    pair = [(blue - luma) / (2 - 2 * LUMA_WEIGHTS[2]), (red - luma) / (2 - 2 * LUMA_WEIGHTS[0])]
    return luma, torch.stack(pair, 1)


def _gradient_energy(x: Tensor) -> Tensor:
    return ((x - x.roll(1, 1)).square() + (x - x.roll(1, 2)).square()).sum((1, 2)).mean()


def hue(rgb: tuple[float, float, float]) -> float:
    """Return the angle of a colour's (Cb, Cr), in degrees; of a grey it means nothing."""
    _, chroma = luma_chroma(torch.tensor(rgb, dtype=torch.double)[None, :, None, None])
    cb, cr = chroma.flatten().tolist()
    return math.degrees(math.atan2(cr, cb))
