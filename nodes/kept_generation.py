"""A video being generated whose chunks lie in a run on disk: whatever ends it, it goes on from them."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from ..sfpp_core.config import StudentConfig, to_table
from ..sfpp_core.errors import SettingsError
from ..sfpp_core.run.folder import Run
from ..sfpp_core.run.going_on import go_on
from . import _host
from .generation import Generation, attention
from .lazy_latent import Finished
from .memory import memory_needed
from .model_fingerprint import latents_fingerprint, patches_fingerprint, student_fingerprint
from .progress import replaying
from .run_folder import RunFolder
from .run_settings import EXACT, RunChoice
from .start import Start


class KeptGeneration(Generation):
    """One video, read from its run as far as that goes and made from there on.

    A chunk is on the disk before it is handed on, and not kept in memory. The run, which holds the start as
    well, is locked while it is read; what it holds is asked anew each time, as others may have worked on it
    in between. The model is not let go, as chunks may be gone by then.
    """

    def __init__(
        self, model: Any, *more: Any, run: RunFolder, going_on: RunChoice = EXACT, **options: Any
    ) -> None:
        """Take what ``Generation`` takes, the run, and how it is gone on with.

        Nothing is written before the first chunk is read.
        """
        super().__init__(model, *more, **options)
        self.run = run
        self.going_on = going_on

    @property
    def origin(self) -> str:
        """Where kept chunks come from, for people."""
        return f"run {self.run.name}"

    @property
    def kept(self) -> int:
        """Chunks that are finished, from the first.

        Raises:
            SFPPError: The run cannot be read, or was made otherwise.
        """
        fresh = max(0, self.run.kept() - self._given_chunks)
        return fresh + (0 if self.start is None else self.start.kept)

    def chunks(self, *, beside: Sequence[Any] = ()) -> Generator[Tensor]:
        """Yield every chunk ``(1, C, T, h, w)`` in the host's latents: the start, finished ones, fresh ones.

        Args:
            beside: Other models that are needed between the chunks, for example that of a decoder. Looked at
                before every chunk.

        Raises:
            SFPPError: As ``open_run`` and ``go_on``.
        """
        with self.run.open() as run:
            opening: list[Tensor] = []
            if self.start is not None:
                with closing(self.start.chunks(beside=beside)) as pieces:
                    for piece in pieces:
                        opening.append(piece)
                        yield piece
            for chunk in range(self._given_chunks, min(run.kept, self.geometry.chunks)):
                yield _host.to_host_latent(run.chunk(chunk)[:, :, -self.geometry.chunk :])
            if run.kept < self.geometry.chunks:
                with closing(self._go_on(run, beside, opening)) as fresh:
                    yield from map(_host.to_host_latent, fresh)

    def _go_on(self, run: Run, beside: Sequence[Any], opening: list[Tensor]) -> Generator[Tensor]:
        """Yield the chunks that are missing, normalised, on the CPU; each is on the disk by then."""
        model, config, text = self._recipe_left()
        needed = memory_needed(model, config, self)
        _host.load([model, *beside], needed.activations + needed.remembered)
        start = _host.from_host_latent(torch.cat(opening, dim=2)) if opening else None
        with _host.running(model):
            # The run may be longer than this video, which is its beginning then.
            sampler = replace(self._sampler(model, config), geometry=run.manifest.geometry)
            if run.kept:
                _host.say(f"going on after chunk {run.kept} of {self.geometry.chunks} of {self.origin}")
                sampler = replace(sampler, recalling=replaying(run.kept, self.origin))
            chosen = self.going_on
            more = go_on(run, sampler, text, start=start, replay=chosen.replay, keep_cache=chosen.keep_cache)
            try:
                with closing(more) as made:
                    while run.kept < self.geometry.chunks:
                        # Whoever used the last chunk may have pushed the model out; if not, this is free.
                        _host.load([model, *beside], needed.activations)
                        piece = next(made)
                        piece.keep()
                        if run.kept > self._given_chunks:
                            yield piece.clean[:, :, -self.geometry.chunk :].cpu()
            finally:
                whole = run.kept >= self.geometry.chunks
                run.say(f"{'complete' if whole else 'stopped'}: {run.kept} chunks of {self.geometry.chunks}")


def decisions_of(model: Any, config: StudentConfig, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that decides the chunks of a video but for the text, in a table of JSON.

    Args:
        model: A loaded MODEL.
        config: Its architecture.
        recipe: What else ``Generation`` takes.

    Raises:
        SettingsError: What it starts from cannot be told.
    """
    start, loras = recipe["start"], patches_fingerprint(model)
    return {
        "student": student_fingerprint(model),
        **({"loras": loras} if loras else {}),
        **({} if start is None else {"start": start_fingerprint(start)}),
        "seed": recipe["seed"],
        "settings": to_table(recipe["settings"]),
        **recipe["drift"].table(),
        "cache": recipe["storage"],
        "device": torch.device(model.load_device).type,
        "dtype": str(_host.compute_dtype(model)).removeprefix("torch."),
        "attention": attention(model, config, recipe["geometry"], recipe["settings"]).__name__.strip("_"),
    }


def start_fingerprint(start: Start) -> str:
    """Return a digest of what a video starts from.

    Raises:
        SettingsError: It is made by a Long Sampler that would have to make it again to tell.
    """
    if isinstance(start.source, KeptGeneration):
        return blake2b(start.source.run.key.encode(), digest_size=6).hexdigest()
    if isinstance(start.source, Finished):
        return latents_fingerprint(start.source.samples()[:, :, : start.latent_frames])
    raise SettingsError(
        "start comes from a Long Sampler without a run, so that it would be lost; name a run there too, "
        "another one than here."
    )
