"""How large an attention memory is, and which of its tokens a chunk is written to and may see.

The tokens lie in one row: the lead, the sink, then a ring of slots. What a chunk may see is always one
contiguous slice of that row, and the same one for every chunk once the window is full.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from .config import RolloutSettings, SinkPositions, StudentConfig
from .errors import SettingsError
from .geometry import VideoGeometry

StorageKind = Literal["plain", "fp8", "host", "fp8-host"]
"""How keys and values are kept: in the compute dtype or as 8-bit floats, on the device or in host memory."""

LEAD = -1
"""The chunk number of the lead: the latent frame before chunk 0 in a video that starts from an image."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes of memory in two places."""

    device: int = 0
    """Where the student computes."""

    host: int = 0
    """Main memory, where that is another place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """Size of a cache. A slot holds one chunk."""

    layers: int
    heads: int
    head_dim: int
    tokens_per_chunk: int

    latent_frames_per_chunk: int
    """Latent frames generated together."""

    window: int
    """Chunks attention sees, the open one and the sink included."""

    sink: int = 0
    """First chunks of the video, never evicted."""

    sink_positions: SinkPositions = "absolute"
    """Where attention places the sink: at its true time, or right before the rest of the window."""

    lead: int = 0
    """Latent frames before chunk 0, 0 or 1. With a sink the lead belongs to it and is always seen; without
    one it is seen while it and all chunks so far fit in the window, as in Self-Forcing."""

    def __post_init__(self) -> None:
        if self.window < 1 or not 0 <= self.sink < self.window:
            raise SettingsError(
                f"need 0 <= sink < window chunks, got sink {self.sink} and window {self.window}."
            )

    @classmethod
    def of(cls, config: StudentConfig, geometry: VideoGeometry, settings: RolloutSettings) -> "CacheShape":
        """Return the cache one student needs for one video size."""
        return cls(
            layers=config.layers,
            heads=config.heads,
            head_dim=config.head_dim,
            tokens_per_chunk=geometry.tokens_per_chunk,
            latent_frames_per_chunk=settings.chunk,
            window=settings.window_chunks,
            sink=settings.sink_chunks,
            sink_positions=settings.sink_positions,
            lead=geometry.lead,
        )

    @property
    def lead_tokens(self) -> int:
        """Tokens of the lead."""
        return self.lead * self.tokens_per_chunk // self.latent_frames_per_chunk

    @property
    def sink_tokens(self) -> int:
        """Tokens that are never evicted: the sink and, where there is one, the lead before it."""
        return self.lead_tokens + self.sink * self.tokens_per_chunk if self.sink else 0

    @property
    def tokens(self) -> int:
        """Tokens of the whole row."""
        return self.lead_tokens + self.window * self.tokens_per_chunk

    @property
    def sink_moves(self) -> bool:
        """Whether the sink is shown at another time than its own."""
        return self.sink > 0 and self.sink_positions == "relative"

    @property
    def numbers(self) -> int:
        """Numbers held by a full cache of batch 1, keys and values together."""
        return 2 * self.layers * self.tokens * self.heads * self.head_dim

    def bytes(self, storage: StorageKind, dtype: torch.dtype) -> Bytes:
        """Return exactly what a ``RollingKVCache`` of batch 1 allocates for a student of this ``dtype``."""
        exact, layer = self.numbers * dtype.itemsize, self.numbers // self.layers
        eight_bits = self.numbers + self.numbers // self.head_dim * dtype.itemsize  # and one scale per head
        match storage:
            case "plain":
                kept_twice = self.numbers * self.sink_tokens // self.tokens // 2 if self.sink_moves else 0
                return Bytes(device=exact + kept_twice * dtype.itemsize)
            case "fp8":
                return Bytes(device=eight_bits + layer * dtype.itemsize)
            case "host":
                return Bytes(device=2 * exact // self.layers, host=exact)
            case "fp8-host":
                buffers = 2 * eight_bits // self.layers
                return Bytes(device=buffers + layer * dtype.itemsize, host=eight_bits)

    def slot(self, chunk: int) -> int:
        """Return the slot of ``chunk``. With window 5 and sink 2, chunks 0 to 8 use 0 1 2 3 4 2 3 4 2."""
        return chunk if chunk < self.sink else self.sink + (chunk - self.sink) % (self.window - self.sink)

    def place(self, chunk: int) -> slice:
        """Return the tokens ``chunk`` is written to."""
        if chunk == LEAD:
            return slice(0, self.lead_tokens)
        start = self.lead_tokens + self.slot(chunk) * self.tokens_per_chunk
        return slice(start, start + self.tokens_per_chunk)

    def visible(self, chunk: int) -> slice:
        """Return the tokens ``chunk`` sees while it is open, its own included."""
        start = 0 if self.sees_lead(chunk) else self.lead_tokens
        return slice(start, self.lead_tokens + min(chunk + 1, self.window) * self.tokens_per_chunk)

    def sees_lead(self, chunk: int) -> bool:
        """Return whether the lead, if there is one, is in sight of ``chunk``."""
        return self.sink > 0 or chunk + 1 < self.window

    def past(self, chunk: int) -> list[int]:
        """Return the closed chunks that ``chunk`` sees, oldest first, ``LEAD`` included where it is one."""
        lead = [LEAD] if self.lead and chunk != LEAD and self.sees_lead(chunk) else []
        ring = range(max(self.sink, chunk + 1 - self.window + self.sink), chunk)
        return [*lead, *range(min(self.sink, max(chunk, 0))), *ring]

    def first(self, chunk: int) -> int:
        """Return the latent frame of the video at which ``chunk`` starts. The lead starts at 0."""
        return max(0, self.lead + chunk * self.latent_frames_per_chunk)

    def sink_shift(self, chunk: int) -> int:
        """Return how many latent frames later the sink stands while ``chunk`` is open."""
        if not self.sink_moves:
            return 0
        return max(0, chunk + 1 - self.window) * self.latent_frames_per_chunk
