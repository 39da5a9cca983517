"""Stage 5 of the demo: distribution matching on the student's own rollouts.

``horizon`` equal to ``segment`` is Self-Forcing; a longer horizon is Self-Forcing++.
Run ``python -m training.train_dmd training/configs/demo_self_forcing.toml [key=value ...]``.

Source: Self-Forcing, arXiv:2506.08009, algorithm 1; Self-Forcing++, arXiv:2510.02283, algorithm 1.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch

from sfpp_core.config import RolloutSettings
from sfpp_core.geometry import VideoGeometry
from sfpp_core.kv_cache import CacheShape
from sfpp_core.noise import ChunkNoise
from sfpp_core.tiny_autoencoder import TinyAutoencoder
from training.config import ConfigError, load
from training.first_latent import FirstLatent
from training.loop import LoopSettings, OptimiserSettings, Trained, run
from training.matching import Matching, RollOptions, Shown
from training.scores import CausalScores, Levels, WholeScores
from training.segments import BackwardNoise, Segment, draw_segment
from training.sheets import roll_sheet
from training.streaming import Stream, StreamLaw
from training.teacher import load_demo_model
from training.world import FRAMES, SIZE, caption, sample_scene


@dataclass(frozen=True, slots=True, kw_only=True)
class DmdSettings:
    """Settings of the distribution-matching stage."""

    loop: LoopSettings
    """Length and bookkeeping; an iteration is one update of the critic."""

    student: OptimiserSettings
    """How the student is updated."""

    critic: OptimiserSettings
    """How the critic is updated."""

    teacher_run: str
    """``last.pt`` of the teacher, which the critic starts from too."""

    student_run: str
    """``last.pt`` of the stage the student starts from."""

    autoencoder: str
    """Weights of the demo autoencoder: for the sample sheets, and to encode a first latent frame again."""

    scores: str = "causal"
    """``causal``: teacher and critic judge each chunk given the segment's chunks before it.
    ``bidirectional``: they judge the segment as a whole."""

    horizon: int = 21
    """Longest rollout, in latent frames."""

    segment: int = 21
    """Latent frames the teacher scores: its own horizon."""

    streaming: bool = False
    """Go on with one rollout from update to update, instead of beginning another in each."""

    overlap: int = 3
    """Latent frames a streamed segment shares with the one before; the others are new."""

    at_zero: float = 0.3
    """Share of segments that start at the first latent frame; not for streaming."""

    beta: tuple[float, ...] = (1.0, 1.0)
    """Beta law of where the other segments start: (1, 1) is uniform, (1, 2) prefers early; not for
    streaming."""

    last_step_only: bool = False
    """Keep the gradient at the last denoising step only, as Self-Forcing++ does, instead of a random one."""

    backward_noise: str = "rollout"
    """What the differentiated step starts from: the ``rollout``'s own noisy chunk, or the ``finished`` chunk
    noised again."""

    first_latent: str = "keep"
    """A segment from the middle of a video has no picture as its first latent frame: ``keep`` it as it is,
    ``mask`` its loss, or ``reencode`` the frame as a picture and mask."""

    masked: int = 3
    """Latent frames at the start of such a segment that have no loss, unless they are kept."""

    batch: int = 16
    """Rollouts per update."""

    every: int = 5
    """Updates of the critic per update of the student."""

    warmup: int = 40
    """Updates of the critic before the first of the student."""

    ema_start: int = 0
    """Updates of the student before its average begins; until then the average is the student itself."""

    guidance: float = 1.5
    """Guidance of the teacher, conventional scale: 1 is none."""

    least_sigma: float = 0.43
    """Least noise at which the teacher compares; lower ones over-sharpen."""

    largest_sigma: float = 0.98
    """Largest noise at which the teacher compares."""

    checkpointing: bool = False
    """Recompute each layer in backward instead of keeping its activations."""

    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """How the student is rolled out."""

    def __post_init__(self) -> None:
        kinds = {
            "scores": ("causal", "bidirectional"),
            "backward_noise": get_args(BackwardNoise),
            "first_latent": get_args(FirstLatent),
        }
        for name, known in kinds.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(known)}.")
        for name in ("horizon", "segment", "overlap"):
            if getattr(self, name) % self.rollout.chunk:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be a multiple of the chunk.")
        if self.horizon < self.segment:
            raise ConfigError(f"horizon is {self.horizon}, shorter than the segment, {self.segment}.")
        if not 0 <= self.overlap < self.segment:
            raise ConfigError(f"overlap is {self.overlap}; it must be below the segment, {self.segment}.")
        if len(self.beta) != 2 or min(self.beta) <= 0:
            raise ConfigError(f"beta is {list(self.beta)}; it must be two numbers above 0, e.g. [1, 1].")


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
        scores=CausalScores(levels, asked) if settings.scores == "causal" else WholeScores(levels),
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
    critic = Trained(cast(torch.nn.Module, roles.critic), settings.critic, updates=updates)
    seen = {"dmd": float("nan")}

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
        loss = roles.critic_loss(shown, generator)
        critic.update(loss, iteration)
        return {"critic": loss.item(), **seen}

    def sample(path: Path) -> None:
        roll_sheet(student.averaged, autoencoder, settings.rollout, path, device=device)

    parts: dict[str, Any] = {"model": student, "critic": critic}
    if rollouts.stream is not None:
        parts["stream"] = rollouts.stream
    run(settings.loop, parts, step, sample, recipe=settings)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(DmdSettings, sys.argv[1:], stage="train_dmd"))
