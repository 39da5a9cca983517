"""Rollouts of a student, measured second by second while they are made: nothing grows with their length.

A batch of videos that is done is kept on disk with all it follows from, so that a measurement that was killed
goes on with the next batch.

Legend: B videos, F frames, C channels, T latent frames, H and W pixels.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfpp_core.anchor import anchoring
from sfpp_core.attention import matmul, sdpa
from sfpp_core.config import RolloutSettings
from sfpp_core.durable import write_text
from sfpp_core.geometry import VideoGeometry
from sfpp_core.sampler import LongSampler
from sfpp_core.student import CausalStudent
from sfpp_core.tiny_autoencoder import TinyAutoencoder
from training.config import ConfigError
from training.digests import digest
from training.precision import region
from training.state import newest
from training.teacher import load_demo_model
from training.world import FPS, SIZE
from training.world_metrics import Measuring, Second

COLUMNS = 12
"""Frames kept of each video for the contact sheet, evenly spread from its first to its last second."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Videos that were made and measured, and are gone but for a few frames."""

    captions: Sequence[str]
    """One per video."""

    seconds: Sequence[Sequence[Second]]
    """Of each video, whole seconds only."""

    strips: Tensor
    """``(B, COLUMNS, 3, H, W)``, uint8."""


class Roller:
    """A student with its words and decoder, which makes and measures videos."""

    def __init__(
        self,
        run: str,
        autoencoder: str,
        rollout: RolloutSettings,
        *,
        device: torch.device,
        dtype: torch.dtype,
        anchor: float = 0.0,
    ) -> None:
        """Load the student.

        Args:
            run: ``last.pt`` of its run; empty is the embedded demo.
            autoencoder: File of the decoder's weights.
            rollout: How the student is rolled out.
            device: Where everything is computed.
            dtype: What the student computes in; with bfloat16 as in training. The decoder is float32.
            anchor: Strength of what pulls chunks towards the first ones, see ``sfpp_core.anchor``.
        """
        model = load_demo_model(Path(run)).to(device).requires_grad_(False)
        self._words = model.words
        self._autoencoder = TinyAutoencoder.load(Path(autoencoder)).to(device)
        self._rollout, self._device, self._dtype, self._anchor = rollout, device, dtype, anchor
        attend = sdpa if dtype == torch.float32 else matmul
        self._student = CausalStudent(model.network, model.config, dtype=dtype, attend=attend)

    @torch.inference_mode()
    def measure(self, captions: Sequence[str], *, seed: int, frames: int) -> Measured:
        """Make one video of ``frames`` frames per caption, all at once, and measure it as it comes."""
        measurings = [Measuring(text) for text in captions]
        measured: list[list[Second]] = [[] for _ in captions]
        columns, strips = picks(frames), []
        decoded = self._decoded(captions, seed, frames)
        for index, part in enumerate(whole_seconds(decoded)):
            second = part.cpu()  # measuring is many small steps, each with a question
            for video, measuring, seconds in zip(second, measurings, measured, strict=True):
                seconds.append(measuring.add(video))
            shown = [frame - index * FPS for frame in columns if frame // FPS == index]
            strips.append((second[:, shown].clamp(0, 1) * 255).round().byte())
        return Measured(list(captions), measured, torch.cat(strips, dim=1))

    def _decoded(self, captions: Sequence[str], seed: int, frames: int) -> Iterator[Tensor]:
        """Yield the frames ``(B, F, 3, H, W)`` of each chunk in turn, ``frames`` in all."""
        geometry = VideoGeometry(height=SIZE, width=SIZE, frames=frames, chunk=self._rollout.chunk)
        sampler = LongSampler(
            student=self._student,
            geometry=geometry,
            settings=self._rollout,
            seed=seed,
            device=self._device,
            finish=anchoring(self._anchor),
        )
        with region(self._device, self._dtype):
            chunks = sampler.chunks(self._words(captions))
        self._autoencoder.reset()
        made = 0
        while made < frames:
            with region(self._device, self._dtype):
                clean = next(chunks)
            decoded = self._autoencoder.decode(clean)[:, : frames - made]
            made += decoded.shape[1]
            yield decoded


def whole_seconds(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the whole seconds ``(B, FPS, 3, H, W)`` of a video that comes in parts ``(B, F, 3, H, W)``."""
    held: Tensor | None = None
    for part in parts:
        held = part if held is None else torch.cat([held, part], dim=1)
        while held.shape[1] >= FPS:
            yield held[:, :FPS]
            held = held[:, FPS:]


def picks(frames: int) -> list[int]:
    """Return the frames of a video of ``frames`` frames that its strip shows: of whole seconds only."""
    last = frames // FPS * FPS - 1
    return [round(column * last / (COLUMNS - 1)) for column in range(COLUMNS)]


class Shelf:
    """Batches of measured videos on disk, each good only for what it follows from."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        """Keep batches in ``folder`` that follow from ``recipe``."""
        self._folder, self._recipe = folder, dict(recipe)
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, batch: int, captions: Sequence[str]) -> Measured | None:
        """Return one batch, or ``None`` if it is missing or follows from something else."""
        path = self._path(batch)
        if not path.exists():
            return None
        table = json.loads(path.read_text())
        if table["recipe"] != self._recipe or table["captions"] != list(captions):
            return None
        seconds = [[read_second(second) for second in video] for video in table["seconds"]]
        return Measured(captions, seconds, load_file(path.with_suffix(".safetensors"))["strips"])

    def put(self, batch: int, measured: Measured) -> None:
        """Keep one batch, whole or not at all."""
        path = self._path(batch)
        path.unlink(missing_ok=True)
        save_file({"strips": measured.strips.contiguous()}, path.with_suffix(".safetensors"))
        seconds = [[asdict(second) for second in video] for video in measured.seconds]
        table = {"recipe": self._recipe, "captions": list(measured.captions), "seconds": seconds}
        write_json(path, table)

    def _path(self, batch: int) -> Path:
        return self._folder / f"videos_{batch:05d}.json"


def write_json(path: Path, table: Any, *, indent: int | None = None) -> None:
    """Write ``table`` to ``path``, whole or not at all."""
    write_text(path, json.dumps(table, indent=indent))


def read_second(table: Mapping[str, Any]) -> Second:
    """Return the measurements that ``asdict`` turned into ``table``."""
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in table.items()}
    return Second(**values)


def fingerprint(path: Path) -> str:
    """Return a digest of a file, or of the saved state of a run, given its ``last.pt``.

    Raises:
        ConfigError: There is neither.
    """
    found = newest(path)
    if found is None:
        raise ConfigError(f"{path} does not exist; run the stage that writes it first.")
    return digest(found)
