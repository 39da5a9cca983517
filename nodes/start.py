"""What a video starts from: the latent of an image, of a clip, or of another sampler that is still at work.

Legend: C channels, T latent frames, h and w latent height and width.
"""

import logging
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from ..sfpp_core.errors import GeometryError
from ..sfpp_core.geometry import TEMPORAL_STRIDE, VideoGeometry
from ..sfpp_core.latent_space import WAN_2_2, LatentSpace
from .lazy_latent import ChunkSource, Finished, source_of

PIECE = 3
"""Latent frames of a start that are handed on at a time."""

logger = logging.getLogger(__name__)


def fitting(latent_frames: int, chunk: int) -> int:
    """Return how many of the first latent frames a video can start from: whole chunks, or one more.

    The one more is an image, or the first frame of a clip. With chunks of 3, of 20 latent frames 19 fit, and
    of 21, 22 and 1 all.
    """
    over = latent_frames % chunk
    return latent_frames if over <= 1 else latent_frames - over + 1


class Start:
    """The opening of a video: it is read like the rest, and then remembered."""

    def __init__(self, source: ChunkSource, *, chunk: int) -> None:
        """Take as much of ``source`` as fits into chunks of ``chunk`` latent frames."""
        self.source = source
        self.latent_frames = fitting(source.latent_frames, chunk)
        self.pieces = -(-self.latent_frames // PIECE)

    @classmethod
    def of(
        cls, latent: dict[str, Any], *, width: int, height: int, chunk: int, space: LatentSpace
    ) -> "Start":
        """Return the start that a LATENT holds.

        Args:
            latent: Of an image, of a clip, or of another sampler.
            width: Pixels of the video.
            height: Pixels of the video.
            chunk: Latent frames generated together.
            space: Where the latents of the model live.

        Raises:
            GeometryError: It is no latent of one image or clip for this model, or has another size than the
                video.
        """
        _check_mask(latent)
        source = source_of(latent)
        if source.space is not space:
            name = "Wan 2.2" if space is WAN_2_2 else "Wan 2.1"
            raise GeometryError(
                f"start has {source.space.channels} latent channels and the model {space.channels}; encode "
                f"the image or clip with the {name} VAE."
            )
        if source.size != (width, height):
            seen, wanted = "x".join(map(str, source.size)), f"{width}x{height}"
            raise GeometryError(
                f"start is {seen} and the video {wanted}; scale the image or clip to {wanted} "
                "before VAE Encode."
            )
        return cls(source, chunk=chunk)

    @property
    def frames(self) -> int:
        """Frames it decodes to."""
        return VideoGeometry.frames_of(self.latent_frames)

    @property
    def dropped(self) -> int:
        """Latent frames at its end that do not fit."""
        return self.source.latent_frames - self.latent_frames

    @property
    def kept(self) -> int:
        """Pieces that need not be made any more."""
        if isinstance(self.source, Finished):
            return self.pieces
        kept = self.source.kept  # of a run, the head of every file of it is read for this
        return self.pieces if kept >= self.source.total_chunks else min(self.pieces, kept)

    def chunks(self, *, beside: Sequence[Any] = ()) -> Generator[Tensor]:
        """Yield the start in pieces ``(1, C, T, h, w)`` of the host's latents, generating what is missing."""
        left, held = self.latent_frames, None
        with closing(self.source.chunks(beside=beside)) as chunks:
            for chunk in chunks:
                held = chunk if held is None else torch.cat((held, chunk), dim=2)
                while held.shape[2] >= min(PIECE, left) > 0:
                    piece, held = held.split((min(PIECE, left), held.shape[2] - min(PIECE, left)), dim=2)
                    left -= piece.shape[2]
                    yield piece


def _check_mask(latent: dict[str, Any]) -> None:
    """Refuse a latent that leaves some of its frames to be made; warn of any other mask."""
    mask = latent.get("noise_mask")
    if mask is None:
        return
    if mask.ndim == 5 and mask.amax() > 0:
        raise GeometryError(
            "start leaves frames open for a sampler to fill, as Wan22ImageToVideoLatent does; connect VAE "
            "Encode with the image itself."
        )
    logger.warning("start has a mask, which the Long Sampler does not use.")


def in_words(start: Start) -> str:
    """Return what a video starts from, for people."""
    text = "starts from an image" if start.frames == 1 else f"goes on after {start.frames} frames"
    if start.dropped:
        frames = TEMPORAL_STRIDE * start.dropped
        text += f"; the last {frames} frames of the clip are left out, as they fill no chunk"
    return text
