"""Prompts over time, written as text; see ``script`` for what it may look like."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from .cues import CHANGES, Change
from .errors import SettingsError
from .geometry import LONGEST_SECONDS
from .scenes import Scene, Script, Source, goes_on, joined

_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
_UNITS = {"s": 1, "sec": 1, "secs": 1, "second": 1, "seconds": 1, "m": 60, "min": 60, "minutes": 60}
_LOOKS_LIKE_A_UNIT = r"(?:s|secs?|seconds?|m|mins?|minutes?|ms|h|f|frames?)(?![A-Za-z])"
_MARK = r"(?:\#|cut)(?:\+sink)?|(?:soft|blend)(?::\d+)?"

_CUE = re.compile(
    # A number with a unit, or followed as a time would be, but not 16:9 and not 3 cats; or a change alone.
    rf"(?<!\\)\[\s*(?:-?{_NUMBER}\s*(?:{_LOOKS_LIKE_A_UNIT}|[\]\#]|:(?!\d)|-\s*{_NUMBER}\s*\w*\s*:|(?:{_MARK})\b)"
    rf"|-?{_NUMBER}[A-Za-z]+\s*:|(?:{_MARK})\s*\])"
)
_BAR = re.compile(r"(?<!\\)\|")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bracket:
    """A bracket with a time in it, or a change, or both."""

    start: int
    """Place of ``[``."""

    stop: int
    """Place after ``]``."""

    time: float | None
    end: float | None
    change: Change | None

    text: str | None
    """What stands after its colon. ``None`` if there is none: then it closes the scene before it."""


def read_text(text: str, *, change: Change) -> Script:
    """Read a script that is no JSON.

    Args:
        text: What the user wrote.
        change: How scenes take over that do not say.

    Raises:
        ScriptError: It cannot be read; the message points at the character.
    """
    source = Source(text)
    brackets = _brackets(source)
    closing = [bracket for bracket in brackets if bracket.text is None]
    if closing and len(closing) < len(brackets):
        raise source.wrong(
            closing[0].start,
            "two forms are mixed; write every scene as [5s: a dog], or every one as a dog [5s].",
        )
    if brackets and not closing:
        return _timed(source, brackets, change)
    bars = [bar.start() for bar in _BAR.finditer(text)]
    if brackets or bars:
        return _in_turn(source, brackets, bars, change)
    return Script(scenes=(Scene(prompt=_plain(text)),))


def _timed(source: Source, brackets: Sequence[_Bracket], change: Change) -> Script:
    """Read scenes that say when they begin."""
    common = _common(source, brackets)
    scenes: list[Scene] = []
    if brackets[0].time:
        if not common:
            raise source.wrong(
                brackets[0].start,
                "nothing says what is shown before this scene; begin it at 0s, or put text before it.",
            )
        scenes.append(Scene(prompt=common))
    remarks, ended = _first_change(brackets[0]) if not scenes else [], None
    for number, bracket in enumerate(brackets):
        assert bracket.time is not None
        assert bracket.text is not None
        if number:
            _check_order(source, brackets[number - 1], bracket)
        if ended is not None and ended < bracket.time:
            remarks.append(goes_on(ended, bracket.time))
        if not (prompt := joined(common, bracket.text)):
            raise source.wrong(bracket.stop - 1, "this scene is empty; say what it shows.")
        scenes.append(Scene(prompt=prompt, seconds=bracket.time, change=bracket.change or change))
        ended = bracket.end
    return Script(scenes=tuple(scenes), seconds=ended, remarks=tuple(remarks))


def _check_order(source: Source, before: _Bracket, bracket: _Bracket) -> None:
    """Refuse a scene that begins before the one before it, or before its end."""
    assert before.time is not None
    assert bracket.time is not None
    if bracket.time <= before.time:
        raise source.wrong(
            bracket.start + 1,
            f"this scene begins at {bracket.time:g} s and the one before at {before.time:g} s; list scenes "
            "in the order they are shown.",
        )
    if before.end is not None and bracket.time < before.end:
        raise source.wrong(
            bracket.start + 1,
            f"this scene begins at {bracket.time:g} s, before the one before ends at {before.end:g} s; let "
            "one end where the next begins, or leave the end away.",
        )


def _first_change(bracket: _Bracket) -> list[str]:
    """Say so if the first scene asks for a change: there is nothing to change from."""
    if bracket.change is None:
        return []
    return [f"{bracket.change} at the first scene does nothing: no scene comes before it."]


def _common(source: Source, brackets: Sequence[_Bracket]) -> str:
    """Return what stands outside the brackets."""
    parts, before = [], 0
    for start, stop in [*((each.start, each.stop) for each in brackets), (len(source.text), 0)]:
        outside = source.text[before:start]
        if bar := _BAR.search(outside):
            raise source.wrong(
                before + bar.start(),
                "scenes that begin at a time need no | between them; take it away, or write \\| for the "
                "character.",
            )
        parts.append(outside)
        before = stop
    return joined("", " ".join(part for part in (_plain(part).strip() for part in parts) if part))


def _in_turn(source: Source, brackets: Sequence[_Bracket], bars: Sequence[int], change: Change) -> Script:
    """Read scenes that follow each other: with a length each, or in equal shares of the video."""
    edges = [-1, *bars, len(source.text)]
    pieces = [_piece(source, a + 1, b, brackets) for a, b in pairwise(edges)]
    timed = any(bracket.time is not None for bracket in brackets)
    scenes, now, lasts = [], 0.0, None
    for number, (prompt, bracket) in enumerate(pieces):
        lasts = None if bracket is None else bracket.time
        if timed and lasts is None and number + 1 < len(pieces):
            raise source.wrong(
                edges[number + 1],
                f"scene {number + 1} does not say how long it lasts; end it with its length, e.g. [5s].",
            )
        own = change if bracket is None else bracket.change or change
        scene = Scene(prompt=prompt, change=own)
        scenes.append(replace(scene, seconds=now) if timed else replace(scene, share=number / len(pieces)))
        now += lasts or 0.0
    first = pieces[0][1]
    return Script(
        scenes=tuple(scenes),
        seconds=None if lasts is None else now,
        remarks=tuple(_first_change(first)) if first else (),
    )


def _piece(
    source: Source, start: int, stop: int, brackets: Sequence[_Bracket]
) -> tuple[str, _Bracket | None]:
    """Return what a scene between two bars says, and the bracket it ends with."""
    inside = [bracket for bracket in brackets if start <= bracket.start < stop]
    if len(inside) > 1:
        raise source.wrong(inside[1].start, "this scene has two brackets; put | between scenes.")
    bracket = inside[0] if inside else None
    prompt = _plain(source.text[start : bracket.start if bracket else stop]).strip()
    if not prompt:
        raise source.wrong(bracket.start if bracket else stop, "this scene is empty; say what it shows.")
    if bracket is None:
        return prompt, None
    rest = source.text[bracket.stop : stop]
    if rest.strip():
        raise source.wrong(
            bracket.stop + len(rest) - len(rest.lstrip()),
            "a scene ends with its bracket; put | before the next one. Subtitles are not drawn.",
        )
    if bracket.time == 0:
        raise source.wrong(bracket.start + 1, "a scene of 0 s is never seen; give it a length, or remove it.")
    return prompt, bracket


def _plain(text: str) -> str:
    """Return ``text`` with the escaped characters themselves."""
    return re.sub(r"\\([|\[\]])", r"\1", text)


def _brackets(source: Source) -> list[_Bracket]:
    """Return the brackets that speak of time or of a change, in order. All others are text."""
    found: list[_Bracket] = []
    while match := _CUE.search(source.text, found[-1].stop if found else 0):
        found.append(_Reader(source, match.start()).bracket())
    return found


class _Reader:
    """Reads one bracket, and knows the character at which it stopped understanding."""

    def __init__(self, source: Source, start: int) -> None:
        self.source, self.start, self.place = source, start, start + 1

    def bracket(self) -> _Bracket:
        """Return the bracket that begins at ``start``."""
        time = self._time() if self._sees(rf"-?{_NUMBER}") else None
        end = self._end(time) if time is not None and self._takes("-") else None
        change = self._change() if self._sees(r"[#A-Za-z]") else None
        text = None
        if self._takes(":"):
            text = self._text()
        elif not self._takes(r"\]"):
            raise self._wrong(f"a : or ] is missing, as in [5s: a dog] or a dog [5s]; before it: {CHANGES}.")
        elif end is not None:
            raise self._wrong("a range of time needs its scene, as in [3s-5s: a dog]; a length is [2s].", -1)
        return _Bracket(start=self.start, stop=self.place, time=time, end=end, change=change, text=text)

    def _sees(self, pattern: str) -> str | None:
        """Skip spaces; return what ``pattern`` matches next."""
        while self.source.text[self.place : self.place + 1].isspace():
            self.place += 1
        match = re.compile(pattern).match(self.source.text, self.place)
        return match.group() if match else None

    def _takes(self, pattern: str) -> str | None:
        """Skip spaces; return what ``pattern`` matches next, and go past it."""
        found = self._sees(pattern)
        self.place += len(found or "")
        return found

    def _wrong(self, what: str, step: int = 0) -> Exception:
        return self.source.wrong(self.place + step, what)

    def _time(self) -> float:
        """Return the seconds of ``12.5s``, ``2m`` or ``1m30s``."""
        if self._sees("-"):
            raise self._wrong("a time is below 0; the video begins at 0s.")
        total, more = 0.0, True
        while more:
            number = self._takes(_NUMBER)
            if number is None:
                raise self._wrong("a time is missing; write seconds, e.g. 5s.")
            place, unit = self.place, self._takes("[A-Za-z]+")
            if unit not in _UNITS:
                self.place = place
                raise self._wrong(
                    f"the unit of {number} is missing or unknown; write seconds as {number}s, or \\[ for a "
                    "bracket that is text."
                )
            total += min(float(number) * _UNITS[unit], LONGEST_SECONDS)
            more = _UNITS[unit] == 60 and self.source.text[self.place : self.place + 1].isdigit()
        return total

    def _end(self, time: float) -> float:
        """Return where a scene ends."""
        self._sees("")
        place, end = self.place, self._time()
        if end <= time:
            raise self.source.wrong(place, f"this scene ends at {end:g} s and begins at {time:g} s.")
        return end

    def _change(self) -> Change:
        """Return how the scene takes over."""
        place = self.place
        try:
            return Change.parse(self._takes(rf"{_MARK}|#?[A-Za-z+]*") or "")
        except SettingsError as error:
            raise self.source.wrong(place, str(error)) from error

    def _text(self) -> str:
        """Return what stands before the closing bracket."""
        first, depth = self.place, 1
        for sign in re.finditer(r"(?<!\\)[\[\]]", self.source.text[first:]):
            place = first + sign.start()
            if sign.group() == "[" and _CUE.match(self.source.text, place):
                raise self.source.wrong(
                    place, "a scene begins inside another; close the one before it with a ]."
                )
            depth += 1 if sign.group() == "[" else -1
            if not depth:
                self.place = place + 1
                return _plain(self.source.text[first:place]).strip()
        raise self.source.wrong(self.start, "this bracket is never closed; put ] after the scene.")
