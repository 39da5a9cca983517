"""Sample videos while training: short and long ones of the same rollout, and how far they have drifted.

A short video of a student is the beginning of its long one, so one rollout makes both.

Legend: B videos, F frames, H and W pixels.
"""

import logging
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sfpp_core.config import RolloutSettings
from sfpp_core.decoder import StreamingDecoder
from sfpp_core.errors import OutputError
from sfpp_core.geometry import FPS, VideoGeometry, frames_in
from sfpp_core.sampler import LongSampler
from sfpp_core.student import CausalStudent
from sfpp_core.video import open_writer
from training.sheets import sheet
from training.teacher import DemoModel
from training.world import SIZE
from training.world_metrics import clip_ok, mean_seconds, measure, steady
from training.worlds import STANDARD, World

logger = logging.getLogger(__name__)

CRUSHED, BLOWN = 0.02, 0.98
"""Luma below and above which a pixel has lost its detail."""

WORLD = ("present", "motion", "sharpness", "colour_drift", "pace")
"""Means of the world's measurements that are logged."""


@torch.inference_mode()
def roll_samples(
    model: DemoModel,
    decoder: StreamingDecoder,
    settings: RolloutSettings,
    path: Path,
    *,
    device: torch.device,
    seconds: Sequence[float],
    world: World = STANDARD,
) -> dict[str, float]:
    """Roll out the sample prompts and keep them as ``keep_samples`` does; measure the demo's world too.

    Args:
        model: The student.
        decoder: Of its latents.
        settings: How it is rolled out.
        path: The sheet, a .png file.
        device: Of the student.
        seconds: Lengths of the videos.
        world: Whose prompts.

    Returns:
        The numbers of ``keep_samples``; and by length the share of videos that are ``right`` and ``steady``
        (see ``world_metrics``), and the means of the measurements in ``WORLD``.
    """
    frames = frames_in(max(seconds))
    geometry = VideoGeometry(height=SIZE, width=SIZE, frames=frames, chunk=settings.chunk)
    student = CausalStudent(model.network, model.config)
    sampler = LongSampler(student=student, geometry=geometry, settings=settings, seed=1, device=device)
    decoder.reset()
    parts = [in_bytes(decoder.decode(clean)) for clean in sampler.chunks(model.words(world.prompts))]
    decoder.reset()
    videos = torch.cat(parts, dim=1)[:, :frames]
    numbers = keep_samples(videos, world.prompts, path, seconds=seconds)
    for length in seconds:
        numbers |= _world(videos[:, : frames_in(length)], world.prompts, f"{length:g}s")
    return numbers


def keep_samples(
    videos: Tensor, prompts: Sequence[str], path: Path, *, seconds: Sequence[float], fps: int = FPS
) -> dict[str, float]:
    """Write a sheet and a video of each length; return how far the videos have drifted. Any model's will do.

    The videos stand side by side in files beside the sheet, ``sample_000500_5s.mp4``.

    Args:
        videos: ``(B, F, 3, H, W)``, bytes, on the CPU.
        prompts: What each shows.
        path: The sheet, a .png file.
        seconds: Lengths, none above that of ``videos``.
        fps: Frames per second.

    Returns:
        By length, as ``5s/luma_drift``: what ``drift`` measures, as means over the videos.
    """
    rows = [(text, video.float() / 255) for text, video in zip(prompts, videos, strict=True)]
    sheet([(f"{text} ({max(seconds):g} s)", video) for text, video in rows], path)
    numbers: dict[str, float] = {}
    for length in seconds:
        cut = videos[:, : frames_in(length, fps=fps)]
        _write(cut, path.with_name(f"{path.stem}_{length:g}s.mp4"), fps=fps)
        drifts = [drift(video.float() / 255, fps=fps) for video in cut]
        numbers |= {
            f"{length:g}s/{name}": statistics.mean(each[name] for each in drifts) for name in drifts[0]
        }
    return numbers


def drift(video: Tensor, *, fps: int = FPS) -> dict[str, float]:
    """Return how the last second of a video differs from its first, whatever it shows.

    Args:
        video: ``(F, 3, H, W)`` in [0, 1].
        fps: Frames per second.

    Returns:
        ``luma_drift`` and ``saturation_drift``, changes of the mean in [0, 1], without their signs; and
        ``clipped``, the share of the last second's pixels that are nearly black or white.
    """
    second = min(len(video), fps)
    first, last = video[:second], video[-second:]
    luma, luma_last = _luma(first), _luma(last)
    saturation, saturation_last = (part.amax(1) - part.amin(1) for part in (first, last))
    return {
        "luma_drift": float((luma_last.mean() - luma.mean()).abs()),
        "saturation_drift": float((saturation_last.mean() - saturation.mean()).abs()),
        "clipped": float(((luma_last < CRUSHED) | (luma_last > BLOWN)).float().mean()),
    }


def _luma(frames: Tensor) -> Tensor:
    """Return the luma ``(F, H, W)`` of ``(F, 3, H, W)``."""
    red, green, blue = frames.unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def in_bytes(frames: Tensor) -> Tensor:
    """Return frames in [0, 1] as a viewer gets them: bytes, on the CPU."""
    return (frames.float().clamp(0, 1) * 255).round().byte().cpu()


def _world(videos: Tensor, prompts: Sequence[str], name: str) -> dict[str, float]:
    """Return what the world's ground truth says of the sample prompts' videos, under ``name``."""
    measured = [
        (measure(video.float() / 255, text), text) for video, text in zip(videos, prompts, strict=True)
    ]
    means = mean_seconds([second for seconds, _ in measured for second in seconds])
    return {
        f"{name}/right": statistics.mean(float(clip_ok(seconds, text)) for seconds, text in measured),
        f"{name}/steady": statistics.mean(float(steady(seconds)) for seconds, _ in measured),
        **{f"{name}/{field}": means[field] for field in WORLD if field in means},
    }


def _write(videos: Tensor, path: Path, *, fps: int) -> None:
    """Write videos ``(B, F, 3, H, W)`` side by side; a run does not end because a sample cannot be."""
    joined = torch.cat(list(videos), dim=-1)
    height, width = joined.shape[-2:]
    enlarge = 2 if max(height, width) < 256 else 1
    try:
        with open_writer(path, width=width, height=height, fps=fps, enlarge=enlarge) as writer:
            for part in joined.split(fps):
                writer.write(part.float() / 255)
    except OutputError as error:
        logger.warning("no sample video: %s", error)
