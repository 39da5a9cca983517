"""Keys and values of the chunks a new chunk may attend to.

Two memories with one life cycle: ``RollingKVCache`` overwrites in place and never grows (inference, and every
pass without a gradient); ``GradientKVCache`` never overwrites a tensor (passes that are differentiated).

Legend: B batch, N heads, L tokens, D head dim.
"""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .config import RolloutSettings, SinkPositions, StudentConfig
from .errors import RolloutOrderError, SettingsError
from .geometry import VideoGeometry
from .rope import move_in_time, rotate, rotation


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
        )

    @property
    def numbers(self) -> int:
        """Numbers held by a full cache of batch 1, keys and values together."""
        return 2 * self.layers * self.window * self.tokens_per_chunk * self.heads * self.head_dim

    def slot(self, chunk: int) -> int:
        """Return the slot of ``chunk``. With window 5 and sink 2, chunks 0 to 8 use 0 1 2 3 4 2 3 4 2."""
        return chunk if chunk < self.sink else self.sink + (chunk - self.sink) % (self.window - self.sink)

    def sink_shift(self, chunk: int) -> int:
        """Return how many latent frames later the sink stands while ``chunk`` is open."""
        if self.sink_positions == "absolute" or not self.sink:
            return 0
        return max(0, chunk + 1 - self.window) * self.latent_frames_per_chunk


class OpenChunk(Protocol):
    """The chunk being generated, as the student's layers see it."""

    first: int
    """Latent frame of the video at which the chunk starts."""

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the open chunk of one layer and return all that it may attend to.

        Args:
            layer: Index of the transformer layer.
            k: Keys of the open chunk, ``(B, N, L, D)``, position already applied.
            v: Values of the open chunk, ``(B, N, L, D)``.

        Returns:
            Visible keys and values, ``(B, N, visible tokens, D)``, valid until the next write to the layer.
        """
        ...


class KVCache(Protocol):
    """Attention memory of one rollout.

    Use::

        cache.open(chunk)                        # evicts the oldest chunk once the window is full
        k, v = cache.opened.write(layer, k, v)   # any number of passes; each overwrites the last
        cache.close()                            # the last pass written is the one remembered
    """

    @property
    def opened(self) -> OpenChunk:
        """The open chunk."""
        ...

    def open(self, chunk: int) -> None:
        """Make room for ``chunk``, which must follow the last one closed."""
        ...

    def close(self) -> None:
        """Remember the open chunk as last written."""
        ...


class _Lifecycle:
    """Order in which chunks are opened and closed: one at a time, none left out."""

    def __init__(self) -> None:
        self.next = 0
        self._opened: OpenChunk | None = None

    @property
    def opened(self) -> OpenChunk:
        """The open chunk.

        Raises:
            RolloutOrderError: No chunk is open.
        """
        if self._opened is None:
            raise RolloutOrderError("no chunk is open; call open(chunk) first.")
        return self._opened

    def _check_open(self, chunk: int) -> None:
        """Refuse to open ``chunk`` out of order."""
        if self._opened is not None:
            raise RolloutOrderError(f"chunk {self.next} is still open; close it before opening {chunk}.")
        if chunk != self.next:
            raise RolloutOrderError(
                f"chunk {chunk} opened, but {self.next} comes next; another video starts with an empty cache."
            )


class _OpenSlot:
    """The open chunk of a ``RollingKVCache``: a slot and the prefix of slots in sight."""

    def __init__(self, k: Tensor, v: Tensor, *, first: int, start: int, stop: int, visible: int) -> None:
        self.first = first
        self._k, self._v = k, v
        self._start, self._stop, self._visible = start, stop, visible

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Overwrite the slot of one layer and return views of all slots in sight."""
        if k.requires_grad or v.requires_grad:
            raise RolloutOrderError(
                "a rolling cache overwrites its keys; use GradientKVCache under a gradient."
            )
        self._k[layer, :, :, self._start : self._stop] = k
        self._v[layer, :, :, self._start : self._stop] = v
        return self._k[layer, :, :, : self._visible], self._v[layer, :, :, : self._visible]


