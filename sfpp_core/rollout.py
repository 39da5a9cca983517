"""The rollout: a video as a chain of chunks, each denoised from noise given the past.

One loop for inference and for training, so that the student is trained on exactly what
it will be asked to do (Self-Forcing, arXiv:2506.08009; long horizons, arXiv:2510.02283).

Legend: B batch, C channels, T latent frames of a chunk, H and W latent height and width.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from .kv_cache import KVCache
from .noise import NoiseSource
from .schedule import FewStepSchedule, add_noise, clean_from_velocity


class Student(Protocol):
    """A causal video model, bound to its conditioning."""

    def __call__(self, noisy: Tensor, sigma: float, cache: KVCache) -> Tensor:
        """Return the velocity at ``noisy`` ``(B, C, T, H, W)``, writing its keys to ``cache``."""
        ...

    def remember(self, clean: Tensor, cache: KVCache, *, sigma: float = 0.0) -> None:
        """Write the keys of ``clean`` ``(B, C, T, H, W)``, at ``sigma``, as the past of later chunks."""
        ...


Finish = Callable[[int, Tensor], Tensor]
"""Maps a clean chunk, given its number, before it is shown and remembered."""


def denoise_chunk(
    student: Student,
    noise: NoiseSource,
    schedule: FewStepSchedule,
    cache: KVCache,
    *,
    chunk: int,
    like: Tensor,
    exit_step: int | None = None,
) -> Tensor:
    """Denoise the chunk that is open in ``cache``.

    Args:
        student: Velocity model.
        noise: Source of the initial noise and of the noise added between steps.
        schedule: Noise levels to visit.
        cache: Memory with this chunk open.
        chunk: Index of the chunk in the video.
        like: Any tensor with the shape, device and dtype of the result.
        exit_step: Step whose estimate is returned, and the only one that keeps a gradient.
            ``None`` runs every step, as inference does.

    Returns:
        Clean estimate, ``(B, C, T, H, W)``.
    """
    last = len(schedule.sigmas) - 1 if exit_step is None else exit_step
    shape = tuple(like.shape)
    noisy = noise.draw(shape, chunk=chunk, step=0, like=like)
    for step, sigma in enumerate(schedule.sigmas[:last]):
        with torch.no_grad():
            clean = clean_from_velocity(noisy, student(noisy, sigma, cache), sigma)
        fresh = noise.draw(shape, chunk=chunk, step=step + 1, like=like)
        noisy = add_noise(clean, fresh, schedule.sigmas[step + 1])
    sigma = schedule.sigmas[last]
    return clean_from_velocity(noisy, student(noisy, sigma, cache), sigma)


def remember(
    student: Student,
    clean: Tensor,
    noise: NoiseSource,
    schedule: FewStepSchedule,
    cache: KVCache,
    *,
    chunk: int,
) -> None:
    """Remember the chunk that is open in ``cache`` as the past, and close it.

    Args:
        student: Velocity model.
        clean: What the chunk became, ``(B, C, T, H, W)``, without a gradient.
        noise: Source of the noise on it, if the past is remembered under noise.
        schedule: Says under how much.
        cache: Memory with this chunk open.
        chunk: What ``noise`` calls the chunk.
    """
    if not schedule.context_sigma:
        student.remember(clean, cache)
    else:
        sigma = schedule.context_sigma
        # The step after the last: noise that no step has used.
        fresh = noise.draw(tuple(clean.shape), chunk=chunk, step=len(schedule.sigmas), like=clean)
        student.remember(add_noise(clean, fresh, sigma), cache, sigma=sigma)
    cache.close()


def rollout(
    student: Student,
    noise: NoiseSource,
    schedule: FewStepSchedule,
    cache: KVCache,
    *,
    chunks: int,
    like: Tensor,
    start: int = 0,
    exit_step: int | None = None,
    keep_last: bool = False,
    finish: Finish | None = None,
) -> Iterator[Tensor]:
    """Yield the clean chunks ``start`` to ``chunks - 1``, each ``(B, C, T, H, W)``, oldest first.

    A generator: the caller decodes, previews or cancels between chunks, and memory does
    not grow with the length of the video. A chunk is yielded before it is remembered, so
    whoever decodes it works while the caller asks for the next.

    Args:
        student: Velocity model, bound to its conditioning.
        noise: Source of all noise.
        schedule: Noise levels to visit.
        cache: Memory that has closed every chunk before ``start``.
        chunks: Chunks of the whole video.
        like: Any tensor with the shape, device and dtype of one chunk.
        start: First chunk to generate.
        exit_step: See ``denoise_chunk``.
        keep_last: Remember the last chunk too, so that the cache can go on from it.
        finish: Maps each clean chunk before it is yielded and remembered.
    """
    for chunk in range(start, chunks):
        cache.open(chunk)
        clean = denoise_chunk(student, noise, schedule, cache, chunk=chunk, like=like, exit_step=exit_step)
        if finish is not None:
            clean = finish(chunk, clean)
        yield clean
        if keep_last or chunk + 1 < chunks:
            # The past is remembered as it came out, not as it was denoised.
            remember(student, clean.detach(), noise, schedule, cache, chunk=chunk)
