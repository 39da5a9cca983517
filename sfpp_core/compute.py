"""Where a run computes, in what dtype, and with how many threads."""

import torch

from .errors import SettingsError
from .request import DTYPES

SMALL_WORK = 2**17
"""Numbers in the residual stream of a chunk below which a second CPU thread costs more than it helps: threads
wait for each other hundreds of times a chunk, and the encoder wants a core of its own."""


def device_named(name: str) -> torch.device:
    """Return the device called ``name``.

    Raises:
        SettingsError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise SettingsError(f"device is {name!r}; use auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device is 'cuda', but PyTorch finds no NVIDIA GPU here; use 'cpu' or 'auto'.")
    return torch.device(name)


def dtype_named(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called ``name``."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise SettingsError(f"dtype is {name!r}; use auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def decoder_dtype(device: torch.device) -> torch.dtype:
    """Return what decoders compute in: the autoencoders of Wan were made for half precision on a GPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def tiles_rest_on(device: torch.device) -> str | None:
    """Return where the memory of the tiles not at work is kept: off a GPU, where room is short."""
    return None if device.type == "cpu" else "cpu"


def threads_for(threads: int | None, numbers: int) -> int:
    """Return the CPU threads to compute with, for a residual stream of so many numbers per chunk."""
    if threads is None:
        return 1 if numbers < SMALL_WORK else torch.get_num_threads()
    if threads < 1:
        raise SettingsError(f"threads is {threads}; use at least 1.")
    return threads
