"""Which stretch of a rollout the teacher scores, and making it without remembering the rest.

A horizon of one segment is Self-Forcing (arXiv:2506.08009). A longer one is Self-Forcing++ (arXiv:2510.02283,
equations 1 and 2; the paper calls the segment a window): the rollout runs without a gradient to the start of
the segment, keeps one within it, and stops at its end, since what follows cannot change the loss.

Legend: B batch, C channels, T latent frames, H and W latent height and width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sfpp_core.kv_cache import CacheShape, GradientKVCache, RollingKVCache
from sfpp_core.noise import ChunkNoise
from sfpp_core.rollout import rollout
from sfpp_core.schedule import FewStepSchedule
from sfpp_core.student import BoundStudent


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of one rollout, in chunks."""

    start: int
    """First chunk the teacher scores."""

    chunks: int
    """Chunks it scores."""

    exit_step: int
    """Denoising step that keeps the gradient, the same in every chunk."""


def draw_segment(
    rng: np.random.Generator, *, horizon: int, chunks: int, at_zero: float, steps: int, last_step_only: bool
) -> Segment:
    """Draw a segment of ``chunks`` from a rollout of ``horizon`` chunks.

    Args:
        rng: Source of the draw.
        horizon: Longest rollout, in chunks.
        chunks: Length of the segment, in chunks.
        at_zero: Share of segments that start at 0; the others start anywhere, uniformly.
        steps: Denoising steps of the student.
        last_step_only: Keep the gradient at the last step, as Self-Forcing++ does, instead of a random one.
    """
    start = 0 if rng.random() < at_zero else int(rng.integers(horizon - chunks + 1))
    exit_step = steps - 1 if last_step_only else int(rng.integers(steps))
    return Segment(start=start, chunks=chunks, exit_step=exit_step)


def roll_segment(
    student: BoundStudent,
    noise: ChunkNoise,
    schedule: FewStepSchedule,
    shape: CacheShape,
    segment: Segment,
    *,
    like: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return the clean segment, ``(B, C, T, H, W)``, with a gradient if gradients are on.

    Args:
        student: The student, bound to its prompts.
        noise: Source of all noise.
        schedule: The student's noise levels.
        shape: Size of its cache.
        segment: What to make.
        like: Tensor with the shape, device and dtype of one chunk.
        dtype: Dtype of the cache.
    """
    ring = RollingKVCache(shape, batch=len(like), like=like.to(dtype))
    with torch.no_grad():
        for _ in rollout(student, noise, schedule, ring, chunks=segment.start, like=like, keep_last=True):
            pass
    end = segment.start + segment.chunks
    memory = GradientKVCache.continuing(ring) if torch.is_grad_enabled() else ring
    made = rollout(
        student,
        noise,
        schedule,
        memory,
        chunks=end,
        like=like,
        start=segment.start,
        exit_step=segment.exit_step,
    )
    return torch.cat(list(made), dim=2)
