"""One run: a prompt and a size become the clean chunks of a video of any length.

Legend: B batch, C channels, T latent frames of a chunk, H and W latent height and width.
"""

from collections.abc import Callable, Iterator, Sequence
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
            NumericsError: A chunk holds a number that is not finite. It is not yielded; but on CUDA, where
                waiting for the answer would hold up the GPU, one such chunk at most is, and never the last.
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
        check = _FiniteCheck(self.student.dtype, late=like.is_cuda)
        for chunk, clean in enumerate(made, start=len(past)):
            check.add(chunk, clean)
            if chunk + 1 == self.geometry.chunks:
                check.settle()  # here, not after the loop: a caller who counts never comes back
            yield clean


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
        finite, arrive = _fetch(torch.isfinite(clean).all())
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


def _fetch(flag: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Return ``flag`` where reading it makes no GPU wait, and what waits until it is there."""
    if not flag.is_cuda:
        return flag, lambda: None
    host = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True)
    host.copy_(flag, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(flag.device))
    return host, copied.synchronize
