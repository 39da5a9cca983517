"""Faults of a video, found in what ``drift`` has measured, each with a score and in words.

A score of 1 is the threshold: a steady clip stays below, and of several faults the highest stands out. Drift
is measured against the first seconds, after a median of three that leaves single seconds out. Where a clip
changes a lot from second to second anyway, as a walk through a city does, that much more is needed: the scale
is the threshold or three times the usual bend from one second to the next, whichever is larger. What was
meant to change cannot be told from what drifted: a cut or another prompt is found like a fault.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .drift import Borders, Second
from .geometry import TEMPORAL_STRIDE

LUMA_STEP = 0.06
"""Departure of mean luma from the first seconds that counts as a fault, of [0, 1]."""

CLIPPED_STEP = 0.10
"""Rise of the share of crushed or blown pixels that counts, of [0, 1]."""

SATURATION_STEP = 0.08
"""Departure of saturation that counts, of [0, 1]."""

TINT_STEP = 0.03
"""Departure of mean (Cb, Cr) that counts; 0.5 is the most there is."""

RATIO = 1.5
"""Factor by which contrast or sharpness must grow or fall to count."""

STOPPED = 5.0
"""Factor by which motion must fall for two seconds to count as frozen."""

FLASH = 0.02
"""Departure of a few frames from those around them that counts as flicker, of [0, 1]."""

SEAM = 1.5
"""Change across borders of chunks over the change inside them that counts, as a median of five seconds."""

REPEATED = 0.5
"""Nearness to an earlier stretch, kept for ``REPEATED_SECONDS`` at one lag, that counts."""

REPEATED_SECONDS = 3
"""Seconds in a row that must follow an earlier stretch."""

LEAST_SECONDS = 5
"""Length in seconds from which drift is judged."""

_LEAST_MOTION = 0.003  # shorter sides per second: below, nothing moves that could stop
_NOTHING = 0.05  # nearness below which there is no stretch to speak of
_BEND = 3.0  # usual bends between two seconds that a drift must exceed


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One way in which the video is not what it was, or not what it should be."""

    name: str
    """One of ``FAULTS``."""

    score: float
    """Its strength; 1 is where it counts."""

    text: str
    """One line for people."""

    first: int
    """Second in which it begins."""

    last: int
    """Second in which it is strongest, or the last one it is found in."""


def find_faults(seconds: Sequence[Second], *, fps: float, borders: Borders) -> list[Fault]:
    """Return every fault with its score, the strongest first; those below 1 are there too.

    Args:
        seconds: As the meter gave them. A last one of less than half a second is left out.
        fps: Frames per second.
        borders: Where chunks meet.
    """
    whole = [second for second in seconds if second.frames >= fps / 2]
    if not whole:
        return []
    found = [_flicker(whole), _seams(whole, borders), _repetition(whole, fps)]
    if len(whole) >= LEAST_SECONDS:
        found += [judge(whole) for judge in _DRIFTS.values()]
    return sorted((fault for fault in found if fault is not None), key=lambda fault: -fault.score)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Departure:
    """Where a series is furthest from its first seconds."""

    score: float
    value: float
    """Signed, in the units of the series."""

    first: int
    last: int

    @property
    def when(self) -> str:
        return f"between second {self.first} and {self.last}"


