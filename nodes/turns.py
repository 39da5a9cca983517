"""A video made and decoded chunk by chunk; where the GPU has no memory left, model and decoder take turns.

As long as there is room, both are on the GPU, so that neither waits. Where there is none, what was at work is
begun once more and goes on, with the decoder and what it remembers off the GPU while the model works, and the
model off it while the decoder does. That costs time and changes nothing else, unless a run goes on by
replaying a window alone. Where no decoder is at work, all but the model is taken off the GPU, once.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..sfpp_core.run.warm_up import WAN_REACH
from . import _host
from .lazy_latent import ChunkSource
from .tiles import Stream

KEPT = "The chunks made so far are kept: queue again and the video goes on. "
"""What becomes of the rest, wherever the room was lacking."""

LESS_FOR_THE_MODEL = (
    "What needs less, and makes another video: storage fp8, host or fp8-host in Cache Settings, a smaller "
    "window there, a smaller width or height."
)
"""What to change where the model found no room."""

LESS_FOR_THE_DECODER = (
    "What needs less: tile 256 on Decode to Video, a tiny VAE (taew2_1, lighttaew2_1), or decoder preview; "
    "the chunks are not made again."
)
"""What to change where the decoder found no room."""

logger = logging.getLogger(__name__)


class Turns:
    """One reading of a source, beside a decoder or none."""

    def __init__(
        self, source: ChunkSource, *, vae: Any = None, open_stream: Callable[[], Stream] | None = None
    ) -> None:
        """Take what is read, and what decodes it.

        Args:
            source: Where the chunks come from.
            vae: The host's VAE, or the demo's; ``None`` where none is at work.
            open_stream: Returns a fresh decoder, which knows nothing of the video.
        """
        self._source = source
        self._open = open_stream
        self._stream = None if open_stream is None else open_stream()
        self._beside: list[Any] = [] if vae is None else [vae.patcher]
        self._recent: deque[Tensor] = deque()
        self._taking_turns = False
        self._done = 0

    def chunks(self) -> Generator[Tensor]:
        """Yield the chunks of the source, ``(1, C, T, h, w)`` in the host's latents.

        Raises:
            torch.OutOfMemoryError: There was no room for the model a second time; the message says what to
                do.
        """
        try:
            yield from self._read()
            return
        except Exception as error:
            if not _host.lacks_memory(error):
                raise
            self._note(error, self._done + 1, LESS_FOR_THE_MODEL)
        # Outside of the handler: what the error holds on to would take the memory that is needed now.
        self._begin()
        try:
            yield from self._read()
        except Exception as error:
            if _host.lacks_memory(error):
                self._note(error, self._done + 1, LESS_FOR_THE_MODEL)
            raise

    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames ``(F, 3, H, W)`` of the next chunk.

        Raises:
            torch.OutOfMemoryError: There was no room for the decoder a second time; the message says what to
                do.
        """
        assert self._open is not None
        assert self._stream is not None
        try:
            return self._decode(chunk)
        except Exception as error:
            if not _host.lacks_memory(error):
                raise
            self._note(error, self._done, LESS_FOR_THE_DECODER)
        self._begin()
        self._stream = self._open()  # the other one may have stopped half way
        try:
            for before in self._recent:
                self._stream.decode(before)
            return self._decode(chunk)
        except Exception as error:
            if _host.lacks_memory(error):
                self._note(error, self._done, LESS_FOR_THE_DECODER)
            raise

    def _read(self) -> Generator[Tensor]:
        """Yield the chunks that were not yet handed on."""
        with closing(self._source.chunks(beside=self._beside)) as chunks:
            for chunk in islice(chunks, self._done, None):
                self._done += 1  # it is there, whatever becomes of it
                yield chunk

    def _decode(self, chunk: Tensor) -> Tensor:
        """Decode once, and remember the latents that a fresh decoder would have to see."""
        assert self._stream is not None
        if not self._taking_turns:
            frames = self._stream.decode(chunk)
        else:
            _host.make_room()
            frames = self._stream.decode(chunk)
            self._stream.park()
            _host.make_room()
        self._recent.append(chunk)
        # One more: the first latent frame a decoder sees is taken for the first of a video.
        while sum(part.shape[2] for part in self._recent) - self._recent[0].shape[2] > WAN_REACH:
            self._recent.popleft()
        return frames

    def _note(self, error: Exception, chunk: int, advice: str) -> None:
        """Say that there was no memory left at a chunk, counted from 1; the second time, as an error."""
        place = f"at chunk {chunk} of {self._source.total_chunks}"
        trouble = str(error).partition("\n")[0]
        alone = self._stream is None
        if self._taking_turns:
            tried = "the model was alone on it" if alone else "model and decoder took turns on it"
            raise torch.OutOfMemoryError(
                f"the GPU ran out of memory {place}, although {tried}. {KEPT}{advice}\n{trouble}"
            ) from error
        turns = "model and decoder take turns now, which is slower"
        said = f"The GPU ran out of memory {place}: {'all else is taken off it now' if alone else turns}"
        logger.warning("%s (%s).", said, trouble)
        _host.say(f"{said}.")

    def _begin(self) -> None:
        """Take turns from here on."""
        self._taking_turns = True
        self._beside.clear()
        if self._stream is not None:
            self._stream.park()
        _host.make_room()
