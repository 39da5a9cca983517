"""Losses, as pure functions of tensors.

Legend: B batch, C channels, T latent frames, H and W latent height and width.
"""

import torch
from torch import Tensor

_LEAST_SCALE = 1e-3
"""Below this a student agrees with its teacher and the normalised gradient would blow up."""


def dmd_loss(clean: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Distribution-matching loss whose gradient is the normalised score difference.

    DMD, arXiv:2311.18828, equations 7 and 8.

    Args:
        clean: Student sample that keeps a gradient, ``(B, C, T, H, W)``.
        real: Teacher's estimate of it from a noised copy, same shape.
        fake: Critic's estimate of it from the same noised copy, same shape.

    Returns:
        Scalar. Its value means nothing; its gradient is ``(fake - real) / scale`` over the numbers of
        ``clean``.
    """
    scale = (clean - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp_min(_LEAST_SCALE)
    target = (clean - (fake - real) / scale).detach()
    return 0.5 * torch.nn.functional.mse_loss(clean, target)


def velocity_loss(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Return the flow-matching error: mean square of ``velocity - (noise - clean)``."""
    return torch.nn.functional.mse_loss(velocity, noise - clean)
