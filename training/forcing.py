"""Teacher forcing through the student's own cache: every chunk is denoised with the true past behind it.

The past is remembered by the same clean pass as at inference, and carries no gradient.

Legend: B clips, C channels, T latent frames, H and W latent height and width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sfpp_core.config import RolloutSettings
from sfpp_core.kv_cache import CacheShape, GradientKVCache
from sfpp_core.schedule import clean_from_velocity
from sfpp_core.student import BoundStudent
from training.config import ConfigError


def check_past(rollout: RolloutSettings) -> None:
    """Refuse a noise on the past in a stage that remembers true clips as they are.

    Raises:
        ConfigError: There is one.
    """
    if rollout.context_sigma:
        raise ConfigError(
            f"rollout.context_sigma is {rollout.context_sigma:g}, and this stage remembers the past without "
            "noise; leave it 0 here, and set it where the student is rolled out: in train_dmd or train_grpo."
        )


def forced_estimates(
    student: BoundStudent, shape: CacheShape, clean: Tensor, noisy: Tensor, sigmas: Sequence[float | Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield velocity and clean estimate of every chunk, each ``(B, C, chunk, H, W)``, oldest first.

    Args:
        student: The student, bound to its captions.
        shape: Size of its cache.
        clean: The true clips, ``(B, C, T, H, W)``: what each chunk finds as its past.
        noisy: What is denoised, same shape.
        sigmas: Share of noise of each chunk, the same for all clips or ``(B,)``.
    """
    cache, size = GradientKVCache(shape), shape.latent_frames_per_chunk
    pieces = zip(noisy.split(size, dim=2), clean.split(size, dim=2), sigmas, strict=True)
    for chunk, (noisy_chunk, clean_chunk, sigma) in enumerate(pieces):
        cache.open(chunk)
        velocity = student(noisy_chunk, sigma, cache)
        share = sigma.view(-1, 1, 1, 1, 1) if isinstance(sigma, Tensor) else sigma
        yield velocity, clean_from_velocity(noisy_chunk, velocity, share)
        if chunk + 1 < len(sigmas):
            student.remember(clean_chunk, cache)
            cache.close()


def spread_evenly(generator: torch.Generator, count: int) -> list[float]:
    """Return ``count`` numbers in (0, 1), spread evenly and in random order."""
    strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return strata[torch.randperm(count, generator=generator)].tolist()
