"""The causal student, initialised on a teacher's trajectories: stage 4 of the demo; and for Wan.

Each chunk stands at one of the student's noise levels, with the trajectory's own clean past behind it in the
cache, as at inference; the target is where the trajectory ends.
Run ``python -m training.train_ode training/configs/demo_ode.toml [key=value ...]``.

Source: Self-Forcing, arXiv:2506.08009, equation 4; CausVid, arXiv:2412.07772.
"""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from sfpp_core.config import RolloutSettings
from sfpp_core.kv_cache import CacheShape
from sfpp_core.student import CausalStudent
from sfpp_core.tiny_autoencoder import TinyAutoencoder
from training.config import ConfigError, load
from training.cost import COPIES, copies_of, held, regression_operations
from training.forcing import check_past, forced_estimates
from training.inputs import open_texts
from training.loop import LoopSettings, Loss, OptimiserSettings, Plan, Trained, descend, run
from training.make_ode_pairs import Pairs
from training.models import VideoSettings, WanModel, attention_of, geometry_of, load_role
from training.precision import narrow_on, region
from training.samples import roll_samples
from training.wan_sheets import WanPictures, load_pictures, roll_wan_samples
from training.worlds import check_runs, check_world, world_called


@dataclass(frozen=True, slots=True, kw_only=True)
class OdeSettings:
    """Settings of the causal initialisation."""

    SMOKE: ClassVar = ("batch=2", "loop.sample_seconds=[1, 2]")

    loop: LoopSettings
    """Length and bookkeeping."""

    optimiser: OptimiserSettings
    """How the student is updated."""

    pairs: str
    """Folder of the pairs."""

    teacher_run: str
    """``last.pt`` of the teacher, which the student starts from; for Wan also a published checkpoint; empty
    is the demo's embedded student."""

    autoencoder: str
    """Weights of the autoencoder, for the sample sheets. For Wan also a tiny decoder, ``preview``, or
    nothing: no sheets."""

    batch: int = 16
    """Trajectories computed at once, on each rank."""

    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """How the student will be rolled out."""

    checkpointing: bool = False
    """Recompute each layer in backward instead of keeping its activations."""

    video: VideoSettings = field(default_factory=VideoSettings)
    """Wan's prompts and sizes; without them it is the demo's world."""

    world: str = "standard"
    """Which of the demo's worlds, see ``worlds``: ``standard``, or ``hard``, whose captions tell less."""

    def __post_init__(self) -> None:
        check_world(self.world, is_wan=self.video.is_wan)
        check_past(self.rollout)


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


def open_pairs(settings: OdeSettings, clip: tuple[int, ...]) -> Pairs:
    """Return the pairs of clips of the shape ``clip``.

    Raises:
        ConfigError: As ``Pairs``; or they are of another world.
    """
    pairs = Pairs(Path(settings.pairs), clip)
    if pairs.world != settings.world:
        raise ConfigError(
            f"the pairs in {settings.pairs} are of the {pairs.world} world, and this is of the "
            f"{settings.world} world; make pairs of it, or set world={pairs.world}."
        )
    return pairs


def files_of(settings: OdeSettings) -> dict[str, str]:
    """Return what the stage reads, by setting."""
    return {name: getattr(settings, name) for name in ("teacher_run", "pairs", "autoencoder")}


def main(settings: OdeSettings) -> None:
    """Train the causal initialisation."""
    device = settings.loop.pick_device()
    rollout, computed = settings.rollout, narrow_on(device)
    if not settings.video.is_wan:
        check_runs(settings.world, {"teacher_run": settings.teacher_run})
    texts = open_texts(settings.video, files_of(settings), dry_run=settings.loop.dry_run)
    narrow = settings.optimiser.lora.rank and settings.video.is_wan
    dtype = computed if narrow else torch.float32
    model = load_role(settings.teacher_run, settings.video, texts, device=device, dtype=dtype)
    if texts is not None:
        torch.manual_seed(settings.loop.seed)  # every rank draws the same adapters
    geometry = geometry_of(settings.video, model.config, chunk=rollout.chunk)
    shape = CacheShape.of(model.config, geometry, rollout)
    clip = (model.config.channels, geometry.latent_frames, *geometry.chunk_shape[1:])
    pairs = None if settings.loop.dry_run else open_pairs(settings, clip)
    schedule = rollout.schedule()
    trained = Trained(model, settings.optimiser, updates=settings.loop.iterations)
    autoencoder = load_pictures(settings.autoencoder, settings.video, model.config, device=device)
    pieces = settings.loop.pieces(settings.batch)

    def loss_of(piece: int) -> Loss:
        assert pairs is not None
        states, captions, rng = pairs.batch(settings.loop.seed, piece, settings.batch)
        levels = draw_levels(rng, geometry.chunks, rollout.steps)
        noisy, target = pick_states(states, levels, rollout.chunk).to(device), states[-1].to(device)
        sigmas = [schedule.sigmas[level] for level in levels]
        with region(device, computed):
            student = CausalStudent(
                model.network,
                model.config,
                attend=attention_of(model),
                dtype=computed,
                checkpointing=settings.checkpointing,
            )
            bound = student.bind(model.words(captions))
            clean = [clean for _, clean in forced_estimates(bound, shape, target, noisy, sigmas)]
        loss = torch.nn.functional.mse_loss(torch.cat(clean, dim=2), target)
        return Loss(loss, batch={"noisy": noisy, "target": target, "captions": captions, "sigmas": sigmas})

    def step(iteration: int) -> dict[str, float]:
        losses = map(loss_of, pieces.of(iteration))
        return descend(trained, losses, iteration, count=pieces.per_rank)

    def sample(path: Path) -> Mapping[str, float] | None:
        seconds = settings.loop.sample_seconds
        if isinstance(trained.averaged, WanModel):
            pictures = cast("WanPictures | None", autoencoder)
            return roll_wan_samples(
                trained.averaged, pictures, rollout, settings.video, path, seconds=seconds
            )
        assert isinstance(autoencoder, TinyAutoencoder)
        world = world_called(settings.world)
        return roll_samples(
            trained.averaged, autoencoder, rollout, path, device=device, seconds=seconds, world=world
        )

    plan = partial(
        Plan,
        pieces=pieces,
        shapes={"states": (rollout.steps + 1, settings.batch, *clip)},
        held={
            COPIES: copies_of(model, pieces.ranks),
            **held(model.config, geometry, batch=settings.batch, checkpointing=settings.checkpointing),
        },
        operations={
            "update": pieces.per_rank
            * settings.batch
            * regression_operations(model.config, geometry, rollout, checkpointing=settings.checkpointing)
        },
        narrow=settings.video.is_wan,
        teraflops=settings.video.teraflops,
    )
    run(settings.loop, {"model": trained}, step, sample, recipe=settings, plan=plan)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(OdeSettings, sys.argv[1:], stage="train_ode"))
