"""Losses, as pure functions of tensors.

Legend: B batch, C channels, T latent frames, H and W latent height and width.
"""

from torch import Tensor

_LEAST_SCALE = 1e-3
"""Below this a student agrees with its teacher and the normalised gradient would blow up."""


def dmd_loss(
    clean: Tensor, real: Tensor, fake: Tensor, mask: Tensor | None = None, *, overall: float = 0.0
) -> Tensor:
    """Distribution-matching loss whose gradient is the normalised score difference.

    DMD, arXiv:2311.18828, equations 7 and 8.

    Args:
        clean: Student sample that keeps a gradient, ``(B, C, T, H, W)``.
        real: Teacher's estimate of it from a noised copy, same shape.
        fake: Critic's estimate of it from the same noised copy, same shape.
        mask: ``(B, 1, T, 1, 1)``, B may be 1: how much the loss counts, 0 where it does not. ``None``: all
            counts the same.
        overall: Extra weight of what each clip's score difference has in common over place and time: the
            gradient is ``x + overall * mean(x)`` for a score difference ``x``. Zero where the method is
            meant as published.

    Returns:
        Scalar. Its value means nothing; its gradient is ``(fake - real) / scale`` over the numbers of
        ``clean`` that count. The scale is that of the whole sample, whatever counts.
    """
    scale = (clean - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp_min(_LEAST_SCALE)
    difference = (fake - real) / scale
    if overall:
        difference = difference + overall * _mean_of_clips(difference, mask)
    target = (clean - difference).detach()
    return 0.5 * _mean((clean - target).square(), mask)


def velocity_loss(velocity: Tensor, clean: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the flow-matching error: mean square of ``velocity - (noise - clean)``, weighed by ``mask``."""
    return _mean((velocity - (noise - clean)).square(), mask)


def overall_loss(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Return the flow-matching error of each clip's mean over place and time.

    It has the same minimum as ``velocity_loss``, which hardly feels it: a clip's exposure is one number among
    thousands.

    Args:
        velocity: ``(B, C, T, H, W)``; each clip has one sigma.
        clean: What was noised, same shape.
        noise: Same shape.
    """
    return _mean_of_clips(velocity - (noise - clean)).square().mean()


def _mean_of_clips(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of each clip ``(B, C, T, H, W)`` where ``mask`` counts, ``(B, C, 1, 1, 1)``."""
    dims = (2, 3, 4)
    if mask is None:
        return x.mean(dims, keepdim=True)
    return (x * mask).sum(dims, keepdim=True) / mask.expand_as(x).sum(dims, keepdim=True).clamp_min(1)


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of ``x`` where ``mask`` counts."""
    if mask is None:
        return x.mean()
    return (x * mask).sum() / mask.expand_as(x).sum().clamp_min(1)


def guide(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Return the velocity under classifier-free guidance of the conventional scale: 1 is none.

    Wan and Self-Forcing's sampler use the same scale. Self-Forcing's trainer writes a guidance of 4 as 3:
    ``conditional + 3 * (conditional - unconditional)``.
    """
    return unconditional + guidance * (conditional - unconditional)
