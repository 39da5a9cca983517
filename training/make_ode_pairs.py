"""Stage 2 of the demo: trajectories of the teacher, the targets of the causal initialisation.

Each trajectory keeps the states at the student's own noise levels and the clean clip the teacher ends in.
Run ``python -m training.make_ode_pairs training/configs/demo_ode_pairs.toml [key=value ...]``.

Source: Self-Forcing, arXiv:2506.08009, section 3; shift 5, so that every state saved lies exactly at the
sigma the student is trained at.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from training.config import ConfigError, load
from training.teacher import DemoModel, load_demo_model, trajectory
from training.world import caption, sample_scene


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSettings:
    """Settings of the pair stage."""

    teacher: str
    """``last.pt`` of the teacher stage."""

    out: str
    """Folder of the pairs: one file per batch."""

    pairs: int = 1024
    """Trajectories."""

    batch: int = 16
    """Trajectories made together."""

    steps: int = 24
    """Euler steps of the teacher; a multiple of the student's steps."""

    student_steps: int = 4
    """Denoising steps of the student, whose noise levels are kept."""

    guidance: float = 2.0
    """Guidance of the teacher, conventional scale."""

    shift: float = 5.0
    """Timestep shift, the student's own."""

    seed: int = 0
    """Of captions and noise."""

    threads: int = 2
    """CPU threads of torch."""

    def __post_init__(self) -> None:
        if self.steps % self.student_steps:
            raise ConfigError(
                f"steps is {self.steps}; it must be a multiple of student_steps, {self.student_steps}."
            )


def captions_of(seed: int, batch: int, size: int) -> list[str]:
    """Return the captions of one batch of pairs."""
    captions = []
    for index in range(size):
        rng = np.random.default_rng((seed, 1, batch, index))
        captions.append(caption(sample_scene(rng), rng))
    return captions


def make_batch(
    teacher: DemoModel, settings: PairSettings, batch: int, shape: tuple[int, ...]
) -> dict[str, Tensor]:
    """Return the states kept and the clean clip, ``(student_steps + 1, B, C, T, H, W)``, float16."""
    captions = captions_of(settings.seed, batch, settings.batch)
    generator = torch.Generator().manual_seed(
        int(np.random.default_rng((settings.seed, 2, batch)).integers(2**63))
    )
    noise = torch.randn(settings.batch, *shape, generator=generator).to(next(teacher.parameters()).device)
    every = settings.steps // settings.student_steps
    with torch.autocast(noise.device.type, torch.bfloat16):
        states = [
            state.half().cpu()
            for step, (_, state) in enumerate(
                trajectory(
                    teacher,
                    noise,
                    captions,
                    steps=settings.steps,
                    guidance=settings.guidance,
                    shift=settings.shift,
                )
            )
            if step % every == 0
        ]
    return {"states": torch.stack(states)}


def main(settings: PairSettings) -> None:
    """Make the pairs that are missing; a second start continues."""
    torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_demo_model(Path(settings.teacher)).to(device)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    shape = (teacher.config.channels, 21, 8, 8)
    for batch in tqdm(range(-(-settings.pairs // settings.batch)), desc="trajectories"):
        path = out / f"pairs_{batch:05d}.safetensors"
        if path.exists():
            continue
        partial = path.with_suffix(".partial")
        save_file(make_batch(teacher, settings, batch, shape), partial)
        partial.replace(path)


class Pairs:
    """Batches of trajectories with their captions, each a function of seed and iteration."""

    def __init__(self, folder: Path, settings: PairSettings) -> None:
        """Read every file of ``folder`` into memory."""
        paths = sorted(folder.glob("pairs_*.safetensors"))
        if not paths:
            raise ConfigError(f"no pairs in {folder}; run training.make_ode_pairs first.")
        self.states = torch.cat([load_file(path)["states"] for path in paths], dim=1)
        self.captions = [
            text for batch in range(len(paths)) for text in captions_of(settings.seed, batch, settings.batch)
        ]

    def batch(self, seed: int, iteration: int, size: int) -> tuple[Tensor, list[str], np.random.Generator]:
        """Return states ``(steps + 1, B, C, T, H, W)``, captions, and a generator for the rest."""
        rng = np.random.default_rng((seed, 3, iteration))
        picks = rng.integers(self.states.shape[1], size=size)
        states = []
        for pick in picks.tolist():
            move = tuple(int(rng.integers(side)) for side in self.states.shape[-2:])
            states.append(self.states[:, pick].float().roll(move, (-2, -1)))
        return torch.stack(states, dim=1), [self.captions[pick] for pick in picks], rng


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(PairSettings, sys.argv[1:], stage="make_ode_pairs"))
