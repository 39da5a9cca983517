"""What the user sees while a video is made: bar, text, and the latest chunk as a picture that moves."""

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from . import _host
from .animation import animated, small

SECONDS_BETWEEN_UPDATES = 0.25
"""A fast run would otherwise keep the server busy with news nobody can tell apart."""

SECONDS_BETWEEN_PREVIEWS = 0.75
"""Shortest time from one animation to the next: as long as one of them runs."""

SHARE = 0.05
"""Of the time, that one CPU core works on animations; the next one waits accordingly."""

logger = logging.getLogger(__name__)


class Progress:
    """What the user sees while a video is read: bar and text on the node at work, preview on its maker.

    A node that ends with a video of its own must show no preview: frontends would keep that instead.
    Animations are encoded by a thread, so that nothing waits for them; there are none if the user wants none.

    Use::

        with Progress(chunks, sampler) as progress:
            progress.show(1, "chunk 1 of 80", lambda: (frames, 16))
    """

    def __init__(self, total: int, maker: str | None = None) -> None:
        """Open a progress bar of ``total`` ticks.

        Args:
            total: Ticks.
            maker: Id of the node that made what is being read, if it should show bar and preview as well.
        """
        self._bar = _host.progress_bar(total)
        self._total = total
        self._maker = maker
        self._shown = self._next_preview = -math.inf
        self._previews = maker is not None and _host.previews_wanted()
        self._done = 0
        self._thread = ThreadPoolExecutor(1, "sfpp_preview")
        self._encoding: Future[float] | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        self._settle()
        if self._maker is not None:
            _host.finish_progress(self._maker)

    def show(
        self, done: int, text: str, frames: Callable[[], tuple[Tensor, float] | None] | None = None
    ) -> None:
        """Set the bar, the text and the preview, a few times a second at most.

        Args:
            done: Ticks done.
            text: One line.
            frames: Gives what the preview shows, ``(F, 3, H, W)`` in [0, 1], and how many frames a second
                has; asked for where there is time to show it. ``None`` where there is nothing to see.

        Raises:
            The host's interrupt, if the user pressed Cancel.
        """
        _host.stop_if_cancelled()
        self._done = done
        if done == self._total or time.monotonic() - self._shown >= SECONDS_BETWEEN_UPDATES:
            self._shown = time.monotonic()
            _host.say(text)
            self._bar.update_absolute(done, self._total)
            if self._maker is not None:
                _host.show_progress(self._maker, done, self._total)
        # After the bar, which adds the node to the host's list: no thread may while that list is read.
        if frames is not None:
            self._preview(frames)

    def _preview(self, frames: Callable[[], tuple[Tensor, float] | None]) -> None:
        """Have the preview made, if it is wanted and its time has come."""
        self._settle()
        start, last = time.monotonic(), self._done == self._total
        due = self._encoding is None and start >= self._next_preview
        if not self._previews or not (due or last):  # the last chunk stays to be seen
            return
        self._next_preview = start + SECONDS_BETWEEN_PREVIEWS
        if (found := frames()) is not None:
            self._encoding = self._thread.submit(self._encode, *found, start)

    @torch.inference_mode()
    def _encode(self, frames: Tensor, fps: float, start: float) -> float:
        """Encode and show an animation; return when the next one may be begun."""
        assert self._maker is not None
        picture = animated(*small(frames, fps))
        _host.show_progress(self._maker, self._done, self._total, picture)
        return start + (time.monotonic() - start) / SHARE

    def _settle(self) -> None:
        """Take note of a preview that is finished."""
        if self._encoding is None or not self._encoding.done():
            return
        encoding, self._encoding = self._encoding, None
        if error := encoding.exception():
            logger.warning("There are no previews: %s", error)
            self._previews = False
        else:
            self._next_preview = max(self._next_preview, encoding.result())


def replaying(kept: int, origin: str) -> Callable[[int], None]:
    """Return what is told of every chunk of the past, by its number, that is remembered again, and says so.

    Args:
        kept: Chunks that are there.
        origin: Where they come from, for people; empty where they are in memory.
    """
    shown = time.monotonic()  # where it takes no time, nothing is said

    def tell(chunk: int) -> None:
        nonlocal shown
        if chunk < kept and time.monotonic() - shown >= SECONDS_BETWEEN_UPDATES:
            shown = time.monotonic()
            _host.say(f"replaying chunk {chunk + 1} of {kept}" + (f" of {origin}" if origin else ""))

    return tell
