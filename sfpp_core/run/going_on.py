"""A run is gone on with: the past is recalled, further chunks are made and kept, one by one.

Legend: C channels, T latent frames of a chunk, h and w latent cells.
"""

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor

from ..cues import Cue, as_cues
from ..errors import CheckpointError, OutputError
from ..sampler import LongSampler
from ..start import check_start
from ..stretches import Stretch
from ..student import CausalStudent
from ..transfers import fetch
from .folder import CACHE, Run
from .kept_cache import KeptCache, find_cache, save_cache
from .recall import RecallingStudent

Replay = Literal["auto", "all", "window"]
"""How the past is recalled where no keys were kept: all of it, which is exact and takes a fifth of the time
it took to make; or of the last chunks alone, which is quick. ``auto`` recalls all of a short past."""

AUTO_WINDOWS = 8
"""Windows up to which ``auto`` recalls all."""

REPLAYED_WINDOWS = 2
"""Windows that are remembered again of a longer past: the first of them only so that the second, which the
next chunk sees, has seen what it should."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """How a past is recalled."""

    how: Literal["cache", "all", "window"]

    first: int = 0
    """First chunk that is remembered again, the sink apart."""

    kept: KeptCache | None = None
    """Keys and values to go on from."""

    def remembered(self, stretch: Stretch, chunks: int) -> int:
        """Return how many of the chunks that are there are remembered again, the sink apart."""
        if self.kept is not None:
            return chunks - self.kept.chunk - 1
        return chunks - max(self.first, stretch.offset)

    @property
    def exact(self) -> bool:
        """Whether what follows is, bit for bit, what an undisturbed run makes."""
        return self.how != "window"

    @property
    def in_words(self) -> str:
        """The same for people."""
        return {
            "cache": "exactly, from its kept keys and values",
            "all": "exactly: its whole past is remembered again",
            "window": "closely, not bit for bit, from its last chunks (--replay all is exact)",
        }[self.how]


class Made:
    """A chunk that was just made, on its way to the disk."""

    def __init__(self, clean: Tensor, save: Callable[[Tensor], None]) -> None:
        """Take the chunk and what saves it, and start to fetch it from its device."""
        self.clean = clean
        self._host, self._arrive = fetch(clean)
        self._save: Callable[[Tensor], None] | None = save

    def keep(self) -> None:
        """Wait until it is here and save it; harmless if that is done.

        Raises:
            NumericsError: It holds numbers that are not finite; it is not kept.
            OutputError: The disk is full, or the folder cannot be written to.
        """
        save, self._save = self._save, None
        if save is not None:
            self._arrive()
            save(self._host)


def go_on(
    run: Run,
    sampler: LongSampler,
    text: Tensor | Sequence[Cue],
    *,
    start: Tensor | None = None,
    replay: Replay = "auto",
    keep_cache: int = 0,
) -> Generator[Made]:
    """Yield the clean chunks ``(1, C, T, h, w)`` that a run lacks, normalised, on the device of the sampler.

    Each is kept when the next is asked for, and when the iterator is closed; the caller may do so earlier.

    Args:
        run: What is gone on with.
        sampler: Of the same size and length; see ``LongSampler``.
        text: Text embeddings, ``(1, tokens, text_dim)``, or cues; see ``LongSampler.chunks``.
        start: As for ``LongSampler.chunks``.
        replay: How the past is recalled where no keys were kept.
        keep_cache: Keep the keys and values after every so many chunks, and when the iterator is closed; 0
            never does.

    Raises:
        CheckpointError: A chunk was damaged since the run was opened.
        GeometryError: ``start`` does not fit; see ``check_start``.
        NumericsError: A chunk came out as numbers that are not finite; it is not kept.
        OutputError: The disk is full, or the folder cannot be written to.
    """
    if run.complete:
        return
    found = list(sampler.stretches(as_cues(text)))
    check_start(start, sampler.geometry, batch=1, channels=sampler.student.config.channels)
    given = 0 if start is None else start.shape[2] // sampler.geometry.chunk
    stretch = _at(found, max(run.kept, given))
    recall = recall_of(run, sampler, stretch, replay=replay)
    if run.kept:
        replayed = recall.remembered(stretch, run.kept)
        run.note_resume(how=recall.how, exact=recall.exact, replayed=replayed)
        said = f"went on at chunk {run.kept} of {run.chunks}, {recall.in_words}"
        run.say(said)
        logger.log(logging.INFO if recall.exact else logging.WARNING, "%s %s.", run.folder, said)
    student = RecallingStudent(
        sampler.student, made=lambda: run.kept, offset=stretch.offset, first=recall.first, kept=recall.kept
    )
    sampler = replace(sampler, student=cast(CausalStudent, student))
    if keep_cache and sampler.settings.overlap:
        logger.warning("Keys and values are not kept: with an overlap a window starts anew all the same.")
        keep_cache = 0
    cached = -1 if recall.kept is None else recall.kept.chunk
    past = _past(run, sampler, stretch, recall)
    try:
        for chunk, clean in enumerate(sampler.chunks(text, start=start, past=past), start=run.kept):
            made = Made(clean, partial(run.add, chunk))
            try:
                yield made
            finally:
                made.keep()
            if keep_cache and (chunk + 1) % keep_cache == 0:
                cached = _keep_cache(run, student, found, cached)
    finally:
        if keep_cache:
            _keep_cache(run, student, found, cached)


def recall_of(run: Run, sampler: LongSampler, stretch: Stretch, *, replay: Replay = "auto") -> Recall:
    """Return how the past of a run will be recalled, as far as the stretch of its next chunk knows it."""
    settings = sampler.settings
    if settings.overlap:  # a window that starts anew knows nothing of what came before it
        return Recall(how="all")
    kept = _kept_cache(run, stretch)
    if kept is not None:
        return Recall(how="cache", kept=kept)
    short = run.kept - stretch.offset <= AUTO_WINDOWS * settings.window_chunks
    first = run.kept + 1 - REPLAYED_WINDOWS * (settings.window_chunks - settings.sink_chunks)
    if first - stretch.offset <= settings.sink_chunks or replay == "all" or (replay == "auto" and short):
        return Recall(how="all")
    return Recall(how="window", first=first)


def _at(found: Sequence[Stretch], chunk: int) -> Stretch:
    """Return the stretch that a chunk belongs to."""
    return next(stretch for stretch in found if stretch.stop > chunk)


def _kept_cache(run: Run, stretch: Stretch) -> KeptCache | None:
    """Return the keys and values that a run can go on from: they must be of the same memory."""
    try:
        kept = find_cache(run.folder / CACHE)
    except CheckpointError as error:
        logger.warning("%s The past is remembered again instead.", error)
        return None
    first = max(run.section.chunk, stretch.begin)
    if kept is None or not first <= kept.chunk < run.kept or kept.key != run.key(kept.chunk):
        return None
    return kept


def _past(run: Run, sampler: LongSampler, stretch: Stretch, recall: Recall) -> list[Tensor]:
    """Return the chunks of the past; of those that are not looked at, nothing but their place."""
    settings, nothing = sampler.settings, torch.empty(0)
    windows = settings.window_chunks * (2 if settings.overlap else 1)
    if sampler.finish is not None:
        first = 0  # what maps the chunks is shown all of them
    elif settings.overlap:
        first = run.kept - windows
    elif recall.kept is not None:
        first = recall.kept.chunk - windows
    else:
        first = (recall.first or stretch.begin) - windows
    sinks = {stretch.chunk(number) for number in range(settings.sink_chunks)}
    needed = {0, *sinks, *stretch.kept, *range(max(first, 0), run.kept)}  # chunk 0 is cut into lead and rest
    return [run.chunk(chunk) if chunk in needed else nothing for chunk in range(run.kept)]


def _keep_cache(run: Run, student: RecallingStudent, found: Sequence[Stretch], cached: int) -> int:
    """Save the keys and values, if they have changed; return the last chunk they remember."""
    if student.latest is None:
        return cached
    cache, chunk = student.latest
    # At the first chunk of a stretch the memory is one that the chunk before never had.
    if chunk <= cached or chunk >= run.kept or chunk < _at(found, chunk + 1).begin:
        return cached
    try:
        save_cache(run.folder / CACHE, cache, chunk=chunk, key=run.key(chunk))
    except OutputError as error:
        logger.warning("%s The run goes on without.", error)
        return cached
    return chunk
