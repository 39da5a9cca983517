"""Distribution matching on the student's own rollouts: stage 5 of the demo, and where Wan begins.

``horizon`` equal to ``segment`` is Self-Forcing; a longer horizon is Self-Forcing++.
Run ``python -m training.train_dmd training/configs/demo_self_forcing.toml [key=value ...]``.

Source: Self-Forcing, arXiv:2506.08009, algorithm 1; Self-Forcing++, arXiv:2510.02283, algorithm 1.
"""

import copy
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from sfpp_core.geometry import VideoGeometry
from sfpp_core.kv_cache import CacheShape
from sfpp_core.noise import ChunkNoise
from sfpp_core.tiny_autoencoder import TinyAutoencoder
from training import parallel
from training.config import load
from training.cost import COPIES, MatchingCost, copies_of
from training.dmd_settings import DmdSettings
from training.dry_run import Plan
from training.first_latent import FirstLatent, Pictures
from training.inputs import open_texts
from training.latents import Clips
from training.loop import Loss, OptimiserSettings, descend, run
from training.matching import Matching, RollOptions, Shown
from training.models import Model, WanModel, geometry_of, load_role, texts_of
from training.parallel import Pieces
from training.precision import narrow_on
from training.samples import roll_samples
from training.scores import CausalScores, Levels, WholeScores
from training.segments import BackwardNoise, Segment, draw_segment
from training.streaming import Stream, StreamLaw
from training.texts import Texts
from training.trained import Trained
from training.wan_sheets import WanPictures, load_pictures, picture_bytes, roll_wan_samples
from training.world import sample_scene
from training.worlds import check_runs, world_called

logger = logging.getLogger(__name__)


def draw_captions(
    settings: DmdSettings, piece: int, texts: Texts | None = None
) -> tuple[list[str], np.random.Generator]:
    """Return the captions of one piece and a generator for the rest, functions of seed and piece.

    Args:
        settings: Of the stage.
        piece: Number of the piece.
        texts: Prompts to draw from; ``None`` makes captions of the demo's world.
    """
    rng = np.random.default_rng((settings.loop.seed, 4, piece))
    if texts is not None:
        return texts.draw(rng, settings.batch), rng
    world = world_called(settings.world)
    return [world.caption(sample_scene(rng), rng) for _ in range(settings.batch)], rng


_ROLES = ("teacher_run", "student_run", "critic_run")
"""Settings that name what the roles start from."""


