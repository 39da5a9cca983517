"""How the CPU multiplies."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import linear

_LARGEST_ERROR = 2e-6
"""Largest error of a float32 product, over its largest entry, that still counts as single precision."""

_PROBED = ((256, 256, 256), (48, 256, 1024), (48, 1024, 256))
"""Rows, inputs and outputs of the products compared: a square one, and the demo's feed-forward on a chunk."""


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Let float32 matrix products on a CPU take the faster of PyTorch's two ways, where it is as exact.

    The switch that does so also permits bfloat16 products on CPUs that have them in hardware. So a few
    products are compared with float64 first, and where one lost precision the switch stays as it was. Other
    devices are left alone.
    """
    before = torch.get_float32_matmul_precision()
    try:
        if device.type == "cpu":
            torch.set_float32_matmul_precision("medium")
            if _product_error() > _LARGEST_ERROR:
                torch.set_float32_matmul_precision(before)
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _product_error() -> float:
    """Return the largest error of a few float32 products on the CPU, each over its largest entry."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(256 * 1024, generator=generator)
    errors = []
    for rows, inputs, outputs in _PROBED:
        x = numbers[: rows * inputs].view(rows, inputs)
        weight = numbers[: outputs * inputs].view(outputs, inputs)
        exact = linear(x.double(), weight.double())
        errors.append((linear(x, weight) - exact).abs().max() / exact.abs().max())
    return max(errors).item()
