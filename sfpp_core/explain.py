"""A weights file explained to people."""

from pathlib import Path

import torch

from .config import WAN_1_3B, WAN_14B, RolloutSettings, StudentConfig
from .forecast import forecast
from .geometry import FPS, VideoGeometry
from .inspection import inspect
from .machine import in_words
from .plan import native_size


def file_lines(path: Path) -> list[str]:
    """Explain a weights file, for people.

    Raises:
        CheckpointError: It is missing, damaged, or no weights file; the message says what it looks like.
    """
    info = inspect(path)
    lines = [
        f"{path}",
        f"holds      {info.looks_like}" + (f", stage {info.stage}" if info.stage else ""),
        f"size       {in_words(info.file_bytes)}, {info.parameters / 1e6:.4g} million parameters "
        f"in {info.tensors} tensors, {', '.join(info.dtypes)}",
    ]
    if info.config is None:
        return lines
    config, settings = info.config, info.settings or RolloutSettings()
    height, width = native_size(config)
    geometry = VideoGeometry(height=height, width=width, frames=FPS, chunk=settings.chunk)
    needed = forecast(config, geometry, settings, torch.bfloat16)
    lines.append(
        f"student    dim {config.dim}, {config.heads} heads of {config.head_dim}, {config.layers} layers, "
        f"ffn {config.ffn_dim}, {config.channels} channels, text {config.text_length} x {config.text_dim}"
        + _preset(config)
    )
    lines.append(
        f"rollout    {settings.steps} steps, shift {settings.shift:g}, chunk {settings.chunk}, "
        f"window {settings.window}, sink {settings.sink}"
        + ("" if info.settings else " (defaults; the file does not say)")
    )
    lines.append(f"causal     {'yes' if info.causal else 'not as far as it says; expect poor long video'}")
    lines.append(f"memory     {needed} to run at {width}x{height} in bfloat16")
    lines.extend(f"{key:<10} {value}" for key, value in info.notes.items())
    return lines


def _preset(config: StudentConfig) -> str:
    """Return the published model a student has the sizes of, if any."""
    presets = {"Wan2.1-T2V-1.3B": WAN_1_3B, "Wan2.1-T2V-14B": WAN_14B}
    return "".join(f" (as {name})" for name, preset in presets.items() if preset == config)
