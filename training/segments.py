"""Which stretch of a rollout the teacher scores, and making it without remembering the rest.

A horizon of one segment is Self-Forcing (arXiv:2506.08009). A longer one is Self-Forcing++ (arXiv:2510.02283,
equations 1 and 2; the paper calls the segment a window): the rollout runs without a gradient to the start of
the segment, keeps one within it, and stops at its end, since what follows cannot change the loss.

Legend: B batch, C channels, T latent frames, H and W latent height and width.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sfpp_core.config import RolloutSettings
from sfpp_core.kv_cache import CacheShape, GradientKVCache, KVCache, RollingKVCache
from sfpp_core.noise import ChunkNoise
from sfpp_core.rollout import denoise_chunk, remember, rollout
from sfpp_core.schedule import FewStepSchedule, add_noise, clean_from_velocity
from sfpp_core.student import BoundStudent
from training.config import ConfigError

BackwardNoise = Literal["rollout", "finished"]
"""What the differentiated forward starts from, the two readings of Self-Forcing++'s equation 1.

``rollout``: the noisy chunk the rollout itself has at that step, as at inference. ``finished``: the chunk is
denoised to its end first, then noised to that step's sigma again (the paper's algorithm 1, by the letter).
"""

BEFORE = 2
"""Chunks before a segment that are kept: what a decoder needs to show the segment's first latent frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of one rollout, in chunks."""

    start: int
    """First chunk the teacher scores."""

    chunks: int
    """Chunks it scores."""

    exit_step: int
    """Denoising step that keeps the gradient, the same in every chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rolled:
    """A segment as the student made it."""

    clean: Tensor
    """``(B, C, T, H, W)``, with a gradient if gradients are on."""

    before: Tensor
    """The latent frames right before it, at most ``BEFORE`` chunks, ``(B, C, t, H, W)``; none at the start of
    a video. Without a gradient."""

    old: int = 0
    """Latent frames at the start of ``clean`` that an earlier update made, and that carry no gradient."""


def cut(x: Tensor, length: int) -> Tensor:
    """Return ``(B, C, T, H, W)`` as P clips of ``length`` latent frames, ``(B * P, C, length, H, W)``."""
    return x.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)


def check_rolling(rollout: RolloutSettings, longest: int) -> None:
    """Refuse windows that start anew in a stage whose window rolls on.

    Args:
        rollout: How the student is rolled out.
        longest: Latent frames of its longest rollout; one within the window is the same either way.

    Raises:
        ConfigError: They would start anew.
    """
    if rollout.overlap and longest > rollout.window:
        raise ConfigError(
            f"rollout.overlap is {rollout.overlap}, and a rollout of {longest} latent frames is trained on a "
            f"window that rolls; set it to 0, or roll out no more than the window, {rollout.window}."
        )


def draw_segment(
    rng: np.random.Generator,
    *,
    horizon: int,
    chunks: int,
    at_zero: float,
    steps: int,
    last_step_only: bool,
    beta: tuple[float, float] = (1.0, 1.0),
    given: int = 0,
) -> Segment:
    """Draw a segment of ``chunks`` from a rollout of ``horizon`` chunks.

    Args:
        rng: Source of the draw.
        horizon: Longest rollout, in chunks.
        chunks: Length of the segment, in chunks.
        at_zero: Share of segments that start at 0; the others start anywhere.
        steps: Denoising steps of the student.
        last_step_only: Keep the gradient at the last step, as Self-Forcing++ does, instead of a random one.
        beta: The Beta law of the others' place in the rollout: (1, 1) is uniform, (1, 2) prefers early ones.
        given: Chunks the others go on from, if these are given and not rolled out.
    """
    if rng.random() < at_zero:
        start = 0
    elif given:
        start = given
    else:
        start = min(int(rng.beta(*beta) * (horizon - chunks + 1)), horizon - chunks)
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
    backward_noise: BackwardNoise = "rollout",
    past: Tensor | None = None,
) -> Rolled:
    """Return the clean segment, with a gradient if gradients are on.

    Args:
        student: The student, bound to its prompts.
        noise: Source of all noise.
        schedule: The student's noise levels.
        shape: Size of its cache.
        segment: What to make.
        like: Tensor with the shape, device and dtype of one chunk.
        dtype: Dtype of the cache.
        backward_noise: What the differentiated forward starts from.
        past: All before the segment, ``(B, C, T, H, W)``, if the student shall go on from that; ``None``:
            from its own rollout.
    """
    ring = RollingKVCache(shape, batch=len(like), like=like.to(dtype))
    before: deque[Tensor] = deque([like[:, :, :0]], maxlen=BEFORE)
    if past is None:
        earlier = rollout(student, noise, schedule, ring, chunks=segment.start, like=like, keep_last=True)
    else:
        earlier = _remembered(student, noise, schedule, ring, past)
    with torch.no_grad():
        before.extend(earlier)
    memory = GradientKVCache.continuing(ring) if torch.is_grad_enabled() else ring
    made = differentiable_chunks(
        student, noise, schedule, memory, segment, like=like, backward_noise=backward_noise
    )
    return Rolled(clean=torch.cat(list(made), dim=2), before=torch.cat(list(before), dim=2))


def _remembered(
    student: BoundStudent, noise: ChunkNoise, schedule: FewStepSchedule, memory: RollingKVCache, past: Tensor
) -> Iterator[Tensor]:
    """Yield the chunks of ``past`` ``(B, C, T, H, W)``, remembered in ``memory`` as if they had been made."""
    for chunk, clean in enumerate(past.split(memory.shape.latent_frames_per_chunk, dim=2)):
        memory.open(chunk)
        remember(student, clean, noise, schedule, memory, chunk=chunk)
        yield clean


def differentiable_chunks(
    student: BoundStudent,
    noise: ChunkNoise,
    schedule: FewStepSchedule,
    memory: KVCache,
    segment: Segment,
    *,
    like: Tensor,
    backward_noise: BackwardNoise = "rollout",
    keep_last: bool = False,
) -> Iterator[Tensor]:
    """Yield the clean chunks of ``segment``, each with the gradient of one forward if gradients are on.

    Args:
        student: The student, bound to its prompts.
        noise: Source of all noise.
        schedule: The student's noise levels.
        memory: Memory that has closed every chunk before the segment.
        segment: What to make.
        like: Tensor with the shape, device and dtype of one chunk.
        backward_noise: What the differentiated forward starts from.
        keep_last: Remember the last chunk too, so that the memory can go on from it.
    """
    end, step = segment.start + segment.chunks, segment.exit_step
    if backward_noise == "rollout":
        yield from rollout(
            student,
            noise,
            schedule,
            memory,
            chunks=end,
            like=like,
            start=segment.start,
            exit_step=step,
            keep_last=keep_last,
        )
        return
    sigma = schedule.sigmas[step]
    for chunk in range(segment.start, end):
        memory.open(chunk)
        with torch.no_grad():
            finished = denoise_chunk(student, noise, schedule, memory, chunk=chunk, like=like)
        # The step after the last: noise that no step has used.
        fresh = noise.draw(tuple(like.shape), chunk=chunk, step=len(schedule.sigmas), like=like)
        noisy = add_noise(finished, fresh, sigma)
        yield clean_from_velocity(noisy, student(noisy, sigma, memory), sigma)
        if keep_last or chunk + 1 < end:
            remember(student, finished, noise, schedule, memory, chunk=chunk)
