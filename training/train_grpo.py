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
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfpp_core.decoder import PREVIEW, load_decoder
from sfpp_core.geometry import VideoGeometry
from sfpp_core.kv_cache import CacheShape
from sfpp_core.student import CausalStudent
from training import parallel
from training.config import load
from training.cost import held, reinforcement_operations
from training.exam import examine, papers
from training.grpo_settings import GrpoSettings
from training.inputs import open_texts
from training.loop import Pieces, Plan, Trained, run
from training.models import Model, WanModel, attention_of, geometry_of, load_role
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
from training.precision import computed_in, region
from training.rewards import make_reward, rate, speeds_of, videos
from training.samples import roll_samples
from training.teacher import DemoModel
from training.texts import Texts
from training.wan_sheets import roll_wan_samples
from training.world import sample_scene
from training.worlds import check_runs, world_called


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

    chosen: dict[int, list[int]]
    """Steps whose actions are weighed, by chunk; the same for the whole group."""

    @property
    def passes(self) -> int:
        """Actions that are weighed, of each video."""
        return sum(map(len, self.chosen.values()))

    @classmethod
    def draw(cls, settings: GrpoSettings, iteration: int, texts: Texts | None = None) -> "list[Batch]":
        """Draw the batches of one iteration, of Wan's ``texts`` or of the demo's world.

        They are a function of the seed and the iteration.
        """
        rng = np.random.default_rng((settings.loop.seed, 6, iteration))
        size, batches = settings.at_once or settings.group, []
        world = world_called(settings.world)
        for group in range(settings.prompts):
            text = world.caption(sample_scene(rng), rng) if texts is None else texts.draw(rng, 1)[0]
            starts, actions = rng.integers(2**62, size=(2, settings.group)).tolist()
            if settings.same_start:
                starts = starts[:1] * settings.group
            chosen = choose(
                np.random.default_rng((settings.loop.seed, 7, iteration, group)),
                chunks=settings.latent_frames // settings.rollout.chunk,
                steps=settings.rollout.steps,
                chunk_share=settings.chunk_share,
                step_share=settings.step_share,
                last_steps=settings.last_steps,
            )
            videos = VideoNoise(tuple(starts), tuple(actions))
            if settings.differ == "weighed":
                videos = videos.apart(chosen, mirrored=settings.mirrored, coarse=settings.coarse)
            for first in range(0, settings.group, size):
                rows = slice(first, first + size)
                batches.append(cls([text] * size, videos.part(rows), group, rows, chosen))
        return batches


class Policy:
    """The student as it acts and learns."""

    def __init__(self, settings: GrpoSettings, device: torch.device) -> None:
        """Load the student, and a copy of it if it shall stay near."""
        self.settings, self.device = settings, device
        self.dtype = computed_in(settings.dtype, device)
        files = {"student_run": settings.student_run, "autoencoder": settings.autoencoder}
        self.texts = open_texts(settings.video, files, dry_run=settings.loop.dry_run)
        self.model = starting_model(settings, self.texts, device).requires_grad_(True)
        # What adapters are trained for never moves, so the copy shares it.
        shared = {id(weight): weight for weight in self.model.parameters()}
        memo = shared if settings.optimiser.lora.rank else {}
        self.reference = copy.deepcopy(self.model, memo).requires_grad_(False) if settings.kl else None
        self.chunks = settings.latent_frames // settings.rollout.chunk
        frames = VideoGeometry.frames_of(settings.latent_frames)
        chunk = settings.rollout.chunk
        geometry = geometry_of(settings.video, self.model.config, chunk=chunk, frames=frames)
        self.shape = CacheShape.of(self.model.config, geometry, settings.rollout)
        self.chunk_shape = (self.model.config.channels, *geometry.chunk_shape)

    @property
    def copied_bytes(self) -> int:
        """Bytes of the student at the start that the one in training does not share."""
        shared = {id(weight) for weight in self.model.parameters()}
        copied = self.reference.parameters() if self.reference is not None else ()
        return sum(weight.nbytes for weight in copied if id(weight) not in shared)

    def bind(self, model: Model, captions: Sequence[str]) -> Mixed:
        """Return ``model`` bound to one caption per video."""
        student = CausalStudent(
            model.network,
            model.config,
            attend=attention_of(model),
            dtype=self.dtype,
            checkpointing=self.settings.checkpointing,
        )
        with region(self.device, self.dtype):
            return Mixed(student.bind(model.words(captions)), self.dtype, self.device)

    @torch.no_grad()
    def play(self, captions: Sequence[str], noise: VideoNoise, *, model: Model | None = None) -> Trace:
        """Roll out one video per caption."""
        like = torch.empty(len(captions), *self.chunk_shape, device=self.device)
        student, schedule = self.bind(model or self.model, captions), self.settings.rollout.schedule()
        return record(student, noise, schedule, self.shape, chunks=self.chunks, like=like)

    def losses(
        self, batch: Batch, trace: Trace, advantages: Tensor
    ) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """Yield the loss of each weighed action, averaged over the batch, and numbers worth knowing.

        Go backward before asking for the next one.
        """
        settings = self.settings
        reduction: Reduction = "sum" if settings.logprob_reduction == "sum" else "mean"
        passes = estimates(lambda: self.bind(self.model, batch.captions), trace, self.shape, batch.chosen)
        near = self._reference_estimates(batch, trace)
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

    def _reference_estimates(self, batch: Batch, trace: Trace) -> Iterator[Tensor | None]:
        """Yield what the student at the start would have estimated, or ``None`` where nobody asks."""
        reference = self.reference
        if reference is None:
            yield from [None] * batch.passes
            return
        # The decorator, not the statement: a generator would leave gradients off for whoever asks it.
        ungraded = torch.no_grad()(estimates)
        bind = lambda: self.bind(reference, batch.captions)  # noqa: E731
        for _, _, estimate in ungraded(bind, trace, self.shape, batch.chosen):
            yield estimate


