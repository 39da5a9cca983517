"""From a training run to the files the pack ships: one student with its settings, and its words.

Run ``python -m training.export training/configs/demo_export.toml [key=value ...]``.
"""

import hashlib
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from sfpp_core.checkpoint import save, save_words
from sfpp_core.config import RolloutSettings
from sfpp_core.demo import STUDENT, WORDS
from training.config import load
from training.teacher import load_demo_model
from training.world import WORD_GROUPS, WORLD_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """What is exported, and where to."""

    SMOKE: ClassVar = ("out=runs/smoke/export",)  # never over the files that ship

    run: str
    """Folder of the stage: ``last.pt`` holds the weights, ``log.jsonl`` what led to them."""

    stage: str
    """Name of the stage, e.g. ``ode``; shown wherever the student is used."""

    out: str = "sfpp_core/demo"
    """Folder of the two files."""

    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """How the student was trained to be rolled out."""


def main(settings: ExportSettings) -> None:
    """Write the student in float16 and its words."""
    run, out = Path(settings.run), Path(settings.out)
    model = load_demo_model(run / "last.pt")
    notes = {
        "world": WORLD_VERSION,
        "log": hashlib.blake2b((run / "log.jsonl").read_bytes(), digest_size=8).hexdigest(),
        "note": "A demonstration of the mechanism on a toy world; it says nothing about Wan.",
    }
    out.mkdir(parents=True, exist_ok=True)
    save(
        out / STUDENT,
        model.network.state_dict(),
        model.config,
        settings.rollout,
        stage=settings.stage,
        dtype=torch.float16,
        notes=notes,
    )
    save_words(out / WORDS, model.words, groups=WORD_GROUPS)
    logging.info("wrote %s and %s", out / STUDENT, out / WORDS)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(ExportSettings, sys.argv[1:], stage="export"))
