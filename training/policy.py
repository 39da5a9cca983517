"""The few-step student as a stochastic policy, and what reinforcement learning asks of it.

Between two steps a student adds fresh noise to its clean estimate: the latent at ``sigma`` is drawn from a
normal distribution around ``(1 - sigma) * clean`` with deviation ``sigma``. That draw is the action; the last
step draws nothing and is none. No stochastic sampler has to be put in the place of the student's own.

Source: Self-Forcing++, arXiv:2510.02283, equations 5 to 7.

Legend: B videos, C channels, T latent frames of a chunk, H and W latent height and width, P prompts,
G videos of one prompt.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sfpp_core.kv_cache import CacheShape, GradientKVCache, KVCache
from sfpp_core.noise import ChunkNoise, NoiseSource
from sfpp_core.rollout import Student, remember, rollout
from sfpp_core.schedule import FewStepSchedule, add_noise, clean_from_velocity
from training.precision import region

Reduction = Literal["mean", "sum"]
"""How the log-ratios of an action's numbers become one: ``mean`` divides the true one by their count."""

Chosen = Mapping[int, Sequence[int]]
"""Steps whose actions are weighed, by chunk."""


@dataclass(frozen=True, slots=True)
class VideoNoise:
    """Noise of several videos, each a function of its own seed and not of what it is batched with.

    Each is standard normal noise, whatever it shares with the others.
    """

    starts: tuple[int, ...]
    """Seed of what each video starts from, in every chunk."""

    actions: tuple[int, ...]
    """Seed of what is added to each video between steps."""

    shared: int | None = None
    """Seed of what is added to all of them, but for the actions in ``chosen``."""

    chosen: Chosen = field(default_factory=dict)
    """Steps whose actions the videos do not share, by chunk."""

    signs: tuple[int, ...] = ()
    """1, or -1 for a video that takes its seed's noise the other way round; none is all 1."""

    coarse: int = 1
    """Side in latent cells of the squares over whose means alone the videos differ."""

    def apart(self, chosen: Chosen, *, mirrored: bool, coarse: int = 1) -> "VideoNoise":
        """Return noise by which the videos differ in the ``chosen`` actions alone.

        Args:
            chosen: Steps by chunk.
            mirrored: Give every second video the opposite of what another before it differs by.
            coarse: Side in latent cells of squares: the videos differ by the means over these alone.
        """
        videos = len(self.actions)
        actions = self.actions
        if mirrored:
            actions = tuple(actions[video - video % 2] for video in range(videos))
        signs = tuple(-1 if mirrored and video % 2 else 1 for video in range(videos))
        return replace(
            self, actions=actions, shared=self.actions[0], chosen=chosen, signs=signs, coarse=coarse
        )

    def part(self, rows: slice) -> "VideoNoise":
        """Return the noise of some of the videos."""
        return replace(self, starts=self.starts[rows], actions=self.actions[rows], signs=self.signs[rows])

    def draw(self, shape: tuple[int, ...], *, chunk: int, step: int, like: Tensor) -> Tensor:
        """Return standard normal noise of ``shape``, ``(B, C, T, H, W)``, like ``like``."""

        def drawn(seed: int) -> Tensor:
            return ChunkNoise(seed).draw((1, *shape[1:]), chunk=chunk, step=step, like=like)

        if not step or self.shared is None:
            return torch.cat([drawn(seed) for seed in (self.actions if step else self.starts)])
        shared = drawn(self.shared)
        # The noise of step k + 1 is the action of step k.
        if step - 1 not in self.chosen.get(chunk, ()):
            return shared.expand(shape).contiguous()
        own = torch.cat([sign * drawn(seed) for sign, seed in zip(self.signs, self.actions, strict=True)])
        if self.coarse == 1:
            return own
        # The means over squares and what is left without them are independent: the sum is plain noise again.
        return shared - square_means(shared, self.coarse) + square_means(own, self.coarse)


