"""How much memory a run will take, before any of it is allocated."""

import math
from dataclasses import dataclass

import torch

from .cache_shape import Bytes, CacheShape, StorageKind
from .checkpoint import parameter_shapes
from .config import RolloutSettings, StudentConfig
from .geometry import PATCH, VideoGeometry
from .machine import in_words

NO_BYTES = Bytes()
"""Of what a run does without."""

FLOAT32 = 4
"""Bytes of a number in single precision."""

DECODER_NUMBERS = 80
"""Numbers the demo's decoder holds per pixel of a latent frame at its widest place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Bytes a run will hold, on the device of the student and in main memory."""

    weights: int
    """Weights of the student."""

    cache: int
    """What the device holds of the keys and values of a full window. Does not depend on the length."""

    text: int
    """Keys and values of the prompt."""

    activations: int
    """Largest set of intermediate results alive at once; an estimate, see ``forecast``."""

    decoder: int
    """The decoder at work on one chunk; an estimate, see ``forecast``."""

    text_encoder: Bytes = NO_BYTES
    """The text encoder, which is gone before anything else is there."""

    cache_on_host: int = 0
    """What main memory holds of the keys and values of a full window."""

    @property
    def device(self) -> int:
        """Most bytes on the device at one time."""
        rollout = self.weights + self.cache + self.text + self.activations + self.decoder
        return max(rollout, self.text_encoder.device)

    @property
    def host(self) -> int:
        """Most bytes in main memory at one time, where the device is another place."""
        return max(self.cache_on_host, self.text_encoder.host)

    @property
    def total(self) -> int:
        """All of it together, for a device that is the main memory."""
        return self.device + self.host

    def __str__(self) -> str:
        size = in_words(self.device)
        if self.host:
            size += f" on the device and {in_words(self.host)} of main memory"
        rest = self.device - self.weights - self.cache
        return (
            f"{size} (weights {in_words(self.weights)}, cache {in_words(self.cache)}, "
            f"everything else {in_words(rest)})"
        )


def forecast(
    config: StudentConfig,
    geometry: VideoGeometry,
    settings: RolloutSettings,
    dtype: torch.dtype,
    *,
    storage: StorageKind = "plain",
    decoder: int | None = None,
    decoder_weights: int = 0,
    text_encoder: Bytes = NO_BYTES,
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
        storage: How keys and values are kept.
        decoder: Bytes of a decoder at work on one chunk, its weights included; ``None`` is the demo's.
        decoder_weights: Bytes of the demo decoder's weights.
        text_encoder: Bytes of the text encoder at work.
        attention_holds_scores: Whether the attention back end holds all scores at once, as ``matmul`` does.
    """
    size = dtype.itemsize
    shape = CacheShape.of(config, geometry, settings)
    cache = shape.bytes(storage, dtype)
    visible = shape.tokens if attention_holds_scores else 0
    pixels = (geometry.lead + geometry.chunk) * geometry.height * geometry.width
    return Forecast(
        weights=size * sum(math.prod(shape) for shape in parameter_shapes(config).values()),
        cache=cache.device,
        text=size * 2 * config.layers * config.text_length * config.dim,
        activations=_activations(config, shape.tokens_per_chunk, visible, size)
        + FLOAT32 * config.text_length * config.text_dim
        + size * (settings.steps + 1) * (6 * config.layers + 2) * config.dim,
        decoder=decoder_weights + 4 * DECODER_NUMBERS * pixels if decoder is None else decoder,
        text_encoder=text_encoder,
        cache_on_host=cache.host,
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
