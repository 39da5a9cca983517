"""Frames go into a file as they are made, and whatever ends that, what is made is kept."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .outputs import OutputPath
from .video import Writer, open_writer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is."""

    chunks: int
    """Chunks done."""

    total_chunks: int
    """Chunks of the whole video."""

    frames: int
    """Frames handed to the writer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    frames: int
    """Frames in the file."""

    seconds: float
    """Time from the start of the first chunk to the closed file."""

    complete: bool
    """Whether the whole video was made; otherwise Ctrl-C ended it."""

    before: int = 0
    """Frames that were there at the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A video to be written."""

    out: OutputPath
    """As for ``video.open_writer``."""

    width: int
    """Pixels of the frames, before enlarging."""

    height: int
    """Pixels."""

    fps: float
    """Frames per second."""

    enlarge: int
    """Side, in pixels, of the square each pixel becomes."""

    chunks: int
    """Chunks of the whole video."""

    @property
    def picture(self) -> dict[str, Any]:
        """How its frames become pictures, by the names that whatever writes them has for it."""
        return {name: getattr(self, name) for name in ("width", "height", "fps", "enlarge")}


def record(
    pieces: Iterator[Tensor],
    recording: Recording,
    *,
    report: Callable[[Progress], None],
    writer: Writer | None = None,
    before: Progress | None = None,
    observe: Callable[[Tensor], None] | None = None,
) -> Outcome:
    """Write the frames ``(F, 3, H, W)`` of chunk after chunk. Another process encodes them meanwhile.

    ``KeyboardInterrupt`` ends the video early: what is made is kept, and the outcome says how much.

    Args:
        pieces: Frames in [0, 1], made as they are asked for.
        recording: Where they go.
        report: Called after every chunk.
        writer: What goes on with a video; ``None`` begins one.
        before: How far that video is.
        observe: Sees the frames of every chunk once the writer has them, e.g. ``DriftWatch.add``.

    Raises:
        OutputError: The disk is full or the encoder died. As after any error, the file plays up to there, and
            a note on the error says how far that is.
    """
    complete, start = False, time.perf_counter()
    before = before or Progress(chunks=0, total_chunks=recording.chunks, frames=0)
    done = before.frames
    writer = writer or open_writer(recording.out, **recording.picture)
    try:
        with writer:
            for chunk, frames in enumerate(pieces, start=before.chunks):
                writer.write(frames)
                done += len(frames)
                if observe is not None:
                    observe(frames)
                report(Progress(chunks=chunk + 1, total_chunks=recording.chunks, frames=done))
        complete = True
    except KeyboardInterrupt:
        logger.debug("interrupted")
    except Exception as error:
        if frames := before.frames + writer.frames_written:
            error.add_note(f"The first {frames} frames are in {recording.out}.")
        raise
    frames = before.frames + writer.frames_written
    seconds = time.perf_counter() - start
    return Outcome(frames=frames, seconds=seconds, complete=complete, before=before.frames)
