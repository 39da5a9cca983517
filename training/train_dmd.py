"""Stage 5 of the demo: distribution matching on the student's own rollouts.

``horizon`` equal to ``segment`` is Self-Forcing; a longer horizon is Self-Forcing++. The teacher sees a
segment from the middle of a rollout as it is: its first latent frame is not encoded again as a first frame.
Run ``python -m training.train_dmd training/configs/demo_self_forcing.toml [key=value ...]``.

Source: Self-Forcing, arXiv:2506.08009, algorithm 1; Self-Forcing++, arXiv:2510.02283, algorithm 1.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfpp_core.attention import matmul
from sfpp_core.config import RolloutSettings
from sfpp_core.geometry import VideoGeometry
from sfpp_core.kv_cache import CacheShape
from sfpp_core.noise import ChunkNoise
from sfpp_core.schedule import add_noise, clean_from_velocity
from sfpp_core.student import CausalStudent
from sfpp_core.tiny_autoencoder import TinyAutoencoder
from training.config import ConfigError, load
from training.loop import LoopSettings, OptimiserSettings, Trained, run
from training.losses import dmd_loss, velocity_loss
from training.segments import Segment, draw_segment, roll_segment
from training.sheets import roll_sheet
from training.teacher import DemoModel, Guided, load_demo_model
from training.train_teacher import warp_all
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
    """Weights of the demo autoencoder, for the sample sheets."""

    horizon: int = 21
    """Longest rollout, in latent frames."""

    segment: int = 21
    """Latent frames the teacher scores: its own horizon."""

    at_zero: float = 0.3
    """Share of segments that start at the first latent frame."""

    last_step_only: bool = False
    """Keep the gradient at the last denoising step only, as Self-Forcing++ does."""

    batch: int = 16
    """Rollouts per update."""

    every: int = 5
    """Updates of the critic per update of the student."""

    warmup: int = 40
    """Updates of the critic before the first of the student."""

    guidance: float = 1.5
    """Guidance of the teacher, conventional scale: 1 is none."""

    least_sigma: float = 0.43
    """Least noise at which the teacher compares; lower ones over-sharpen."""

    largest_sigma: float = 0.98
    """Largest noise at which the teacher compares."""

    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """How the student is rolled out."""

    def __post_init__(self) -> None:
        for name in ("horizon", "segment"):
            if getattr(self, name) % self.rollout.chunk:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be a multiple of the chunk.")
        if self.horizon < self.segment:
            raise ConfigError(f"horizon is {self.horizon}, shorter than the segment, {self.segment}.")


@dataclass(frozen=True, slots=True)
class Batch:
    """What one iteration is made from: a function of the seed and the iteration."""

    captions: list[str]
    noise: ChunkNoise
    segment: Segment
    generator: torch.Generator

    @classmethod
    def draw(cls, settings: DmdSettings, iteration: int) -> "Batch":
        """Draw the batch of one iteration."""
        rng = np.random.default_rng((settings.loop.seed, 4, iteration))
        captions = [caption(sample_scene(rng), rng) for _ in range(settings.batch)]
        chunk = settings.rollout.chunk
        segment = draw_segment(
            rng,
            horizon=settings.horizon // chunk,
            chunks=settings.segment // chunk,
            at_zero=settings.at_zero,
            steps=settings.rollout.steps,
            last_step_only=settings.last_step_only,
        )
        seeds = rng.integers(2**62, size=2).tolist()
        return cls(captions, ChunkNoise(seeds[0]), segment, torch.Generator().manual_seed(seeds[1]))


class Matching:
    """Student, teacher and critic, and the two losses between them."""

    def __init__(self, settings: DmdSettings, device: torch.device) -> None:
        """Load the three roles."""
        self.settings, self.device = settings, device
        self.student = load_demo_model(Path(settings.student_run)).to(device)
        self.teacher = load_demo_model(Path(settings.teacher_run)).to(device).requires_grad_(False)
        self.critic = load_demo_model(Path(settings.teacher_run)).to(device)
        rollout = settings.rollout
        self.schedule = rollout.schedule()
        self.geometry = VideoGeometry(height=SIZE, width=SIZE, frames=FRAMES, chunk=rollout.chunk)
        self.shape = CacheShape.of(self.student.config, self.geometry, rollout)

    def roll(self, batch: Batch) -> Tensor:
        """Return the student's segment, with a gradient if gradients are on."""
        model = self.student
        student = CausalStudent(model.network, model.config, attend=matmul, dtype=torch.bfloat16)
        like = torch.empty(
            len(batch.captions), model.config.channels, *self.geometry.chunk_shape, device=self.device
        )
        with torch.autocast(self.device.type, torch.bfloat16):
            bound = student.bind(model.words(batch.captions))
            return roll_segment(
                bound, batch.noise, self.schedule, self.shape, batch.segment, like=like, dtype=torch.bfloat16
            )

    def noised(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``clean`` at a random noise level, the level ``(B, 1)`` and the noise."""
        settings = self.settings
        sigma = warp_all(torch.rand(len(clean), 1, generator=generator), settings.rollout.shift)
        sigma = sigma.clamp(settings.least_sigma, settings.largest_sigma).to(self.device)
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        return add_noise(clean.detach(), noise, sigma[:, :, None, None, None]), sigma, noise

    def critic_loss(self, clean: Tensor, batch: Batch) -> Tensor:
        """Return the flow-matching error of the critic on the student's segment."""
        noisy, sigma, noise = self.noised(clean, batch.generator)
        return velocity_loss(self._velocity(self.critic, noisy, sigma, batch.captions), clean.detach(), noise)

    def student_loss(self, clean: Tensor, batch: Batch) -> Tensor:
        """Return the distribution-matching loss of the student's segment."""
        noisy, sigma, _ = self.noised(clean, batch.generator)
        level = sigma[:, :, None, None, None]
        with torch.no_grad():
            guidance = self.settings.guidance
            real, fake = (
                clean_from_velocity(noisy, self._velocity(model, noisy, sigma, batch.captions, scale), level)
                for model, scale in ((self.teacher, guidance), (self.critic, 1.0))
            )
        return dmd_loss(clean, real, fake)

    def _velocity(
        self, model: DemoModel, noisy: Tensor, sigma: Tensor, captions: Sequence[str], guidance: float = 1.0
    ) -> Tensor:
        """Return the velocity of a bidirectional role."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return Guided(model, captions, guidance=guidance)(noisy, sigma)


def main(settings: DmdSettings) -> None:
    """Train the student against the teacher, and the critic against the student."""
    device = settings.loop.pick_device()
    roles = Matching(settings, device)
    autoencoder = TinyAutoencoder.load(Path(settings.autoencoder)).to(device)
    updates = settings.loop.iterations
    student = Trained(
        roles.student, settings.student, updates=max(1, (updates - settings.warmup) // settings.every)
    )
    critic = Trained(roles.critic, settings.critic, updates=updates)
    seen = {"dmd": float("nan")}

    def step(iteration: int) -> dict[str, float]:
        batch = Batch.draw(settings, iteration)
        past_warmup = iteration - settings.warmup
        moves = past_warmup >= 0 and past_warmup % settings.every == 0
        with torch.set_grad_enabled(moves):
            clean = roles.roll(batch)
        if moves:
            loss = roles.student_loss(clean, batch)
            seen["dmd"] = loss.item()
            seen["norm"] = student.update(loss, past_warmup // settings.every)
        # The critic learns on the same rollout: one less to make.
        loss = roles.critic_loss(clean, batch)
        critic.update(loss, iteration)
        return {"critic": loss.item(), **seen}

    def sample(path: Path) -> None:
        roll_sheet(student.averaged, autoencoder, settings.rollout, path, device=device)

    run(settings.loop, {"model": student, "critic": critic}, step, sample, recipe=settings)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(DmdSettings, sys.argv[1:], stage="train_dmd"))
