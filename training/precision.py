"""What networks compute in while they train: bfloat16, where the device has it in hardware, else float32.

A CPU without bfloat16 products (before AVX-512, on x86) imitates them, ten times slower than float32. Weights
that are trained, their gradients and averages are float32 either way.
"""

import logging
from functools import lru_cache

import torch

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What networks may compute in, by the names settings have for it."""

AUTO = "auto"
"""In a setting: what the device is fast in."""


def narrow_on(device: torch.device) -> torch.dtype:
    """Return the dtype that networks compute in on ``device``; for a dry run's, that of a GPU."""
    return torch.float32 if device.type == "cpu" and not _cpu_multiplies_bfloat16() else torch.bfloat16


def computed_in(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a setting, ``AUTO`` or one of ``DTYPES``."""
    return narrow_on(device) if name == AUTO else DTYPES[name]


def region(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the autocast region of ``dtype``; float32 has none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32)


@lru_cache
def _cpu_multiplies_bfloat16() -> bool:
    """Return whether oneDNN, which multiplies for PyTorch, has bfloat16 products on this CPU."""
    has = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not has:
        logger.info("this CPU has no bfloat16 products: networks compute in float32")
    return has
