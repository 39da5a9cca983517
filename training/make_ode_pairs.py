"""Trajectories of a teacher, the targets of the causal initialisation: stage 3 of the demo; and for Wan.

Each trajectory keeps the states at the student's own noise levels and the clean clip the teacher ends in.
Run ``python -m training.make_ode_pairs training/configs/demo_ode_pairs.toml [key=value ...]``.

Source: Self-Forcing, arXiv:2506.08009, section 3; shift 5, so that every state saved lies exactly at the
sigma the student is trained at.
"""

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sfpp_core.config import RolloutSettings, to_table
from sfpp_core.weights import open_weights
from training import parallel
from training.config import ConfigError, load
from training.digests import digest
from training.forcing import check_past
from training.inputs import open_texts
from training.models import Model, VideoSettings, geometry_of, load_role, texts_of
from training.precision import narrow_on, region
from training.state import FILE, newest
from training.teacher import causal_trajectory, trajectory
from training.texts import Texts
from training.world import sample_scene
from training.worlds import STANDARD, check_runs, check_world, world_called


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSettings:
    """Settings of the pair stage."""

    SMOKE: ClassVar = ("pairs=4", "batch=2", "steps=4", "threads=1")

    teacher: str
    """``last.pt`` of the teacher's stage; for Wan also a published checkpoint."""

    out: str
    """Folder of the pairs: one file per batch."""

    source: str
    """``causal``: each chunk given the clean ones before it; ``bidirectional``: the whole clip at once."""

    pairs: int = 1024
    """Trajectories."""

    batch: int = 16
    """Trajectories made together."""

    steps: int = 24
    """Euler steps of the teacher; a multiple of the student's steps."""

    guidance: float = 2.0
    """Guidance of the teacher, conventional scale."""

    seed: int = 0
    """Of captions and noise."""

    threads: int = 2
    """CPU threads of torch."""

    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """The student's steps and shift, whose noise levels are kept; its chunk, window and sink."""

    video: VideoSettings = field(default_factory=VideoSettings)
    """Wan's prompts and sizes; without them it is the demo's world. Clips have 21 latent frames."""

    world: str = "standard"
    """Which of the demo's worlds, see ``worlds``: ``standard``, or ``hard``, whose captions tell less."""

    def __post_init__(self) -> None:
        check_past(self.rollout)
        check_world(self.world, is_wan=self.video.is_wan)
        if self.source not in ("causal", "bidirectional"):
            raise ConfigError(f"source is {self.source!r}; use 'causal' or 'bidirectional'.")
        if self.steps % self.rollout.steps:
            raise ConfigError(
                f"steps is {self.steps}; it must be a multiple of the student's steps, {self.rollout.steps}."
            )


def captions_of(settings: PairSettings, batch: int, texts: Texts | None = None) -> list[str]:
    """Return the captions of one batch of pairs: of the demo's world, or the next of ``texts``."""
    size = settings.batch
    if texts is not None:
        return [texts.prompts[(batch * size + index) % len(texts.prompts)] for index in range(size)]
    world, captions = world_called(settings.world), []
    for index in range(size):
        rng = np.random.default_rng((settings.seed, 1, batch, index))
        captions.append(world.caption(sample_scene(rng), rng))
    return captions


def make_batch(teacher: Model, settings: PairSettings, batch: int) -> Tensor:
    """Return the states kept and the clean clip, ``(student steps + 1, B, C, T, H, W)``, float16."""
    captions = captions_of(settings, batch, texts_of(teacher))
    seed = int(np.random.default_rng((settings.seed, 2, batch)).integers(2**63))
    clip = geometry_of(settings.video, teacher.config, chunk=settings.rollout.chunk)
    shape = (settings.batch, teacher.config.channels, clip.latent_frames, *clip.chunk_shape[1:])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    noise = noise.to(next(teacher.parameters()).device)
    every = settings.steps // settings.rollout.steps
    options = {"steps": settings.steps, "guidance": settings.guidance}
    with region(noise.device, narrow_on(noise.device)):
        if settings.source == "causal":
            chunks = causal_trajectory(
                teacher, noise, captions, rollout=settings.rollout, clip=clip, **options
            )
            states = torch.cat([torch.stack(chunk[::every]) for chunk in chunks], dim=3)
        else:
            path = trajectory(teacher, noise, captions, shift=settings.rollout.shift, **options)
            states = torch.stack([state for step, (_, state) in enumerate(path) if step % every == 0])
    return states.half().cpu()


def identity(
    settings: PairSettings, batch: int, texts: Texts | None = None, *, teacher: str
) -> dict[str, str]:
    """Return all that one file of pairs follows from, given the ``digest_of`` its teacher."""
    skipped = ["out", "pairs", "threads"] + ([] if settings.video.is_wan else ["video"])
    if settings.world == STANDARD.name:
        skipped.append("world")  # as before there were others: pairs that exist stay good
    table = {**asdict(settings), "rollout": to_table(settings.rollout)}
    recipe: dict[str, Any] = {name: value for name, value in table.items() if name not in skipped}
    if settings.video.is_wan:
        recipe["video"] = {name: recipe["video"][name] for name in ("height", "width")}
    captions = captions_of(settings, batch, texts)
    return {"recipe": json.dumps({**recipe, "teacher": teacher}), "captions": json.dumps(captions)}


