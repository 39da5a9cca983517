"""Where the keys and values of a rolling cache lie, and how attention gets to see them.

``plain`` keeps them as attention reads them and returns views. The others keep less on the device: as 8-bit
floats with a scale per token and head, in host memory, or both; then one layer's window at a time is brought
before attention. All are allocated once and written in place.

Rounding moves keys and values by 2.6 percent (root mean square) at any size: a float keeps its precision, so
the scale has only to bring the largest number to 448. While a chunk is open its own keys are seen unrounded,
since they weigh most: rounding them too would more than double the distance from the plain video.

Legend: B batch, N heads, L tokens, D head dim.
"""

from typing import Protocol, get_args

from torch import Tensor

from .cache_shape import CacheShape, StorageKind
from .errors import SettingsError
from .kv_staging import DeviceShelf, EightBitPacking, ExactPacking, HostShelf, Packing, Shelf
from .rope import rotate, rotation


class KVStorage(Protocol):
    """Memory of a rolling cache: a row of tokens per layer."""

    def open(self, chunk: int) -> None:
        """Make ready to write ``chunk`` and to show what it may see."""
        ...

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the open chunk of one layer and return all in sight, see ``OpenChunk.write``."""
        ...

    def close(self) -> None:
        """Keep the open chunk as last written."""
        ...

    def kept(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Return keys, at their true time, and values of one chunk, each ``(layers, B, N, L, D)``."""
        ...

    def tensors(self) -> list[Tensor]:
        """Return all tensors that hold keys and values."""
        ...


def make_storage(kind: StorageKind, shape: CacheShape, *, batch: int, like: Tensor) -> KVStorage:
    """Allocate a storage for a student that computes on the device and in the dtype of ``like``.

    Raises:
        SettingsError: No such kind, or the device cannot do it.
    """
    if kind not in get_args(StorageKind):
        raise SettingsError(f"storage is {kind!r}; use one of {', '.join(get_args(StorageKind))}.")
    if kind == "plain":
        return PlainStorage(shape, batch=batch, like=like)
    if kind != "host" and like.device.type == "mps":
        raise SettingsError(f"storage is {kind!r}, and mps has no 8-bit floats; use 'plain'.")
    packing = (
        ExactPacking(shape, like=like) if kind == "host" else EightBitPacking(shape, batch=batch, like=like)
    )
    shelf = DeviceShelf if kind == "fp8" else HostShelf
    return StagedStorage(shape, packing, shelf(shape, packing.parts, batch=batch, like=like), like=like)


class PlainStorage:
    """Keys and values in the compute dtype, where attention reads them. Nothing is ever moved or copied."""

    def __init__(self, shape: CacheShape, *, batch: int, like: Tensor) -> None:
        """Allocate every slot on the device and dtype of ``like``."""
        size = (shape.layers, batch, shape.heads, shape.tokens, shape.head_dim)
        self.shape = shape
        # Zeros, not empty: every page is touched now, so a full disk of swap shows before the first chunk.
        self._k = like.new_zeros(size)
        self._v = like.new_zeros(size)
        moving = (*size[:3], shape.sink_tokens, size[4])
        self._true_sink = like.new_zeros(moving) if shape.sink_moves else None
        self._place = self._visible = slice(0)

    def open(self, chunk: int) -> None:
        """Choose the slot to write and the slots in sight; move the sink to where ``chunk`` sees it."""
        self._place, self._visible = self.shape.place(chunk), self.shape.visible(chunk)
        if self._true_sink is not None and (shift := self.shape.sink_shift(chunk)):
            turns = rotation(self.shape.head_dim, shift, (1, 1, 1), like=self._true_sink)
            # Layer by layer: turning all keys at once, in float32, would be a peak of memory.
            for shown, kept in zip(self._k, self._true_sink, strict=True):
                shown[:, :, : self.shape.sink_tokens] = rotate(kept, turns)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Overwrite the slot of one layer and return views of all slots in sight."""
        self._k[layer, :, :, self._place] = k
        self._v[layer, :, :, self._place] = v
        return self._k[layer, :, :, self._visible], self._v[layer, :, :, self._visible]

    def close(self) -> None:
        """Keep the true keys of the sink apart from those that will be moved."""
        if self._true_sink is not None and self._place.stop <= self.shape.sink_tokens:
            self._true_sink[..., self._place, :] = self._k[..., self._place, :]

    def kept(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Return views of one chunk."""
        k = self._k if self._true_sink is None or chunk >= self.shape.sink else self._true_sink
        place = self.shape.place(chunk)
        return k[..., place, :], self._v[..., place, :]

    def tensors(self) -> list[Tensor]:
        """Return keys, values, and the true keys of a sink that moves."""
        return [part for part in (self._k, self._v, self._true_sink) if part is not None]


class StagedStorage:
    """Keys and values that attention cannot read where they lie: each layer's window is made ready for it.

    Tokens come first, ``(L, 2, B, N, D)`` with keys and values side by side, so that any run of tokens is one
    piece of memory. A sink that moves is turned after it was fetched: what is kept stays as written.
    """

    def __init__(self, shape: CacheShape, packing: Packing, shelf: Shelf, *, like: Tensor) -> None:
        """Combine what is kept with where it is kept."""
        self.shape = shape
        self._packing, self._shelf = packing, shelf
        self._like = like.new_empty(0)
        self._place = self._visible = slice(0)
        self._past: list[slice] = []
        self._turns: Tensor | None = None

    def open(self, chunk: int) -> None:
        """Choose the slot to write and the tokens in sight, and start to fetch the first layer."""
        place, visible = self.shape.place(chunk), self.shape.visible(chunk)
        around = slice(visible.start, place.start), slice(place.stop, visible.stop)
        self._place, self._visible = place, visible
        self._past = [part for part in around if part.start < part.stop]
        shift, like = self.shape.sink_shift(chunk), self._like
        self._turns = rotation(self.shape.head_dim, shift, (1, 1, 1), like=like) if shift else None
        self._shelf.open(place, self._past)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the open chunk of one layer and return views of its window, which the next write reuses."""
        parts = self._shelf.fetch(layer)
        window = self._packing.window(parts)
        own = window[self._place]
        own[:, 0] = k.permute(2, 0, 1, 3)
        own[:, 1] = v.permute(2, 0, 1, 3)
        self._packing.pack(own, [part[self._place] for part in parts])
        self._shelf.keep(layer)
        for past in self._past:
            self._packing.unpack([part[past] for part in parts], window[past])
        if self._turns is not None:
            # Chunk by chunk, for the same reason as in a plain storage.
            for sink in window[: self.shape.sink_tokens, 0].split(self.shape.tokens_per_chunk):
                sink.copy_(rotate(sink.contiguous(), self._turns))
        seen_k, seen_v = window[self._visible].permute(1, 2, 3, 0, 4)
        return seen_k, seen_v

    def close(self) -> None:
        """Do nothing: every write was stored."""

    def kept(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Return copies of one chunk; waits for the device."""
        parts = self._shelf.everywhere(self.shape.place(chunk))
        k, v = self._packing.unpacked(parts).permute(2, 0, 3, 4, 1, 5)
        return k, v

    def tensors(self) -> list[Tensor]:
        """Return what is kept, and the buffers it is shown in."""
        return [*self._shelf.tensors(), *self._packing.tensors()]
