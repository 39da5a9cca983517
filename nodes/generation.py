"""A video being generated on a model the host has loaded: what a lazy latent draws from."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..sfpp_core.anchor import anchoring
from ..sfpp_core.attention import Attend, choose
from ..sfpp_core.cache_shape import StorageKind
from ..sfpp_core.config import RolloutSettings, StudentConfig
from ..sfpp_core.cues import Cue
from ..sfpp_core.errors import CheckpointError, NumericsError
from ..sfpp_core.geometry import TEMPORAL_STRIDE, VideoGeometry
from ..sfpp_core.latent_space import LatentSpace
from ..sfpp_core.preview_decoder import rough
from ..sfpp_core.prompts import is_of_the_demo
from ..sfpp_core.sampler import LongSampler
from ..sfpp_core.student import CausalStudent
from . import _host
from .drift_controls import OFF, DriftChoice
from .lazy_latent import SPACES
from .memory import memory_needed
from .pace import Pace
from .plain_errors import plain_errors
from .progress import Progress, replaying
from .start import Start
from .turns import Turns

TEXT_TO_VIDEO = {"WAN21": 16, "WAN21_CausalAR": 16, "WAN22": 48}
"""Core's names for the models a student can be, and their latent channels: plain Wan 2.1, to which Wan 2.2 of
14B belongs; Wan 2.1 marked as causal in its file; and Wan 2.2 of 5B."""


def architecture(model: Any, *, text_length: int) -> StudentConfig:
    """Return the architecture of a loaded MODEL.

    Raises:
        CheckpointError: It is no text-to-video model of Wan.
    """
    kind = type(model.model).__name__
    if kind not in TEXT_TO_VIDEO:
        raise CheckpointError(
            f"this MODEL is of the kind {kind}; the Long Sampler needs a text-to-video model of "
            "Wan distilled with Self-Forcing. Load one with Load Student or Load Diffusion Model."
        )
    network = model.model.diffusion_model
    channels = (network.in_dim, network.out_dim)
    if network.model_type != "t2v" or network.img_emb is not None or network.ref_conv is not None:
        raise CheckpointError(
            f"this Wan model is of the type {network.model_type} and expects pictures; "
            "the Long Sampler needs a text-to-video one."
        )
    wanted = TEXT_TO_VIDEO[kind]
    if channels != (wanted, wanted):
        raise CheckpointError(
            f"this Wan model has {channels} latent channels; the Long Sampler needs ({wanted}, {wanted})."
        )
    return StudentConfig(
        dim=network.dim,
        ffn_dim=network.ffn_dim,
        heads=network.num_heads,
        layers=len(network.blocks),
        channels=wanted,
        text_dim=network.text_dim,
        text_length=text_length,
        freq_dim=network.freq_dim,
        eps=network.eps,
    )


def cancellable(attend: Attend) -> Attend:
    """Return ``attend``, which raises the host's interrupt first if the user pressed Cancel.

    Every pass of a student attends in every layer, so a run ends in the middle of a denoising step, of a
    clean pass, or of the passes over the chunks of an earlier run.
    """

    def checked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _host.stop_if_cancelled()
        return attend(q, k, v)

    return checked


class Generation:
    """One video: the chunks that are finished, and all it takes to make the rest.

    Chunks are kept on the CPU as they are finished. A reader that is cancelled leaves them here, and the
    next one goes on after the last. Once the video is complete the model is let go.
    """

    def __init__(
        self,
        model: Any,
        config: StudentConfig,
        *,
        text: Tensor | Sequence[Cue],
        geometry: VideoGeometry,
        settings: RolloutSettings,
        seed: int,
        start: Start | None = None,
        storage: StorageKind = "plain",
        drift: DriftChoice = OFF,
        maker: str | None = None,
    ) -> None:
        """Keep everything; nothing is loaded or computed before the first chunk is asked for."""
        self.maker = maker
        self.geometry = geometry
        self.settings = settings
        self.seed = seed
        self.start = start
        self.space: LatentSpace = SPACES[config.channels]
        self.storage: StorageKind = storage
        self.drift = drift
        self._has_colours = not is_of_the_demo(config)
        self._finished: list[Tensor] = []
        self._recipe: tuple[Any, StudentConfig, Tensor | Sequence[Cue]] | None = (model, config, text)

    @property
    def frames(self) -> int:
        """Frames the video has once decoded, those of the start included."""
        return self.geometry.frames

    @property
    def latent_frames(self) -> int:
        """Latent frames of all chunks together, those of the start included."""
        return self.geometry.latent_frames

    @property
    def total_chunks(self) -> int:
        """Chunks of the whole video, and pieces of the start."""
        return self._fresh + (0 if self.start is None else self.start.pieces)

    @property
    def kept(self) -> int:
        """Chunks that are finished, from the first."""
        return len(self._finished) + (0 if self.start is None else self.start.kept)

    @property
    def origin(self) -> str:
        """Where kept chunks come from, for people; empty where they are in memory."""
        return ""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.geometry.width, self.geometry.height

    @property
    def _fresh(self) -> int:
        """Chunks to generate."""
        return self.geometry.chunks - self._given_chunks

    @property
    def _given_chunks(self) -> int:
        """Whole chunks of the start."""
        return 0 if self.start is None else self.start.latent_frames // self.geometry.chunk

    def __str__(self) -> str:
        done = f"{self.kept} of {self.total_chunks} chunks"
        return f"{self.geometry.width}x{self.geometry.height}, {self.frames} frames, {done}"

    def chunks(self, *, beside: Sequence[Any] = ()) -> Generator[Tensor]:
        """Yield every chunk ``(1, C, T, h, w)`` in the host's latents: the start, finished ones, fresh ones.

        Args:
            beside: Other models that are needed between the chunks, for example that of a decoder. Looked at
                before every chunk.
        """
        opening = []
        if self.start is not None:
            with closing(self.start.chunks(beside=beside)) as pieces:
                for piece in pieces:
                    opening.append(piece)
                    yield piece
        kept = len(self._finished)
        yield from map(_host.to_host_latent, self._finished[:kept])
        if self._recipe is None:
            return
        with closing(self._make(beside, opening)) as fresh:
            try:
                for clean in fresh:
                    self._finished.append(clean)
                    if len(self._finished) == self._fresh:
                        self._recipe = None
                    yield _host.to_host_latent(clean)
            except NumericsError:
                # The answer may come one chunk late, so the latest one kept may be the one refused.
                del self._finished[-1:]
                raise

    @plain_errors
    def samples(self) -> Tensor:
        """Return the whole latent ``(1, C, T, h, w)``, generating what is missing with a progress bar."""
        parts, pace = [], Pace(self.total_chunks, kept=self.kept, origin=self.origin)
        latent_frames = frames = 0
        reading = Turns(self).chunks()
        with Progress(self.total_chunks, self.maker) as progress, closing(reading) as chunks:
            for number, chunk in enumerate(chunks, start=1):
                parts.append(chunk)
                latent_frames += chunk.shape[2]
                before, frames = frames, min(self.frames, VideoGeometry.frames_of(latent_frames))
                progress.show(number, pace.tick(frames - before), partial(self._seen, chunk))
        needed = 1 + -(-(self.frames - 1) // TEMPORAL_STRIDE)
        return torch.cat(parts, dim=2)[:, :, :needed]

    def _seen(self, chunk: Tensor) -> tuple[Tensor, float] | None:
        """Return rough pictures of a chunk in the host's latents, and how many a second has, if there are."""
        if not self._has_colours:
            return None
        return rough(_host.from_host_latent(chunk), self.space)[0], self.space.fps / TEMPORAL_STRIDE

    def _make(self, beside: Sequence[Any], opening: list[Tensor]) -> Generator[Tensor]:
        """Yield the chunks that are missing, normalised, on the CPU, after a start in the host's latents."""
        model, config, text = self._recipe_left()
        needed = memory_needed(model, config, self)
        _host.load([model, *beside], needed.activations + needed.remembered)
        with _host.running(model):
            sampler = self._sampler(model, config)
            if self._finished:
                _host.say(f"going on after chunk {self.kept} of {self.total_chunks}")
                sampler = replace(sampler, recalling=replaying(self._given_chunks + len(self._finished), ""))
            start, past = self._given(opening)
            made = sampler.chunks(text, start=start, past=past)
            for _ in range(len(self._finished), self._fresh):
                # Whoever used the last chunk may have pushed the model out; if not, this costs nothing.
                _host.load([model, *beside], needed.activations)
                yield next(made)[:, :, -self.geometry.chunk :].cpu()

    def _recipe_left(self) -> tuple[Any, StudentConfig, Tensor | Sequence[Cue]]:
        """Return what it takes to make chunks: the model, its architecture and the text."""
        assert self._recipe is not None
        return self._recipe

    def _sampler(self, model: Any, config: StudentConfig) -> LongSampler:
        """Return the sampler over the layers of ``model``."""
        return LongSampler(
            student=self._student(model, config),
            geometry=self.geometry,
            settings=self.settings,
            seed=self.seed,
            device=model.load_device,
            storage=self.storage,
            context_sigma=self.drift.context_sigma or None,
            finish=anchoring(self.drift.anchor),
        )

    def _given(self, opening: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """Return the start and the past as the sampler wants them: an image belongs to the first chunk."""
        if not opening:
            return None, list(self._finished)
        start, lead = _host.from_host_latent(torch.cat(opening, dim=2)), self.geometry.lead
        chunks = [*start[:, :, lead:].split(self.geometry.chunk, dim=2), *self._finished]
        if not chunks[0].shape[2]:  # an image alone
            chunks = chunks[1:]
        if not chunks:
            return start, []
        return None, [torch.cat((start[:, :, :lead], chunks[0]), dim=2), *chunks[1:]]

    def _student(self, model: Any, config: StudentConfig) -> CausalStudent:
        """Return the student over the layers of ``model``."""
        return CausalStudent(
            model.model.diffusion_model,
            config,
            attend=cancellable(attention(model, config, self.geometry, self.settings)),
            dtype=_host.compute_dtype(model),
            patch_dtype=torch.float32,  # the host keeps this layer, a Conv3d, in float32
            read=_host.parameter_reader(model),
        )


def attention(
    model: Any, config: StudentConfig, geometry: VideoGeometry, settings: RolloutSettings
) -> Attend:
    """Return the host's attention, or where it has none to offer the back end this package would choose."""
    if (attend := _host.attention_of(model, config.heads)) is not None:
        return attend
    tokens = geometry.tokens_per_chunk
    shape = (1, config.heads, tokens, config.head_dim)
    like = torch.empty((), device=model.load_device, dtype=_host.compute_dtype(model))
    return choose("auto", shape=shape, visible=settings.window_chunks * tokens, like=like)
