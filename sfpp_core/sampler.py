"""One run: a prompt and a size become the clean chunks of a video of any length.

Legend: B batch, C channels, T latent frames of a chunk, H and W latent height and width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cache_shape import CacheShape, StorageKind
from .config import RolloutSettings
from .cues import Cue, Voice, as_cues
from .errors import NumericsError, SettingsError
from .geometry import VideoGeometry
from .kv_cache import RollingKVCache
from .noise import ChunkNoise
from .rollout import Finish, remember, rollout
from .schedule import FewStepSchedule, check_context_sigma
from .start import check_start, given_chunks
from .stretches import Stretch, stretches
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

    context_sigma: float | None = None
    """Share of noise, from 0 to below 1, under which the past is remembered; ``None`` is that of the
    settings, which the student was trained with."""

    finish: Finish | None = None
    """Maps each clean chunk, given its number in the video, before it is yielded and remembered. Given chunks
    are shown to it too, in order, and stay as they are."""

    recalling: Callable[[int], None] | None = None
    """Told of each chunk of the past, by its number in the video, before it is remembered again."""

    def __post_init__(self) -> None:
        if self.geometry.chunk != self.settings.chunk:
            raise SettingsError(
                f"geometry has chunks of {self.geometry.chunk} latent frames and the settings of "
                f"{self.settings.chunk}; build both with the same chunk."
            )
        if self.context_sigma is not None:
            check_context_sigma(self.context_sigma)

    @torch.inference_mode()
    def chunks(
        self, text: Tensor | Sequence[Cue], *, start: Tensor | None = None, past: Sequence[Tensor] = ()
    ) -> Iterator[Tensor]:
        """Yield the clean chunks of the video after ``past``, oldest first, those of ``start`` among them.

        Args:
            text: Text embeddings, ``(B, tokens, text_dim)``, or several of them as cues in order. Chunks
                before a cue do not depend on it.
            start: Latents the video starts with, ``(B, C, T, H, W)``, normalised: whole chunks (a clip), or
                one latent frame and whole chunks (an image: one latent frame and none). ``geometry`` counts
                them, and its ``lead`` is that of ``lead_of``.
            past: Every chunk of this run already yielded. The clean passes of those since the memory was last
                built are run again, which costs a fifth of making them and gives exactly what they left.

        Yields:
            ``(B, C, T, H, W)``, normalised latents, float32, on ``device``. T is the chunk; the first is
            longer by the lead.

        Raises:
            ConditioningError: The embeddings do not fit the student, or each other.
            GeometryError: ``start`` does not fit; see ``check_start``.
            NumericsError: A chunk holds a number that is not finite. It is not yielded; but on CUDA, where
                waiting for the answer would hold up the GPU, one such chunk at most is, and never the last.
            SettingsError: The cues are not in order.
        """
        cues = as_cues(text)
        voice = Voice(self.student, cues, device=self.device)
        channels, total, lead = self.student.config.channels, self.geometry.chunks, self.geometry.lead
        like = torch.empty(len(cues[0].embeddings), channels, *self.geometry.chunk_shape, device=self.device)
        check_start(start, self.geometry, batch=len(like), channels=channels)
        given = given_chunks(start, past, self.geometry)
        opening, given = [clean.to(like) for clean in given[:lead]], given[lead:]
        for chunk, clean in enumerate(given[len(past) :], start=len(past)):
            yield _with_lead(opening, chunk, clean.to(like))
        self._show(given, like)
        check, cache = _FiniteCheck(self.student.dtype, late=like.is_cuda), None
        held, done = dict(enumerate(given)), len(given)
        for stretch in (stretch for stretch in self.stretches(cues) if stretch.stop > done):
            if cache is None or cache.shape.lead != stretch.lead:
                cache = None  # its memory is free before another is taken
                cache = self._cache(like, lead=stretch.lead)
            self._recall(stretch, [*opening[: stretch.lead], *self._past(stretch, held, done)], voice, cache)
            for clean in self._make(stretch, done, voice, cache, like):
                check.add(done, clean)
                done += 1
                if done == total:
                    check.settle()  # here, not after the loop: a caller who counts never comes back
                if stretch.stop < total:
                    self._hold(held, done - 1, clean, stretch)
                yield _with_lead(opening, done - 1, clean)

    def _show(self, given: Sequence[Tensor], like: Tensor) -> None:
        """Show the given chunks to what maps the others."""
        if self.finish is not None:
            for chunk, clean in enumerate(given):
                self.finish(chunk, clean.to(like))

    def stretches(self, cues: Sequence[Cue]) -> Iterator[Stretch]:
        """Yield the stretches the video is made in, in order; the cues are as ``as_cues`` returns them."""
        settings, geometry = self.settings, self.geometry
        shape = CacheShape.of(self.student.config, geometry, settings)
        return stretches(cues, shape, chunks=geometry.chunks, overlap=settings.overlap_chunks)

    def _cache(self, like: Tensor, *, lead: int) -> RollingKVCache:
        """Return an empty memory for stretches with so many latent frames before their first chunk."""
        shape = replace(CacheShape.of(self.student.config, self.geometry, self.settings), lead=lead)
        like = like.to(self.student.dtype)
        return RollingKVCache(shape, batch=len(like), like=like, storage=self.storage)

    def _past(self, stretch: Stretch, held: Mapping[int, Tensor], done: int) -> list[Tensor]:
        """Return the chunks before ``done`` as the memory of ``stretch`` sees them, oldest first."""
        past = [held[chunk] for chunk in (*stretch.kept, *range(stretch.begin, done))]
        if stretch.overlap and self.restart is not None:
            stop = stretch.offset + stretch.overlap
            before = [held[chunk] for chunk in range(stop - self.settings.window_chunks, stop)]
            made = self.restart(torch.cat(before, dim=2).to(self.device, torch.float32))
            past[: stretch.overlap] = made.split(self.settings.chunk, dim=2)
        return past

    def _recall(self, stretch: Stretch, past: Sequence[Tensor], voice: Voice, cache: RollingKVCache) -> None:
        """Build the memory of ``stretch`` out of the clean passes of ``past``, the lead first if it has one.

        What is kept from before is heard as the first chunk of the stretch is.
        """
        schedule, noise = self._schedule(), ChunkNoise(self.seed)
        cache.reset(skipped=stretch.skipped(cache.shape))
        for number, clean in enumerate(past, start=cache.next):
            if self.recalling is not None and number >= 0:
                self.recalling(stretch.chunk(number))
            cache.open(number)
            heard = max(stretch.begin, stretch.offset + number)
            chunk = number if number < 0 else stretch.chunk(number)
            clean = clean.to(self.device, torch.float32)
            remember(voice.at(heard), clean, noise, schedule, cache, chunk=chunk)

    def _make(
        self, stretch: Stretch, done: int, voice: Voice, cache: RollingKVCache, like: Tensor
    ) -> Iterator[Tensor]:
        """Yield the chunks of ``stretch`` that are missing after ``done``."""
        offset, finish = stretch.offset, self.finish
        noise = ChunkNoise(self.seed, offset)
        while done < stretch.stop:
            until = voice.until(done, stretch.stop)
            yield from rollout(
                voice.at(done),
                noise,
                self._schedule(),
                cache,
                chunks=until - offset,
                like=like,
                start=done - offset,
                keep_last=until < stretch.stop,
                finish=None if finish is None else lambda number, clean: finish(offset + number, clean),
            )
            done = until

    def _schedule(self) -> FewStepSchedule:
        """Return the noise levels of one chunk, and that of the past."""
        schedule = self.settings.schedule()
        if self.context_sigma is None:
            return schedule
        return replace(schedule, context_sigma=self.context_sigma)

    def _hold(self, held: dict[int, Tensor], chunk: int, clean: Tensor, stretch: Stretch) -> None:
        """Keep ``chunk`` in ``held``, and let go of what no memory will begin with."""
        held[chunk] = clean
        sink = {stretch.chunk(number) for number in range(self.settings.sink_chunks)}
        oldest = chunk - 2 * self.settings.window_chunks
        for old in [old for old in held if old < oldest and old not in sink]:
            del held[old]


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
