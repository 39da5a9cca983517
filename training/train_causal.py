"""Stage 2 of the demo: a causal teacher, by flow matching on each chunk given its true past.

It starts from the bidirectional teacher, or from a causal one, of another world too. Its trajectories are
what a causal student can follow: a trajectory of the bidirectional teacher also depends on what has not
happened yet. Run ``python -m training.train_causal training/configs/demo_causal.toml [key=value ...]``.

Source: the causal teacher of Causal-Forcing (repository thu-ml/Causal-Forcing).
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from sfpp_core.attention import matmul
from sfpp_core.config import RolloutSettings
from sfpp_core.kv_cache import CacheShape
from sfpp_core.schedule import add_noise, warp
from sfpp_core.student import CausalStudent
from sfpp_core.tiny_autoencoder import TinyAutoencoder
from training import parallel
from training.config import ConfigError, load
from training.forcing import check_past, forced_estimates, spread_evenly
from training.latents import Clips, prepare
from training.loop import LoopSettings, Loss, OptimiserSettings, Plan, Trained, descend, run
from training.losses import velocity_loss
from training.precision import narrow_on, region
from training.samples import roll_samples
from training.teacher import CLIP, load_demo_model
from training.worlds import world_called


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalSettings:
    """Settings of the causal teacher."""

    SMOKE: ClassVar = ("clips=4", "batch=2", "rollout.steps=1", "loop.sample_seconds=[1, 2]")

    loop: LoopSettings
    """Length and bookkeeping."""

    optimiser: OptimiserSettings
    """How it is updated."""

    teacher_run: str
    """``last.pt`` of the bidirectional teacher, or of a causal one that has learned another world; empty is
    the embedded student."""

    autoencoder: str
    """Weights of the demo autoencoder, for the sample sheets."""

    latents: str
    """File of encoded clips; made if it is missing, which it is not after the teacher's stage."""

    clips: int = 4096
    """Scenes encoded, where that file is made."""

    batch: int = 16
    """Clips computed at once, on each rank."""

    drop: float = 0.1
    """Share of captions dropped, for classifier-free guidance."""

    shift: float = 3.0
    """Shift of the noise levels seen in training."""

    chunks: int = 7
    """Chunks of each clip that are trained, from its first."""

    openings: int = 0
    """In every other update, batches of ``opening`` chunks instead of one of ``chunks``; 0 is never.

    What opens a clip has no past to copy, and is a small share of the whole clips' loss."""

    opening: int = 2
    """Chunks of an opening."""

    cuts: float = 0.0
    """Share of the chunks after a clip's first that begin with a cut, the picture moved by two latent cells
    or more: the teacher then cuts as well, and flow has spikes for reinforcement to lower."""

    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """Chunk, window and sink; steps and shift of the sample sheets."""

    world: str = "standard"
    """Which of the demo's worlds, see ``worlds``: ``standard``, or ``hard``, whose captions tell less."""

    def __post_init__(self) -> None:
        world_called(self.world)
        check_past(self.rollout)
        if not 0 <= self.cuts <= 1:
            raise ConfigError(f"cuts is {self.cuts}; it is a share, from 0 to 1.")


def main(settings: CausalSettings) -> None:
    """Train the causal teacher."""
    device, world = settings.loop.pick_device(), world_called(settings.world)
    pieces, dtype = settings.loop.pieces(settings.batch), narrow_on(device)
    model = load_demo_model(Path(settings.teacher_run)).to(device)
    shape = CacheShape.of(model.config, CLIP, settings.rollout)
    trained = Trained(model, settings.optimiser, updates=settings.loop.iterations)
    autoencoder = TinyAutoencoder.load(Path(settings.autoencoder)).to(device)
    chunk = settings.rollout.chunk

    @cache
    def clips() -> Clips:
        path = Path(settings.latents)
        with parallel.first():
            if not path.exists():
                prepare(path, autoencoder, clips=settings.clips, seed=settings.loop.seed)
        return Clips(
            path,
            seed=settings.loop.seed + 1,
            drop=settings.drop,
            world=world,
            cuts=settings.cuts,
            shot=chunk,
        )

    def loss_of(clean: Tensor, captions: list[str], generator: torch.Generator) -> Tensor:
        chunks = clean.shape[2] // chunk
        sigmas = [warp(level, settings.shift) for level in spread_evenly(generator, chunks)]
        levels = torch.tensor(sigmas).repeat_interleave(chunk)[None, None, :, None, None]
        noise = torch.randn(clean.shape, generator=generator)
        noisy = add_noise(clean, noise, levels).to(device)
        with region(device, dtype):
            student = CausalStudent(model.network, model.config, attend=matmul, dtype=dtype)
            bound = student.bind(model.words(captions))
            pairs = list(forced_estimates(bound, shape, clean.to(device), noisy, sigmas))
        velocity = torch.cat([velocity for velocity, _ in pairs], dim=2)
        return velocity_loss(velocity, clean.to(device), noise.to(device))

    def losses(piece: int, batches: int, chunks: int) -> Iterator[Loss]:
        clean, captions, generator = clips().batch(piece, settings.batch * batches)
        for first in range(0, len(captions), settings.batch):
            part = slice(first, first + settings.batch)
            clip = clean[part, :, : chunks * chunk]
            batch = {"clean": clip, "captions": captions[part]}
            yield Loss(loss_of(clip, captions[part], generator), batch=batch)

    def step(iteration: int) -> dict[str, float]:
        opens = settings.openings > 0 and iteration % 2 == 1
        batches, chunks = (settings.openings, settings.opening) if opens else (1, settings.chunks)
        every = (loss for piece in pieces.of(iteration) for loss in losses(piece, batches, chunks))
        numbers = descend(trained, every, iteration, count=pieces.per_rank * batches)
        return {**numbers, "opens": float(opens)}

    def sample(path: Path) -> Mapping[str, float]:
        seconds = settings.loop.sample_seconds
        return roll_samples(
            trained.averaged,
            autoencoder,
            settings.rollout,
            path,
            device=device,
            seconds=seconds,
            world=world,
        )

    clip = (settings.batch, model.config.channels, settings.chunks * chunk, *CLIP.chunk_shape[1:])
    plan = partial(Plan, pieces=pieces, shapes={"clips": clip})
    run(settings.loop, {"model": trained}, step, sample, recipe=settings, plan=plan)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(CausalSettings, sys.argv[1:], stage="train_causal"))
