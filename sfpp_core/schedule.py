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


@dataclass(frozen=True, slots=True)
class FewStepSchedule:
    """Noise levels visited while one chunk is denoised, largest first."""

    sigmas: tuple[float, ...]
    """Strictly decreasing, first 1. Never contains 0: the last estimate is the result."""

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False))
        if not self.sigmas or self.sigmas[0] != 1 or self.sigmas[-1] <= 0 or not falling:
            raise SettingsError(f"sigmas must fall from 1 and stay above 0, got {self.sigmas}.")

    @classmethod
    def uniform(cls, steps: int = 4, *, shift: float = 5.0) -> "FewStepSchedule":
        """Return ``steps`` equal steps from 1 to 0, warped by ``shift``.

        Four steps at shift 5 are the timesteps 1000, 937.5, 833.33 and 625 of Self-Forcing.
        """
        return cls(tuple(warp(1 - step / steps, shift) for step in range(steps)))
