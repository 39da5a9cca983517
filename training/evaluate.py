"""How right a demo student is, by the world's ground truth, at multiples of the teacher's horizon.

Run ``python -m training.evaluate training/configs/demo_evaluate.toml [key=value ...]``: writes ``table.md``,
``seconds.json`` and a contact sheet to the output folder. Started again, it goes on with the next batch.
"""

import json
import logging
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sfpp_core.anchor import Anchor
from sfpp_core.compute import device_named
from sfpp_core.config import RolloutSettings, to_table
from sfpp_core.tiny_autoencoder import TinyAutoencoder
from training.config import ConfigError, load
from training.measuring import COLUMNS, Measured, Roller, Shelf, fingerprint, write_json
from training.precision import AUTO, DTYPES, computed_in
from training.sheets import sheet
from training.state import exported, read_rollout
from training.teacher import LATENT_CLIP, DemoModel, load_demo_model, trajectory
from training.world import FPS, FRAMES, Scene, render, sample_scene
from training.world_metrics import Second, clip_ok, measure, steady
from training.worlds import STANDARD, check_runs, world_called

RESULT = "seconds.json"
"""Name of the file of all measurements, in the output folder; written last."""

SHOWN = 8
"""Videos on the contact sheet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateSettings:
    """What is measured."""

    SMOKE: ClassVar = ("prompts=2", "batch=2", "horizons=[1, 2]", "threads=1")

    out: str
    """Folder of the results."""

    student: str = ""
    """``last.pt`` of a student's run, or a file ``training.export`` wrote; empty is the embedded demo."""

    teacher: str = ""
    """``last.pt`` of the teacher's run; empty leaves its row out."""

    autoencoder: str = "sfpp_core/demo/autoencoder.safetensors"
    """Weights of the autoencoder."""

    prompts: int = 48
    """Captions, each of a scene of its own; scenes no training stage has seen."""

    batch: int = 12
    """Videos made together; their noise follows from it."""

    horizons: tuple[int, ...] = (1, 4, 12)
    """Lengths measured, in multiples of the teacher's 81 frames."""

    guidance: float = 2.0
    """Guidance of the teacher's row."""

    seed: int = 1_000_003
    """Of captions and noise."""

    dtype: str = "float32"
    """What the student computes in: ``float32``, ``bfloat16``, or ``auto``, as in training: bfloat16
    where the device has it, twice as fast."""

    threads: int = 2
    """CPU threads of torch."""

    device: str = "auto"
    """Of the student: ``cpu``, ``cuda``, or ``auto``, the GPU if there is one."""

    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """How the student is rolled out."""

    anchor: float = 0.0
    """Strength, 0 to 1, of what pulls exposure and tint towards the first seconds, as ``--anchor`` does."""

    world: str = "standard"
    """Which of the demo's worlds, see ``worlds``: ``standard``, or ``hard``, whose captions tell less."""

    def __post_init__(self) -> None:
        world_called(self.world)
        Anchor(strength=self.anchor)
        if self.dtype not in (AUTO, *DTYPES):
            raise ConfigError(f"dtype is {self.dtype!r}; use one of {', '.join((AUTO, *DTYPES))}.")
        if not self.horizons or min(self.horizons) < 1:
            raise ConfigError(f"horizons is {list(self.horizons)}; name at least one, from 1, e.g. [1, 4].")
        for name in ("prompts", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    @property
    def frames(self) -> int:
        """Length of each video."""
        return max(self.horizons) * FRAMES


def scenes_of(settings: EvaluateSettings) -> list[tuple[Scene, str]]:
    """Return the scenes and captions of one evaluation: any shape, colour, direction and speed."""
    world, chosen = world_called(settings.world), []
    for index in range(settings.prompts):
        rng = np.random.default_rng((settings.seed, index))
        scene = sample_scene(rng)
        chosen.append((scene, world.caption(scene, rng)))
    return chosen


def decode(autoencoder: TinyAutoencoder, clips: Tensor) -> Tensor:
    """Return the frames ``(B, F, 3, H, W)`` of whole latent clips ``(B, C, T, H, W)``."""
    autoencoder.reset()
    return torch.cat([autoencoder.decode(part) for part in clips.split(3, dim=2)], dim=1)


def recipe_of(settings: EvaluateSettings) -> dict[str, str]:
    """Return all that the measurements of a student's video follow from, beside its caption.

    Raises:
        ConfigError: A file of weights is missing.
    """
    student = exported(Path(settings.student)) or Path(settings.student)
    return {
        "student": fingerprint(student),
        "autoencoder": fingerprint(Path(settings.autoencoder)),
        "rollout": json.dumps(to_table(settings.rollout)),
        "frames": str(settings.frames),
        # Nothing of what is as it always was: measurements made before there were others stay good.
        **({} if settings.world == STANDARD.name else {"world": settings.world}),
        **({"anchor": f"{settings.anchor:g}"} if settings.anchor else {}),
        **{name: str(getattr(settings, name)) for name in ("batch", "seed")},
        "dtype": str(computed_in(settings.dtype, device_named(settings.device))).removeprefix("torch."),
    }


def student_videos(settings: EvaluateSettings, prompts: Sequence[str]) -> Iterator[Measured]:
    """Yield the measurements of the student's videos by batch: from disk where they were made before."""
    shelf = Shelf(Path(settings.out) / "videos", recipe_of(settings))
    roller: Roller | None = None
    for first in tqdm(range(0, len(prompts), settings.batch), desc="student"):
        captions = prompts[first : first + settings.batch]
        measured = shelf.get(first // settings.batch, captions)
        if measured is None:
            roller = roller or Roller(
                settings.student,
                settings.autoencoder,
                settings.rollout,
                device=device_named(settings.device),
                dtype=computed_in(settings.dtype, device_named(settings.device)),
                anchor=settings.anchor,
            )
            measured = roller.measure(captions, seed=settings.seed + first, frames=settings.frames)
            shelf.put(first // settings.batch, measured)
        yield measured


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


def tell_other_rollout(settings: EvaluateSettings) -> None:
    """Warn that a student is rolled out otherwise than it was trained; it is measured all the same."""
    trained = read_rollout(Path(settings.student))
    if trained is None or trained == settings.rollout:
        return
    was, wanted = asdict(trained), asdict(settings.rollout)
    others = [f"{name} = {was[name]}, not {wanted[name]}" for name in was if was[name] != wanted[name]]
    logging.warning(
        "%s was trained with rollout.%s; it is measured with the settings given.",
        settings.student or "the embedded demo",
        ", rollout.".join(others),
    )


def main(settings: EvaluateSettings) -> None:
    """Measure truth, teacher and student, and write the table."""
    torch.set_num_threads(settings.threads)
    runs = {"student": settings.student} | ({"teacher": settings.teacher} if settings.teacher else {})
    check_runs(settings.world, runs)
    tell_other_rollout(settings)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    scenes = scenes_of(settings)
    prompts = [text for _, text in scenes]
    sources: dict[str, Iterator[Tensor]] = {"truth": (render([scene], FRAMES)[0] for scene, _ in scenes)}
    if settings.teacher:
        sources["teacher"] = teacher_videos(settings, prompts)
    measured: dict[str, list[Sequence[Second]]] = {}
    shown: list[tuple[str, Tensor]] = []
    for name, videos in sources.items():
        measured[name] = []
        for text, video in zip(prompts, videos, strict=True):
            measured[name].append(measure(video, text))
            if len(measured[name]) <= SHOWN and name != "truth":
                shown.append((f"{name}: {text} ({len(video) / FPS:.0f} s)", video))
    measured["student"] = []
    for part in student_videos(settings, prompts):
        room = max(0, SHOWN - len(measured["student"]))
        measured["student"].extend(part.seconds)
        for text, strip in list(zip(part.captions, part.strips, strict=True))[:room]:
            shown.append((f"student: {text} ({settings.frames / FPS:.0f} s)", strip / 255))
    lines = [header(settings.horizons)]
    lines += [row(name, seconds, prompts, settings.horizons) for name, seconds in measured.items()]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    sheet(shown, out / "sheet.png", columns=COLUMNS)
    seconds = {
        name: [[asdict(second) for second in clip] for clip in clips] for name, clips in measured.items()
    }
    write_json(out / RESULT, {"recipe": recipe_of(settings), "prompts": prompts, "seconds": seconds})
    logging.info("%s", "\n".join(lines))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(EvaluateSettings, sys.argv[1:], stage="evaluate"))
