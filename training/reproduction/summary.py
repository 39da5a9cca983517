"""What the measurements of many videos come to at each horizon, with their spread."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from training.digests import stamp
from training.measuring import read_second
from training.world import parse_caption
from training.world_metrics import LIMITS, STILL, Second, clip_ok, speed_along
from training.worlds import world_called

SECONDS = 5
"""Whole seconds in the teacher's horizon, and at the end of each horizon that is measured."""

SHARES = ("right", "right at the end", "out of range", "other colour", "frozen")
"""Numbers that are 0 or 1 for each clip."""

NUMBERS = (
    "right", "right at the end", "out of range", "exposure drift", "tint drift", "overshoot",
    "crushed or blown", "motion", "IoU", "sharpness",
)  # fmt: skip
"""What is told of each horizon."""

LEFT_OPEN = ("colour drift", "hue drift", "other colour", "pace", "frozen")
"""What is told besides where captions leave colour and speed open."""

DIGITS = {"exposure drift": 3, "tint drift": 3, "overshoot": 3, "crushed or blown": 3, "hue drift": 1}
"""Decimals of what has not two."""

EXPLAINED = {
    "right": "share of clips in which every second until then shows what the caption asks for, inside the "
    "world's range (`world_metrics.clip_ok`)",
    "right at the end": "the same of the last 5 s alone",
    "out of range": "share of clips whose background leaves the world's range of exposure, tint or gradation "
    "in the last 5 s",
    "exposure drift": "mean distance of the background's luma from the clip's own first second, last 5 s",
    "tint drift": "mean distance of its (Cb, Cr), last 5 s",
    "overshoot": "mean distance beyond the world's range, last 5 s",
    "crushed or blown": "share of the background's pixels nearly black or nearly white, last 5 s",
    "motion": "velocity along the wanted one, over the wanted speed, or where none is wanted the world's "
    "nearest: 1 is right, 0 frozen; last 5 s",
    "IoU": "overlap with the template of the wanted shape, last 5 s",
    "sharpness": "gradient energy of the outline, over the true one; last 5 s",
    "colour drift": "mean RGB distance of the object from itself in the clip's own first second, last 5 s; "
    "this and the following are of the seconds that show an object",
    "hue drift": "mean change of its hue since then in degrees, last 5 s",
    "other colour": "share of clips in which the named colour nearest to the object's is not that of the "
    "first second in some second of the last 5",
    "pace": "speed along the wanted direction over that of the clip's own first second: 1 is as in it, 0 "
    "frozen; last 5 s",
    "frozen": f"share of clips that move by less than {STILL} pixels per frame along the wanted direction in "
    "some second of the last 5; the slowest true one is 1",
}
"""What each number is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """One student's videos as they were measured."""

    method: str
    """What made it."""

    seed: int | None
    """Of its training; ``None`` if all seeds share it."""

    ablates: str
    """Method it changes one thing of; empty if none."""

    seconds: Sequence[Sequence[Second]]
    """Of each video."""

    at: Mapping[int, Mapping[str, Sequence[float]]]
    """By horizon, every number of ``NUMBERS`` and ``LEFT_OPEN`` for each clip; nan where a clip has none."""


def numbers_of(world: str) -> tuple[str, ...]:
    """Return what the tables of a world tell of each horizon."""
    return NUMBERS if world_called(world).tells_all else (*NUMBERS, *LEFT_OPEN)


def read_student(
    path: Path, horizons: Sequence[int], *, method: str, seed: int | None, ablates: str
) -> Student:
    """Read what the stage ``evaluate`` wrote."""
    videos, at = _read(path, stamp(path), tuple(horizons))
    return Student(method=method, seed=seed, ablates=ablates, seconds=videos, at=at)


@lru_cache
def _read(
    path: Path,
    stamp: tuple[int, int],  # noqa: ARG001 - a changed file is read again
    horizons: tuple[int, ...],
) -> tuple[list[list[Second]], dict[int, dict[str, list[float]]]]:
    """Return the seconds of every video, and the numbers of every clip at each horizon."""
    table = json.loads(path.read_text())
    videos = [[read_second(second) for second in video] for video in table["seconds"]["student"]]
    at = {}
    for horizon in horizons:
        clips = [
            clip_numbers(seconds[: horizon * SECONDS], text)
            for seconds, text in zip(videos, table["prompts"], strict=True)
        ]
        at[horizon] = {name: [clip[name] for clip in clips] for name in (*NUMBERS, *LEFT_OPEN)}
    return videos, at


