"""One run: a prompt and a size become the clean chunks of a video of any length.

Legend: B batch, C channels, T latent frames of a chunk, H and W latent height and width.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cache_shape import CacheShape, StorageKind
from .config import RolloutSettings
from .errors import NumericsError, SettingsError
from .geometry import VideoGeometry
from .kv_cache import RollingKVCache
from .noise import ChunkNoise
from .rollout import Student, rollout
from .start import check_start, given_chunks
from .student import CausalStudent
from .transfers import fetch


@dataclass(frozen=True, slots=True, kw_only=True)
class LongSampler:
    """Generates a video chunk by chunk; memory depends on the window, not on the length.

    Use::

        sampler = LongSampler(student=student, geometry=geometry, settings=settings, seed=0)
        for clean in sampler.chunks(embeddings):    # (B, C, T, H, W), normalised, float32
            frames = decoder.decode(clean)
    """

    student: CausalStudent
    """The model, bound to no prompt."""

    geometry: VideoGeometry
    """Size of the video."""

    settings: RolloutSettings
    """How the student is rolled out."""

    seed: int = 0
    """Of all noise. A longer video begins with the shorter one of the same seed."""

    device: torch.device | str = "cpu"
    """Where the student computes."""

    storage: StorageKind = "plain"
    """How keys and values are kept."""

    restart: Callable[[Tensor], Tensor] | None = None
    """With an overlap: makes the latents ``(B, C, overlap, H, W)`` a window begins with from all of the
    window before, ``(B, C, window, H, W)``. ``None`` takes its last ones as they are."""

    def __post_init__(self) -> None:
        if self.geometry.chunk != self.settings.chunk:
            raise SettingsError(
                f"geometry has chunks of {self.geometry.chunk} latent frames and the settings of "
                f"{self.settings.chunk}; build both with the same chunk."
            )

    @torch.inference_mode()
    def chunks(
        self, embeddings: Tensor, *, start: Tensor | None = None, past: Sequence[Tensor] = ()
    ) -> Iterator[Tensor]:
        """Yield the clean chunks of the video after ``past``, oldest first, those of ``start`` among them.

        Args:
            embeddings: Text embeddings, ``(B, tokens, text_dim)``.
            start: Latents the video starts with, ``(B, C, T, H, W)``, normalised: whole chunks (a clip), or
                one latent frame and whole chunks (an image: one latent frame and none). ``geometry`` counts
                them, and its ``lead`` is that of ``lead_of``.
            past: Every chunk of this run already yielded. Their clean passes are run again, which costs a
                fifth of making them and gives exactly the memory they left.

        Yields:
            ``(B, C, T, H, W)``, normalised latents, float32, on ``device``. T is the chunk; the first is
            longer by the lead.

        Raises:
            GeometryError: ``start`` does not fit; see ``check_start``.
            NumericsError: A chunk holds a number that is not finite. It is not yielded; but on CUDA, where
                waiting for the answer would hold up the GPU, one such chunk at most is, and never the last.
        """
        config, total, lead = self.student.config, self.geometry.chunks, self.geometry.lead
        check_start(start, self.geometry, batch=len(embeddings), channels=config.channels)
        given = given_chunks(start, past, self.geometry)
        bound = self.student.bind(embeddings.to(self.device))
        like = torch.empty(len(embeddings), config.channels, *self.geometry.chunk_shape, device=self.device)
        opening, given = [clean.to(like) for clean in given[:lead]], given[lead:]
        for chunk, clean in enumerate(given[len(past) :], start=len(past)):
            yield _with_lead(opening, chunk, clean.to(like))
        check = _FiniteCheck(self.student.dtype, late=like.is_cuda)
        overlap, done, cache = self.settings.overlap, len(given), None
        held = self._held(given, like)
        while done < total:
            first, stop = self._window(done)
            if first:
                opening = []  # the lead belongs to the first window
            if cache is None or cache.shape.lead != len(opening):
                cache = None  # its memory is free before another is taken
                cache = self._cache(like, lead=len(opening))
            cache.reset()
            _remember([*opening, *self._given(held, first, done)], bound, cache, like=like)
            noise = ChunkNoise(self.seed, first)
            schedule = self.settings.schedule()
            made = rollout(bound, noise, schedule, cache, chunks=stop - first, like=like, start=done - first)
            for clean in made:
                check.add(done, clean)
                done += 1
                if done == total:
                    check.settle()  # here, not after the loop: a caller who counts never comes back
                if overlap:
                    held.append(clean)
                yield _with_lead(opening, done - 1, clean)

    def _held(self, given: Sequence[Tensor], like: Tensor) -> "deque[Tensor]":
        """Return the chunks there may still be use for: all given ones, or those of two windows."""
        if not self.settings.overlap:
            return deque(given)
        return deque((clean.to(like) for clean in given), maxlen=2 * self.settings.window_chunks)

    def _cache(self, like: Tensor, *, lead: int) -> RollingKVCache:
        """Return an empty memory for windows with so many latent frames before their chunk 0."""
        shape = replace(CacheShape.of(self.student.config, self.geometry, self.settings), lead=lead)
        like = like.to(self.student.dtype)
        return RollingKVCache(shape, batch=len(like), like=like, storage=self.storage)

    def _window(self, done: int) -> tuple[int, int]:
        """Return the first chunk of the window that chunk ``done`` is made in, and the one after its last."""
        settings, total = self.settings, self.geometry.chunks
        if not settings.overlap:
            return 0, total  # one window, which rolls
        span = settings.window_chunks - settings.overlap_chunks
        first = max(0, (done - settings.overlap_chunks) // span) * span
        return first, min(first + settings.window_chunks, total)

    def _given(self, held: Sequence[Tensor], first: int, done: int) -> list[Tensor]:
        """Return the chunks ``first`` to ``done - 1`` as their window sees them.

        Args:
            held: Chunks up to ``done - 1``, as many as there may be use for.
            first: First chunk of the window.
            done: Chunks made.
        """
        given = [held[chunk - done] for chunk in range(first, done)]
        if first and self.restart is not None:
            overlap = self.settings.overlap_chunks
            stop = first + overlap
            before = [held[chunk - done] for chunk in range(stop - self.settings.window_chunks, stop)]
            given[:overlap] = self.restart(torch.cat(before, dim=2)).split(self.settings.chunk, dim=2)
        return given


def _remember(given: Sequence[Tensor], student: Student, cache: RollingKVCache, *, like: Tensor) -> None:
    """Run the clean passes of the chunks that come next in ``cache``, the lead first if there is one."""
    for chunk, clean in enumerate(given, start=cache.next):
        cache.open(chunk)
        student.remember(clean.to(like), cache)
        cache.close()


def _with_lead(opening: Sequence[Tensor], chunk: int, clean: Tensor) -> Tensor:
    """Return what is yielded for ``chunk``: the lead, if there is one, comes with chunk 0."""
    return torch.cat((*opening, clean), dim=2) if opening and chunk == 0 else clean


class _FiniteCheck:
    """Refuses chunks that are not finite; if late, each when the next one is made, so that nobody waits."""

    def __init__(self, dtype: torch.dtype, *, late: bool) -> None:
        """Take the compute dtype, to name it, and whether an answer may come one chunk late."""
        self._dtype = dtype
        self._late = late
        self._asked: tuple[int, Tensor, Callable[[], None]] | None = None

    def add(self, chunk: int, clean: Tensor) -> None:
        """Ask of one chunk, after settling the one before.

        Raises:
            NumericsError: The chunk before is not finite, or this one where the check is not late.
        """
        finite, arrive = fetch(torch.isfinite(clean).all())
        self.settle()
        self._asked = chunk, finite, arrive
        if not self._late:
            self.settle()

    def settle(self) -> None:
        """Wait for the answer that is due, if there is one.

        Raises:
            NumericsError: The chunk asked of is not finite.
        """
        if self._asked is None:
            return
        (chunk, finite, arrive), self._asked = self._asked, None
        arrive()
        if not finite:
            raise NumericsError(
                f"chunk {chunk} came out as numbers that are not finite; the weights are damaged or the "
                f"compute dtype {self._dtype} is too narrow: check the file, or use float32."
            )
