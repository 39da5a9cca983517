"""Stage 3 of the demo: trajectories of the teacher, the targets of the causal initialisation.

Each trajectory keeps the states at the student's own noise levels and the clean clip the teacher ends in.
Run ``python -m training.make_ode_pairs training/configs/demo_ode_pairs.toml [key=value ...]``.

Source: Self-Forcing, arXiv:2506.08009, section 3; shift 5, so that every state saved lies exactly at the
sigma the student is trained at.
"""

import hashlib
import json
import logging
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sfpp_core.config import RolloutSettings
from training.config import ConfigError, load
from training.teacher import LATENT_CLIP, DemoModel, causal_trajectory, load_demo_model, trajectory
from training.world import caption, sample_scene


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSettings:
    """Settings of the pair stage."""

    SMOKE: ClassVar = ("pairs=4", "batch=2", "steps=4", "threads=1")

    teacher: str
    """``last.pt`` of the teacher's stage."""

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

    def __post_init__(self) -> None:
        if self.source not in ("causal", "bidirectional"):
            raise ConfigError(f"source is {self.source!r}; use 'causal' or 'bidirectional'.")
        if self.steps % self.rollout.steps:
            raise ConfigError(
                f"steps is {self.steps}; it must be a multiple of the student's steps, {self.rollout.steps}."
            )


def captions_of(seed: int, batch: int, size: int) -> list[str]:
    """Return the captions of one batch of pairs."""
    captions = []
    for index in range(size):
        rng = np.random.default_rng((seed, 1, batch, index))
        captions.append(caption(sample_scene(rng), rng))
    return captions


def make_batch(teacher: DemoModel, settings: PairSettings, batch: int) -> Tensor:
    """Return the states kept and the clean clip, ``(student steps + 1, B, C, T, H, W)``, float16."""
    captions = captions_of(settings.seed, batch, settings.batch)
    seed = int(np.random.default_rng((settings.seed, 2, batch)).integers(2**63))
    shape = (settings.batch, teacher.config.channels, *LATENT_CLIP)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    noise = noise.to(next(teacher.parameters()).device)
    every = settings.steps // settings.rollout.steps
    options = {"steps": settings.steps, "guidance": settings.guidance}
    with torch.autocast(noise.device.type, torch.bfloat16):
        if settings.source == "causal":
            chunks = causal_trajectory(teacher, noise, captions, rollout=settings.rollout, **options)
            states = torch.cat([torch.stack(chunk[::every]) for chunk in chunks], dim=3)
        else:
            path = trajectory(teacher, noise, captions, shift=settings.rollout.shift, **options)
            states = torch.stack([state for step, (_, state) in enumerate(path) if step % every == 0])
    return states.half().cpu()


def identity(settings: PairSettings, batch: int) -> dict[str, str]:
    """Return all that one file of pairs follows from; a file that says otherwise is made again."""
    teacher = hashlib.blake2b(Path(settings.teacher).read_bytes(), digest_size=8).hexdigest()
    skipped = ("out", "pairs", "threads")
    recipe = {name: value for name, value in asdict(settings).items() if name not in skipped}
    captions = captions_of(settings.seed, batch, settings.batch)
    return {"recipe": json.dumps({**recipe, "teacher": teacher}), "captions": json.dumps(captions)}


def main(settings: PairSettings) -> None:
    """Make the pairs that are missing, or were made otherwise; a second start continues."""
    torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_demo_model(Path(settings.teacher)).to(device)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    for batch in tqdm(range(-(-settings.pairs // settings.batch)), desc="trajectories"):
        path, wanted = out / f"pairs_{batch:05d}.safetensors", identity(settings, batch)
        if path.exists() and _metadata(path) == wanted:
            continue
        partial = path.with_suffix(".partial")
        save_file({"states": make_batch(teacher, settings, batch)}, partial, metadata=wanted)
        partial.replace(path)


def _metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return file.metadata()


class Pairs:
    """Batches of trajectories with their captions, each a function of seed and iteration."""

    def __init__(self, folder: Path) -> None:
        """Read every file of ``folder`` into memory.

        Raises:
            ConfigError: There are no pairs, or they were not made with one set of settings.
        """
        paths = sorted(folder.glob("pairs_*.safetensors"))
        if not paths:
            raise ConfigError(f"no pairs in {folder}; run training.make_ode_pairs first.")
        metadata = [_metadata(path) for path in paths]
        if len({table["recipe"] for table in metadata}) > 1:
            raise ConfigError(
                f"the pairs in {folder} were made with different settings; run make_ode_pairs again."
            )
        self.states = torch.cat([load_states(path) for path in paths], dim=1)
        self.captions = [text for table in metadata for text in json.loads(table["captions"])]

    def batch(self, seed: int, iteration: int, size: int) -> tuple[Tensor, list[str], np.random.Generator]:
        """Return states ``(steps + 1, B, C, T, H, W)``, captions, and a generator for the rest."""
        rng = np.random.default_rng((seed, 3, iteration))
        picks = rng.integers(self.states.shape[1], size=size)
        states = []
        for pick in picks.tolist():
            move = tuple(int(rng.integers(side)) for side in self.states.shape[-2:])
            states.append(self.states[:, pick].float().roll(move, (-2, -1)))
        return torch.stack(states, dim=1), [self.captions[pick] for pick in picks], rng


def load_states(path: Path) -> Tensor:
    """Return the states of one file, ``(student_steps + 1, B, C, T, H, W)``."""
    with safe_open(path, "pt") as file:
        return file.get_tensor("states")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(PairSettings, sys.argv[1:], stage="make_ode_pairs"))
