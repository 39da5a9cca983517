"""Digests that know a loaded model, and what LoRA adds to it, by their numbers: the same after a restart."""

from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from . import _host

SAMPLES = 64
"""Numbers of each tensor that are read, evenly spread. Two trainings of one model differ in all of them."""


def student_fingerprint(model: Any) -> str:
    """Return a digest of the weights of a loaded MODEL, as they are without its LoRAs."""
    digest = blake2b(digest_size=8)
    for name, tensor in _host.own_weights(model):
        _feed(digest, (name, tensor))
    return digest.hexdigest()


def patches_fingerprint(model: Any) -> str:
    """Return a digest of what LoRA loaders and their kin add to a MODEL; empty where nothing is added."""
    patches = _host.patches(model)
    digest = blake2b(digest_size=8)
    for name in sorted(patches):
        _feed(digest, (name, patches[name]))
    return digest.hexdigest() if patches else ""


def latents_fingerprint(latents: Tensor) -> str:
    """Return a digest of all numbers of a latent or an embedding."""
    digest = blake2b(str((tuple(latents.shape), latents.dtype)).encode(), digest_size=6)
    digest.update(_bytes(latents.detach()))
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Add a value to a digest: a tensor by samples, a container by what it holds, the rest by its text."""
    if isinstance(value, Tensor):
        # A quantised tensor of the host keeps its numbers in another; those of GGUF say another shape.
        plain = getattr(value, "_qdata", value).detach().as_subclass(Tensor)
        flat = plain.reshape(-1)
        digest.update(f"{tuple(plain.shape)} {plain.dtype}".encode())
        digest.update(_bytes(flat[:: max(1, len(flat) // SAMPLES)]))
    elif isinstance(value, dict):
        _feed(digest, sorted(value.items()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            _feed(digest, part)
        digest.update(b"end")
    elif (weights := getattr(value, "weights", None)) is not None:  # of one matrix, in the host's class
        _feed(digest, (type(value).__name__, weights))
    elif callable(value):
        digest.update(getattr(value, "__qualname__", type(value).__name__).encode())
    else:
        digest.update(repr(value).encode())


def _bytes(tensor: Tensor) -> bytes:
    """Return the numbers of a tensor, bit by bit."""
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
