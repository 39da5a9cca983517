"""A request becomes a plan: everything checked and every choice made, before a model is loaded."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import demo
from .attention import Attend, choose, matmul
from .checkpoint import check_student, load_words
from .config import WAN_1_3B, RolloutSettings, StudentConfig
from .decoder import check_decoder
from .errors import ConditioningError, SettingsError
from .forecast import Forecast, forecast
from .geometry import VideoGeometry, frames_in
from .inspection import FileInfo
from .machine import in_words, memory_of
from .outputs import automatic_enlargement, check_enlargement, check_output, forecast_bytes
from .words import WordEncoder, check_prompt

SMALL_WORK = 2**17
"""Numbers in the residual stream of a chunk below which a second CPU thread costs more than it helps: threads
wait for each other hundreds of times a chunk, and the encoder wants a core of its own."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Compute dtypes by name."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for. ``None`` leaves the choice to the student, which is the demo's if not named."""

    prompt: str
    """What the video shows."""

    out: str
    """File or folder for the video, as for ``video.open_writer``."""

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

    words: Path | None = None
    """File of the student's word encoder."""

    decoder: Path | None = None
    """Decoder file."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A request found possible, every choice made."""

    request: Request
    student: FileInfo
    decoder: Path
    words: WordEncoder
    geometry: VideoGeometry
    settings: RolloutSettings
    enlarge: int
    device: torch.device
    dtype: torch.dtype
    threads: int
    attend: Attend
    forecast: Forecast

    def lines(self) -> list[str]:
        """Return what will be made, for people."""
        geometry, settings = self.geometry, self.settings
        size = f"{geometry.width}x{geometry.height}"
        if self.enlarge > 1:
            size += f" shown as {geometry.width * self.enlarge}x{geometry.height * self.enlarge}"
        origin = "the embedded demo" if self.request.student is None else str(self.student.path)
        stage = f", stage {self.student.stage}" if self.student.stage else ""
        return [
            f"video    {geometry.seconds:g} s, {geometry.frames} frames, {size}, to {self.request.out}",
            f"student  {origin}{stage}, seed {self.request.seed}",
            f"rollout  {geometry.chunks} chunks of {settings.chunk} latent frames, {settings.steps} steps, "
            f"shift {settings.shift:g}, window {settings.window}, sink {settings.sink}"
            + (f" ({settings.sink_positions})" if settings.sink else ""),
            f"compute  {self.device}, {str(self.dtype)[6:]}, attention {self.attend.__name__.strip('_')}, "
            f"{self.threads} CPU thread{'s' if self.threads > 1 else ''}",
            f"memory   {self.forecast}, besides Python and PyTorch; the same for any length",
        ]


def plan(request: Request) -> Plan:
    """Check a request against the files, the machine and the method, and make every choice left open.

    Reads headers and the words; loads no model.

    Raises:
        SFPPError: Something is impossible; the message says what, and what to do instead.
    """
    frames = frames_in(request.seconds)
    student = check_student(request.student or demo.file(demo.STUDENT))
    assert student.config is not None
    settings = replace(student.settings or RolloutSettings(), **request.settings)
    height, width = native_size(student.config)
    geometry = VideoGeometry(
        height=height if request.height is None else request.height,
        width=width if request.width is None else request.width,
        frames=frames,
        chunk=settings.chunk,
    )
    words = _words(request, student)
    decoder = request.decoder or demo.file(demo.AUTOENCODER)
    check_decoder(decoder)
    enlarge = request.enlarge
    if enlarge is None:
        enlarge = automatic_enlargement(geometry.width, geometry.height)
    check_enlargement(enlarge, width=geometry.width, height=geometry.height)
    _check_output(request.out, geometry, enlarge)
    device = _device(request.device)
    dtype = _dtype(request.dtype, device)
    threads = _threads(request.threads, geometry.tokens_per_chunk * student.config.dim)
    attend = choose(
        request.attention,
        shape=(1, student.config.heads, geometry.tokens_per_chunk, student.config.head_dim),
        visible=settings.window_chunks * geometry.tokens_per_chunk,
        like=torch.empty(0, dtype=dtype, device=device),
    )
    expected = forecast(
        student.config,
        geometry,
        settings,
        dtype,
        decoder_weights=2 * decoder.stat().st_size,  # half precision in the file, single in memory
        attention_holds_scores=attend is matmul,
    )
    _check_memory(expected, device)
    return Plan(
        request=request,
        student=student,
        decoder=decoder,
        words=words,
        geometry=geometry,
        settings=settings,
        enlarge=enlarge,
        device=device,
        dtype=dtype,
        threads=threads,
        attend=attend,
        forecast=expected,
    )


def _words(request: Request, student: FileInfo) -> WordEncoder:
    """Return the word encoder of the student, after a look at what it makes of the prompt."""
    words, groups = load_words(request.words or demo.file(demo.WORDS))
    wanted = student.config
    assert wanted is not None
    if (words.table.embedding_dim, words.text_length) != (wanted.text_dim, wanted.text_length):
        raise ConditioningError(
            f"{student.path} is a student with its own text encoder ({wanted.text_length} embeddings of "
            f"{wanted.text_dim}; Wan's is umT5), which is not supported here. Use the embedded demo, or a "
            "student of the demo's world."
        )
    for warning in check_prompt(request.prompt, words, groups):
        logger.warning("%s", warning)
    return words


def _check_output(out: str, geometry: VideoGeometry, enlarge: int) -> None:
    """Refuse an output that cannot be written, or will not fit."""
    size = forecast_bytes(
        out, frames=geometry.frames, width=geometry.width, height=geometry.height, enlarge=enlarge
    )
    check_output(out, expected_bytes=size)


def _device(name: str) -> torch.device:
    """Return the device called ``name``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise SettingsError(f"device is {name!r}; use auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device is 'cuda', but PyTorch finds no NVIDIA GPU here; use 'cpu' or 'auto'.")
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called ``name``."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise SettingsError(f"dtype is {name!r}; use auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def _threads(threads: int | None, numbers: int) -> int:
    """Return the CPU threads to compute with, for a residual stream of so many numbers per chunk."""
    if threads is None:
        return 1 if numbers < SMALL_WORK else torch.get_num_threads()
    if threads < 1:
        raise SettingsError(f"threads is {threads}; use at least 1.")
    return threads


def _check_memory(expected: Forecast, device: torch.device) -> None:
    """Refuse a run that needs more memory than there is."""
    limit = memory_of(device)
    if limit is not None and expected.total > limit:
        raise SettingsError(
            f"this run needs {expected} of memory and there is {in_words(limit)}; use a smaller window, "
            "width or height."
        )


def native_size(config: StudentConfig) -> tuple[int, int]:
    """Return height and width, in pixels, of the frames a student was made for: Wan's or the demo's."""
    return (480, 832) if config.text_length == WAN_1_3B.text_length else (demo.SIZE, demo.SIZE)