def clip_numbers(seconds: Sequence[Second], text: str) -> dict[str, float]:
    """Return the numbers of one clip that ends where its horizon does."""
    last, wanted = seconds[-SECONDS:], parse_caption(text)
    compared = [second for second in last if not math.isnan(second.colour_drift)]
    paced = [second for second in last if not math.isnan(second.pace)]
    return {
        "right": float(clip_ok(seconds, text)),
        "right at the end": float(clip_ok(last, text)),
        "out of range": float(any(second.overshoot > LIMITS.overshoot for second in last)),
        "exposure drift": _mean(abs(second.luma_drift) for second in last),
        "tint drift": _mean(second.tint_drift for second in last),
        "overshoot": _mean(second.overshoot for second in last),
        "crushed or blown": _mean(second.crushed + second.blown for second in last),
        "motion": _mean(second.motion for second in last),
        "IoU": _mean(second.iou for second in last),
        "sharpness": _mean(second.sharpness for second in last),
        "colour drift": _mean(second.colour_drift for second in last),
        "hue drift": _mean(second.hue_drift for second in last),
        "other colour": _any(second.colour != seconds[0].colour for second in compared),
        "pace": _mean(second.pace for second in last),
        "frozen": _any(speed_along(second.velocity, wanted) < STILL for second in paced),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A mean and how sure it is."""

    mean: float
    """Over the clips of all seeds."""

    error: float
    """Standard error over clips, of one seed's clips: for shares the binomial one."""

    deviation: float | None
    """Standard deviation of the seeds' means; ``None`` for one seed."""

    def told(self, digits: int) -> str:
        """Return ``mean ± deviation (error)``, the deviation only where there is one."""
        if math.isnan(self.mean):
            return ""
        spread = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        error = "" if math.isnan(self.error) else f" ({self.error:.{digits}f})"
        return f"{self.mean:.{digits}f}{spread}{error}"


def spread_of(name: str, seeds: Sequence[Sequence[float]]) -> Spread:
    """Return the spread of one number, given that of each clip for each seed."""
    means = [_mean(clips) for clips in seeds]
    mean = _mean(means)
    clips = [clip for same in zip(*seeds, strict=True) if not math.isnan(clip := _mean(same))]
    is_share = name in SHARES and 0 <= mean <= 1
    error = (mean * (1 - mean) / len(clips)) ** 0.5 if is_share else _error(clips)
    told = [mean for mean in means if not math.isnan(mean)]
    return Spread(mean=mean, error=error, deviation=statistics.stdev(told) if len(told) > 1 else None)


def difference(name: str, one: Sequence[Student], other: Sequence[Student], horizon: int) -> Spread | None:
    """Return how much more of a number ``one`` has than ``other``: the mean over clips of the differences.

    Clips of the same caption, noise and seed are compared; a student that all seeds share with every seed.
    ``None`` without common seeds.
    """
    ones, others = ({student.seed: student for student in group} for group in (one, other))
    gaps = []
    for seed in sorted({*ones, *others} - {None}, key=str) or [None]:
        pair = ones.get(seed, ones.get(None)), others.get(seed, others.get(None))
        if pair[0] is not None and pair[1] is not None:
            first, second = pair[0].at[horizon][name], pair[1].at[horizon][name]
            gaps.append([a - b for a, b in zip(first, second, strict=True)])
    if not gaps:
        return None
    found = spread_of(name, gaps)
    return replace(found, error=_error([_mean(same) for same in zip(*gaps, strict=True)]))


OVER_TIME: dict[str, Callable[[Second], float]] = {
    "exposure drift": lambda second: abs(second.luma_drift),
    "tint drift": lambda second: second.tint_drift,
    "colour drift": lambda second: second.colour_drift,
    "pace": lambda second: second.pace,
}
"""What is drawn over time, of one second."""


def over_time(students: Sequence[Student], name: str) -> list[Spread]:
    """Return the spread of one number of ``OVER_TIME`` of one method, second by second."""
    length, read = min(len(video) for student in students for video in student.seconds), OVER_TIME[name]
    return [
        spread_of(name, [[read(video[second]) for video in student.seconds] for student in students])
        for second in range(length)
    ]


def _mean(values: Iterable[float]) -> float:
    """Return the mean of what is a number."""
    numbers = [value for value in values if not math.isnan(value)]
    return statistics.fmean(numbers) if numbers else math.nan


def _any(values: Iterable[bool]) -> float:
    """Return 1 if any is true, else 0, and nan where there is none."""
    return float(max(values, default=math.nan))


def _error(clips: Sequence[float]) -> float:
    """Return the standard error of a mean over clips."""
    numbers = [value for value in clips if not math.isnan(value)]
    return statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else math.nan
