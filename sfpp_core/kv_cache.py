"""Keys and values of the chunks a new chunk may attend to.

Two memories with one life cycle: ``RollingKVCache`` overwrites in place and never grows (inference, and every
pass without a gradient); ``GradientKVCache`` never overwrites a tensor (passes that are differentiated).

Legend: B batch, N heads, L tokens, D head dim.
"""

from typing import Protocol

import torch
from torch import Tensor

from .cache_shape import CacheShape, StorageKind
from .errors import RolloutOrderError
from .kv_storage import KVStorage, make_storage
from .rope import move_in_time


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
            Visible keys and values, ``(B, N, visible tokens, D)``, valid until the next write.
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
    """Order in which chunks are opened and closed: one at a time, none left out, the lead before chunk 0."""

    def __init__(self, shape: CacheShape) -> None:
        self.shape = shape
        self.next = -shape.lead
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
    """The open chunk of a ``RollingKVCache``."""

    def __init__(self, storage: KVStorage, *, first: int) -> None:
        self.first = first
        self._storage = storage

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Overwrite the slot of one layer and return all slots in sight."""
        if k.requires_grad or v.requires_grad:
            raise RolloutOrderError(
                "a rolling cache overwrites its keys; use GradientKVCache under a gradient."
            )
        return self._storage.write(layer, k, v)


class RollingKVCache(_Lifecycle):
    """Memory of fixed size: ``sink`` slots that stay, and a ring of ``window - sink`` slots.

    Keys are stored with their position already applied, and softmax does not care in which order they come,
    so a slot is overwritten in place and nothing is ever moved. The slots in sight are always one slice.
    """

    def __init__(
        self, shape: CacheShape, *, batch: int, like: Tensor, storage: StorageKind = "plain"
    ) -> None:
        """Allocate every slot for a student that computes on the device and in the dtype of ``like``.

        Raises:
            SettingsError: The device cannot keep keys in this ``storage``.
        """
        super().__init__(shape)
        self._skipped = 0
        self.storage = make_storage(storage, shape, batch=batch, like=like)

    def open(self, chunk: int) -> None:
        """Make room for ``chunk``, which must follow the last one closed.

        Raises:
            RolloutOrderError: Another chunk is open, or ``chunk`` is not the next one.
        """
        self._check_open(chunk)
        self.storage.open(chunk)
        gap = self._skipped * self.shape.latent_frames_per_chunk if chunk >= self.shape.sink else 0
        self._opened = _OpenSlot(self.storage, first=self.shape.first(chunk) + gap)

    def close(self) -> None:
        """Remember the open chunk as last written."""
        if self._opened is None:
            raise RolloutOrderError("close() without an open chunk; call open(chunk) first.")
        self.storage.close()
        self._opened, self.next = None, self.next + 1

    def reset(self, *, skipped: int = 0) -> None:
        """Forget everything; the next chunk is the first.

        Args:
            skipped: Chunks of the video that are left out after the sink. Those that follow are counted on
                without them, and stand as much later in time.
        """
        self.next, self._opened, self._skipped = -self.shape.lead, None, skipped

    def chunk_keys(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Return keys, at their true time, and values of one chunk, each ``(layers, B, N, L, D)``."""
        return self.storage.kept(chunk)


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
        super().__init__(shape)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def continuing(cls, cache: RollingKVCache) -> "GradientKVCache":
        """Return a cache that remembers what ``cache`` does, as copies."""
        own = cls(cache.shape)
        own.next = cache.next
        for chunk in cache.shape.past(cache.next):
            k, v = cache.chunk_keys(chunk)
            own._kept[chunk] = k.clone(), v.clone()
        return own

    def open(self, chunk: int) -> None:
        """Take a view of the past for ``chunk``, which must follow the last one closed.

        Raises:
            RolloutOrderError: Another chunk is open, or ``chunk`` is not the next one.
        """
        self._check_open(chunk)
        self._kept = {seen: self._kept[seen] for seen in self.shape.past(chunk)}
        shift = self.shape.sink_shift(chunk)
        past = tuple(
            (move_in_time(k, shift), v) if shift and seen < self.shape.sink else (k, v)
            for seen, (k, v) in self._kept.items()
        )
        self._opened = _OpenList(past, layers=self.shape.layers, first=self.shape.first(chunk))

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
        self._kept[self.next] = torch.stack([k for k, _ in written]), torch.stack([v for _, v in written])
        self._opened, self.next = None, self.next + 1
