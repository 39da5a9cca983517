"""One run: a prompt and a size become the clean chunks of a video of any length.

Legend: B batch, C channels, T latent frames of a chunk, H and W latent height and width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache_shape import CacheShape, StorageKind
from .config import RolloutSettings
from .errors import NumericsError, SettingsError
from .geometry import VideoGeometry
from .kv_cache import RollingKVCache
from .noise import ChunkNoise
from .rollout import rollout
from .schedule import FewStepSchedule
from .start import check_start, given_chunks
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

    storage: StorageKind = "plain"
    """How keys and values are kept."""

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
        """Yield the clean chunks of the video after ``past``, oldest first, the given ones among them.

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
        config = self.student.config
        check_start(start, self.geometry, batch=len(embeddings), channels=config.channels)
        given = given_chunks(start, past, self.geometry)
        bound = self.student.bind(embeddings.to(self.device))
        like = torch.empty(len(embeddings), config.channels, *self.geometry.chunk_shape, device=self.device)
        shape = CacheShape.of(config, self.geometry, self.settings)
        cache = RollingKVCache(
            shape, batch=len(embeddings), like=like.to(self.student.dtype), storage=self.storage
        )
        schedule = FewStepSchedule.uniform(self.settings.steps, shift=self.settings.shift)
        noise = ChunkNoise(self.seed)
        chunks, lead = self.geometry.chunks, self.geometry.lead
        made = rollout(bound, noise, schedule, cache, chunks=chunks, like=like, start=-lead, given=given)
        check = _FiniteCheck(self.student.dtype, late=like.is_cuda)
        for chunk, clean in enumerate(made, start=-lead):
            if chunk + lead >= len(given):
                check.add(chunk, clean)
            if chunk + 1 == chunks:
                check.settle()  # here, not after the loop: a caller who counts never comes back
            if chunk >= len(past):
                yield torch.cat((given[0].to(like), clean), dim=2) if lead and chunk == 0 else clean


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