def square_means(x: Tensor, side: int) -> Tensor:
    """Return ``(B, C, T, H, W)`` with each square of ``side`` cells, cut at the edges, set to its mean."""
    rows, columns = x.shape[-2:]
    means = torch.nn.functional.avg_pool2d(x.flatten(0, 2), side, ceil_mode=True, count_include_pad=False)
    whole = means.repeat_interleave(side, -2).repeat_interleave(side, -1)
    return whole[..., :rows, :columns].reshape(x.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A batch of rollouts as the policy acted, from which every state and action follows.

    Only the clean estimates are stored; what was denoised is made again from them and the noise, to the bit.
    """

    noise: NoiseSource
    """Source of all noise."""

    schedule: FewStepSchedule
    """Noise levels visited."""

    estimates: tuple[tuple[Tensor, ...], ...]
    """Clean estimate ``(B, C, T, H, W)`` of every step of every chunk, on the CPU."""

    like: Tensor
    """Tensor with the shape, device and dtype of one chunk."""

    def clean(self, chunk: int) -> Tensor:
        """Return what ``chunk`` became."""
        return self.estimate(chunk, len(self.schedule.sigmas) - 1)

    def estimate(self, chunk: int, step: int) -> Tensor:
        """Return the clean estimate of ``step``."""
        return self.estimates[chunk][step].to(self.like.device)

    def fresh(self, chunk: int, step: int) -> Tensor:
        """Return the noise added after ``step``; of the last step there is none."""
        return self.noise.draw(tuple(self.like.shape), chunk=chunk, step=step + 1, like=self.like)

    def noisy(self, chunk: int, step: int) -> Tensor:
        """Return what ``step`` found: pure noise, or the action of the step before."""
        if step == 0:
            return self.noise.draw(tuple(self.like.shape), chunk=chunk, step=0, like=self.like)
        estimate, fresh = self.estimate(chunk, step - 1), self.fresh(chunk, step - 1)
        return add_noise(estimate, fresh, self.schedule.sigmas[step])


class _Recording:
    """A student that notes its clean estimates."""

    def __init__(self, student: Student) -> None:
        self.student, self.estimates = student, []

    def __call__(self, noisy: Tensor, sigma: float, cache: KVCache) -> Tensor:
        """Return the velocity at ``noisy``."""
        velocity = self.student(noisy, sigma, cache)
        self.estimates.append(clean_from_velocity(noisy, velocity, sigma).cpu())
        return velocity

    def remember(self, clean: Tensor, cache: KVCache, *, sigma: float = 0.0) -> None:
        """Write the keys of ``clean``."""
        self.student.remember(clean, cache, sigma=sigma)


@dataclass(frozen=True, slots=True)
class Mixed:
    """A bound student that computes in ``dtype``, each pass in an autocast region of its own.

    A region keeps the weights it has cast, so one that outlived an update would compute with old ones.
    """

    student: Student
    dtype: torch.dtype
    device: torch.device

    def __call__(self, noisy: Tensor, sigma: float, cache: KVCache) -> Tensor:
        """Return the velocity at ``noisy``."""
        with region(self.device, self.dtype):
            return self.student(noisy, sigma, cache)

    def remember(self, clean: Tensor, cache: KVCache, *, sigma: float = 0.0) -> None:
        """Write the keys of ``clean``."""
        with region(self.device, self.dtype):
            self.student.remember(clean, cache, sigma=sigma)


@torch.no_grad()
def record(
    student: Student,
    noise: NoiseSource,
    schedule: FewStepSchedule,
    shape: CacheShape,
    *,
    chunks: int,
    like: Tensor,
) -> Trace:
    """Roll out ``chunks`` chunks and return the trace.

    The past is kept as ``estimates`` keeps it, keys in the same order: so equal weights give equal bits.
    """
    recording = _Recording(student)
    for _ in rollout(recording, noise, schedule, GradientKVCache(shape), chunks=chunks, like=like):
        pass
    steps = len(schedule.sigmas)
    pieces = (tuple(recording.estimates[first : first + steps]) for first in range(0, chunks * steps, steps))
    return Trace(noise=noise, schedule=schedule, estimates=tuple(pieces), like=like)


def estimates(
    bind: Callable[[], Student], trace: Trace, shape: CacheShape, chosen: Chosen
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield chunk, step and clean estimate under the present weights, with a gradient if gradients are on.

    Chunk by chunk: the past is remembered again under these weights, and the gradient reaches the open
    chunk alone. Whoever goes backward before asking for the next holds the memory of one pass, whatever the
    horizon.

    Args:
        bind: Returns the student bound to the captions of the trace; called for every pass, because going
            backward frees the text keys too.
        trace: The states.
        shape: Size of the cache.
        chosen: Steps to look at, by chunk; nothing after the last chosen chunk is computed.
    """
    cache, last = GradientKVCache(shape), max(chosen)
    with torch.no_grad():
        keeper = bind()
    for chunk in range(last + 1):
        cache.open(chunk)
        for step in chosen.get(chunk, ()):
            noisy, sigma = trace.noisy(chunk, step), trace.schedule.sigmas[step]
            yield chunk, step, clean_from_velocity(noisy, bind()(noisy, sigma, cache), sigma)
        if chunk < last:
            with torch.no_grad():
                remember(keeper, trace.clean(chunk), trace.noise, trace.schedule, cache, chunk=chunk)


def choose(
    rng: np.random.Generator,
    *,
    chunks: int,
    steps: int,
    chunk_share: float,
    step_share: float,
    last_steps: bool = False,
) -> dict[int, list[int]]:
    """Draw the actions an update weighs: a share of the chunks, and of the actions of each.

    Args:
        rng: Source of the draw.
        chunks: Chunks of the rollout.
        steps: Denoising steps per chunk; the last is no action.
        chunk_share: Share of the chunks, at least one of them.
        step_share: Share of the actions of each, at least one of them.
        last_steps: Take the last actions of each instead of random ones.
    """

    def some(count: int, share: float, *, last: bool = False) -> list[int]:
        order = np.arange(count)[::-1] if last else rng.permutation(count)
        return sorted(int(pick) for pick in order[: max(1, round(share * count))])

    return {chunk: some(steps - 1, step_share, last=last_steps) for chunk in some(chunks, chunk_share)}


def log_ratio(fresh: Tensor, delta: Tensor, sigma: float, *, reduction: Reduction) -> Tensor:
    """Return the log of how much likelier an action became, ``(B,)``.

    With ``w = (1 - sigma) / sigma`` it is the sum of ``w * fresh * delta - (w * delta)^2 / 2``: the
    difference of two normal log-densities without their cancellation, exactly 0 where nothing has changed.

    Args:
        fresh: Noise the action was made with, ``(B, C, T, H, W)``.
        delta: New clean estimate minus that of the acting policy, same shape.
        sigma: Noise level the action leads to.
        reduction: ``sum``, the true one, or ``mean``, divided by the numbers of an action.
    """
    weighted = (1 - sigma) / sigma * delta
    terms = (weighted * fresh - weighted.square() / 2).flatten(1)
    return terms.mean(1) if reduction == "mean" else terms.sum(1)


def divergence(delta: Tensor, sigma: float, *, reduction: Reduction) -> Tensor:
    """Return the KL divergence of two policies in one state, ``(B,)``.

    Args:
        delta: Difference of their clean estimates, ``(B, C, T, H, W)``.
        sigma: Noise level the action leads to.
        reduction: As in ``log_ratio``.
    """
    terms = ((1 - sigma) / sigma * delta).square().flatten(1) / 2
    return terms.mean(1) if reduction == "mean" else terms.sum(1)


def surrogate(log_ratios: Tensor, advantages: Tensor, *, clip: float) -> Tensor:
    """Return the clipped loss of one action per video, ``(B,)``: PPO's, equation 5 of the paper.

    Args:
        log_ratios: See ``log_ratio``, ``(B,)``.
        advantages: What following the action is worth, ``(B,)``.
        clip: Change of the ratio beyond which nothing more is gained.
    """
    ratios = log_ratios.exp()
    return torch.maximum(-advantages * ratios, -advantages * ratios.clamp(1 - clip, 1 + clip))


def group_advantages(rewards: Tensor, *, floor: float, limit: float) -> Tensor:
    """Return how much better each video is than the others of its prompt, ``(P, G)``: equation 6.

    Args:
        rewards: ``(P, G)``.
        floor: Least deviation divided by: smaller differences are noise, and are not blown up.
        limit: Largest advantage.

    Returns:
        Mean 0 in every group before the limit; all 0 in a group whose videos are worth the same.
    """
    rewards = rewards.double()
    centred = rewards - rewards.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    scaled = (centred / deviation.clamp_min(floor)).clamp(-limit, limit)
    return torch.where(rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True), scaled, 0.0).float()