def digest_of(teacher: str) -> str:
    """Return a digest of the weights a setting names, or the name where it stands for a model without any."""
    path = Path(teacher)
    found = newest(path) if path.name == FILE else path
    if found is None or not found.exists():
        return teacher
    if path.name == FILE or found.is_file():
        return digest(found)
    return digest(*open_weights(found).paths)  # other files of the folder may come and go


def check_made(path: Path, wanted: Mapping[str, str]) -> None:
    """Refuse to take a file of pairs for what it is not: it took long to make.

    Raises:
        ConfigError: It follows from other settings.
    """
    made = _metadata(path)
    before, now = ({**json.loads(table["recipe"]), "captions": table["captions"]} for table in (made, wanted))
    if differ := [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]:
        raise ConfigError(
            f"{path} was made with another {' and another '.join(differ)}; put it back to continue, choose "
            "another out, or remove the folder to begin anew."
        )


def load_teacher(settings: PairSettings, texts: Texts | None, device: torch.device) -> Model:
    """Return the teacher: Wan's in bfloat16 on a GPU, which computes in it anyway."""
    narrow = settings.video.is_wan and device.type == "cuda"
    dtype = torch.bfloat16 if narrow else torch.float32
    teacher = load_role(settings.teacher, settings.video, texts, device=device, dtype=dtype)
    return teacher.requires_grad_(False)


def main(settings: PairSettings) -> None:
    """Make the pairs that are missing; a second start continues, and ranks share the work."""
    torch.set_num_threads(settings.threads)
    device = parallel.join("cuda" if torch.cuda.is_available() else "cpu")
    if not settings.video.is_wan:
        check_runs(settings.world, {"teacher": settings.teacher})
    texts = open_texts(settings.video, {"teacher": settings.teacher})
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    absent, weights = [], digest_of(settings.teacher)
    for batch in range(parallel.rank(), -(-settings.pairs // settings.batch), parallel.ranks()):
        path, wanted = (
            out / f"pairs_{batch:05d}.safetensors",
            identity(settings, batch, texts, teacher=weights),
        )
        if path.exists():
            check_made(path, wanted)
        else:
            absent.append((batch, path, wanted))
    if not absent:
        return
    teacher = load_teacher(settings, texts, device)
    for batch, path, wanted in tqdm(absent, desc="trajectories", disable=parallel.rank() > 0):
        partial = path.with_suffix(".partial")
        save_file({"states": make_batch(teacher, settings, batch)}, partial, metadata=wanted)
        partial.replace(path)


def _metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return file.metadata()


class Pairs:
    """Batches of trajectories with their captions, each a function of seed and iteration.

    They stay on disk: 16,000 of Wan at 832x480 are 336 GB.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        """Read what every file of ``folder`` says of itself.

        Args:
            folder: What ``make_ode_pairs`` wrote.
            shape: Of one clip, ``(C, T, H, W)``.

        Raises:
            ConfigError: There are no pairs, they were not made with one set of settings, or not of this
                shape.
        """
        paths = sorted(folder.glob("pairs_*.safetensors"))
        if not paths:
            raise ConfigError(f"no pairs in {folder}; run training.make_ode_pairs first.")
        metadata = [_metadata(path) for path in paths]
        recipe = json.loads(metadata[0]["recipe"])
        self._wraps = "video" not in recipe
        self.world: str = recipe.get("world", STANDARD.name)
        """Of the captions, if they are the demo's."""
        if len({table["recipe"] for table in metadata}) > 1:
            raise ConfigError(
                f"the pairs in {folder} were made with different settings; run make_ode_pairs again."
            )
        captions = [json.loads(table["captions"]) for table in metadata]
        self.captions = [text for batch in captions for text in batch]
        self._rows = [
            (path, row) for path, batch in zip(paths, captions, strict=True) for row in range(len(batch))
        ]
        self.shape = tuple(load_states(*self._rows[0]).shape[1:])
        """Shape of one clip, ``(C, T, H, W)``."""
        if self.shape != shape:
            raise ConfigError(
                f"the pairs in {folder} are of shape {self.shape} and this stage wants {shape}; make pairs "
                "of its size, or give it theirs: video.height and video.width."
            )

    def batch(self, seed: int, iteration: int, size: int) -> tuple[Tensor, list[str], np.random.Generator]:
        """Return states ``(steps + 1, B, C, T, H, W)``, captions, and a generator for the rest.

        The demo's world is a torus: its clips are moved at random.
        """
        rng = np.random.default_rng((seed, 3, iteration))
        picks = rng.integers(len(self._rows), size=size)
        states = []
        for pick in picks.tolist():
            clip = load_states(*self._rows[pick]).float()
            if self._wraps:
                move = tuple(int(rng.integers(side)) for side in self.shape[-2:])
                clip = clip.roll(move, (-2, -1))
            states.append(clip)
        return torch.stack(states, dim=1), [self.captions[pick] for pick in picks], rng


def load_states(path: Path, row: int) -> Tensor:
    """Return the states of one clip of a file, ``(student_steps + 1, C, T, H, W)``."""
    with safe_open(path, "pt") as file:
        return file.get_slice("states")[:, row]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(PairSettings, sys.argv[1:], stage="make_ode_pairs"))
