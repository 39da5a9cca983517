"""Stage 6 of the demo: reinforcement on the student's own rollouts, for smooth motion or a reward of yours.

Each iteration rolls out several videos per prompt without a gradient, rewards them as a viewer would see
them, and makes the actions of the better ones likelier.
Run ``python -m training.train_grpo training/configs/demo_grpo.toml [key=value ...]``.

Source: Self-Forcing++, arXiv:2510.02283, section 3.3 and equations 5 to 7; GRPO, arXiv:2402.03300. The paper
publishes neither its reward's formula nor its settings; those here are this project's.

Legend: P prompts, G videos of one prompt.
"""

import copy
import logging
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from sfpp_core import demo
from sfpp_core.attention import matmul
from sfpp_core.config import RolloutSettings
from sfpp_core.decoder import load_decoder
from sfpp_core.geometry import VideoGeometry
from sfpp_core.kv_cache import CacheShape
from sfpp_core.student import CausalStudent
from training.config import ConfigError, load
from training.exam import examine, papers
from training.loop import LoopSettings, OptimiserSettings, Trained, run
from training.policy import (
    Mixed,
    Reduction,
    Trace,
    VideoNoise,
    choose,
    divergence,
    estimates,
    group_advantages,
    log_ratio,
    record,
    surrogate,
)
from training.rewards import RewardSettings, make_reward, rate, speeds_of, videos
from training.teacher import DemoModel, load_demo_model
from training.world import SIZE, caption, sample_scene

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What a student may compute in, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoSettings:
    """Settings of the reinforcement stage."""

    loop: LoopSettings
    """Length and bookkeeping; an iteration is one batch of rollouts."""

    optimiser: OptimiserSettings
    """How the student is updated."""

    student_run: str = ""
    """``last.pt`` of the stage the student starts from; empty is the embedded demo."""

    autoencoder: str = "sfpp_core/demo/autoencoder.safetensors"
    """Weights of the decoder whose frames are rewarded."""

    latent_frames: int = 21
    """Length of a rollout."""

    prompts: int = 2
    """Prompts per iteration."""

    group: int = 8
    """Videos per prompt; they are compared with each other only."""

    at_once: int = 0
    """Videos of a group computed together; 0 is all. Must divide ``group``."""

    same_start: bool = True
    """Start the videos of a group from the same noise, so that they differ by their actions alone."""

    updates: int = 1
    """Updates per batch of rollouts. With 1 every ratio is 1 and nothing is ever clipped."""

    chunk_share: float = 1.0
    """Share of the chunks an update weighs, drawn at random."""

    step_share: float = 1.0
    """Share of each chunk's actions an update weighs, drawn at random."""

    last_steps: bool = False
    """Weigh the last actions instead of random ones. They count most: at four steps and shift 5 the noise of
    the three actions enters the gradient with weights 0.067, 0.2 and 0.6."""

    logprob_reduction: str = "mean"
    """``mean``: log-ratios are divided by the numbers of an action; ``sum``: they are the true ones."""

    clip: float = 1e-4
    """Change of a ratio beyond which nothing more is gained; about 0.2 for ``sum``."""

    kl: float = 0.0
    """Weight of the divergence from the student at the start; 0 keeps no copy of it."""

    least_deviation: float = 0.01
    """Least deviation of a group's rewards that advantages are divided by."""

    advantage_limit: float = 5.0
    """Largest advantage."""

    dtype: str = "float32"
    """What the student computes in, ``float32`` or ``bfloat16``; its weights stay float32."""

    exam_videos: int = 24
    """Videos measured with every sample sheet, always of the same captions and noise."""

    reward: RewardSettings = field(default_factory=RewardSettings)
    """What a video is rewarded for."""

    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """How the student is rolled out."""

    def __post_init__(self) -> None:
        self._check_choices()
        if self.latent_frames % self.rollout.chunk:
            raise ConfigError(f"latent_frames is {self.latent_frames}; it must be a multiple of the chunk.")
        if self.rollout.steps < 2:
            raise ConfigError("rollout.steps is 1, which leaves no action to learn; use at least 2, e.g. 4.")
        if self.group < 2:
            raise ConfigError(f"group is {self.group}; comparing needs at least 2 videos, e.g. 8.")
        if self.group % (self.at_once or self.group):
            raise ConfigError(f"at_once is {self.at_once}; it must divide the group, {self.group}.")
        for name in ("prompts", "updates", "clip", "least_deviation", "advantage_limit", "exam_videos"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0.")

    def _check_choices(self) -> None:
        """Refuse unknown words and shares that are none."""
        for name, choices in (("logprob_reduction", get_args(Reduction)), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; use {' or '.join(map(repr, choices))}."
                )
        for name in ("chunk_share", "step_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0 and at most 1.")


@dataclass(frozen=True, slots=True)
class Batch:
    """Videos of one prompt that are computed together."""

    captions: list[str]
    """One per video, all the same."""

    noise: VideoNoise

    group: int
    """Which prompt of the iteration it is."""

    rows: slice
    """Which of the group's videos these are."""

    @classmethod
    def draw(cls, settings: GrpoSettings, iteration: int) -> "list[Batch]":
        """Draw the batches of one iteration: a function of the seed and the iteration."""
        rng = np.random.default_rng((settings.loop.seed, 6, iteration))
        size, batches = settings.at_once or settings.group, []
        for group in range(settings.prompts):
            text = caption(sample_scene(rng), rng)
            starts, actions = rng.integers(2**62, size=(2, settings.group)).tolist()
            if settings.same_start:
                starts = starts[:1] * settings.group
            for first in range(0, settings.group, size):
                rows = slice(first, first + size)
                noise = VideoNoise(tuple(starts[rows]), tuple(actions[rows]))
                batches.append(cls([text] * size, noise, group, rows))
        return batches


class Policy:
    """The student as it acts and learns."""

    def __init__(self, settings: GrpoSettings, device: torch.device) -> None:
        """Load the student, and a copy of it if it shall stay near."""
        self.settings, self.device, self.dtype = settings, device, DTYPES[settings.dtype]
        self.model = starting_model(settings.student_run).to(device).requires_grad_(True)
        self.reference = copy.deepcopy(self.model).requires_grad_(False) if settings.kl else None
        self.chunks = settings.latent_frames // settings.rollout.chunk
        frames = VideoGeometry.frames_of(settings.latent_frames)
        geometry = VideoGeometry(height=SIZE, width=SIZE, frames=frames, chunk=settings.rollout.chunk)
        self.shape = CacheShape.of(self.model.config, geometry, settings.rollout)
        self.chunk_shape = (self.model.config.channels, *geometry.chunk_shape)

    def bind(self, model: DemoModel, captions: Sequence[str]) -> Mixed:
        """Return ``model`` bound to one caption per video."""
        student = CausalStudent(model.network, model.config, attend=matmul, dtype=self.dtype)
        with Mixed.region(self.device, self.dtype):
            return Mixed(student.bind(model.words(captions)), self.dtype, self.device)

    @torch.no_grad()
    def play(self, captions: Sequence[str], noise: VideoNoise, *, model: DemoModel | None = None) -> Trace:
        """Roll out one video per caption."""
        like = torch.empty(len(captions), *self.chunk_shape, device=self.device)
        student, schedule = self.bind(model or self.model, captions), self.settings.rollout.schedule()
        return record(student, noise, schedule, self.shape, chunks=self.chunks, like=like)

    def losses(
        self, batch: Batch, trace: Trace, advantages: Tensor, chosen: dict[int, list[int]]
    ) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """Yield the loss of each chosen action, averaged over the batch, and numbers worth knowing.

        Go backward before asking for the next one.
        """
        settings = self.settings
        reduction: Reduction = "sum" if settings.logprob_reduction == "sum" else "mean"
        passes = estimates(lambda: self.bind(self.model, batch.captions), trace, self.shape, chosen)
        near = self._reference_estimates(batch, trace, chosen)
        for (chunk, step, estimate), anchor in zip(passes, near, strict=True):
            sigma = trace.schedule.sigmas[step + 1]
            delta = estimate - trace.estimate(chunk, step)
            ratios = log_ratio(trace.fresh(chunk, step), delta, sigma, reduction=reduction)
            loss = surrogate(ratios, advantages.to(ratios), clip=settings.clip).mean()
            numbers = {
                "moved": delta.detach().square().mean().sqrt().item(),
                "ratio_off": ratios.detach().expm1().abs().max().item(),
                "clipped": (ratios.detach().expm1().abs() > settings.clip).float().mean().item(),
            }
            if anchor is not None:
                apart = divergence(estimate - anchor, sigma, reduction=reduction).mean()
                loss = loss + settings.kl * apart
                numbers["kl"] = apart.item()
            yield loss, numbers

    def _reference_estimates(
        self, batch: Batch, trace: Trace, chosen: dict[int, list[int]]
    ) -> Iterator[Tensor | None]:
        """Yield what the student at the start would have estimated, or ``None`` where nobody asks."""
        reference = self.reference
        if reference is None:
            yield from [None] * sum(map(len, chosen.values()))
            return
        # The decorator, not the statement: a generator would leave gradients off for whoever asks it.
        ungraded = torch.no_grad()(estimates)
        for _, _, estimate in ungraded(
            lambda: self.bind(reference, batch.captions), trace, self.shape, chosen
        ):
            yield estimate


def starting_model(path: str) -> DemoModel:
    """Return the averaged weights of the run ``path``, or the embedded demo if it is empty."""
    if path:
        return load_demo_model(Path(path))
    shipped = demo.load()
    model = DemoModel(shipped.config)
    model.network.load_state_dict(shipped.network.state_dict())
    model.words.load_state_dict(shipped.words.state_dict())
    return model


class Learner:
    """Plays, rewards and learns: one iteration at a time."""

    def __init__(self, settings: GrpoSettings, device: torch.device) -> None:
        """Load everything."""
        self.settings = settings
        self.reward = make_reward(settings.reward, device=device)
        self.speeds = speeds_of(settings.reward, device=device)
        self.policy = Policy(settings, device)
        channels = self.policy.model.config.channels
        self.decoder = load_decoder(Path(settings.autoencoder), device=device, channels=channels)
        updates = settings.loop.iterations * settings.updates
        self.trained = Trained(self.policy.model, settings.optimiser, updates=updates)

    def step(self, iteration: int) -> dict[str, float]:
        """Roll out one batch of groups and follow what it says."""
        settings = self.settings
        batches = Batch.draw(settings, iteration)
        traces = [self.policy.play(batch.captions, batch.noise) for batch in batches]
        rewards = torch.zeros(settings.prompts, settings.group)
        for batch, trace in zip(batches, traces, strict=True):
            rewards[batch.group, batch.rows] = torch.tensor(self.rewards(trace, batch.captions))
        advantages = group_advantages(rewards, floor=settings.least_deviation, limit=settings.advantage_limit)
        # A group whose videos are worth the same teaches nothing, and is not worth a pass.
        telling = [
            (batch, trace, advantages[batch.group, batch.rows])
            for batch, trace in zip(batches, traces, strict=True)
            if advantages[batch.group].any()
        ]
        numbers = {
            "reward": rewards.mean().item(),
            "deviation": rewards.std(1, correction=0).mean().item(),
            "telling": len(telling) / len(batches),
        }
        for update in range(settings.updates if telling else 0):
            numbers |= self._update(telling, iteration, update)
        return numbers

    def _update(
        self, telling: list[tuple[Batch, Trace, Tensor]], iteration: int, update: int
    ) -> dict[str, float]:
        """Make one update, going backward after every action of every batch."""
        settings = self.settings
        chosen = choose(
            np.random.default_rng((settings.loop.seed, 7, iteration, update)),
            chunks=self.policy.chunks,
            steps=settings.rollout.steps,
            chunk_share=settings.chunk_share,
            step_share=settings.step_share,
            last_steps=settings.last_steps,
        )
        total = len(telling) * sum(map(len, chosen.values()))
        count, seen, norm = iteration * settings.updates + update, [], 0.0
        for batch, trace, advantages in telling:
            for loss, numbers in self.policy.losses(batch, trace, advantages, chosen):
                seen.append(numbers)
                if len(seen) < total:
                    self.trained.accumulate(loss / total, count)
                else:
                    norm = self.trained.update(loss / total, count)
        return {name: statistics.mean(numbers[name] for numbers in seen) for name in seen[0]} | {"norm": norm}

    def rewards(self, trace: Trace, captions: Sequence[str]) -> list[float]:
        """Return the reward of each video of ``trace``."""
        pairs = zip(self._frames(trace), captions, strict=True)
        return [rate(self.reward, video, text) for video, text in pairs]

    def exam(self, path: Path) -> None:
        """Measure the averaged student: a sheet at ``path``, the numbers beside it."""
        examine(self._sat_exams(), self.reward, self.speeds, self.settings.reward, path)

    def _sat_exams(self) -> Iterator[tuple[Tensor, str]]:
        """Yield the averaged student's videos of the exam and their captions."""
        settings = self.settings
        for captions, noise in papers(settings.exam_videos, at_once=settings.at_once or settings.group):
            trace = self.policy.play(captions, noise, model=self.trained.averaged)
            yield from zip(self._frames(trace), captions, strict=True)

    def _frames(self, trace: Trace) -> Iterator[Tensor]:
        """Yield each video of ``trace``, ``(F, 3, H, W)``."""
        return videos(self.decoder, map(trace.clean, range(self.policy.chunks)))


def main(settings: GrpoSettings) -> None:
    """Reinforce the student."""
    learner = Learner(settings, settings.loop.pick_device())
    before = Path(settings.loop.out) / f"sample_{0:06d}.png"
    if not before.exists():
        learner.exam(before)
    run(settings.loop, {"model": learner.trained}, learner.step, learner.exam, recipe=settings)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(GrpoSettings, sys.argv[1:], stage="train_grpo"))