class RollingKVCache(_Lifecycle):
    """Memory of fixed size: ``sink`` slots that stay, and a ring of ``window - sink`` slots.

    Keys are stored with their position already applied, and softmax does not care in which order they come,
    so a slot is overwritten in place and nothing is ever moved. The slots in sight are always a prefix.
    """

    def __init__(self, shape: CacheShape, *, batch: int, like: Tensor) -> None:
        """Allocate every slot on the device and dtype of ``like``."""
        super().__init__()
        size = (shape.layers, batch, shape.heads, shape.window * shape.tokens_per_chunk, shape.head_dim)
        self.shape = shape
        # Zeros, not empty: every page is touched now, so a full disk of swap shows before the first chunk.
        self._k = like.new_zeros(size)
        self._v = like.new_zeros(size)
        moves = shape.sink and shape.sink_positions == "relative"
        self._true_sink = like.new_zeros((*size[:3], self._sink_tokens, size[4])) if moves else None

    @property
    def _sink_tokens(self) -> int:
        """Tokens of all sink slots."""
        return self.shape.sink * self.shape.tokens_per_chunk

    def open(self, chunk: int) -> None:
        """Make room for ``chunk``, which must follow the last one closed.

        Raises:
            RolloutOrderError: Another chunk is open, or ``chunk`` is not the next one.
        """
        self._check_open(chunk)
        start = self.shape.slot(chunk) * self.shape.tokens_per_chunk
        self._opened = _OpenSlot(
            self._k,
            self._v,
            first=chunk * self.shape.latent_frames_per_chunk,
            start=start,
            stop=start + self.shape.tokens_per_chunk,
            visible=min(chunk + 1, self.shape.window) * self.shape.tokens_per_chunk,
        )
        if self._true_sink is not None and (shift := self.shape.sink_shift(chunk)):
            turns = rotation(self.shape.head_dim, shift, (1, 1, 1), like=self._true_sink)
            # Layer by layer: turning all keys at once, in float32, would be a peak of memory.
            for shown, kept in zip(self._k, self._true_sink, strict=True):
                shown[:, :, : self._sink_tokens] = rotate(kept, turns)

    def close(self) -> None:
        """Remember the open chunk as last written."""
        if self._opened is None:
            raise RolloutOrderError("close() without an open chunk; call open(chunk) first.")
        if self._true_sink is not None and self.next < self.shape.sink:
            start = self.next * self.shape.tokens_per_chunk
            part = slice(start, start + self.shape.tokens_per_chunk)
            self._true_sink[..., part, :] = self._k[..., part, :]
        self._opened, self.next = None, self.next + 1

    def reset(self) -> None:
        """Forget everything; the next chunk is 0."""
        self.next, self._opened = 0, None

    def chunk_keys(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Return keys, at their true time, and values of one chunk, each ``(layers, B, N, L, D)``."""
        start = self.shape.slot(chunk) * self.shape.tokens_per_chunk
        part = slice(start, start + self.shape.tokens_per_chunk)
        k = self._k if self._true_sink is None or chunk >= self.shape.sink else self._true_sink
        return k[..., part, :], self._v[..., part, :]


class _OpenList:
    """The open chunk of a ``GradientKVCache``: an immutable view of the past, taken when it was opened.

    Checkpointing runs a layer a second time during backward, when the rollout may be chunks ahead:
    it must find the past as it was, so nothing here refers to what the cache holds later.
    """

    def __init__(self, past: tuple[tuple[Tensor, Tensor], ...], *, layers: int, first: int) -> None:
        self.first = first
        self.written: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self._past = past

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the past and the open chunk, concatenated; the gradient reaches the open chunk only."""
        if not torch.is_grad_enabled():
            self.written[layer] = (k.detach(), v.detach())
        keys = [keys[layer] for keys, _ in self._past]
        values = [values[layer] for _, values in self._past]
        return torch.cat((*keys, k), dim=2), torch.cat((*values, v), dim=2)


class GradientKVCache(_Lifecycle):
    """Memory for passes that are differentiated: immutable tensors per chunk, nothing overwritten.

    Only passes without a gradient are remembered, so a chunk is closed by a clean pass under
    ``torch.no_grad``. Eviction drops a reference. Overwriting in place would leak gradient into earlier
    chunks under checkpointing.
    """

    def __init__(self, shape: CacheShape) -> None:
        """Start empty."""
        super().__init__()
        self.shape = shape
        self._sink: list[tuple[Tensor, Tensor]] = []
        # The open chunk counts inside the window.
        self._ring: deque[tuple[Tensor, Tensor]] = deque(maxlen=shape.window - shape.sink - 1)

    @classmethod
    def continuing(cls, cache: RollingKVCache) -> "GradientKVCache":
        """Return a cache that remembers what ``cache`` does, as copies."""
        own = cls(cache.shape)
        own.next = cache.next
        kept = range(max(cache.shape.sink, cache.next - (own._ring.maxlen or 0)), cache.next)
        for chunk in (*range(min(cache.shape.sink, cache.next)), *kept):
            own._keep(chunk, *(part.clone() for part in cache.chunk_keys(chunk)))
        return own

    def _keep(self, chunk: int, k: Tensor, v: Tensor) -> None:
        """Append one chunk, evicting the oldest of the ring if it is full."""
        (self._sink if chunk < self.shape.sink else self._ring).append((k, v))

    def open(self, chunk: int) -> None:
        """Take a view of the past for ``chunk``, which must follow the last one closed.

        Raises:
            RolloutOrderError: Another chunk is open, or ``chunk`` is not the next one.
        """
        self._check_open(chunk)
        shift = self.shape.sink_shift(chunk)
        sink = [(move_in_time(k, shift), v) if shift else (k, v) for k, v in self._sink]
        first = chunk * self.shape.latent_frames_per_chunk
        self._opened = _OpenList((*sink, *self._ring), layers=self.shape.layers, first=first)

    def close(self) -> None:
        """Remember the open chunk as last written without a gradient.

        Raises:
            RolloutOrderError: No chunk is open, or no pass without a gradient has written it.
        """
        written = [pair for pair in self.opened.written if pair is not None]  # type: ignore[attr-defined]
        if len(written) < self.shape.layers:
            raise RolloutOrderError(
                f"chunk {self.next} has no clean pass to remember; run one before close()."
            )
        self._keep(self.next, torch.stack([k for k, _ in written]), torch.stack([v for _, v in written]))
        self._opened, self.next = None, self.next + 1
