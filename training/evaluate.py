"""How right a demo student is, by the world's ground truth, at multiples of the teacher's horizon.

Run ``python -m training.evaluate training/configs/demo_evaluate.toml [key=value ...]``: writes ``table.md``,
``seconds.json`` and a contact sheet to the output folder.
"""

import json
import logging
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sfpp_core import demo
from sfpp_core.config import RolloutSettings
from sfpp_core.geometry import VideoGeometry
from sfpp_core.sampler import LongSampler
from sfpp_core.student import CausalStudent
from sfpp_core.tiny_autoencoder import TinyAutoencoder
from training.config import load
from training.sheets import sheet
from training.teacher import LATENT_CLIP, DemoModel, load_demo_model, trajectory
from training.world import FRAMES, SIZE, Scene, caption, render, sample_scene
from training.world_metrics import Second, clip_ok, measure, steady


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateSettings:
    """What is measured."""

    out: str
    """Folder of the results."""

    student: str = ""
    """``last.pt`` of a student's run; empty is the embedded demo."""

    teacher: str = ""
    """``last.pt`` of the teacher's run; empty leaves its row out."""

    autoencoder: str = "sfpp_core/demo/autoencoder.safetensors"
    """Weights of the autoencoder."""

    prompts: int = 48
    """Captions, each of a scene of its own; scenes no training stage has seen."""

    batch: int = 12
    """Videos made together."""

    horizons: tuple[int, ...] = (1, 4, 12)
    """Lengths measured, in multiples of the teacher's 81 frames."""

    guidance: float = 2.0
    """Guidance of the teacher's row."""

    seed: int = 1_000_003
    """Of captions and noise."""

    threads: int = 2
    """CPU threads of torch."""

    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """How the student is rolled out."""


def scenes_of(settings: EvaluateSettings) -> list[tuple[Scene, str]]:
    """Return the scenes and captions of one evaluation: every shape, colour, direction and speed in turn."""
    chosen = []
    for index in range(settings.prompts):
        rng = np.random.default_rng((settings.seed, index))
        scene = sample_scene(rng)
        chosen.append((scene, caption(scene, rng)))
    return chosen


def decode(autoencoder: TinyAutoencoder, clips: Tensor) -> Tensor:
    """Return the frames ``(B, F, 3, H, W)`` of whole latent clips ``(B, C, T, H, W)``."""
    autoencoder.reset()
    return torch.cat([autoencoder.decode(part) for part in clips.split(3, dim=2)], dim=1)


def student_videos(settings: EvaluateSettings, prompts: Sequence[str], frames: int) -> Iterator[Tensor]:
    """Yield the student's videos ``(F, 3, H, W)``, one per prompt."""
    if settings.student:
        model = load_demo_model(Path(settings.student))
        student, words = CausalStudent(model.network, model.config), model.words
    else:
        shipped = demo.load()
        student, words = CausalStudent(shipped.network, shipped.config), shipped.words
    autoencoder = TinyAutoencoder.load(Path(settings.autoencoder))
    geometry = VideoGeometry(height=SIZE, width=SIZE, frames=frames, chunk=settings.rollout.chunk)
    for first in tqdm(range(0, len(prompts), settings.batch), desc="student"):
        sampler = LongSampler(
            student=student, geometry=geometry, settings=settings.rollout, seed=settings.seed + first
        )
        with torch.inference_mode():
            embeddings = words(prompts[first : first + settings.batch])
        autoencoder.reset()
        parts = [autoencoder.decode(clean) for clean in sampler.chunks(embeddings)]
        yield from torch.cat(parts, dim=1)[:, :frames]


def teacher_videos(settings: EvaluateSettings, prompts: Sequence[str]) -> Iterator[Tensor]:
    """Yield the teacher's clips ``(F, 3, H, W)``, one per prompt."""
    teacher: DemoModel = load_demo_model(Path(settings.teacher))
    autoencoder = TinyAutoencoder.load(Path(settings.autoencoder))
    generator = torch.Generator().manual_seed(settings.seed)
    for first in tqdm(range(0, len(prompts), settings.batch), desc="teacher"):
        part = prompts[first : first + settings.batch]
        noise = torch.randn(len(part), teacher.config.channels, *LATENT_CLIP, generator=generator)
        *_, (_, clean) = trajectory(teacher, noise, part, steps=24, guidance=settings.guidance)
        yield from decode(autoencoder, clean)


def row(
    name: str, measured: Sequence[Sequence[Second]], prompts: Sequence[str], horizons: Sequence[int]
) -> str:
    """Return one line of the table: the share of clips that are right up to each horizon, and the means."""
    cells = [name]
    for horizon in horizons:
        parts = [seconds[: horizon * 5] for seconds in measured]
        if len(parts[0]) < horizon * 5:
            cells += ["", ""]
            continue
        right = [clip_ok(part, text) for part, text in zip(parts, prompts, strict=True)]
        share = sum(right) / len(right)
        error = (share * (1 - share) / len(right)) ** 0.5
        cells += [f"{share:.2f} ± {error:.2f}", f"{statistics.mean(steady(part) for part in parts):.2f}"]
    first = [second for seconds in measured for second in seconds[:5]]
    for field_name in ("present", "iou", "motion", "colour_error", "sharpness"):
        values = [v for second in first if (v := getattr(second, field_name)) == v]
        cells.append(f"{statistics.mean(values):.2f}")
    return "| " + " | ".join(cells) + " |"


def header(horizons: Sequence[int]) -> str:
    """Return the head of the table."""
    cells = ["5 s clips"]
    for horizon in horizons:
        cells += [f"right at {horizon}x", f"steady at {horizon}x"]
    cells += ["present", "IoU", "motion", "colour error", "sharpness"]
    return "| " + " | ".join(cells) + " |\n" + "|---" * len(cells) + "|"


def main(settings: EvaluateSettings) -> None:
    """Measure truth, teacher and student, and write the table."""
    torch.set_num_threads(settings.threads)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    scenes = scenes_of(settings)
    prompts = [text for _, text in scenes]
    longest = max(settings.horizons) * FRAMES
    sources: dict[str, Iterator[Tensor]] = {"truth": (render([scene], FRAMES)[0] for scene, _ in scenes)}
    if settings.teacher:
        sources["teacher"] = teacher_videos(settings, prompts)
    sources["student"] = student_videos(settings, prompts, longest)
    lines, seconds, shown = [header(settings.horizons)], {}, []
    for name, videos in sources.items():
        measured = []
        for text, video in zip(prompts, videos, strict=True):
            measured.append(measure(video, text))
            if len(measured) <= 8 and name != "truth":
                shown.append(
                    (f"{name}: {text} ({len(video) / 16:.0f} s)", video[:: max(1, len(video) // 240)])
                )
        lines.append(row(name, measured, prompts, settings.horizons))
        seconds[name] = [[asdict(second) for second in clip] for clip in measured]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    (out / "seconds.json").write_text(json.dumps({"prompts": prompts, "seconds": seconds}))
    sheet(shown, out / "sheet.png")
    logging.info("%s", "\n".join(lines))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(EvaluateSettings, sys.argv[1:], stage="evaluate"))
