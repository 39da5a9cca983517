"""A student that has been there before: it recalls a past from kept keys, or from its last chunks alone.

A sampler that is given the past of a run shows every chunk of it to its student once more, which takes a
fifth of the time that making it took. What stands here takes the place of the student and does as much of
that as is needed: none where the keys and values were kept, or that of the last chunks where an approximation
will do.

Legend: B batch, C channels, T latent frames of a chunk, H and W latent height and width, N heads, L tokens, D
head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..cache_shape import LEAD
from ..config import StudentConfig
from ..kv_cache import OpenChunk, RollingKVCache
from ..student import BoundStudent, CausalStudent
from .kept_cache import KeptCache


class RecallingStudent:
    """Stands for a student in a sampler. The past is recalled until the first chunk is denoised."""

    def __init__(
        self,
        student: CausalStudent,
        *,
        made: Callable[[], int],
        offset: int = 0,
        first: int = 0,
        kept: KeptCache | None = None,
    ) -> None:
        """Wrap a student.

        Args:
            student: What is asked for all that is not recalled.
            made: Says how many chunks of the video there are.
            offset: Number of a chunk in the video less its number in the memory of the past.
            first: First chunk of the past that is remembered again, the sink apart; those that follow do not
                see what came before it.
            kept: Keys and values to go on from, once the chunk they remember last comes by.
        """
        self.student = student
        self.made = made
        self.offset = offset
        self.first = first
        self.kept = kept
        self.recalling = True
        self.latest: tuple[RollingKVCache, int] | None = None
        """The memory, and the last chunk of the video in it that is closed."""

    @property
    def config(self) -> StudentConfig:
        """Architecture of the student."""
        return self.student.config

    @property
    def dtype(self) -> torch.dtype:
        """What the student computes in."""
        return self.student.dtype

    def bind(self, embeddings: Tensor) -> "BoundRecall":
        """Bind the student to text embeddings, ``(B, tokens, text_dim)``."""
        return BoundRecall(self, self.student.bind(embeddings))


class BoundRecall:
    """A recalling student, bound to its conditioning."""

    def __init__(self, recalling: RecallingStudent, bound: BoundStudent) -> None:
        self._recalling = recalling
        self._bound = bound

    def __call__(self, noisy: Tensor, sigma: float, cache: RollingKVCache) -> Tensor:
        """Return the velocity at ``noisy`` ``(B, C, T, H, W)``, writing its keys to ``cache``."""
        self._recalling.recalling = False
        self._recalling.latest = cache, self._recalling.made() - 1
        return self._bound(noisy, sigma, cache)

    def remember(self, clean: Tensor, cache: RollingKVCache, *, sigma: float = 0.0) -> None:
        """Write the keys of ``clean`` ``(B, C, T, H, W)``, unless they are recalled or not needed."""
        recalling = self._recalling
        if not recalling.recalling:
            self._bound.remember(clean, cache, sigma=sigma)
        elif recalling.kept is not None:
            if cache.next + recalling.offset == recalling.kept.chunk:
                recalling.kept.restore(cache)
                recalling.kept = None
        else:
            unseen = _unseen(cache, recalling.first - recalling.offset)
            if cache.next not in unseen:
                seen = _Cut(cache, unseen) if unseen else cache
                self._bound.remember(clean, cast(RollingKVCache, seen), sigma=sigma)


def _unseen(cache: RollingKVCache, first: int) -> set[int]:
    """Return which chunks of a memory, of those the open one sees and itself, are not remembered again."""
    seen = (*cache.shape.past(cache.next), cache.next)
    return {other for other in seen if cache.shape.sink <= other < first and other != LEAD}


@dataclass(frozen=True, slots=True)
class _Cut:
    """A cache whose open chunk does not see some of the past."""

    cache: RollingKVCache
    unseen: set[int]

    @property
    def opened(self) -> OpenChunk:
        """The open chunk."""
        return _CutChunk(self.cache, self.unseen)


class _CutChunk:
    """The open chunk of a cache, without some of the past."""

    def __init__(self, cache: RollingKVCache, unseen: set[int]) -> None:
        self.first = cache.opened.first
        self._opened = cache.opened
        shape, chunk = cache.shape, cache.next
        start = shape.visible(chunk).start
        places = sorted(
            (place.start, place.stop)
            for place in (shape.place(other) for other in (*shape.past(chunk), chunk) if other not in unseen)
        )
        self._tokens = torch.cat([torch.arange(first - start, stop - start) for first, stop in places])

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the open chunk of one layer; return keys and values ``(B, N, L, D)`` of what it sees."""
        seen_k, seen_v = self._opened.write(layer, k, v)
        self._tokens = self._tokens.to(seen_k.device)  # copied once, for the first layer
        return seen_k.index_select(2, self._tokens), seen_v.index_select(2, self._tokens)
