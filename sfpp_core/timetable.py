"""When each scene of a script is shown: times in seconds become chunks, of which a prompt has whole ones."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .config import RolloutSettings
from .cues import SOFT, Change, Cue
from .geometry import TEMPORAL_STRIDE, VideoGeometry
from .scenes import Scene, Script, goes_on

SHOWN = 48
"""Characters of a prompt that a line shows."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A scene that is shown, and from when."""

    number: int
    """Of the scene in its script, from 1."""

    scene: Scene

    wanted: float
    """Second of the video at which it was to begin."""

    chunk: int
    """First chunk that hears it."""

    actual: float
    """Second of the video at which that chunk begins."""

    @property
    def change(self) -> Change:
        """How it takes over from the scene before."""
        return self.scene.change

    @property
    def text(self) -> str:
        """The prompt, with when and how it takes over: ``[5.0625s cut: a dog]``; the first goes without."""
        return f"[{self.actual:g}s {self.change}: {self.scene.prompt}]" if self.chunk else self.scene.prompt

    def __str__(self) -> str:
        return f"scene {self.number} ({short(self.scene.prompt)!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timetable:
    """The scenes of one video. Chunk borders are the times a prompt can change at.

    Use::

        table = timetable(script, geometry)
        for warning in table.warnings: ...
        cues = table.cues(encode(table.prompts))
        sampler.chunks(cues)
    """

    entries: tuple[Entry, ...]
    """In order; the first begins with the video, and no two say the same unless a cut parts them."""

    warnings: tuple[str, ...]
    """What of the script is not shown as written."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt of each entry."""
        return tuple(entry.scene.prompt for entry in self.entries)

    def cues(self, embeddings: Tensor | Sequence[Tensor]) -> tuple[Cue, ...]:
        """Return what the sampler follows.

        Args:
            embeddings: Of each prompt, ``(tokens, text_dim)`` or ``(1, tokens, text_dim)``, in order.
        """
        return tuple(
            Cue(chunk=entry.chunk, embeddings=rows if rows.ndim == 3 else rows[None], change=entry.change)
            for entry, rows in zip(self.entries, embeddings, strict=True)
        )

    def without_effect(self, settings: RolloutSettings) -> list[str]:
        """Return what the changes ask for and a rollout of these settings cannot give, a line each."""
        if settings.sink:
            return []
        return [
            f"{entry}: {entry.change} is a plain cut here, for there is no sink; set one, or write cut."
            for entry in self.entries[1:]
            if entry.change.sink
        ]

    def text(self, chunk: int) -> str:
        """Return what is heard at ``chunk``, in words that say how it came about; see ``Entry.text``."""
        return next(entry.text for entry in reversed(self.entries) if entry.chunk <= chunk)

    def lines(self) -> list[str]:
        """Return the table for people: scene, wanted second, chunk, actual second, change, prompt."""
        rows = [("scene", "wanted", "chunk", "actual", "change", "prompt")]
        for place, entry in enumerate(self.entries):
            times = f"{entry.wanted:.2f} s", str(entry.chunk), f"{entry.actual:.2f} s"
            change = str(entry.change) if place else "-"
            rows.append((str(entry.number), *times, change, short(entry.scene.prompt)))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return [
            "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[5]])
            for row in rows
        ]


def short(prompt: str) -> str:
    """Return a prompt as a line of a table shows it."""
    line = " ".join(prompt.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."


def chunk_at(seconds: float, geometry: VideoGeometry) -> int:
    """Return the chunk of the video whose beginning is nearest to ``seconds``.

    Chunk 0 begins at 0. Of Wan 2.1, with chunks of 3, the next begin at 0.5625, 1.3125, 2.0625 s and so on.
    """
    places = range(geometry.chunks)
    guess = round(seconds / _chunk_seconds(geometry))
    near = [place for place in range(guess - 2, guess + 3) if place in places] or [places[-1]]
    return min(near, key=lambda place: abs(begins(place, geometry) - seconds))


def begins(chunk: int, geometry: VideoGeometry) -> float:
    """Return the second at which ``chunk`` begins in the video."""
    return geometry.frames_until(chunk - 1) / geometry.fps


def timetable(script: Script, geometry: VideoGeometry) -> Timetable:
    """Lay the scenes of ``script`` out over a video. What a start shows counts: times are those of the video.

    A scene begins at the chunk border nearest to the time that is wanted. Of scenes that fall on one border
    the last is shown; scenes that begin after the end are not; a scene that says what the one before says
    changes nothing, unless by a cut. All of that but the last is warned of.
    """
    shown: list[Entry] = []
    warnings = list(script.remarks)
    length = geometry.seconds
    for number, scene in enumerate(script.scenes, start=1):
        wanted = scene.begins(length)
        if number > 1 and wanted >= length:
            warnings.append(
                f"scene {number} ({short(scene.prompt)!r}) begins at {wanted:g} s and the video ends at "
                f"{length:g} s: it is not shown."
            )
            continue
        chunk = chunk_at(wanted, geometry)
        entry = Entry(number=number, scene=scene, wanted=wanted, chunk=chunk, actual=begins(chunk, geometry))
        if shown and shown[-1].chunk == chunk:
            warnings.append(f"{_shared(shown.pop(), entry, geometry)}")
        shown.append(entry)
    if script.seconds is not None and script.seconds < length - _chunk_seconds(geometry):
        warnings.append(goes_on(script.seconds, length))
    return Timetable(entries=_different(shown), warnings=tuple(warnings))


def _shared(before: Entry, entry: Entry, geometry: VideoGeometry) -> str:
    """Say which of two scenes that begin at one border is shown."""
    lasts = _chunk_seconds(geometry)
    return (
        f"{before} and {entry} both begin at {entry.actual:.2f} s, where chunk {entry.chunk} begins: only "
        f"the second is shown. A prompt lasts whole chunks of {lasts:g} s; leave more time between scenes."
    )


def _chunk_seconds(geometry: VideoGeometry) -> float:
    """Return how long a chunk lasts, the first one excepted."""
    return geometry.chunk * TEMPORAL_STRIDE / geometry.fps


def _different(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Return the entries that change anything. The first has nothing to change from."""
    kept: list[Entry] = []
    for entry in entries:
        if not kept:
            kept.append(replace(entry, scene=replace(entry.scene, change=SOFT)))
        elif entry.change.kind == "cut" or entry.scene.prompt != kept[-1].scene.prompt:
            kept.append(entry)
    return tuple(kept)
