"""Reproducible noise: a function of seed, chunk and step, never of call order."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor


class NoiseSource(Protocol):
    """Where a rollout takes its noise from."""

    def draw(self, shape: tuple[int, ...], *, chunk: int, step: int, like: Tensor) -> Tensor:
        """Return standard normal noise of ``shape`` on the device and dtype of ``like``."""
        ...


@dataclass(frozen=True, slots=True)
class ChunkNoise:
    """Noise source of one rollout.

    Chunk 40 gets the same noise whether the rollout started at 0 or resumed at 40,
    on any device: the draw is made on the CPU, then moved.
    """

    seed: int

    first: int = 0
    """Chunk of the video that this source calls chunk 0."""

    def draw(self, shape: tuple[int, ...], *, chunk: int, step: int, like: Tensor) -> Tensor:
        """Return standard normal noise of ``shape`` on the device and dtype of ``like``."""
        # The CPU generator reads only the low 32 bits of its seed, so the key is hashed into them.
        key = blake2b(f"{self.seed}/{self.first + chunk}/{step}".encode(), digest_size=4)
        generator = torch.Generator().manual_seed(int.from_bytes(key.digest(), "little"))
        # From pinned memory a copy to the GPU makes nobody wait.
        return torch.randn(shape, generator=generator, pin_memory=like.is_cuda).to(like, non_blocking=True)
