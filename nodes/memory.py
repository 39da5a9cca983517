"""What a run will take of the host's memory, before any of it is allocated.

The host's own estimate knows neither the cache nor how attention is computed here, so it is not asked.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from ..sfpp_core.cache_shape import StorageKind
from ..sfpp_core.config import RolloutSettings, StudentConfig
from ..sfpp_core.forecast import forecast
from ..sfpp_core.geometry import VideoGeometry
from ..sfpp_core.machine import in_words
from . import _host

FLOAT32 = 4
"""Bytes of a number of a latent."""


class Run(Protocol):
    """What of a run decides how much memory it takes."""

    geometry: VideoGeometry
    settings: RolloutSettings
    storage: StorageKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """Bytes a run takes beside the weights, which are the host's."""

    activations: int
    """Intermediate results of one forward."""

    remembered: int
    """Keys and values of a full window, and of the text. Does not depend on the length of the video."""

    main: int
    """Main memory: finished latents, and the part of the cache that was put there."""

    def __str__(self) -> str:
        return (
            f"{in_words(self.remembered + self.activations)} beside the weights, "
            f"{in_words(self.main)} of main memory"
        )


def memory_needed(model: Any, config: StudentConfig, run: Run) -> Needed:
    """Return what a rollout over the layers of ``model`` takes."""
    ours = forecast(config, run.geometry, run.settings, _host.compute_dtype(model), storage=run.storage)
    geometry = run.geometry
    pixels = geometry.latent_frames * math.prod(geometry.chunk_shape[1:])
    return Needed(
        activations=ours.activations,
        remembered=ours.cache + ours.text,
        main=ours.cache_on_host + pixels * config.channels * FLOAT32,
    )
