"""Stage 3 of the demo: the causal student, initialised on the teacher's trajectories.

One forward covers a whole clip under the mask of a rollout. Each chunk stands at a noise level of its own, or
is
clean: at inference the past is clean, so a random clean prefix is part of the batch.
Run ``python -m training.train_ode training/configs/demo_ode.toml [key=value ...]``.

Source: Self-Forcing, arXiv:2506.08009, equation 4; CausVid, arXiv:2412.07772.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfpp_core.config import RolloutSettings
from sfpp_core.schedule import FewStepSchedule, clean_from_velocity
from sfpp_core.student import causal_mask
from sfpp_core.tiny_autoencoder import TinyAutoencoder
from training.config import load
from training.loop import LoopSettings, OptimiserSettings, Trained, run
from training.make_ode_pairs import Pairs, PairSettings
from training.sheets import roll_sheet
from training.teacher import load_demo_model

TOKENS = 16
"""Tokens of a latent frame of the demo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OdeSettings:
    """Settings of the causal initialisation."""

    loop: LoopSettings
    """Length and bookkeeping."""

    optimiser: OptimiserSettings
    """How the student is updated."""

    pairs: PairSettings
    """How the pairs were made."""

    autoencoder: str
    """Weights of the demo autoencoder, for the sample sheets."""

    batch: int = 24
    """Trajectories per update."""

    clean_prefix: float = 0.7
    """Share of clips whose first chunks are clean."""

    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """How the student will be rolled out."""


def draw_levels(
    rng: np.random.Generator, clips: int, chunks: int, steps: int, *, clean_prefix: float
) -> Tensor:
    """Return the index of the state of every chunk, ``(clips, chunks)``; ``steps`` stands for clean.

    At least the last chunk of every clip is noisy.
    """
    levels = rng.integers(steps, size=(clips, chunks))
    for row in levels:
        if rng.random() < clean_prefix:
            row[: rng.integers(1, chunks)] = steps
    return torch.from_numpy(levels)


def pick_states(states: Tensor, levels: Tensor, chunk: int) -> Tensor:
    """Return the clip ``(B, C, T, H, W)`` in which every chunk stands at its own level.

    Args:
        states: ``(steps + 1, B, C, T, H, W)``.
        levels: ``(B, chunks)``.
        chunk: Latent frames per chunk.
    """
    index = levels.repeat_interleave(chunk, dim=1)[None, :, None, :, None, None]
    return states.gather(0, index.expand(1, *states.shape[1:])).squeeze(0)


def main(settings: OdeSettings) -> None:
    """Train the causal initialisation."""
    device = settings.loop.pick_device()
    rollout = settings.rollout
    pairs = Pairs(Path(settings.pairs.out), settings.pairs)
    student = load_demo_model(Path(settings.pairs.teacher)).to(device)
    latent_frames = pairs.states.shape[3]
    mask = causal_mask(
        latent_frames, TOKENS, chunk=rollout.chunk, window=rollout.window, sink=rollout.sink
    ).to(device)
    sigmas = torch.tensor([*FewStepSchedule.uniform(rollout.steps, shift=rollout.shift).sigmas, 0.0])

    trained = Trained(student, settings.optimiser, updates=settings.loop.iterations)

    def step(iteration: int) -> dict[str, float]:
        states, captions, rng = pairs.batch(settings.loop.seed, iteration, settings.batch)
        chunks = latent_frames // rollout.chunk
        levels = draw_levels(rng, settings.batch, chunks, rollout.steps, clean_prefix=settings.clean_prefix)
        noisy, target = pick_states(states, levels, rollout.chunk).to(device), states[-1].to(device)
        sigma = sigmas[levels].repeat_interleave(rollout.chunk, dim=1).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            velocity = student.bind(captions, dtype=torch.bfloat16).whole(noisy, sigma, mask=mask)
        clean = clean_from_velocity(noisy, velocity, sigma[:, None, :, None, None])
        error = (clean - target).square().mean(dim=(1, 3, 4))
        loss = error[sigma > 0].mean()
        last = error[sigma == sigmas[-2].to(device)].mean().item()
        return {"loss": loss.item(), "norm": trained.update(loss, iteration), "last": last}

    autoencoder = TinyAutoencoder.load(Path(settings.autoencoder)).to(device)

    def sample(path: Path) -> None:
        roll_sheet(trained.averaged, autoencoder, rollout, path, device=device)

    run(settings.loop, {"model": trained}, step, sample)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(OdeSettings, sys.argv[1:], stage="train_ode"))
