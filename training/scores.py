"""What the teacher and the critic say about a segment, each from the same noised copy of it.

Two kinds of score. Bidirectional: the whole segment at one sigma, as a clip of its own. Causal: each chunk at
a sigma of its own, given the student's own clean chunks before it in the segment. The divergence of two
causal models is a sum over chunks of what they disagree on given the same past, so the sum of these scores is
one of the whole segment; the past itself is data here, as in the rollout.

Either way positions start at 0 and nothing outside the segment is seen: the teacher judges what it knows, its
own horizon.

Legend: B clips, C channels, T latent frames, H and W latent height and width, P pieces of one sigma each: 1,
or the chunks of the segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sfpp_core.kv_cache import CacheShape
from sfpp_core.schedule import add_noise, clean_from_velocity, warp
from sfpp_core.student import BoundStudent
from training.forcing import forced_estimates, spread_evenly
from training.guidance import Guidance
from training.losses import guide
from training.segments import cut


class Role(Protocol):
    """A model that can be asked about captions: teacher or critic."""

    def bind(self, prompts: Sequence[str], *, dtype: torch.dtype | None = None) -> BoundStudent:
        """Return its velocity model for ``prompts``, one per clip."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """The law of the noise levels at which teacher and critic are asked: uniform, warped, clamped."""

    shift: float
    """Timestep shift; 5 in Self-Forcing."""

    least: float
    """Least sigma; 0.02 in Self-Forcing. Higher ones sharpen less."""

    largest: float
    """Largest sigma; 0.98 in Self-Forcing."""

    def of(self, uniform: float) -> float:
        """Return the sigma of a number drawn evenly from (0, 1)."""
        return min(max(warp(uniform, self.shift), self.least), self.largest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Noised:
    """A segment at random noise levels, without a gradient."""

    noisy: Tensor
    """``(B, C, T, H, W)``."""

    sigma: Tensor
    """``(B, 1, T, 1, 1)``; T may be 1."""

    noise: Tensor
    """``(B, C, T, H, W)``."""

    clean: Tensor
    """What was noised."""


class Scores(Protocol):
    """How teacher and critic are asked about a segment."""

    def noised(self, clean: Tensor, generator: torch.Generator) -> Noised:
        """Return ``clean`` ``(B, C, T, H, W)`` at random noise levels."""
        ...

    def velocity(self, role: Role, at: Noised, captions: Sequence[str], guidance: float = 1.0) -> Tensor:
        """Return the velocity of ``role``, ``(B, C, T, H, W)``; guidance is the conventional scale."""
        ...

    def pieces(self, x: Tensor) -> Tensor:
        """Return ``(B, C, T, H, W)`` cut into what has one sigma, ``(B * P, C, T / P, H, W)``."""
        ...

    def weights(self, clean: Tensor) -> Tensor | None:
        """Return how much each latent frame counts, ``(1, 1, T, 1, 1)``; ``None``: all the same."""
        ...


def estimate(scores: Scores, role: Role, at: Noised, captions: Sequence[str], guidance: float) -> Tensor:
    """Return the clean estimate of ``role``, ``(B, C, T, H, W)``."""
    return clean_from_velocity(at.noisy, scores.velocity(role, at, captions, guidance), at.sigma)


class WholeScores:
    """Scores of bidirectional roles: every clip of the batch at one sigma of its own."""

    def __init__(self, levels: Levels, *, apart: bool = False) -> None:
        """Take the law of the noise levels.

        Args:
            levels: The law.
            apart: Ask with and without the caption one after the other: half the memory, and no slower
                where one clip fills the device.
        """
        self.levels, self.apart = levels, apart

    def noised(self, clean: Tensor, generator: torch.Generator) -> Noised:
        """Return ``clean`` ``(B, C, T, H, W)`` at one random noise level per clip."""
        uniform = torch.rand(len(clean), generator=generator).tolist()
        sigma = torch.tensor([self.levels.of(number) for number in uniform])
        return _noised(clean, sigma.view(-1, 1, 1, 1, 1), generator)

    def velocity(self, role: Role, at: Noised, captions: Sequence[str], guidance: float = 1.0) -> Tensor:
        """Return the velocity of ``role``, ``(B, C, T, H, W)``, from one forward over the whole segment."""
        if self.apart and guidance != 1:
            conditional = self.velocity(role, at, captions)
            return guide(conditional, self.velocity(role, at, [""] * len(captions)), guidance)
        guided = Guidance(guidance)
        bound = role.bind(guided.captions(captions))
        return guided.of(bound.whole(guided.batch(at.noisy), guided.batch(at.sigma.view(-1, 1))))

    def pieces(self, x: Tensor) -> Tensor:
        """Return ``x``: a segment is one piece."""
        return x

    def weights(self, clean: Tensor) -> Tensor | None:  # noqa: ARG002 - the protocol's
        """Return ``None``: the whole segment is judged at once."""
        return None


class CausalScores:
    """Scores of causal roles: every chunk at a sigma of its own, given its clean past in the segment."""

    def __init__(self, levels: Levels, shape: CacheShape, *, opening: float = 1.0) -> None:
        """Take what the roles need.

        Args:
            levels: The law of the noise levels.
            shape: Size of the roles' cache.
            opening: How much a segment's first chunk counts against each other. It alone is judged without a
                past; of a chunk that goes on from a wrong past, the teacher asks only that it goes on.
        """
        self.levels, self.shape, self.opening = levels, shape, opening

    def noised(self, clean: Tensor, generator: torch.Generator) -> Noised:
        """Return ``clean`` ``(B, C, T, H, W)`` at one random noise level per chunk, spread over the law.

        Every chunk of every clip has a level of its own: what teacher and critic get wrong at one level they
        get wrong in all clips, and a batch at one level would take it for an exposure to correct.
        """
        chunk = self.shape.latent_frames_per_chunk
        chunks = clean.shape[2] // chunk
        uniform = spread_evenly(generator, len(clean) * chunks)
        sigma = torch.tensor([self.levels.of(number) for number in uniform]).view(len(clean), 1, chunks, 1, 1)
        return _noised(clean, sigma.repeat_interleave(chunk, dim=2), generator)

    def velocity(self, role: Role, at: Noised, captions: Sequence[str], guidance: float = 1.0) -> Tensor:
        """Return the velocity of ``role``, ``(B, C, T, H, W)``, chunk by chunk over its own memory."""
        guided = Guidance(guidance)
        bound = role.bind(guided.captions(captions))
        clean, noisy, sigma = map(guided.batch, (at.clean, at.noisy, at.sigma))
        sigmas = sigma.flatten(1)[:, :: self.shape.latent_frames_per_chunk].unbind(1)
        made = forced_estimates(bound, self.shape, clean, noisy, sigmas)
        return guided.of(torch.cat([velocity for velocity, _ in made], dim=2))

    def pieces(self, x: Tensor) -> Tensor:
        """Return the chunks of ``(B, C, T, H, W)`` as clips of their own, ``(B * P, C, chunk, H, W)``."""
        return cut(x, self.shape.latent_frames_per_chunk)

    def weights(self, clean: Tensor) -> Tensor | None:
        """Return ``opening`` for the first chunk, 1 for the others."""
        if self.opening == 1:
            return None
        weights = torch.ones(1, 1, clean.shape[2], 1, 1, device=clean.device)
        weights[:, :, : self.shape.latent_frames_per_chunk] = self.opening
        return weights


def _noised(clean: Tensor, sigma: Tensor, generator: torch.Generator) -> Noised:
    """Return ``clean`` at ``sigma``, without a gradient."""
    clean, sigma = clean.detach(), sigma.to(clean)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    return Noised(noisy=add_noise(clean, noise, sigma), sigma=sigma, noise=noise, clean=clean)
