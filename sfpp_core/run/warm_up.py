"""How far back a decoder sees: what it must be shown again before it goes on in the middle of a video.

All of them are convolutions that look back in time, so what they remember depends on the last latent frames
alone. Shown those, they draw what follows bit for bit as if they had seen all.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..decoder import DecoderInfo, StreamingDecoder
from ..taehv import TinySizes
from ..tiny_autoencoder import AutoencoderConfig
from ..wan_autoencoder import WanSizes

WAN_REACH = 40
"""Latent frames that Wan's decoder looks back, rounded up: 2 per convolution over time, of which 12 lie where
there is one frame per latent frame, 7 where there are two and 13 where there are four."""

TINY_REACH = 10
"""Latent frames that a tiny decoder for Wan looks back: one per remembering unit, and the first of all."""


def reach_of(decoder: DecoderInfo) -> int:
    """Return how many latent frames a decoder looks back."""
    match decoder.sizes:
        case AutoencoderConfig(units=units):
            return 2 * units + 1
        case WanSizes():
            return WAN_REACH
        case TinySizes():
            return TINY_REACH
        case _:
            return 0


def warm_up(
    decoder: StreamingDecoder, latents: Callable[[int], Tensor], *, chunk: int, reach: int, per_chunk: int
) -> None:
    """Bring a decoder to where it is before it decodes ``chunk``.

    Args:
        decoder: Forgets what it has seen.
        latents: Gives the latents of a chunk.
        chunk: What comes next.
        reach: Latent frames it looks back.
        per_chunk: Latent frames of a chunk.
    """
    decoder.reset()
    # One more: the first latent frame after a reset is taken for the first of a video.
    chunks = -(-(reach + 1) // per_chunk) if chunk else 0
    with torch.inference_mode():
        for before in range(max(0, chunk - chunks), chunk):
            decoder.decode(latents(before))
