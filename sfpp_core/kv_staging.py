"""The two halves of a staged storage: how keys and values are packed, and the shelf the packed parts lie on.

A packing turns tokens ``(L, 2, B, N, D)`` into one or two parts ``(L, 2, B, N, width)``. A shelf keeps the
parts of every layer and hands out one layer's at a time, on the device: as views (``DeviceShelf``), or
copied from host memory into one of two buffers while the layer before computes (``HostShelf``).

Legend: B batch, N heads, L tokens, D head dim.
"""

import contextlib
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .cache_shape import CacheShape
from .errors import SettingsError
from .machine import in_words

EIGHT_BITS = torch.float8_e4m3fn
"""Dtype of rounded keys and values: 4 bits of exponent, 3 of mantissa."""

LARGEST = 448.0
"""Largest number of that dtype."""

SMALLEST_SCALE = 2.0**-14
"""Smallest scale: below this, float16 loses precision."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a packing makes of the head dim of one token."""

    dtype: torch.dtype

    width: int
    """Numbers per token and head, of keys or of values."""


class Packing(Protocol):
    """How keys and values are kept."""

    parts: tuple[Part, ...]

    def window(self, parts: Sequence[Tensor]) -> Tensor:
        """Return where the tokens of one layer are shown, ``(L, 2, B, N, D)``, given its parts."""
        ...

    def pack(self, tokens: Tensor, parts: Sequence[Tensor]) -> None:
        """Write some tokens of the window to their parts."""
        ...

    def unpack(self, parts: Sequence[Tensor], tokens: Tensor) -> None:
        """Write some parts back to their tokens of the window."""
        ...

    def unpacked(self, parts: Sequence[Tensor]) -> Tensor:
        """Return any parts ``(..., width)`` as tokens ``(..., D)``."""
        ...

    def tensors(self) -> list[Tensor]:
        """Return the memory that is the packing's own."""
        ...


