"""Clean chunks pulled towards the statistics of the first ones, against slow drift of colour and contrast.

Per channel, mean and standard deviation of a chunk move a share of the way ("strength") to those of the first
seconds. A chunk is anchored before it is remembered and before it is yielded, so the pull acts on what the
next chunks are made from. It knows nothing of what is shown: with a high strength a scene that should change
colour cannot. Off by default.

Legend: B batch, C channels, T latent frames, H and W latent height and width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from .errors import SettingsError
from .rollout import Finish

ANCHOR_CHUNKS = 7
"""Chunks that set the target: of three latent frames, five seconds of Wan 2.1."""

_LEAST_STD = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentStatistics:
    """Mean and standard deviation of latents over time and place."""

    mean: Tensor
    """``(B, C, 1, 1, 1)``, float64."""

    std: Tensor
    """``(B, C, 1, 1, 1)``, float64."""

    @classmethod
    def of(cls, latents: Tensor) -> "LatentStatistics":
        """Return the statistics of ``(B, C, T, H, W)``."""
        wide = latents.double()
        mean = wide.mean(dim=(2, 3, 4), keepdim=True)
        return cls(mean=mean, std=wide.std(dim=(2, 3, 4), correction=0, keepdim=True))


def anchored(clean: Tensor, target: LatentStatistics, strength: float) -> Tensor:
    """Return ``clean`` ``(B, C, T, H, W)`` with its statistics moved towards ``target``.

    Args:
        clean: Latents. They are returned themselves at strength 0.
        target: Where to.
        strength: Share of the way: 0 changes nothing, 1 gives the mean and deviation of the target. A channel
            that is constant keeps its deviation of 0.
    """
    if strength == 0:
        return clean
    own = LatentStatistics.of(clean)
    mean = torch.lerp(own.mean, target.mean.to(own.mean), strength)
    std = torch.lerp(own.std, target.std.to(own.std), strength)
    return ((clean.double() - own.mean) * (std / own.std.clamp(min=_LEAST_STD)) + mean).to(clean)


class Anchor:
    """Anchors the chunks of one video: the first ones pass and are learnt from, later ones are moved.

    All it knows is a function of the first chunks, so a run is resumed by giving them again, in order; what
    follows is then bit-identical.

    Use::

        anchor = Anchor(strength=0.3)
        for chunk in ...:
            clean = anchor(denoise_chunk(...))      # then yield it, and remember it
    """

    def __init__(self, *, strength: float, chunks: int = ANCHOR_CHUNKS, past: Iterable[Tensor] = ()) -> None:
        """Start a video, or go on with one.

        Args:
            strength: As for ``anchored``, 0 to 1.
            chunks: How many first chunks set the target.
            past: Chunks of this video that are already made, the first ones first; no more than ``chunks`` of
                them are looked at.

        Raises:
            SettingsError: A number is impossible.
        """
        if not 0 <= strength <= 1:
            raise SettingsError(f"the strength of the anchor is {strength:g}; use 0 (off) to 1.")
        if chunks < 1:
            raise SettingsError(f"the anchor learns from {chunks} chunks; use at least 1.")
        self._strength = strength
        self._wanted = chunks
        self._learnt = 0
        self._weight = 0
        self._mean: Tensor | None = None
        self._square: Tensor | None = None
        for clean in islice(past, chunks):
            self._learn(clean)

    def __call__(self, clean: Tensor) -> Tensor:
        """Return the next clean chunk ``(B, C, T, H, W)`` as it is to be remembered and shown."""
        if self._strength == 0:
            return clean
        if self._learnt < self._wanted:
            self._learn(clean)
            return clean
        assert self._mean is not None
        assert self._square is not None
        variance = (self._square - self._mean.square()).clamp(min=0)
        return anchored(clean, LatentStatistics(mean=self._mean, std=variance.sqrt()), self._strength)

    def _learn(self, clean: Tensor) -> None:
        """Add one chunk to the target; a longer one weighs more."""
        own, weight = LatentStatistics.of(clean), clean.shape[2]
        square = own.std.square() + own.mean.square()
        self._weight += weight
        self._learnt += 1
        if self._mean is None or self._square is None:
            self._mean, self._square = own.mean, square
        else:
            self._mean = torch.lerp(self._mean, own.mean, weight / self._weight)
            self._square = torch.lerp(self._square, square, weight / self._weight)


def anchoring(strength: float) -> Finish | None:
    """Return what anchors the chunks of one video after another, for ``LongSampler``; ``None`` at strength 0.

    It is shown every chunk of a video, in order; with chunk 0 it begins anew.

    Raises:
        SettingsError: The strength is impossible.
    """
    anchor = Anchor(strength=strength)

    def finish(chunk: int, clean: Tensor) -> Tensor:
        nonlocal anchor
        if chunk == 0:
            anchor = Anchor(strength=strength)
        return anchor(clean)

    return finish if strength else None
