"""The stretches of a video that are made over one memory, and what each memory begins with.

A plain video is one stretch. A new one begins where the memory is built again: at a soft change of the prompt
and at a cut, and with overlapping windows at each of them. What a memory begins with follows from the chunks
before and from nothing else, so a stopped run goes on exactly as it would have gone on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .cache_shape import LEAD, CacheShape
from .cues import Change, Cue


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Chunks of the video made over one memory. The memory counts ``kept`` and then these, from 0.

    With ``begin`` 10 and ``kept`` (0, 8, 9) its chunks 0, 1, 2 and 3 are chunks 0, 8, 9 and 10 of the video.
    """

    begin: int
    """First chunk."""

    stop: int
    """The chunk after the last."""

    kept: tuple[int, ...] = ()
    """Earlier chunks the memory begins with, oldest first."""

    lead: int = 0
    """Latent frames before them, see ``CacheShape.lead``."""

    overlap: int = 0
    """How many of the kept ones a window that starts anew shares with the window before."""

    @property
    def offset(self) -> int:
        """Number of a chunk in the video less its number in the memory, from ``begin`` on."""
        return self.begin - len(self.kept)

    def chunk(self, number: int) -> int:
        """Return which chunk of the video the memory counts as ``number``."""
        return self.kept[number] if number < len(self.kept) else self.offset + number

    def skipped(self, shape: CacheShape) -> int:
        """Return how many chunks of the video lie between the sink and what comes next in the memory.

        A sink that is placed right before the window, or none, leaves no gap: only distances count.
        """
        if not shape.sink or shape.sink_moves or len(self.kept) < shape.sink:
            return 0
        return self.chunk(shape.sink) - self.chunk(shape.sink - 1) - 1

    def seen(self, chunk: int, shape: CacheShape) -> tuple[tuple[int, ...], int]:
        """Return what ``chunk`` sees in this memory: chunks of the video, oldest first, and the lead."""
        past = replace(shape, lead=self.lead).past(chunk - self.offset)
        return tuple(self.chunk(number) for number in past if number != LEAD), int(LEAD in past)


def stretches(cues: Sequence[Cue], shape: CacheShape, *, chunks: int, overlap: int = 0) -> Iterator[Stretch]:
    """Yield the stretches of a video, in order.

    Args:
        cues: As ``as_cues`` returns them.
        shape: Of the memory of the first stretch.
        chunks: Chunks of the video.
        overlap: Chunks a window shares with the one before, if each starts anew; 0 if one window rolls.
    """
    changes = {cue.chunk: cue.change for cue in cues[1:] if cue.change.kind != "blend"}
    span = shape.window - overlap if overlap else chunks
    origin, now = 0, Stretch(begin=0, stop=chunks, lead=shape.lead)
    while now.begin < chunks:
        window = origin + (max(0, now.begin - origin - overlap) // span + 1) * span + overlap
        stop = min([window, chunks, *(chunk for chunk in changes if chunk > now.begin)])
        now = replace(now, stop=stop)
        yield now
        change = changes.get(stop)
        if change is not None and change.kind == "cut":
            origin = stop
        starts_anew = overlap > 0 and stop == window and origin != stop
        now = _after(now, change, shape, overlap=overlap if starts_anew else 0)


def _after(before: Stretch, change: Change | None, shape: CacheShape, *, overlap: int) -> Stretch:
    """Return the stretch that follows; its ``stop`` is not known yet."""
    begin = before.stop
    if overlap:
        return Stretch(begin=begin, stop=begin, kept=tuple(range(begin - overlap, begin)), overlap=overlap)
    kept, lead = before.seen(begin, shape)
    if change is not None and change.kind == "cut":
        own = shape.sink if change.sink else 0
        return Stretch(begin=begin, stop=begin, kept=kept[:own], lead=lead if own else 0)
    if change is not None and change.chunks and not before.overlap:
        sink, ring = kept[: shape.sink], kept[shape.sink :]
        if len(ring) > change.chunks:
            kept, lead = sink + ring[-change.chunks :], lead if sink else 0
    return Stretch(begin=begin, stop=begin, kept=kept, lead=lead, overlap=before.overlap)
