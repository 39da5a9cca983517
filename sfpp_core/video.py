"""Frames into a growing MP4 or a numbered PNG sequence, while later frames are still being made.

Legend: F frames, H W height and width in pixels.
"""

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .durable import unwritable
from .encoder import FRAGMENT_SECONDS, Encoder, VideoInfo, video_info
from .errors import GeometryError, OutputError, SettingsError
from .geometry import FPS
from .outputs import OutputPath, check_output, forecast_bytes, is_video, split_pattern

__all__ = [
    "FRAGMENT_SECONDS",
    "WAITING_FRAMES",
    "Sink",
    "VideoInfo",
    "Writer",
    "check_output",
    "forecast_bytes",
    "open_writer",
    "video_info",
]

WAITING_FRAMES = 32
"""Frames kept for a slow encoder before ``write`` waits for it."""

_POLL_SECONDS = 0.002
"""Pause between two looks at a full queue."""

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where frames end. An error is an OutputError."""

    def put(self, picture: np.ndarray) -> None:
        """Take one frame, ``(H, W, 3)`` in bytes."""
        ...

    def finish(self) -> None:
        """Complete the output; harmless after an error."""
        ...


@dataclass(frozen=True, slots=True)
class _Waiting:
    """One frame on its way to the sink."""

    picture: np.ndarray
    """``(H, W, 3)`` in bytes."""

    arrive: Callable[[], None] | None
    """Waits for the copy from the device; None where the picture is already here."""


class Writer:
    """Frames on their way into a video or numbered pictures; ``open_writer`` makes one.

    They wait in a short queue for a thread, which hands them to the sink. One thread at a time may use a
    writer.

    Use::

        with open_writer("video.mp4", width=64, height=64, enlarge=8) as writer:
            for clean in rollout(...):
                writer.write(decoder.decode(clean)[0])  # waits only while the queue is full
    """

    def __init__(self, sink: Sink, *, width: int, height: int, waiting: int) -> None:
        """Start the thread.

        Args:
            sink: Where the frames end.
            width: Pixels of the frames that will be written.
            height: Pixels.
            waiting: Frames kept for a slow sink before ``write`` waits.
        """
        self._sink = sink
        self._size = (3, height, width)
        self._taken = 0
        self._waiting = waiting
        # Ctrl-C may come at any moment, and inside the put of a Queue with a limit it can leave a lock held.
        # A SimpleQueue has no lock of its own to leave, so the limit is kept in write().
        self._queue: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._failure: OutputError | None = None
        self._closed = False
        # A daemon: an abandoned writer must not keep the interpreter alive.
        self._thread = Thread(target=self._run, name="video-writer", daemon=True)
        self._thread.start()

    @property
    def frames_written(self) -> int:
        """Frames the sink has taken. After ``close`` without an error, the frames of the video."""
        return self._taken

    def write(self, frames: Tensor) -> None:
        """Append ``frames``, ``(F, 3, H, W)`` in [0, 1] on any device; waits while the queue is full.

        Raises:
            GeometryError: The frames do not have the size the writer was opened with.
            OutputError: The encoder died, the disk is full, or the writer is closed.
        """
        if self._closed:
            raise OutputError("write() after close(); open another writer.")
        if frames.ndim != 4 or tuple(frames.shape[1:]) != self._size or not frames.is_floating_point():
            _, height, width = self._size
            raise GeometryError(
                f"frames are {tuple(frames.shape)} of {frames.dtype}; "
                f"this writer takes (F, 3, {height}, {width}) of floats in [0, 1]."
            )
        for frame in _as_bytes(frames):
            while self._queue.qsize() >= self._waiting and self._failure is None:
                time.sleep(_POLL_SECONDS)
            if self._failure is not None:
                raise self._failure
            self._queue.put(frame)

    def close(self) -> None:
        """Write what waits and finish the output. A second call does nothing.

        Raises:
            OutputError: The encoder died or the disk is full.
        """
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join()
        try:
            self._sink.finish()
        except OutputError as error:
            self._failure = self._failure or error
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Trouble in closing must not hide an error that is already on its way up.
        try:
            self.close()
        except OutputError as failure:
            if error is None:
                raise
            if failure is not error:
                _log.warning("%s", failure)

    def _run(self) -> None:
        frames = iter(self._queue.get, None)
        try:
            for frame in frames:
                if frame.arrive is not None:
                    frame.arrive()
                self._sink.put(frame.picture)
                self._taken += 1
        except OutputError as error:
            self._failure = error
        except Exception as error:
            self._failure = OutputError(f"the video writer stopped after {self._taken} frames: {error!r}.")
            self._failure.__cause__ = error
        # Nobody may wait for ever for a place in the queue of a failed sink.
        deque(frames, maxlen=0)


def open_writer(
    path: OutputPath,
    *,
    width: int,
    height: int,
    fps: float = FPS,
    enlarge: int = 1,
    waiting: int = WAITING_FRAMES,
) -> Writer:
    """Return the writer that ``path`` asks for.

    A video is H.264 in an MP4 that grows while it is written and plays up to its last fragment after a kill.
    It appears with the first frame, in place of an earlier file of its name.

    Pictures are numbered from 0, and one that has its final name is whole. A folder that already holds such
    pictures is refused: a shorter sequence over a longer one would mix two videos.

    Args:
        path: ``name.mp4`` for a video; for pictures, a folder (it ends in ``/``, has no ending, or exists) or
            a pattern such as ``folder/frame_%06d.png``.
        width: Pixels of the frames that will be written, before enlarging.
        height: Pixels.
        fps: Frames per second; pictures carry none.
        enlarge: Side, in pixels, of the sharp-edged square each pixel becomes.
        waiting: Frames kept for a slow encoder before ``write`` waits.

    Raises:
        GeometryError: The size cannot be encoded.
        SettingsError: ``fps``, ``enlarge`` or ``waiting`` is impossible.
        OutputError: The path cannot be written, or the encoder is missing.
    """
    moving = is_video(path)
    _check_settings(width=width, height=height, fps=fps if moving else FPS, enlarge=enlarge, waiting=waiting)
    check_output(path)
    if moving:
        sink = Encoder(Path(path), width=width, height=height, fps=fps, enlarge=enlarge)
    else:
        sink = Pictures(*split_pattern(path), enlarge)
    return Writer(sink, width=width, height=height, waiting=waiting)


class Pictures:
    """Numbered PNG files in one folder."""

    def __init__(self, folder: Path, name: str, enlarge: int, *, first: int = 0) -> None:
        """Take where they go, how large each pixel becomes, and the number of the next."""
        self._folder = folder
        self._name = name
        self._enlarge = enlarge
        self._frames = first

    def put(self, picture: np.ndarray) -> None:
        """Write one frame, ``(H, W, 3)`` in bytes."""
        from PIL import Image

        final = self._folder / (self._name % self._frames)
        part = final.with_suffix(".part")
        large = picture.repeat(self._enlarge, axis=0).repeat(self._enlarge, axis=1)
        try:
            self._folder.mkdir(exist_ok=True)
            with part.open("wb") as file:
                # Level 1 is several times as fast as the default, and hardly larger.
                Image.fromarray(large).save(file, format="PNG", compress_level=1)
                file.flush()
                os.fsync(file.fileno())  # a run that goes on counts names: what has one has to be whole
            part.replace(final)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise unwritable(final, error) from error
        self._frames += 1

    def finish(self) -> None:
        """Nothing is left to do: every picture is complete by itself."""


def _as_bytes(frames: Tensor) -> Iterator[_Waiting]:
    """Round ``(F, 3, H, W)`` in [0, 1] to bytes on its device, fetch them, and deal them out one by one."""
    small = frames.detach().float().clamp(0, 1).mul_(255).round_().to(torch.uint8)
    small = small.permute(0, 2, 3, 1).contiguous()
    arrive = None
    if small.is_cuda:
        # Into pinned memory; the thread waits for the copy, so the caller can launch the next chunk at once.
        host = torch.empty(small.shape, dtype=small.dtype, pin_memory=True)
        host.copy_(small, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(small.device))
        small, arrive = host, copied.synchronize
    for picture in small.cpu().numpy():
        yield _Waiting(picture, arrive)


def _check_settings(*, width: int, height: int, fps: float, enlarge: int, waiting: int) -> None:
    if enlarge < 1 or waiting < 1:
        raise SettingsError(f"enlarge is {enlarge} and waiting is {waiting}; both must be at least 1.")
    if not 0 < fps < 1000:
        raise SettingsError(f"fps is {fps:g}; it must be above 0 and below 1000, e.g. {FPS}.")
    if width < 2 or height < 2 or width * enlarge % 2 or height * enlarge % 2:
        raise GeometryError(f"the video is {width}x{height} enlarged by {enlarge}; both sides must be even.")
