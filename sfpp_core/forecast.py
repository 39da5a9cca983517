"""How much memory a run will take, before any of it is allocated."""

import math
from dataclasses import dataclass

import torch

from .checkpoint import parameter_shapes
from .config import RolloutSettings, StudentConfig
from .geometry import PATCH, VideoGeometry
from .kv_cache import CacheShape
from .machine import in_words

FLOAT32 = 4
"""Bytes of a number in single precision."""

DECODER_NUMBERS = 80
"""Numbers the demo's decoder holds per pixel of a latent frame at its widest place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Bytes a run will hold, on the device of the student."""

    weights: int
    """Weights of the student."""

    cache: int
    """Keys and values of a full window. Does not depend on the length of the video."""

    text: int
    """Keys and values of the prompt."""

    activations: int
    """Largest set of intermediate results alive at once; an estimate, see ``forecast``."""

    decoder: int
    """The decoder at work on one chunk; an estimate, see ``forecast``."""

    @property
    def total(self) -> int:
        """All of it together."""
        return self.weights + self.cache + self.text + self.activations + self.decoder

    def __str__(self) -> str:
        rest = self.total - self.weights - self.cache
        return (
            f"{in_words(self.total)} (weights {in_words(self.weights)}, cache {in_words(self.cache)}, "
            f"everything else {in_words(rest)})"
        )


def forecast(
    config: StudentConfig,
    geometry: VideoGeometry,
    settings: RolloutSettings,
    dtype: torch.dtype,
    *,
    decoder_weights: int = 0,
    attention_holds_scores: bool = False,
) -> Forecast:
    """Forecast the memory of a run of batch 1.

    Weights, cache and text keys are exact. Activations are counted at the widest place of a layer, with the
    text embeddings and one modulation per sigma; the decoder at the widest place of the demo's, its two
    colour fields at full size.

    Args:
        config: Architecture of the student.
        geometry: Size of the video.
        settings: How the student is rolled out.
        dtype: Compute dtype of the student.
        decoder_weights: Bytes of the decoder's weights.
        attention_holds_scores: Whether the attention back end holds all scores at once, as ``matmul`` does.
    """
    size = dtype.itemsize
    shape = CacheShape.of(config, geometry, settings)
    moves = settings.sink_positions == "relative"
    kept_twice = settings.sink_chunks / settings.window_chunks / 2 if moves else 0
    visible = shape.window * shape.tokens_per_chunk if attention_holds_scores else 0
    pixels = geometry.chunk * geometry.height * geometry.width
    return Forecast(
        weights=size * sum(math.prod(shape) for shape in parameter_shapes(config).values()),
        cache=size * int(shape.numbers * (1 + kept_twice)),
        text=size * 2 * config.layers * config.text_length * config.dim,
        activations=_activations(config, shape.tokens_per_chunk, visible, size)
        + FLOAT32 * config.text_length * config.text_dim
        + size * (settings.steps + 1) * (6 * config.layers + 2) * config.dim,
        decoder=decoder_weights + 4 * DECODER_NUMBERS * pixels,
    )


def _activations(config: StudentConfig, tokens: int, scores: int, size: int) -> int:
    """Return the bytes alive at the widest place of a layer: feed-forward, rotation of queries, or attention.

    Beside these stand the residual stream, its modulated copy and the queries; the rotations (complex64); and
    in float32 the latents, with the noise and the estimates of one step.

    Args:
        config: Architecture of the student.
        tokens: Tokens of one chunk.
        scores: Keys whose scores attention holds at once, per head and query.
        size: Bytes of a number.
    """
    feed_forward = size * (7 * config.dim + 2 * config.ffn_dim)
    turning = size * 5 * config.dim + FLOAT32 * 4 * config.dim
    attention = size * (6 * config.dim + 2 * config.heads * scores)
    latents = FLOAT32 * 6 * PATCH**2 * config.channels
    rotations = 2 * FLOAT32 * config.head_dim // 2
    return tokens * (max(feed_forward, turning, attention) + latents + rotations)
