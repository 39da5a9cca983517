"""Stage 4 of the demo: the causal student, initialised on the teacher's trajectories.

Each chunk stands at one of the student's noise levels, with the trajectory's own clean past behind it in the
cache, as at inference; the target is where the trajectory ends.
Run ``python -m training.train_ode training/configs/demo_ode.toml [key=value ...]``.

Source: Self-Forcing, arXiv:2506.08009, equation 4; CausVid, arXiv:2412.07772.
"""

import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sfpp_core.attention import matmul
from sfpp_core.config import RolloutSettings
from sfpp_core.kv_cache import CacheShape
from sfpp_core.student import CausalStudent
from sfpp_core.tiny_autoencoder import TinyAutoencoder
from training.config import load
from training.forcing import forced_estimates
from training.loop import LoopSettings, Loss, OptimiserSettings, Plan, Trained, descend, run
from training.make_ode_pairs import Pairs
from training.sheets import roll_sheet
from training.teacher import CLIP, load_demo_model


@dataclass(frozen=True, slots=True, kw_only=True)
class OdeSettings:
    """Settings of the causal initialisation."""

    SMOKE: ClassVar = ("batch=2",)

    loop: LoopSettings
    """Length and bookkeeping."""

    optimiser: OptimiserSettings
    """How the student is updated."""

    pairs: str
    """Folder of the pairs."""

    teacher_run: str
    """``last.pt`` of the teacher, which the student starts from."""

    autoencoder: str
    """Weights of the demo autoencoder, for the sample sheets."""

    batch: int = 16
    """Trajectories computed at once, on each rank."""

    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """How the student will be rolled out."""


def draw_levels(rng: np.random.Generator, chunks: int, steps: int) -> list[int]:
    """Return the denoising step each chunk stands at: every step about equally often, in random order."""
    return [int(level) for level in rng.permutation(np.arange(chunks) + rng.integers(steps)) % steps]


def pick_states(states: Tensor, levels: list[int], chunk: int) -> Tensor:
    """Return the clip ``(B, C, T, H, W)`` in which every chunk stands at its own level.

    Args:
        states: ``(steps + 1, B, C, T, H, W)``.
        levels: Index of the state of each chunk.
        chunk: Latent frames per chunk.
    """
    pieces = states.split(chunk, dim=3)
    return torch.cat([piece[level] for piece, level in zip(pieces, levels, strict=True)], dim=2)


def main(settings: OdeSettings) -> None:
    """Train the causal initialisation."""
    device = settings.loop.pick_device()
    rollout = settings.rollout
    pairs = Pairs(Path(settings.pairs))
    model = load_demo_model(Path(settings.teacher_run)).to(device)
    geometry = replace(CLIP, chunk=rollout.chunk)
    shape = CacheShape.of(model.config, geometry, rollout)
    schedule = rollout.schedule()
    trained = Trained(model, settings.optimiser, updates=settings.loop.iterations)
    autoencoder = TinyAutoencoder.load(Path(settings.autoencoder)).to(device)
    pieces = settings.loop.pieces(settings.batch)

    def loss_of(piece: int) -> Loss:
        states, captions, rng = pairs.batch(settings.loop.seed, piece, settings.batch)
        levels = draw_levels(rng, geometry.chunks, rollout.steps)
        noisy, target = pick_states(states, levels, rollout.chunk).to(device), states[-1].to(device)
        sigmas = [schedule.sigmas[level] for level in levels]
        with torch.autocast(device.type, torch.bfloat16):
            student = CausalStudent(model.network, model.config, attend=matmul, dtype=torch.bfloat16)
            bound = student.bind(model.words(captions))
            clean = [clean for _, clean in forced_estimates(bound, shape, target, noisy, sigmas)]
        loss = torch.nn.functional.mse_loss(torch.cat(clean, dim=2), target)
        return Loss(loss, batch={"noisy": noisy, "target": target, "captions": captions, "sigmas": sigmas})

    def step(iteration: int) -> dict[str, float]:
        losses = map(loss_of, pieces.of(iteration))
        return descend(trained, losses, iteration, count=pieces.per_rank)

    def sample(path: Path) -> None:
        roll_sheet(trained.averaged, autoencoder, rollout, path, device=device)

    states = (rollout.steps + 1, settings.batch, *pairs.states.shape[2:])
    plan = Plan(pieces=pieces, shapes={"states": states})
    run(settings.loop, {"model": trained}, step, sample, recipe=settings, plan=plan)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(OdeSettings, sys.argv[1:], stage="train_ode"))
