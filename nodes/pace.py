"""How far a run is, in words: ``chunk 12 of 80, 21 fps, 40 s left``."""

import time
from collections import deque
from collections.abc import Callable

MEMORY = 8
"""Chunks the speed is averaged over: long enough to be calm, short enough to follow a change."""


class Pace:
    """Progress of one reading of a video, chunk by chunk.

    The speed is that of the latest chunks, and only of those made now: kept ones pass in no time.
    """

    def __init__(
        self,
        chunks: int,
        *,
        kept: int = 0,
        origin: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock on a video of ``chunks`` chunks.

        Args:
            chunks: Of the whole video.
            kept: How many of them, from the first, are there already.
            origin: Where those come from, if that shall be said.
            clock: Seconds.
        """
        self.chunks = chunks
        self.kept = kept
        self.origin = origin
        self.done = 0
        self._clock = clock
        self._frames = 0
        self._start = clock()
        self._recent = deque([(self._start, 0)], maxlen=MEMORY + 1)

    def tick(self, frames: int) -> str:
        """Count one chunk of ``frames`` frames and return the text to show."""
        self.done += 1
        self._frames += frames
        if self.done <= self.kept:
            self._recent.clear()
        self._recent.append((self._clock(), self._frames))
        return self.text()

    def text(self) -> str:
        """Return where the run is, how fast it goes and how long it will take; at the end, what it was."""
        if self.done == self.chunks:
            text = f"{self._frames} frames in {duration(self._clock() - self._start)}"
            told = self.origin and self.kept
            return text + (f"; {self.kept} of {self.chunks} chunks from {self.origin}" if told else "")
        place = f"chunk {self.done} of {self.chunks}"
        if self.origin and self.done <= self.kept:
            return f"{place}, from {self.origin}" if self.done else place
        (start, before), (now, after) = self._recent[0], self._recent[-1]
        seconds, chunks = now - start, len(self._recent) - 1
        if not chunks or seconds <= 0:
            return place
        left = (self.chunks - self.done) * seconds / chunks
        return f"{place}, {rate((after - before) / seconds)} fps, {duration(left)} left"


def rate(fps: float) -> str:
    """Return frames per second with two figures that matter. 21.4 is ``21``, 3.14 is ``3.1``."""
    return f"{fps:.0f}" if fps >= 10 else f"{fps:.2g}"


def duration(seconds: float) -> str:
    """Return a time to wait. 40 is ``40 s``, 75 is ``1 min 15 s``, 7500 is ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
