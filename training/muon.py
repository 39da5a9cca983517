"""Muon on processors without bfloat16 products.

PyTorch's Muon makes each update orthogonal in bfloat16, which such a CPU imitates: one step of the demo's 40
matrices took fifteen seconds, and takes half a second in float32.

Source: Muon, K. Jordan et al. 2024; ``torch.optim.Muon``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from training.precision import narrow_on


class Muon(torch.optim.Muon):
    """PyTorch's Muon with its default rates; in float32 where the device has no bfloat16 products."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every matrix along its averaged gradient, made orthogonal."""
        if narrow_on(self.param_groups[0]["params"][0].device) == torch.bfloat16:
            return super().step(closure)
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            momentum = group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                average = state.setdefault("momentum_buffer", torch.zeros_like(matrix.grad))
                average.lerp_(matrix.grad, 1 - momentum)
                update = matrix.grad.lerp(average, momentum) if group["nesterov"] else average
                coefficients, steps = group["ns_coefficients"], group["ns_steps"]
                update = orthogonal(update, coefficients, steps=steps, eps=group["eps"])
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                rows, columns = matrix.shape
                matrix.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)
        return loss


def orthogonal(matrix: Tensor, coefficients: Sequence[float], *, steps: int, eps: float) -> Tensor:
    """Return about the orthogonal matrix nearest to ``matrix``, in its own dtype.

    Args:
        matrix: Two-dimensional.
        coefficients: Of the quintic Newton-Schulz iteration; its singular values end near 1, not at it.
        steps: Iterations.
        eps: Least norm divided by.
    """
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
