"""What a student is (its architecture) and how it is rolled out (its settings).

Both travel in the metadata of a checkpoint, so nothing is guessed from a file's name.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from .errors import SettingsError
from .schedule import FewStepSchedule

SinkPositions = Literal["absolute", "relative"]
"""Where attention places the sink: at its true time, or right before the rest of the window."""

LARGEST_SHIFT = 1000
"""A larger shift leaves no noise level below 1."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentConfig:
    """Architecture of a Wan 2.1 transformer. Source: Wan 2.1, ``wan/configs``."""

    dim: int
    """Width of the residual stream."""

    ffn_dim: int
    """Width of the feed-forward layer."""

    heads: int
    """Attention heads. ``dim / heads`` is the head dim, 128 in every published Wan."""

    layers: int
    """Transformer layers."""

    channels: int = 16
    """Latent channels, in and out."""

    text_dim: int = 4096
    """Width of the text embeddings."""

    text_length: int = 512
    """Text embeddings the student attends to; shorter conditioning is padded with zeros."""

    freq_dim: int = 256
    """Width of the sinusoidal embedding of sigma."""

    eps: float = 1e-6
    """Added to variances by every norm."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise SettingsError(f"{field.name} is {value}; it must be above 0.")
        if self.dim % self.heads or self.head_dim % 2:
            raise SettingsError(
                f"dim is {self.dim} and heads {self.heads}; dim / heads must be an even number."
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.heads


WAN_1_3B = StudentConfig(dim=1536, ffn_dim=8960, heads=12, layers=30)
"""Wan2.1-T2V-1.3B."""

WAN_14B = StudentConfig(dim=5120, ffn_dim=13824, heads=40, layers=40)
"""Wan2.1-T2V-14B."""

WAN_5B = StudentConfig(dim=3072, ffn_dim=14336, heads=24, layers=30, channels=48)
"""Wan2.2-TI2V-5B: latents of Wan 2.2's own VAE."""

DEMO = StudentConfig(dim=256, ffn_dim=1024, heads=2, layers=4, text_length=16)
"""The embedded demo student: Wan's architecture, small sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """How a student is rolled out. Sizes are latent frames, as in the literature."""

    steps: int = 4
    """Denoising steps per chunk."""

    shift: float = 5.0
    """Timestep shift of the schedule; 5 in Self-Forcing and Self-Forcing++."""

    chunk: int = 3
    """Latent frames generated together."""

    window: int = 21
    """Latent frames attention sees, those being generated and the sink included."""

    sink: int = 0
    """First latent frames of the video that are never evicted. Counted in ``window``."""

    sink_positions: SinkPositions = "absolute"
    """Where attention places the sink."""

    sigmas: tuple[float, ...] = ()
    """Noise level of each step, falling from 1. Empty: they follow from ``steps`` and ``shift``."""

    overlap: int = 0
    """Latent frames a window shares with the one before, if each starts anew, as in CausVid. 0: one window
    rolls, and nothing is ever computed again."""

    context_sigma: float = 0.0
    """Share of noise, from 0 to below 1, under which the past is remembered."""

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise SettingsError(f"chunk is {self.chunk} latent frames; it must be at least 1.")
        if not 1 <= self.steps <= 100:
            raise SettingsError(f"steps is {self.steps}; it must be from 1 to 100, e.g. 4.")
        if not 0 < self.shift <= LARGEST_SHIFT:
            raise SettingsError(f"shift is {self.shift}; it must be above 0 and at most 1000, e.g. 5.")
        if self.sigmas and len(self.sigmas) != self.steps:
            raise SettingsError(
                f"steps is {self.steps}, but sigmas lists {len(self.sigmas)} noise levels; change both, or "
                "leave sigmas empty."
            )
        if self.sink_positions not in get_args(SinkPositions):
            raise SettingsError(f"sink_positions is {self.sink_positions!r}; use 'absolute' or 'relative'.")
        self._check_window()
        if self.overlap:
            self._check_overlap()
        self.schedule()

    def _check_window(self) -> None:
        """Refuse windows and sinks that are no whole chunks or leave no room to generate."""
        if self.window < self.chunk:
            raise SettingsError(
                f"window is {self.window} latent frames, smaller than a chunk of {self.chunk}; "
                f"use at least {self.chunk}, e.g. 21."
            )
        if self.sink < 0:
            raise SettingsError(f"sink is {self.sink} latent frames; it must be 0 or more.")
        for name in ("window", "sink"):
            size = getattr(self, name)
            if size % self.chunk:
                nearest = max(round(size / self.chunk), int(name == "window")) * self.chunk
                raise SettingsError(
                    f"{name} is {size} latent frames; it must be a multiple of the chunk, {self.chunk}, "
                    f"e.g. {nearest}."
                )
        if self.sink > self.window - self.chunk:
            raise SettingsError(
                f"sink is {self.sink} latent frames and leaves no room for a chunk of {self.chunk} in a "
                f"window of {self.window}; use a sink of at most {self.window - self.chunk}."
            )

    def _check_overlap(self) -> None:
        """Refuse overlaps that are no whole chunks, leave no room to generate, or meet a sink."""
        if self.overlap < 0 or self.overlap % self.chunk or self.overlap > self.window - self.chunk:
            raise SettingsError(
                f"overlap is {self.overlap} latent frames; it must be a multiple of the chunk, {self.chunk}, "
                f"from 0 to {self.window - self.chunk}."
            )
        if self.sink:
            raise SettingsError(
                f"overlap is {self.overlap} and sink {self.sink}; a window that starts anew keeps no sink: "
                "set one of them to 0."
            )

    def schedule(self) -> FewStepSchedule:
        """Return the noise levels of one chunk.

        Raises:
            SettingsError: ``sigmas`` do not fall from 1, or reach 0; or ``context_sigma`` cannot be.
        """
        sigmas = self.sigmas or FewStepSchedule.uniform(self.steps, shift=self.shift).sigmas
        return FewStepSchedule(sigmas, context_sigma=self.context_sigma)

    @property
    def window_chunks(self) -> int:
        """Window in chunks."""
        return self.window // self.chunk

    @property
    def sink_chunks(self) -> int:
        """Sink in chunks."""
        return self.sink // self.chunk

    @property
    def overlap_chunks(self) -> int:
        """Overlap in chunks."""
        return self.overlap // self.chunk


def to_table(settings: StudentConfig | RolloutSettings) -> dict[str, Any]:
    """Return ``settings`` as a table for JSON or TOML; ``context_sigma`` only where it is above 0.

    Without it, who does not know the setting can read the others, and tells the same rollout by them.
    """
    return {name: value for name, value in asdict(settings).items() if name != "context_sigma" or value}


def from_table(kind: type[T], table: dict[str, Any], *, where: str) -> T:
    """Build the dataclass ``kind`` from ``table``.

    Args:
        kind: ``StudentConfig`` or ``RolloutSettings``.
        table: Values by field name.
        where: What the table was read from, for the message.

    Raises:
        SettingsError: A key is unknown or missing, or a value is impossible.
    """
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(table) - known):
        raise SettingsError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(known))}.")
    try:
        return kind(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
        )
    except TypeError as error:
        raise SettingsError(f"{where}: {error}.") from error
