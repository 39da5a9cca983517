"""Noise levels of the few-step student, and the two identities of flow matching.

``sigma`` is the share of noise in a sample: 1 is pure noise, 0 is clean.
Few-step sampling as in Self-Forcing, arXiv:2506.08009.
"""

from dataclasses import dataclass

from torch import Tensor

from .errors import SettingsError


def warp(sigma: float, shift: float) -> float:
    """Move a noise level towards 1 by ``shift`` (1 changes nothing)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def add_noise(clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Return the sample at ``sigma`` on the straight line from ``clean`` to ``noise``."""
    return (1 - sigma) * clean + sigma * noise


def clean_from_velocity(noisy: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """Return the clean estimate, given ``velocity = noise - clean`` at ``noisy``."""
    return noisy - sigma * velocity


def check_context_sigma(sigma: float) -> None:
    """Refuse a noise of the past that cannot be.

    Raises:
        SettingsError: It is not from 0 to below 1.
    """
    if not 0 <= sigma < 1:
        raise SettingsError(f"context_sigma is {sigma:g}; it must be from 0 to below 1, e.g. 0 or 0.1.")


@dataclass(frozen=True, slots=True)
class FewStepSchedule:
    """Noise levels visited while one chunk is denoised, largest first, and the one it is remembered at."""

    sigmas: tuple[float, ...]
    """Strictly decreasing, first 1. Never contains 0: the last estimate is the result."""

    context_sigma: float = 0.0
    """Share of noise, from 0 to below 1, under which the past is remembered."""

    def __post_init__(self) -> None:
        check_context_sigma(self.context_sigma)
        falling = all(a > b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False))
        if not self.sigmas or self.sigmas[0] != 1 or self.sigmas[-1] <= 0 or not falling:
            raise SettingsError(f"sigmas must fall from 1 and stay above 0, got {self.sigmas}.")

    @classmethod
    def uniform(cls, steps: int = 4, *, shift: float = 5.0) -> "FewStepSchedule":
        """Return ``steps`` equal steps from 1 to 0, warped by ``shift``.

        Four steps at shift 5 are the timesteps 1000, 937.5, 833.33 and 625 of Self-Forcing.
        """
        return cls(tuple(warp(1 - step / steps, shift) for step in range(steps)))
