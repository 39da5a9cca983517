"""Copies to main memory that make no GPU wait."""

from collections.abc import Callable

import torch
from torch import Tensor


def fetch(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Return ``tensor`` in main memory, and what waits until it is there.

    A tensor that is there already is returned as it is.
    """
    if not tensor.is_cuda:
        return tensor, lambda: None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))
    return host, copied.synchronize
