"""From a training run to files that load: one student with its settings, its LoRA, or the demo and its words.

How a student is rolled out (steps, window, sink) is told as it was trained.

Run ``python -m training.export training/configs/demo_export.toml [key=value ...]``.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from sfpp_core.checkpoint import save, save_words
from sfpp_core.config import RolloutSettings
from sfpp_core.demo import STUDENT, WORDS
from training.adapters import LoraSettings, export_adapters
from training.config import ConfigError, load
from training.digests import digest
from training.models import network_of
from training.precision import DTYPES
from training.state import FILE, read_averaged, read_notes, read_rollout
from training.teacher import load_demo_model
from training.world import WORD_GROUPS
from training.worlds import STANDARD, world_called, world_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """What is exported, and where to."""

    SMOKE: ClassVar = ("out=runs/smoke/export",)  # never over the files that ship

    run: str
    """Folder of the stage: ``last.pt`` holds the weights, ``log.jsonl`` what led to them."""

    stage: str
    """Name of the stage, e.g. ``ode``; shown wherever the student is used."""

    out: str = "sfpp_core/demo"
    """Folder of the demo's two files; for Wan the one file, ``.safetensors``."""

    dtype: str = "bfloat16"
    """Of the file of a Wan, ``bfloat16`` or ``float32``; the demo's is float16."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; use one of {', '.join(DTYPES)}.")


def main(settings: ExportSettings) -> None:
    """Write what the run trained: the demo, a Wan, or a LoRA for one."""
    weights = read_averaged(Path(settings.run) / FILE)
    if "words.table.weight" in weights:
        export_demo(settings)
        return
    out = Path(settings.out)
    if out.suffix != ".safetensors":
        raise ConfigError(f"out is {out}; a student of Wan is one file: name it, e.g. student.safetensors.")
    out.parent.mkdir(parents=True, exist_ok=True)
    if any(".lora_" in name for name in weights):
        export_adapters(weights, out, lora_of(Path(settings.run)), dtype=DTYPES[settings.dtype])
    else:
        network, config = network_of(weights)
        notes = {"log": digest(Path(settings.run) / "log.jsonl")}
        dtype, rollout = DTYPES[settings.dtype], rollout_of(Path(settings.run))
        save(out, network, config, rollout, stage=settings.stage, dtype=dtype, notes=notes)
    logging.info("wrote %s", out)


def lora_of(run: Path) -> LoraSettings:
    """Return the adapters that a run trained, as its recipe says.

    Raises:
        ConfigError: Its saved state says nothing of adapters.
    """
    recipe = read_notes(run / FILE)["recipe"]
    for part in ("student", "optimiser"):
        if int(recipe.get(f"{part}.lora.rank", 0)):
            rank, alpha = (recipe[f"{part}.lora.{name}"] for name in ("rank", "alpha"))
            return LoraSettings(rank=int(rank), alpha=float(alpha))
    raise ConfigError(
        f"{run} holds adapters, and its settings say nothing of them; is it a run of a student?"
    )


def rollout_of(run: Path) -> RolloutSettings:
    """Return how the student of a run was trained to be rolled out, which its file says to whoever loads it.

    Raises:
        ConfigError: Its saved state says nothing of it.
    """
    rollout = read_rollout(run / FILE)
    if rollout is None:
        raise ConfigError(
            f"{run} says nothing of how it was rolled out; is it a run of a student? Name one of "
            "train_ode, train_dmd or train_grpo."
        )
    return rollout


def export_demo(settings: ExportSettings) -> None:
    """Write the demo's student in float16 and its words."""
    run, out = Path(settings.run), Path(settings.out)
    model, rollout = load_demo_model(run / FILE), rollout_of(run)
    world = world_called(world_of(str(run / FILE)) or STANDARD.name)
    notes = {
        "world": world.version,
        "log": digest(run / "log.jsonl"),
        "note": "A demonstration of the mechanism on a toy world; it says nothing about Wan.",
    }
    out.mkdir(parents=True, exist_ok=True)
    save(
        out / STUDENT,
        model.network.state_dict(),
        model.config,
        rollout,
        stage=settings.stage,
        dtype=torch.float16,
        notes=notes,
    )
    save_words(out / WORDS, model.words, groups=WORD_GROUPS)
    logging.info("wrote %s and %s", out / STUDENT, out / WORDS)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(ExportSettings, sys.argv[1:], stage="export"))