class ExactPacking:
    """Keys and values as they are: the part is the window."""

    def __init__(self, shape: CacheShape, *, like: Tensor) -> None:
        self.parts = (Part(like.dtype, shape.head_dim),)

    def window(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the part."""
        return parts[0]

    def pack(self, tokens: Tensor, parts: Sequence[Tensor]) -> None:
        """Do nothing: they are the same memory."""

    def unpack(self, parts: Sequence[Tensor], tokens: Tensor) -> None:
        """Do nothing: they are the same memory."""

    def unpacked(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the part."""
        return parts[0]

    def tensors(self) -> list[Tensor]:
        """Return nothing."""
        return []


class EightBitPacking:
    """Keys and values as 8-bit floats, with a scale per token and head; one layer unrounded at a time."""

    def __init__(self, shape: CacheShape, *, batch: int, like: Tensor) -> None:
        self.parts = (Part(EIGHT_BITS, shape.head_dim), Part(like.dtype, 1))
        self._window = like.new_zeros((shape.tokens, 2, batch, shape.heads, shape.head_dim))

    def window(self, parts: Sequence[Tensor]) -> Tensor:  # noqa: ARG002 - the protocol's
        """Return the one window that all layers share."""
        return self._window

    def pack(self, tokens: Tensor, parts: Sequence[Tensor]) -> None:
        """Round ``tokens``: the largest number of each token and head becomes 448."""
        rounded, scales = parts
        largest = tokens.abs().amax(dim=-1, keepdim=True)
        scales.copy_((largest / LARGEST).clamp_(min=SMALLEST_SCALE))
        rounded.copy_(tokens / scales)

    def unpack(self, parts: Sequence[Tensor], tokens: Tensor) -> None:
        """Undo ``pack`` but for the rounding."""
        rounded, scales = parts
        tokens.copy_(rounded).mul_(scales)

    def unpacked(self, parts: Sequence[Tensor]) -> Tensor:
        """Return a copy in the compute dtype."""
        rounded, scales = parts
        return rounded.to(scales.dtype).mul_(scales)

    def tensors(self) -> list[Tensor]:
        """Return the window."""
        return [self._window]


class Shelf(Protocol):
    """Where the parts of every layer lie."""

    def open(self, place: slice, past: list[slice]) -> None:
        """Take the tokens the open chunk is written to, and the runs of tokens it sees."""
        ...

    def fetch(self, layer: int) -> list[Tensor]:
        """Return the parts of one layer, on the device, valid until the next but one is fetched."""
        ...

    def keep(self, layer: int) -> None:
        """Store the open chunk, which was written to the parts last fetched."""
        ...

    def everywhere(self, place: slice) -> list[Tensor]:
        """Return some tokens of all layers, each part ``(layers, L, 2, B, N, width)``, on the device."""
        ...

    def tensors(self) -> list[Tensor]:
        """Return all memory of the shelf."""
        ...


class DeviceShelf:
    """Parts that lie on the device: views are handed out."""

    def __init__(self, shape: CacheShape, parts: Sequence[Part], *, batch: int, like: Tensor) -> None:
        size = (shape.layers, shape.tokens, 2, batch, shape.heads)
        self._parts = [like.new_zeros((*size, part.width), dtype=part.dtype) for part in parts]

    def open(self, place: slice, past: list[slice]) -> None:
        """Do nothing: all is there."""

    def fetch(self, layer: int) -> list[Tensor]:
        """Return views."""
        return [part[layer] for part in self._parts]

    def keep(self, layer: int) -> None:
        """Do nothing: the views were written."""

    def everywhere(self, place: slice) -> list[Tensor]:
        """Return views."""
        return [part[:, place] for part in self._parts]

    def tensors(self) -> list[Tensor]:
        """Return the parts."""
        return self._parts


class HostShelf:
    """Parts that lie in host memory; two buffers on the device each hold one layer.

    While a layer computes over one buffer, the next layer is copied to the other. All copies are made by one
    side stream, so each finds the ones before it done, and nobody waits on the CPU.
    """

    def __init__(self, shape: CacheShape, parts: Sequence[Part], *, batch: int, like: Tensor) -> None:
        layer = (shape.tokens, 2, batch, shape.heads)
        sizes = [((*layer, part.width), part.dtype) for part in parts]
        self._host = [torch.zeros((shape.layers, *size), dtype=dtype) for size, dtype in sizes]
        self._buffers = [[like.new_zeros(size, dtype=dtype) for size, dtype in sizes] for _ in range(2)]
        self._lane = SideStream(like.device) if like.is_cuda else NoStream()
        if like.is_cuda:
            _lock(self, self._host)
        for buffer in self._buffers:
            self._lane.lend(buffer)
        self._place, self._past = slice(0), list[slice]()
        self._layers, self._turn, self._ahead = shape.layers, 0, -1

    def open(self, place: slice, past: list[slice]) -> None:
        """Take the tokens to write and to see, and start to copy the first layer."""
        self._place, self._past = place, past
        self._copy_ahead(0)

    def fetch(self, layer: int) -> list[Tensor]:
        """Return the buffer of one layer, which layers in order find already on its way."""
        if self._ahead != layer:
            self._copy_ahead(layer)
        self._lane.wait()
        return self._buffers[self._turn]

    def keep(self, layer: int) -> None:
        """Start to copy the layer that follows to the other buffer, then the open chunk to the host."""
        written = self._buffers[self._turn]
        self._turn = 1 - self._turn
        self._copy_ahead((layer + 1) % self._layers)
        with self._lane.working():
            for host, part in zip(self._host, written, strict=True):
                host[layer, self._place].copy_(part[self._place], non_blocking=self._lane.exists)

    def _copy_ahead(self, layer: int) -> None:
        """Start to copy one layer to the buffer whose turn it is, once what used it has run."""
        self._lane.follow()
        with self._lane.working():
            for host, part in zip(self._host, self._buffers[self._turn], strict=True):
                for past in self._past:
                    part[past].copy_(host[layer, past], non_blocking=self._lane.exists)
        self._lane.arrive()
        self._ahead = layer

    def everywhere(self, place: slice) -> list[Tensor]:
        """Return copies; waits for the device."""
        self._lane.drain()
        return [host[:, place].to(self._buffers[0][0].device, copy=True) for host in self._host]

    def tensors(self) -> list[Tensor]:
        """Return host memory and both buffers."""
        return [*self._host, *(part for buffer in self._buffers for part in buffer)]


class SideStream:
    """Work beside the stream that computes, on a CUDA device."""

    exists = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._arrived = torch.cuda.Event()

    def follow(self) -> None:
        """Let what is submitted here next wait for all that is submitted to compute so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def working(self) -> AbstractContextManager[object]:
        """Return the context in which work is submitted here."""
        return torch.cuda.stream(self._stream)

    def arrive(self) -> None:
        """Mark what ``wait`` waits for: all that is submitted here so far."""
        self._arrived.record(self._stream)

    def wait(self) -> None:
        """Let what is submitted to compute next wait for the mark. The CPU goes on."""
        torch.cuda.current_stream(self._device).wait_event(self._arrived)

    def drain(self) -> None:
        """Wait, on the CPU, until all that is submitted here is done."""
        self._stream.synchronize()

    def lend(self, tensors: Sequence[Tensor]) -> None:
        """Say that ``tensors`` are used here, so that their memory is not given away too early."""
        for tensor in tensors:
            tensor.record_stream(self._stream)


class NoStream:
    """The same on a CPU, where each copy is done when the next line runs."""

    exists = False

    def working(self) -> AbstractContextManager[object]:
        """Return a context that changes nothing."""
        return contextlib.nullcontext()

    def follow(self) -> None:
        """Do nothing."""

    arrive = wait = drain = follow

    def lend(self, tensors: Sequence[Tensor]) -> None:
        """Do nothing."""


def _lock(owner: object, tensors: list[Tensor]) -> None:
    """Lock host memory in place while ``owner`` lives, so that the GPU copies it while the CPU goes on.

    Not ``pin_memory``: its allocator rounds sizes up to a power of two, 8 GB for the 6 of a full window.

    Raises:
        SettingsError: The system does not lock so much.
    """
    runtime: Any = torch.cuda.cudart()
    locked: list[Tensor] = []
    weakref.finalize(owner, _unlock, locked).atexit = False
    for tensor in tensors:
        if int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)):
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda").add_(1)  # takes the error with it, which is ours to tell
            raise SettingsError(
                f"the system does not lock {in_words(tensor.nbytes)} of main memory for the GPU; close other "
                "programs, keep the cache as 'fp8', or use a smaller window."
            )
        locked.append(tensor)


def _unlock(tensors: list[Tensor]) -> None:
    """Give locked memory back, after the last copy."""
    torch.cuda.synchronize()
    runtime: Any = torch.cuda.cudart()
    for tensor in tensors:
        runtime.cudaHostUnregister(tensor.data_ptr())