class Rollouts:
    """The segment of every piece of an iteration: of a rollout of its own, or the next of a stream."""

    def __init__(self, settings: DmdSettings, roles: Matching, pieces: Pieces) -> None:
        """Take the settings, the roles, and how an iteration is cut."""
        self.settings, self.roles, self.pieces = settings, roles, pieces
        size = settings.rollout.chunk
        self.chunk = geometry_of(settings.video, roles.student.config, chunk=size).chunk_shape
        law = StreamLaw(
            horizon=settings.horizon // size,
            chunks=settings.segment // size,
            overlap=settings.overlap // size,
        )
        self.clips: Clips | None = None
        if settings.past == "data" and not settings.loop.dry_run:
            world = world_called(settings.world)
            self.clips = Clips(Path(settings.latents), seed=settings.loop.seed + 2, world=world)
        count = pieces.per_rank if settings.streaming else 0
        self.streams = [Stream(law, roles.shape) for _ in range(count)]

    def next(self, piece: int) -> tuple[Shown, torch.Generator]:
        """Return the segment of one piece, with a gradient if gradients are on, and a generator."""
        captions, rng = draw_captions(self.settings, piece, texts_of(self.roles.student))
        # Once for all pieces of an iteration: ranks that roll out equally far do not wait for each other.
        shared = np.random.default_rng((self.settings.loop.seed, 8, piece // self.pieces.per_update))
        segment = self._segment(shared)
        clip = int(shared.choice(self.settings.clips or (self.settings.segment,)))
        seeds = rng.integers(2**62, size=2).tolist()
        if self.streams:
            stream = self.streams[piece % self.pieces.per_update // self.pieces.ranks]
            stream.turn(captions, seeds[0])
            shown = self.roles.stream(stream, segment.exit_step, self.chunk, clip)
            if len(self.streams) > 1 and self.roles.device.type == "cuda":
                park(stream)
        else:
            past = None
            if self.clips is not None and segment.start:
                clips, captions, _ = self.clips.batch(piece, self.settings.batch)
                past = clips[:, :, : segment.start * self.settings.rollout.chunk]
            shown = self.roles.roll(captions, ChunkNoise(seeds[0]), segment, self.chunk, clip, past=past)
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
            given=settings.given,
        )


def park(stream: Stream) -> None:
    """Keep a video in main memory until its next turn: each holds a window of keys and values."""
    stream.load_state_dict(_on_host(stream.state_dict()))


def _on_host(state: Any) -> Any:
    """Return nested ``state`` with every tensor in main memory."""
    if isinstance(state, Mapping):
        return {name: _on_host(value) for name, value in state.items()}
    if isinstance(state, list):
        return [_on_host(value) for value in state]
    return state.detach().cpu() if isinstance(state, torch.Tensor) else state


class StreamingStudent(Trained[Model]):
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


def load_models(
    settings: DmdSettings, texts: Texts | None, device: torch.device
) -> tuple[Model, Model, Model]:
    """Return student, teacher and critic.

    What is trained is float32; what adapters are trained for is bfloat16, and a critic of adapters shares its
    weights with the teacher if it starts from it.
    """

    def load_as(path: str, dtype: torch.dtype, **options: Any) -> Model:
        return load_role(path, settings.video, texts, device=device, dtype=dtype, **options)

    def width(optimiser: OptimiserSettings) -> torch.dtype:
        return narrow_on(device) if optimiser.lora.rank and settings.video.is_wan else torch.float32

    recomputed = {"checkpointing": settings.checkpointing}
    student = load_as(
        settings.student_run, width(settings.student), loras=settings.student_loras, **recomputed
    )
    teacher = load_as(settings.teacher_run, narrow_on(device)).requires_grad_(False)
    if settings.critic_run:
        critic = load_as(settings.critic_run, width(settings.critic), part="critic", **recomputed)
    elif settings.critic.lora.rank and settings.video.is_wan:
        assert isinstance(teacher, WanModel)
        critic = copy.deepcopy(teacher, {id(weight): weight for weight in teacher.parameters()})
        critic.checkpointing = settings.checkpointing
    else:
        critic = load_as(settings.teacher_run, torch.float32, **recomputed)
    if settings.video.is_wan:
        torch.manual_seed(settings.loop.seed)  # every rank draws the same adapters
    return student, teacher, critic


def load_roles(
    settings: DmdSettings, autoencoder: Pictures | None, device: torch.device, texts: Texts | None = None
) -> Matching:
    """Load student, teacher and critic."""
    student, teacher, critic = load_models(settings, texts, device)
    geometry = geometry_of(settings.video, student.config, chunk=settings.rollout.chunk)
    levels = Levels(shift=settings.level_shift, least=settings.least_sigma, largest=settings.largest_sigma)
    # Both roles see the whole segment, whatever window the student has.
    asked = replace(
        CacheShape.of(teacher.config, geometry, settings.rollout),
        window=settings.segment // settings.rollout.chunk,
        sink=0,
    )
    return Matching(
        student,
        teacher,
        critic,
        scores=CausalScores(levels, asked, opening=settings.opening)
        if settings.scores == "causal"
        else WholeScores(levels, apart=settings.video.is_wan),
        schedule=settings.rollout.schedule(),
        shape=CacheShape.of(student.config, geometry, settings.rollout),
        options=RollOptions(
            backward_noise=cast(BackwardNoise, settings.backward_noise),
            first_latent=cast(FirstLatent, settings.first_latent),
            masked=settings.masked,
            checkpointing=settings.checkpointing,
            overall=settings.overall,
            critic_overall=settings.critic_overall,
        ),
        autoencoder=autoencoder,
        guidance=settings.guidance,
    )


def plan_of(settings: DmdSettings, roles: Matching, pieces: Pieces) -> Plan:
    """Return what a dry run tells beside what is trained."""
    config, size = roles.student.config, settings.segment
    geometry = geometry_of(
        settings.video, config, chunk=settings.rollout.chunk, frames=VideoGeometry.frames_of(size)
    )
    cost = MatchingCost(
        config=config,
        geometry=geometry,
        rollout=settings.rollout,
        batch=settings.batch,
        horizon=settings.horizon,
        streaming=settings.streaming,
        overlap=settings.overlap,
        at_zero=settings.at_zero,
        place=settings.beta[0] / sum(settings.beta),
        last_step_only=settings.last_step_only,
        guided=settings.guidance != 1,
        every=settings.every,
        critic_updates=settings.critic_updates,
        given=settings.given,
        checkpointing=settings.checkpointing,
    )
    critic = cast(nn.Module, roles.critic)
    critics = {id(weight) for weight in critic.parameters()}
    asked = cast(nn.Module, roles.teacher).parameters()
    teacher = sum(weight.nbytes for weight in asked if id(weight) not in critics)
    pictures = {}
    if settings.video.is_wan and settings.first_latent == "reencode":
        size_of = picture_bytes(settings.autoencoder, settings.video, config)
        pictures["the autoencoder at a segment's first latent frame"] = settings.batch * size_of
    return Plan(
        pieces=pieces,
        shapes={"segment": (settings.batch, config.channels, size, *geometry.chunk_shape[1:])},
        held={
            "teacher, unless the critic holds its weights": teacher,
            COPIES: copies_of(roles.student, pieces.ranks) + copies_of(critic, pieces.ranks),
            **cost.held(),
            **pictures,
        },
        operations={name: pieces.per_rank * number for name, number in cost.parts().items()},
        narrow=settings.video.is_wan,
        teraflops=settings.video.teraflops,
    )


def samples_of(
    model: Model,
    autoencoder: TinyAutoencoder | WanPictures | None,
    settings: DmdSettings,
    path: Path,
    *,
    device: torch.device,
) -> Mapping[str, float] | None:
    """Write the samples of the demo, or of Wan; return what was measured on them."""
    seconds = settings.loop.sample_seconds
    if isinstance(model, WanModel):
        assert not isinstance(autoencoder, TinyAutoencoder)
        return roll_wan_samples(model, autoencoder, settings.rollout, settings.video, path, seconds=seconds)
    assert isinstance(autoencoder, TinyAutoencoder)
    world = world_called(settings.world)
    return roll_samples(
        model, autoencoder, settings.rollout, path, device=device, seconds=seconds, world=world
    )


def main(settings: DmdSettings) -> None:
    """Train the student against the teacher, and the critic against the student."""
    device = settings.loop.pick_device()
    if not settings.video.is_wan:
        # Without a critic_run the critic is the teacher's; an empty name would be the embedded demo.
        named = [name for name in _ROLES if name != "critic_run" or settings.critic_run]
        check_runs(settings.world, {name: getattr(settings, name) for name in named})
    read = {name: getattr(settings, name) for name in (*_ROLES, "autoencoder")}
    texts = open_texts(settings.video, read, loras=settings.student_loras, dry_run=settings.loop.dry_run)
    roles = load_roles(settings, None, device, texts)
    config, encodes = roles.student.config, settings.first_latent == "reencode"
    autoencoder = load_pictures(settings.autoencoder, settings.video, config, device=device, encodes=encodes)
    roles.autoencoder = autoencoder
    pieces = settings.loop.pieces(settings.batch)
    rollouts = Rollouts(settings, roles, pieces)
    updates, repeats = settings.loop.iterations, settings.critic_updates
    moves = max(1, (updates - settings.warmup) // settings.every)
    student = StreamingStudent(roles.student, settings.student, updates=moves)
    student.streams = rollouts.streams
    critic = Trained(cast(nn.Module, roles.critic), settings.critic, updates=updates * repeats)
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
        return dict(seen)

    def sample(path: Path) -> Mapping[str, float] | None:
        return samples_of(student.averaged, autoencoder, settings, path, device=device)

    run(
        settings.loop,
        {"model": student, "critic": critic},
        step,
        sample,
        recipe=settings,
        plan=lambda: plan_of(settings, roles, pieces),
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(DmdSettings, sys.argv[1:], stage="train_dmd"))