def starting_model(settings: GrpoSettings, texts: Texts | None, device: torch.device) -> Model:
    """Return what the student starts from: a run, for Wan also a checkpoint, or the embedded demo."""
    if not settings.video.is_wan:
        check_runs(settings.world, {"student_run": settings.student_run})
    narrow = settings.video.is_wan and settings.optimiser.lora.rank
    dtype = computed_in(settings.dtype, device) if narrow else torch.float32
    model = load_role(settings.student_run, settings.video, texts, device=device, dtype=dtype)
    if settings.video.is_wan:
        torch.manual_seed(settings.loop.seed)  # every rank draws the same adapters
    return model


class Learner:
    """Plays, rewards and learns: one iteration at a time."""

    def __init__(self, settings: GrpoSettings, device: torch.device) -> None:
        """Load everything."""
        self.settings = settings
        self.reward = make_reward(settings.reward, device=device)
        self.speeds = speeds_of(settings.reward, device=device)
        self.policy = Policy(settings, device)
        channels, idle = self.policy.model.config.channels, settings.video.is_wan and device.type == "meta"
        where = torch.device("cpu") if idle else device
        choice = PREVIEW if idle else Path(settings.autoencoder)
        self.decoder = load_decoder(choice, device=where, channels=channels)
        updates = settings.loop.iterations * settings.updates
        narrow = self.policy.dtype == torch.bfloat16
        self.trained = Trained(self.policy.model, settings.optimiser, updates=updates, narrow=narrow)

    def step(self, iteration: int) -> dict[str, float]:
        """Roll out this rank's groups and follow what those of all ranks say."""
        telling, numbers = self.play(iteration)
        passes = sum(batch.passes for batch, _, _ in telling)
        share = parallel.mean({"passes": passes})["passes"]
        for update in range(self.settings.updates if share else 0):
            numbers |= self._update(telling, share, iteration * self.settings.updates + update)
        return numbers

    def play(self, iteration: int) -> tuple[list[tuple[Batch, Trace, Tensor]], dict[str, float]]:
        """Roll out and reward this rank's groups of one iteration.

        Returns:
            The batches that teach something, with their traces and advantages: a group whose videos are worth
            the same teaches nothing, and is not worth a pass. And numbers worth logging.
        """
        settings, ranks = self.settings, parallel.ranks()
        batches = [
            batch
            for batch in Batch.draw(settings, iteration, self.policy.texts)
            if batch.group % ranks == parallel.rank()
        ]
        traces = [self.policy.play(batch.captions, batch.noise) for batch in batches]
        rewards = torch.zeros(settings.prompts // ranks, settings.group)
        for batch, trace in zip(batches, traces, strict=True):
            rewards[batch.group // ranks, batch.rows] = torch.tensor(self.rewards(trace, batch.captions))
        advantages = group_advantages(rewards, floor=settings.least_deviation, limit=settings.advantage_limit)
        telling = [
            (batch, trace, advantages[batch.group // ranks, batch.rows])
            for batch, trace in zip(batches, traces, strict=True)
            if advantages[batch.group // ranks].any()
        ]
        numbers = {
            "reward": rewards.mean().item(),
            "deviation": rewards.std(1, correction=0).mean().item(),
            "telling": len(telling) / len(batches),
        }
        return telling, numbers

    def _update(
        self, telling: list[tuple[Batch, Trace, Tensor]], share: float, count: int
    ) -> dict[str, float]:
        """Make update ``count``, going backward after every action of every batch.

        Args:
            telling: Batches of this rank with their traces and advantages; there may be none.
            share: Passes of an update over all ranks, by the ranks; the ranks' gradients are averaged.
            count: Which update this is.
        """
        names = ("moved", "ratio_off", "clipped", *(("kl",) if self.settings.kl else ()))
        seen = dict.fromkeys(names, 0.0)
        for batch, trace, advantages in telling:
            for loss, numbers in self.policy.losses(batch, trace, advantages):
                seen = {name: seen[name] + numbers[name] / share for name in names}
                self.trained.accumulate(loss / share, count)
        return {**seen, "norm": self.trained.update(self._nothing(), count)}

    def _nothing(self) -> Tensor:
        """Return a loss of 0 that every weight takes part in: with it a rank ends an update."""
        return sum((weight.sum() * 0 for weight in self.trained.module.parameters()), torch.zeros(()))

    def rewards(self, trace: Trace, captions: Sequence[str]) -> list[float]:
        """Return the reward of each video of ``trace``."""
        pairs = zip(self._frames(trace), captions, strict=True)
        return [rate(self.reward, video, text) for video, text in pairs]

    def sample(self, path: Path) -> dict[str, float]:
        """Sit the exam with the averaged student, and roll out longer videos; return all numbers."""
        settings, model = self.settings, self.trained.averaged
        if isinstance(model, WanModel):
            seconds = settings.loop.sample_seconds
            return roll_wan_samples(
                model, self.decoder, settings.rollout, settings.video, path, seconds=seconds
            )
        means = self.exam(path, model)
        longer = roll_samples(
            model,
            self.decoder,
            settings.rollout,
            path.with_name(f"{path.stem}_long.png"),
            device=self.policy.device,
            seconds=settings.loop.sample_seconds,
            world=world_called(settings.world),
        )
        return {f"exam/{name}": mean for name, mean in means.items()} | longer

    def exam(self, path: Path, model: DemoModel) -> dict[str, float]:
        """Measure ``model``: a sheet at ``path``, the numbers beside it; return their means."""
        return examine(self._sat_exams(model), self.reward, self.speeds, self.settings.reward, path)

    def _sat_exams(self, model: DemoModel) -> Iterator[tuple[Tensor, str]]:
        """Yield the videos ``model`` makes for the exam and their captions."""
        settings = self.settings
        world, at_once = world_called(settings.world), settings.at_once or settings.group
        for captions, noise in papers(settings.exam_videos, at_once=at_once, world=world):
            trace = self.policy.play(captions, noise, model=model)
            yield from zip(self._frames(trace), captions, strict=True)

    def plan(self) -> Plan:
        """Return what a dry run tells beside the weights."""
        settings, policy = self.settings, self.policy
        at_once = settings.at_once or settings.group
        estimates_kept = policy.chunks * settings.rollout.steps * math.prod(policy.chunk_shape)
        groups = settings.prompts // parallel.launched()
        config, size = policy.model.config, settings.rollout.chunk
        acting, cached = 1 if policy.reference is None else 2, policy.dtype.itemsize * policy.shape.numbers
        chunk = geometry_of(settings.video, config, chunk=size, frames=VideoGeometry.frames_of(size))
        return Plan(
            pieces=Pieces(batch=settings.group, effective=settings.prompts * settings.group),
            shapes={
                "videos at once": (at_once, config.channels, settings.latent_frames, *policy.chunk_shape[2:])
            },
            held={
                "the rollouts' estimates": 4 * groups * settings.group * estimates_kept,
                "a copy of the student at the start": policy.copied_bytes,
                "keys and values of rollouts": acting * at_once * cached,
                **held(config, chunk, batch=at_once, checkpointing=settings.checkpointing),
            },
            operations=reinforcement_operations(
                config,
                chunk,
                settings.rollout,
                videos=groups * settings.group,
                chunks=policy.chunks,
                weighed=max(1, round(settings.chunk_share * policy.chunks))
                * max(1, round(settings.step_share * (settings.rollout.steps - 1))),
                updates=settings.updates,
                near=policy.reference is not None,
                checkpointing=settings.checkpointing,
            ),
            narrow=policy.dtype == torch.bfloat16,
            teraflops=settings.video.teraflops,
        )

    def _frames(self, trace: Trace) -> Iterator[Tensor]:
        """Yield each video of ``trace``, ``(F, 3, H, W)``."""
        return videos(self.decoder, map(trace.clean, range(self.policy.chunks)))


def main(settings: GrpoSettings) -> None:
    """Reinforce the student."""
    learner = Learner(settings, settings.loop.pick_device())
    before, model = Path(settings.loop.out) / f"sample_{0:06d}.png", learner.policy.model
    examined = settings.loop.dry_run or before.exists()
    if isinstance(model, DemoModel) and not examined and parallel.rank() == 0:
        learner.exam(before, model)
    run(
        settings.loop,
        {"model": learner.trained},
        learner.step,
        learner.sample,
        recipe=settings,
        plan=learner.plan,
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(GrpoSettings, sys.argv[1:], stage="train_grpo"))
