"""Stage 5 of the demo: distribution matching on the student's own rollouts.

``horizon`` equal to ``segment`` is Self-Forcing; a longer horizon is Self-Forcing++.
Run ``python -m training.train_dmd training/configs/demo_self_forcing.toml [key=value ...]``.

Source: Self-Forcing, arXiv:2506.08009, algorithm 1; Self-Forcing++, arXiv:2510.02283, algorithm 1.
"""

import logging
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from sfpp_core.geometry import VideoGeometry
from sfpp_core.kv_cache import CacheShape
from sfpp_core.noise import ChunkNoise
from sfpp_core.tiny_autoencoder import TinyAutoencoder
from training.config import load
from training.dmd_settings import DmdSettings
from training.first_latent import FirstLatent
from training.loop import Trained, run
from training.matching import Matching, RollOptions, Shown
from training.scores import CausalScores, Levels, WholeScores
from training.segments import BackwardNoise, Segment, draw_segment
from training.sheets import roll_sheet
from training.streaming import Stream, StreamLaw
from training.teacher import load_demo_model
from training.world import FRAMES, SIZE, caption, sample_scene


def draw_captions(settings: DmdSettings, *key: int) -> tuple[list[str], np.random.Generator]:
    """Return the captions of one batch of videos and a generator for the rest, functions of seed and key."""
    rng = np.random.default_rng((settings.loop.seed, 4, *key))
    return [caption(sample_scene(rng), rng) for _ in range(settings.batch)], rng


class Rollouts:
    """The segment of every iteration: of a rollout of its own, or the next of a stream."""

    def __init__(self, settings: DmdSettings, roles: Matching, chunk: tuple[int, int, int]) -> None:
        """Take the settings and the roles; ``chunk`` is ``(T, H, W)`` of one chunk."""
        self.settings, self.roles, self.chunk = settings, roles, chunk
        size = settings.rollout.chunk
        law = StreamLaw(
            horizon=settings.horizon // size,
            chunks=settings.segment // size,
            overlap=settings.overlap // size,
        )
        self.stream = Stream(law, roles.shape) if settings.streaming else None

    def next(self, iteration: int) -> tuple[Shown, torch.Generator]:
        """Return the segment of one iteration, with a gradient if gradients are on, and a generator."""
        captions, rng = draw_captions(self.settings, 0, iteration)
        segment = self._segment(rng)
        seeds = rng.integers(2**62, size=2).tolist()
        if self.stream is None:
            shown = self.roles.roll(captions, ChunkNoise(seeds[0]), segment, self.chunk)
        else:
            shown = self.roles.stream(self.stream, self._video, segment.exit_step, self.chunk)
        return shown, torch.Generator().manual_seed(seeds[1])

    def _segment(self, rng: np.random.Generator) -> Segment:
        """Draw where the segment lies and which step keeps the gradient."""
        settings, size = self.settings, self.settings.rollout.chunk
        return draw_segment(
            rng,
            horizon=settings.horizon // size,
            chunks=settings.segment // size,
            at_zero=settings.at_zero,
            steps=settings.rollout.steps,
            last_step_only=settings.last_step_only,
            beta=(settings.beta[0], settings.beta[1]),
        )

    def _video(self, number: int) -> tuple[list[str], int]:
        """Return captions and seed of the stream's video of this number."""
        captions, rng = draw_captions(self.settings, 1, number)
        return captions, int(rng.integers(2**62))


def load_roles(settings: DmdSettings, autoencoder: TinyAutoencoder, device: torch.device) -> Matching:
    """Load student, teacher and critic."""
    student = load_demo_model(Path(settings.student_run)).to(device)
    teacher = load_demo_model(Path(settings.teacher_run)).to(device, torch.bfloat16).requires_grad_(False)
    critic = load_demo_model(Path(settings.teacher_run)).to(device)
    geometry = VideoGeometry(height=SIZE, width=SIZE, frames=FRAMES, chunk=settings.rollout.chunk)
    levels = Levels(shift=settings.rollout.shift, least=settings.least_sigma, largest=settings.largest_sigma)
    asked = CacheShape.of(teacher.config, geometry, settings.rollout)
    return Matching(
        student,
        teacher,
        critic,
        scores=CausalScores(levels, asked, opening=settings.opening)
        if settings.scores == "causal"
        else WholeScores(levels),
        schedule=settings.rollout.schedule(),
        shape=CacheShape.of(student.config, geometry, settings.rollout),
        options=RollOptions(
            backward_noise=cast(BackwardNoise, settings.backward_noise),
            first_latent=cast(FirstLatent, settings.first_latent),
            masked=settings.masked,
            checkpointing=settings.checkpointing,
        ),
        autoencoder=autoencoder,
        guidance=settings.guidance,
    )


def main(settings: DmdSettings) -> None:
    """Train the student against the teacher, and the critic against the student."""
    device = settings.loop.pick_device()
    autoencoder = TinyAutoencoder.load(Path(settings.autoencoder)).to(device)
    roles = load_roles(settings, autoencoder, device)
    geometry = VideoGeometry(height=SIZE, width=SIZE, frames=FRAMES, chunk=settings.rollout.chunk)
    rollouts = Rollouts(settings, roles, geometry.chunk_shape)
    updates = settings.loop.iterations
    moves = max(1, (updates - settings.warmup) // settings.every)
    student = Trained(roles.student, settings.student, updates=moves)
    repeats = settings.critic_updates
    critic = Trained(cast(torch.nn.Module, roles.critic), settings.critic, updates=updates * repeats)
    seen = {"critic": float("nan"), "dmd": float("nan")}

    def step(iteration: int) -> dict[str, float]:
        move, rest = divmod(iteration - settings.warmup, settings.every)
        moving = move >= 0 and rest == 0
        with torch.set_grad_enabled(moving):
            shown, generator = rollouts.next(iteration)
        if moving:
            loss = roles.student_loss(shown, generator)
            seen["dmd"] = loss.item()
            seen["norm"] = student.update(loss, move)
            if move < settings.ema_start:
                student.averaged.load_state_dict(student.module.state_dict())
        # The critic learns on the same rollout: one less to make.
        for repeat in range(repeats):
            loss = roles.critic_loss(shown, generator)
            critic.update(loss, iteration * repeats + repeat)
            seen["critic"] = loss.item()
        return {**seen}

    def sample(path: Path) -> None:
        roll_sheet(student.averaged, autoencoder, settings.rollout, path, device=device)

    parts: dict[str, Any] = {"model": student, "critic": critic}
    if rollouts.stream is not None:
        parts["stream"] = rollouts.stream
    run(settings.loop, parts, step, sample, recipe=settings)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(DmdSettings, sys.argv[1:], stage="train_dmd"))