def reference_seconds(count: int) -> int:
    """Return how many of ``count`` seconds the others are compared with: a quarter, 1 to 5."""
    return min(5, max(1, count // 4))


def steadiness(values: Sequence[float], least: float) -> tuple[float, float]:
    """Return what the first seconds of a series are, and how far it may depart from that.

    Args:
        values: One per second.
        least: Departure that counts, if the series is smooth.
    """
    bends = [abs(c - 2 * b + a) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    usual = statistics.median(bends) if bends else 0.0
    return statistics.median(values[: reference_seconds(len(values))]), max(least, _BEND * usual)


def _departure(values: Sequence[float], least: float, sign: int = 0) -> _Departure:
    """Return the largest departure of a series.

    Args:
        values: One per second.
        least: Departure that counts, if the series is smooth.
        sign: 1 or -1 looks in one direction only.
    """
    start, scale = steadiness(values, least)
    smooth = [statistics.median(values[max(0, s - 1) : s + 2]) for s in range(len(values))]
    away = [value - start for value in smooth]
    strength = [max(0.0, sign * value) if sign else abs(value) for value in away]
    last = max(range(len(away)), key=lambda second: strength[second])
    near = [second for second in range(last) if strength[second] <= 0.2 * strength[last]]
    return _Departure(
        score=strength[last] / scale, value=away[last], first=near[-1] if near else 0, last=last
    )


def _exposure(name: str, sign: int, verb: str, clipped: str) -> Callable[[Sequence[Second]], Fault]:
    """Return the judge of a picture that goes dark or bright."""

    def judge(seconds: Sequence[Second]) -> Fault:
        luma = _departure([second.luma for second in seconds], LUMA_STEP, sign)
        ends = _departure([getattr(second, clipped) for second in seconds], CLIPPED_STEP, 1)
        text = f"luma {verb} by {abs(luma.value):.2f} {luma.when}"
        if ends.score >= 1:
            text += f", and {ends.value:.0%} more of the picture is {clipped}"
        worse = luma if luma.score >= ends.score else ends
        score = max(luma.score, ends.score)
        return Fault(name=name, score=score, text=text, first=worse.first, last=worse.last)

    return judge


def _saturation(seconds: Sequence[Second]) -> Fault:
    found = _departure([second.saturation for second in seconds], SATURATION_STEP)
    verb = "rises" if found.value > 0 else "falls"
    return _fault("saturation", found, f"saturation {verb} by {abs(found.value):.2f} {found.when}")


def _tint(seconds: Sequence[Second]) -> Fault:
    blue = _departure([second.blue for second in seconds], TINT_STEP)
    red = _departure([second.red for second in seconds], TINT_STEP)
    worse, names = (blue, ("blue", "yellow")) if blue.score >= red.score else (red, ("red", "cyan"))
    towards = names[worse.value < 0]
    return _fault("tint", worse, f"colours move {abs(worse.value):.2f} towards {towards} {worse.when}")


def _ratio(name: str) -> Callable[[Sequence[Second]], Fault]:
    """Return the judge of a number that counts by its ratio."""

    def judge(seconds: Sequence[Second]) -> Fault:
        logs = [math.log(max(getattr(second, name), 1e-3)) for second in seconds]
        found = _departure(logs, math.log(RATIO))
        verb = "grows" if found.value > 0 else "falls"
        return _fault(name, found, f"{name} {verb} to {math.exp(found.value):.2g} times {found.when}")

    return judge


def _freeze(seconds: Sequence[Second]) -> Fault | None:
    motion = [second.motion or 0.0 for second in seconds]
    usual = max(
        statistics.median(motion[: reference_seconds(len(motion))]), statistics.quantiles(motion, n=4)[2]
    )
    if usual < _LEAST_MOTION:
        return None
    over_two = [max(pair) for pair in pairwise(motion)]
    place = min(range(len(over_two)), key=lambda second: over_two[second])
    floor = usual / 100
    score = math.log((usual + floor) / (over_two[place] + floor)) / math.log(STOPPED)
    first = last = place
    slow = max(over_two[place], usual / STOPPED)
    while first > 0 and motion[first - 1] <= slow:
        first -= 1
    while last + 1 < len(motion) and motion[last + 1] <= slow:
        last += 1
    share = statistics.fmean(motion[first : last + 1]) / usual
    text = f"motion falls to {share:.0%} of what it was, from second {first} to {last}"
    return Fault(name="freeze", score=max(0.0, score), text=text, first=first, last=last)


def _flicker(seconds: Sequence[Second]) -> Fault:
    worst = max(seconds, key=lambda second: second.flicker)
    hits = [second for second in seconds if second.flicker >= max(FLASH, worst.flicker / 2)]
    text = f"the picture flashes by {worst.flicker:.2f} around frame {worst.flash}"
    gaps = [after.flash - before.flash for before, after in pairwise(hits)]
    if gaps:
        text += f", {len(hits)} times"
        usual = statistics.median_low(gaps)
        if all(abs(gap - usual) <= TEMPORAL_STRIDE // 2 for gap in gaps):
            text += f", {usual} frames ({usual / TEMPORAL_STRIDE:.0f} latent frames) apart"
    first, last = (hits[0].second, hits[-1].second) if hits else (worst.second, worst.second)
    return Fault(name="flicker", score=worst.flicker / FLASH, text=text, first=first, last=last)


def _seams(seconds: Sequence[Second], borders: Borders) -> Fault | None:
    ratios = [(second.second, second.seam) for second in seconds if second.seam is not None]
    if not ratios:
        return None
    span = min(5, len(ratios))
    medians = [
        statistics.median(ratio for _, ratio in ratios[start : start + span])
        for start in range(len(ratios) - span + 1)
    ]
    place = max(range(len(medians)), key=lambda start: medians[start])
    hits = [start for start, ratio in enumerate(medians) if ratio >= SEAM] or [place]
    first, last = ratios[hits[0]][0], ratios[hits[-1] + span - 1][0]
    text = (
        f"the picture changes {medians[place]:.1f} times as much where chunks meet, every {borders.period} "
        f"frames, as inside them, from second {first} to {last}"
    )
    score = max(0.0, math.log(max(medians[place], 1e-6)) / math.log(SEAM))
    return Fault(name="seams", score=score, text=text, first=first, last=last)


def _repetition(seconds: Sequence[Second], fps: float) -> Fault | None:
    score, place = 0.0, 0
    for start in range(len(seconds) - REPEATED_SECONDS + 1):
        row = seconds[start : start + REPEATED_SECONDS]
        if _at_one_lag(row) and (least := min(second.repetition for second in row)) > score:
            score, place = least, start
    if score < _NOTHING:
        return None
    lag, first, last = seconds[place].lag, place, place + REPEATED_SECONDS - 1
    while first > 0 and _follows(seconds[first - 1], lag, score):
        first -= 1
    while last + 1 < len(seconds) and _follows(seconds[last + 1], lag, score):
        last += 1
    before = f"{lag / fps:.1f} s ({lag} frames) before"
    text = f"from second {first} to {last} the video follows what it showed {before}"
    return Fault(name="repetition", score=score / REPEATED, text=text, first=first, last=last)


def _at_one_lag(row: Sequence[Second]) -> bool:
    """Return whether seconds follow one stretch: by chance nothing stays at one distance for long."""
    lags = [second.lag for second in row]
    return min(lags) > 0 and max(lags) - min(lags) <= 2


def _follows(second: Second, lag: int, score: float) -> bool:
    return abs(second.lag - lag) <= 2 and second.repetition >= score / 2


def _fault(name: str, found: _Departure, text: str) -> Fault:
    return Fault(name=name, score=found.score, text=text, first=found.first, last=found.last)


_DRIFTS: dict[str, Callable[[Sequence[Second]], Fault | None]] = {
    "darkening": _exposure("darkening", -1, "falls", "crushed"),
    "over-exposure": _exposure("over-exposure", 1, "rises", "blown"),
    "contrast": _ratio("contrast"),
    "saturation": _saturation,
    "tint": _tint,
    "sharpness": _ratio("sharpness"),
    "freeze": _freeze,
}

FAULTS = (*_DRIFTS, "flicker", "seams", "repetition")
"""Every fault there is a measure of."""
