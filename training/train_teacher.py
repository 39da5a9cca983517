"""Stage 1 of the demo: the bidirectional teacher, by flow matching on five-second clips.

Run ``python -m training.train_teacher training/configs/demo_teacher.toml [key=value ...]``.
"""

import logging
import sys
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from sfpp_core.config import DEMO, StudentConfig
from sfpp_core.schedule import add_noise, warp
from sfpp_core.tiny_autoencoder import TinyAutoencoder
from training import parallel
from training.config import load
from training.latents import Clips, prepare
from training.loop import LoopSettings, Loss, OptimiserSettings, Plan, Trained, descend, run
from training.precision import narrow_on, region
from training.sheets import sheet
from training.teacher import LATENT_CLIP, DemoModel, load_demo_model, trajectory
from training.worlds import world_called


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSettings:
    """Settings of the teacher stage."""

    SMOKE: ClassVar = (
        "clips=4",
        "batch=2",
        "model.dim=128",
        "model.ffn_dim=64",
        "model.heads=1",
        "model.layers=1",
    )

    loop: LoopSettings
    """Length and bookkeeping."""

    optimiser: OptimiserSettings
    """How the teacher is updated."""

    model: StudentConfig = DEMO
    """Architecture; every later stage takes it over."""

    start_run: str = ""
    """``last.pt`` of a run whose weights it starts from, the causal teacher for one; empty starts anew.
    It may have learned another world."""

    autoencoder: str
    """Weights of the demo autoencoder."""

    latents: str
    """File of encoded clips; made if it is missing."""

    clips: int = 4096
    """Scenes encoded."""

    batch: int = 16
    """Clips computed at once, on each rank."""

    drop: float = 0.1
    """Share of captions dropped, for classifier-free guidance."""

    shift: float = 3.0
    """Timestep shift of the training noise levels."""

    guidance: float = 2.0
    """Guidance of the sample sheets."""

    world: str = "standard"
    """Which of the demo's worlds, see ``worlds``: ``standard``, or ``hard``, whose captions tell less."""

    def __post_init__(self) -> None:
        world_called(self.world)


def main(settings: TeacherSettings) -> None:
    """Train the teacher."""
    device, world = settings.loop.pick_device(), world_called(settings.world)
    autoencoder = TinyAutoencoder.load(Path(settings.autoencoder)).to(device)
    pieces, dtype = settings.loop.pieces(settings.batch), narrow_on(device)
    teacher = first_weights(settings).to(device)
    trained = Trained(teacher, settings.optimiser, updates=settings.loop.iterations)

    @cache
    def clips() -> Clips:
        path = Path(settings.latents)
        with parallel.first():
            prepare(path, autoencoder, clips=settings.clips, seed=settings.loop.seed)
        return Clips(path, seed=settings.loop.seed, drop=settings.drop, world=world)

    def loss_of(piece: int) -> Loss:
        clean, captions, generator = clips().batch(piece, settings.batch)
        sigma = warp_all(torch.rand(settings.batch, 1, generator=generator), settings.shift)
        noise = torch.randn(clean.shape, generator=generator)
        clean, noise, sigma = clean.to(device), noise.to(device), sigma.to(device)
        noisy = add_noise(clean, noise, sigma[:, :, None, None, None])
        with region(device, dtype):
            velocity = teacher.bind(captions, dtype=dtype).whole(noisy, sigma)
        error = (velocity - (noise - clean)).square().mean(dim=(1, 2, 3, 4))
        # The error at high noise falls when motion has been learned.
        high = error[sigma[:, 0] > 0.85].mean().item()
        batch = {"clean": clean, "captions": captions, "sigma": sigma, "noise": noise}
        return Loss(error.mean(), {"high": high}, batch)

    def step(iteration: int) -> dict[str, float]:
        losses = map(loss_of, pieces.of(iteration))
        return descend(trained, losses, iteration, count=pieces.per_rank)

    def sample(path: Path) -> None:
        averaged = trained.averaged
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(
            len(world.prompts), settings.model.channels, *LATENT_CLIP, generator=generator
        ).to(device)
        *_, (_, clean) = trajectory(averaged, noise, world.prompts, steps=24, guidance=settings.guidance)
        rows = []
        for prompt, clip in zip(world.prompts, clean, strict=True):
            autoencoder.reset()
            rows.append((prompt, autoencoder.decode(clip[None])[0]))
        sheet(rows, path)

    plan = partial(
        Plan, pieces=pieces, shapes={"clips": (settings.batch, settings.model.channels, *LATENT_CLIP)}
    )
    run(settings.loop, {"model": trained}, step, sample, recipe=settings, plan=plan)


def first_weights(settings: TeacherSettings) -> DemoModel:
    """Return the model as the stage begins with it."""
    if settings.start_run:
        return load_demo_model(Path(settings.start_run))
    return DemoModel(settings.model, seed=settings.loop.seed)


def warp_all(sigma: Tensor, shift: float) -> Tensor:
    """Apply ``schedule.warp`` to every element."""
    return warp(sigma, shift)  # type: ignore[arg-type, return-value]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(TeacherSettings, sys.argv[1:], stage="train_teacher"))
