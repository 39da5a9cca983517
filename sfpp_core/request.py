"""What a user asks for, before anything is checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cache_shape import StorageKind
from .cues import SOFT, Change
from .naming import Choice

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Compute dtypes by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for. ``None`` leaves the choice to the student, which is the demo's if not named."""

    prompt: str
    """What the video shows: one prompt, or prompts over time in any form of ``script``."""

    out: str
    """File or folder for the video, as for ``video.open_writer``."""

    switch: Change = SOFT
    """How a prompt takes over from the one before, where the script does not say."""

    seconds: float = 60.0
    """Length of the video."""

    seed: int = 0
    """Of all noise."""

    width: int | None = None
    """Pixels."""

    height: int | None = None
    """Pixels."""

    settings: Mapping[str, Any]
    """Fields of ``RolloutSettings`` to change."""

    student: Path | None = None
    """Student file."""

    preset: str | None = None
    """Family whose settings are taken, one of ``presets.FAMILIES``; ``None`` takes the student's own."""

    weights: Choice = "auto"
    """Which weights of a training state."""

    loras: tuple[tuple[Path, float], ...] = ()
    """LoRA files and their strengths."""

    words: Path | None = None
    """File of a demo student's word encoder."""

    text_encoder: Path | None = None
    """umT5, for a student of Wan."""

    tokenizer: Path | None = None
    """Its tokenizer, where it is not found by itself."""

    text_cache: Path | None = None
    """Folder in which text embeddings are kept."""

    decoder: Path | str | None = None
    """Decoder: file, folder, or ``preview``."""

    tile: int | None = None
    """Pixels along a side of the tiles a picture is decoded in; ``None`` decodes it whole."""

    start: Path | None = None
    """What the video begins with: a picture, a clip, or a folder of latents."""

    encoder: Path | None = None
    """Autoencoder that encodes the start, where the decoder's file cannot."""

    latents: Path | None = None
    """Folder in which the latents are kept, to be decoded again."""

    storage: StorageKind = "plain"
    """How keys and values are kept."""

    report: Path | None = None
    """Where the drift is reported that is measured meanwhile, as for ``ReportFiles.at``."""

    anchor: float = 0.0
    """Strength, 0 to 1, of what pulls colour and contrast towards the first seconds; see ``anchor``."""

    context_sigma: float = 0.0
    """Share of noise under which the past is remembered; 0 leaves it to the student."""

    run: Path | None = None
    """Folder of the run this is to be; ``None`` makes a video alone."""

    enlarge: int | None = None
    """Side, in pixels, of the square each pixel becomes."""

    attention: str = "auto"
    """Back end, one of ``attention.NAMES``."""

    device: str = "auto"
    """``auto`` is a CUDA GPU if there is one."""

    dtype: str = "auto"
    """One of ``DTYPES``; ``auto`` is float32 on a CPU and bfloat16 elsewhere."""

    threads: int | None = None
    """CPU threads."""
