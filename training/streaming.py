"""One long rollout that goes on from update to update, the cheaper way to train over a long horizon.

Every update takes the next stretch of the same video: its memory stays, so nothing before the stretch is made
again. What earlier updates remembered was made by slightly older weights. A stretch overlaps the one before,
so that the teacher sees a whole segment; the overlap carries no gradient and no loss.

Source: LongLive, arXiv:2509.22622 (streaming long tuning).

Legend: B batch, C channels, T latent frames, H and W latent height and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfpp_core.kv_cache import CacheShape, GradientKVCache
from sfpp_core.noise import ChunkNoise
from sfpp_core.schedule import FewStepSchedule
from sfpp_core.student import BoundStudent
from training.segments import BEFORE, BackwardNoise, Rolled, Segment, differentiable_chunks


class StreamMemory(GradientKVCache):
    """A memory that outlives the process."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that it remembers."""
        return {"next": self.next, "kept": {str(chunk): list(pair) for chunk, pair in self._kept.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what ``state_dict`` returned."""
        self.next = state["next"]
        self._kept = {int(chunk): (k, v) for chunk, (k, v) in state["kept"].items()}

    def to(self, device: torch.device) -> None:
        """Keep everything on ``device``."""
        self._kept = {chunk: (k.to(device), v.to(device)) for chunk, (k, v) in self._kept.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLaw:
    """Sizes of a stream, in chunks."""

    horizon: int
    """Longest video; a stretch that would pass it starts the next video instead."""

    chunks: int
    """Length of a segment."""

    overlap: int
    """Chunks a segment shares with the one before."""

    @property
    def fresh(self) -> int:
        """Chunks that every update but a video's first makes."""
        return self.chunks - self.overlap


class Stream:
    """The video being made, between updates.

    Use::

        stream.turn(captions, seed)                            # a video of these begins, or one goes on
        rolled = stream.roll(bound, schedule, like=like, ...)  # its next stretch, given stream.captions
    """

    def __init__(self, law: StreamLaw, shape: CacheShape) -> None:
        """Start before the first video."""
        self.law, self.shape = law, shape
        self.captions: list[str] = []
        """What the video shows, one caption per clip."""
        self._seed = 0
        self._memory = StreamMemory(shape)
        self._made: Tensor | None = None

    def turn(self, captions: Sequence[str], seed: int) -> None:
        """Begin a video, unless one is being made and a stretch more stays within the horizon.

        Args:
            captions: What it would show, one per clip.
            seed: Of its noise.
        """
        if self._made is None or self._memory.next + self.law.fresh > self.law.horizon:
            self.captions, self._seed = list(captions), seed
            self._memory, self._made = StreamMemory(self.shape), None

    def roll(
        self,
        student: BoundStudent,
        schedule: FewStepSchedule,
        *,
        exit_step: int,
        like: Tensor,
        backward_noise: BackwardNoise = "rollout",
    ) -> Rolled:
        """Return the next segment; only its new chunks have a gradient.

        Args:
            student: The student, bound to the captions.
            schedule: The student's noise levels.
            exit_step: Denoising step that keeps the gradient.
            like: Tensor with the shape, device and dtype of one chunk.
            backward_noise: What the differentiated forward starts from.
        """
        self._memory.to(like.device)
        past = like[:, :, :0] if self._made is None else self._made.to(like)
        fresh = self.law.chunks if self._made is None else self.law.fresh
        segment = Segment(start=self._memory.next, chunks=fresh, exit_step=exit_step)
        chunks = differentiable_chunks(
            student,
            ChunkNoise(self._seed),
            schedule,
            self._memory,
            segment,
            like=like,
            backward_noise=backward_noise,
            keep_last=True,
        )
        new = torch.cat(list(chunks), dim=2)
        size = self.shape.latent_frames_per_chunk
        old = past.shape[2] and self.law.overlap * size
        cut = past.shape[2] - old
        seen = torch.cat((past, new.detach()), dim=2)
        self._made = seen[:, :, -(self.law.overlap + BEFORE) * size :]
        return Rolled(clean=torch.cat((past[:, :, cut:], new), dim=2), before=past[:, :, :cut], old=old)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on."""
        return {
            "captions": list(self.captions),
            "seed": self._seed,
            "memory": self._memory.state_dict(),
            "made": self._made,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.captions, self._seed = state["captions"], state["seed"]
        self._memory = StreamMemory(self.shape)
        self._memory.load_state_dict(state["memory"])
        self._made = state["made"]
