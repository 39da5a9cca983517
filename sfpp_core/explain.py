"""A weights file explained to people."""

from pathlib import Path

import torch

from .adapter_signs import MODELS
from .config import RolloutSettings, StudentConfig
from .forecast import forecast
from .geometry import VideoGeometry
from .inspection import FileInfo, inspect
from .machine import in_words
from .plan import native_size, space_of
from .presets import SELF_FORCING, of_family


def file_lines(path: Path) -> list[str]:
    """Explain a weights file, an index of shards, or a folder, for people.

    Raises:
        CheckpointError: It is missing, damaged, or no weights; the message says what it looks like.
    """
    info = inspect(path)
    lines = [
        f"{path}",
        f"holds      {info.looks_like}" + (f", stage {info.stage}" if info.stage else ""),
        f"format     {info.format}" + (f", {info.quantisation.scheme}" if info.quantisation.scheme else ""),
        f"size       {in_words(info.file_bytes)}, {info.parameters / 1e6:.4g} million parameters "
        f"in {info.tensors} tensors, {', '.join(info.dtypes)}",
    ]
    if info.config is not None:
        lines += _student_lines(info, info.config)
    return lines


def _student_lines(info: FileInfo, config: StudentConfig) -> list[str]:
    """Explain a student."""
    settings = info.settings or of_family(info.family or SELF_FORCING)
    lines = [
        f"student    dim {config.dim}, {config.heads} heads of {config.head_dim}, {config.layers} layers, "
        f"ffn {config.ffn_dim}, {config.channels} channels, text {config.text_length} x {config.text_dim}"
        + _published(config)
    ]
    if info.choices:
        lines.append(f"weights    {', '.join(info.choices)}; {info.part} is taken")
    if info.others:
        lines.append(f"unused     {', '.join(info.others)}")
    lines.append(
        f"rollout    {settings.steps} steps, shift {settings.shift:g}, chunk {settings.chunk}, "
        f"window {settings.window}, sink {settings.sink}"
        + (f" ({settings.sink_positions})" if settings.sink else "")
        + (f", overlap {settings.overlap}" if settings.overlap else "")
        + _origin(info)
    )
    lines.append(f"causal     {'yes' if info.causal else 'not as far as it says; expect poor long video'}")
    lines.append(f"memory     {_needed(config, settings)} in bfloat16")
    lines.extend(f"{key:<10} {value}" for key, value in info.notes.items())
    return lines


def _origin(info: FileInfo) -> str:
    """Say where the settings come from, if not from the file itself."""
    if info.settings:
        return ""
    return (
        f" (of {info.family}; the file does not say)" if info.family else " (defaults; the file does not say)"
    )


def _needed(config: StudentConfig, settings: RolloutSettings) -> str:
    """Return the memory a run takes, and the size of frame it takes it for."""
    (height, width), space = native_size(config), space_of(config)
    geometry = VideoGeometry(
        height=height,
        width=width,
        frames=space.fps,
        chunk=settings.chunk,
        stride=space.spatial_stride,
        fps=space.fps,
    )
    return f"{forecast(config, geometry, settings, torch.bfloat16)} to run at {width}x{height}"


def _published(config: StudentConfig) -> str:
    """Return the published model a student has the sizes of, if any."""
    return "".join(f" (as {name})" for name, model in MODELS.items() if model == config)
