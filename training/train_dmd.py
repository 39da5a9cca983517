"""Stage 5 of the demo: distribution matching on the student's own rollouts.

``horizon`` equal to ``segment`` is Self-Forcing; a longer horizon is Self-Forcing++.
Run ``python -m training.train_dmd training/configs/demo_self_forcing.toml [key=value ...]``.

Source: Self-Forcing, arXiv:2506.08009, algorithm 1; Self-Forcing++, arXiv:2510.02283, algorithm 1.
"""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from sfpp_core.kv_cache import CacheShape
from sfpp_core.noise import ChunkNoise
from sfpp_core.tiny_autoencoder import TinyAutoencoder
from training import parallel
from training.config import load
from training.dmd_settings import DmdSettings
from training.dry_run import Plan
from training.first_latent import FirstLatent
from training.loop import Loss, descend, run
from training.matching import Matching, RollOptions, Shown
from training.parallel import Pieces
from training.scores import CausalScores, Levels, WholeScores
from training.segments import BackwardNoise, Segment, draw_segment
from training.sheets import roll_sheet
from training.streaming import Stream, StreamLaw
from training.teacher import CLIP, DemoModel, load_demo_model
from training.trained import Trained
from training.world import caption, sample_scene

logger = logging.getLogger(__name__)


def draw_captions(settings: DmdSettings, piece: int) -> tuple[list[str], np.random.Generator]:
    """Return the captions of one piece and a generator for the rest, functions of seed and piece."""
    rng = np.random.default_rng((settings.loop.seed, 4, piece))
    return [caption(sample_scene(rng), rng) for _ in range(settings.batch)], rng


class Rollouts:
    """The segment of every piece of an iteration: of a rollout of its own, or the next of a stream."""

    def __init__(self, settings: DmdSettings, roles: Matching, pieces: Pieces) -> None:
        """Take the settings, the roles, and how an iteration is cut."""
        self.settings, self.roles, self.pieces = settings, roles, pieces
        size = settings.rollout.chunk
        self.chunk = replace(CLIP, chunk=size).chunk_shape
        law = StreamLaw(
            horizon=settings.horizon // size,
            chunks=settings.segment // size,
            overlap=settings.overlap // size,
        )
        count = pieces.per_rank if settings.streaming else 0
        self.streams = [Stream(law, roles.shape) for _ in range(count)]

    def next(self, piece: int) -> tuple[Shown, torch.Generator]:
        """Return the segment of one piece, with a gradient if gradients are on, and a generator."""
        captions, rng = draw_captions(self.settings, piece)
        segment = self._segment(rng)
        clip = int(rng.choice(self.settings.clips or (self.settings.segment,)))
        seeds = rng.integers(2**62, size=2).tolist()
        if self.streams:
            stream = self.streams[piece % self.pieces.per_update // self.pieces.ranks]
            stream.turn(captions, seeds[0])
            shown = self.roles.stream(stream, segment.exit_step, self.chunk, clip)
        else:
            shown = self.roles.roll(captions, ChunkNoise(seeds[0]), segment, self.chunk, clip)
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


class StreamingStudent(Trained[DemoModel]):
    """The student in training, with the videos it is in the middle of.

    A video has a number in the whole effective batch, and whichever rank has that number goes on with it.
    """

    streams: Sequence[Stream] = ()
    """The videos of this rank."""

    def own_state(self) -> dict[str, Any]:
        """Return this rank's videos by their numbers."""
        return {name: stream.state_dict() for name, stream in self._numbered()}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Go on with this rank's share of all videos; those that were not saved begin anew."""
        lost = [name for name, _ in self._numbered() if name not in state]
        if lost:
            logger.info("the save holds no video %s: new ones begin", ", ".join(lost))
        for name, stream in self._numbered():
            if name in state:
                stream.load_state_dict(state[name])

    def _numbered(self) -> Iterator[tuple[str, Stream]]:
        """Yield this rank's videos with their numbers."""
        for index, stream in enumerate(self.streams):
            yield str(parallel.rank() + index * parallel.ranks()), stream


def load_roles(settings: DmdSettings, autoencoder: TinyAutoencoder, device: torch.device) -> Matching:
    """Load student, teacher and critic."""
    student = load_demo_model(Path(settings.student_run)).to(device)
    teacher = load_demo_model(Path(settings.teacher_run)).to(device, torch.bfloat16).requires_grad_(False)
    critic = load_demo_model(Path(settings.teacher_run)).to(device)
    geometry = replace(CLIP, chunk=settings.rollout.chunk)
    levels = Levels(shift=settings.level_shift, least=settings.least_sigma, largest=settings.largest_sigma)
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
    pieces = settings.loop.pieces(settings.batch)
    rollouts = Rollouts(settings, roles, pieces)
    updates, repeats = settings.loop.iterations, settings.critic_updates
    moves = max(1, (updates - settings.warmup) // settings.every)
    student = StreamingStudent(roles.student, settings.student, updates=moves)
    student.streams = rollouts.streams
    critic = Trained(cast(torch.nn.Module, roles.critic), settings.critic, updates=updates * repeats)
    seen: dict[str, float] = {"dmd": float("nan"), "norm": float("nan")}

    def student_losses(iteration: int, made: list[tuple[Shown, torch.Generator]]) -> Iterator[Loss]:
        for piece in pieces.of(iteration):
            shown, generator = rollouts.next(piece)
            made.append((shown.detached(), generator))
            yield Loss(roles.student_loss(shown, generator), batch=shown.detached())

    def step(iteration: int) -> dict[str, float]:
        move, rest = divmod(iteration - settings.warmup, settings.every)
        made: list[tuple[Shown, torch.Generator]] = []
        if move >= 0 and rest == 0:
            moved = descend(student, student_losses(iteration, made), move, count=pieces.per_rank)
            seen.update(dmd=moved["loss"], norm=moved["norm"])
        else:
            with torch.no_grad():
                made.extend(rollouts.next(piece) for piece in pieces.of(iteration))
        # The critic learns on the same rollouts: one less to make.
        for repeat in range(repeats):
            losses = (Loss(roles.critic_loss(shown, generator), batch=shown) for shown, generator in made)
            learnt = descend(critic, losses, iteration * repeats + repeat, count=pieces.per_rank)
            seen["critic"] = learnt["loss"]
        return {**seen}

    def sample(path: Path) -> None:
        roll_sheet(student.averaged, autoencoder, settings.rollout, path, device=device)

    segment = (settings.batch, roles.student.config.channels, settings.segment, *CLIP.chunk_shape[1:])
    plan = Plan(
        pieces=pieces,
        shapes={"segment": segment},
        held={
            "teacher": sum(weight.nbytes for weight in cast(DemoModel, roles.teacher).parameters()),
            "the rollout's keys and values": settings.batch * 2 * roles.shape.numbers,
        },
    )
    parts = {"model": student, "critic": critic}
    run(settings.loop, parts, step, sample, recipe=settings, plan=plan)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(DmdSettings, sys.argv[1:], stage="train_dmd"))
