"""What a run will take of the host's memory, before any of it is allocated."""

import math
from dataclasses import dataclass
from typing import Any

from ..sfpp_core.config import RolloutSettings, StudentConfig
from ..sfpp_core.forecast import forecast
from ..sfpp_core.geometry import VideoGeometry
from ..sfpp_core.machine import in_words
from . import _host

FLOAT32 = 4
"""Bytes of a number of a latent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """Bytes a run takes beside the weights, which are the host's."""

    activations: float
    """Intermediate results of one forward: the larger of the host's estimate and this package's."""

    remembered: int
    """Keys and values of a full window, and of the text. Does not depend on the length of the video."""

    latents: int
    """Finished latents, in main memory."""

    def __str__(self) -> str:
        return (
            f"{in_words(self.remembered + self.activations)} beside the weights "
            f"({in_words(self.remembered)} of it to remember), {in_words(self.latents)} of main memory"
        )


def memory_needed(
    model: Any, config: StudentConfig, geometry: VideoGeometry, settings: RolloutSettings
) -> Needed:
    """Return what a rollout over the layers of ``model`` takes."""
    ours = forecast(config, geometry, settings, _host.compute_dtype(model))
    theirs = _host.activation_bytes(model, (1, config.channels, *geometry.chunk_shape))
    latents = geometry.chunks * config.channels * math.prod(geometry.chunk_shape) * FLOAT32
    return Needed(
        activations=max(theirs, ours.activations), remembered=ours.cache + ours.text, latents=latents
    )
