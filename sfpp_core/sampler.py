"""One run: a prompt and a size become the clean chunks of a video of any length.

Legend: B batch, C channels, T latent frames of a chunk, H and W latent height and width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import RolloutSettings
from .errors import NumericsError, SettingsError
from .geometry import VideoGeometry
from .kv_cache import CacheShape, RollingKVCache
from .noise import ChunkNoise
from .rollout import rollout
from .schedule import FewStepSchedule
from .student import CausalStudent


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

    def __post_init__(self) -> None:
        if self.geometry.chunk != self.settings.chunk:
            raise SettingsError(
                f"geometry has chunks of {self.geometry.chunk} latent frames and the settings of "
                f"{self.settings.chunk}; build both with the same chunk."
            )

    @torch.inference_mode()
    def chunks(self, embeddings: Tensor, *, past: Sequence[Tensor] = ()) -> Iterator[Tensor]:
        """Yield the clean chunks after ``past``, oldest first.

        Args:
            embeddings: Text embeddings, ``(B, tokens, text_dim)``.
            past: Every chunk of this run already made. Their clean passes are run again, which costs a fifth
                of making them and gives exactly the memory they left.

        Yields:
            ``(B, C, T, H, W)``, normalised latents, float32, on ``device``.

        Raises:
            NumericsError: A chunk holds a number that is not finite; it is not yielded.
        """
        config = self.student.config
        bound = self.student.bind(embeddings.to(self.device))
        like = torch.empty(len(embeddings), config.channels, *self.geometry.chunk_shape, device=self.device)
        shape = CacheShape.of(config, self.geometry, self.settings)
        cache = RollingKVCache(shape, batch=len(embeddings), like=like.to(self.student.dtype))
        for chunk, clean in enumerate(past):
            cache.open(chunk)
            bound.remember(clean.to(like), cache)
            cache.close()
        schedule = FewStepSchedule.uniform(self.settings.steps, shift=self.settings.shift)
        noise = ChunkNoise(self.seed)
        made = rollout(bound, noise, schedule, cache, chunks=self.geometry.chunks, like=like, start=len(past))
        for chunk, clean in enumerate(made, start=len(past)):
            # The one wait for the device per chunk, where the caller would wait for the chunk anyway.
            if not torch.isfinite(clean).all():
                raise NumericsError(
                    f"chunk {chunk} came out as numbers that are not finite; the weights are damaged or the "
                    f"compute dtype {self.student.dtype} is too narrow: check the file, or use float32."
                )
            yield clean
