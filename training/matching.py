"""Student, teacher and critic of distribution matching, and the two losses between them.

Weights that are trained are float32, what is computed with them bfloat16 (see ``precision``): a learning rate
of 2e-6 is below the resolution of a bfloat16 weight. The teacher is bfloat16 throughout.

Legend: B clips, C channels, T latent frames, H and W latent height and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfpp_core.kv_cache import CacheShape
from sfpp_core.noise import ChunkNoise
from sfpp_core.schedule import FewStepSchedule
from sfpp_core.student import BoundStudent, CausalStudent
from training.first_latent import FirstLatent, Pictures, as_clips
from training.losses import dmd_loss, overall_loss, velocity_loss
from training.models import Model, attention_of
from training.precision import narrow_on, region
from training.scores import Role, Scores, estimate
from training.segments import BackwardNoise, Rolled, Segment, roll_segment
from training.streaming import Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class RollOptions:
    """How a segment is made and shown to the teacher."""

    backward_noise: BackwardNoise
    first_latent: FirstLatent
    masked: int
    """Latent frames at the start of a segment from the middle of a video on which there is no loss."""

    checkpointing: bool
    """Recompute each layer in backward instead of keeping its activations."""

    overall: float = 0.0
    """See ``DmdSettings``."""

    critic_overall: float = 0.0
    """See ``DmdSettings``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A segment as teacher and critic see it."""

    clean: Tensor
    """``(B, C, T, H, W)``, with a gradient if gradients are on."""

    mask: Tensor | None
    """Where the student's loss counts, see ``losses.dmd_loss``."""

    captions: Sequence[str]

    def detached(self) -> "Shown":
        """Return the same without a gradient, so that nothing holds on to how it was made."""
        return replace(self, clean=self.clean.detach())


class Matching:
    """The student's segments, and what teacher and critic make of them."""

    def __init__(
        self,
        student: Model,
        teacher: Role,
        critic: Role,
        *,
        scores: Scores,
        schedule: FewStepSchedule,
        shape: CacheShape,
        options: RollOptions,
        autoencoder: Pictures | None,
        guidance: float,
    ) -> None:
        """Take the three roles.

        Args:
            student: What is rolled out.
            teacher: Frozen; computes in the dtype of its weights.
            critic: Learns the student's distribution.
            scores: How teacher and critic are asked.
            schedule: The student's noise levels.
            shape: Size of its cache.
            options: How a segment is made and shown.
            autoencoder: Of the latents; ``None`` where no first latent frame is encoded again.
            guidance: Of the teacher, conventional scale.
        """
        self.student, self.teacher, self.critic = student, teacher, critic
        self.scores, self.schedule, self.shape, self.options = scores, schedule, shape, options
        self.autoencoder, self.guidance = autoencoder, guidance
        self.device = next(student.parameters()).device
        self.dtype = narrow_on(self.device)

    def roll(
        self,
        captions: Sequence[str],
        noise: ChunkNoise,
        segment: Segment,
        chunk: tuple[int, int, int],
        clip: int,
        *,
        past: Tensor | None = None,
    ) -> Shown:
        """Return one segment of a new rollout, cut into clips.

        Args:
            captions: One per video.
            noise: Of the rollout.
            segment: What to make.
            chunk: ``(T, H, W)`` of one chunk.
            clip: Latent frames of each clip the roles judge.
            past: See ``segments.roll_segment``.
        """
        with region(self.device, self.dtype):
            rolled = roll_segment(
                self.bound(captions),
                noise,
                self.schedule,
                self.shape,
                segment,
                like=self._like(captions, chunk),
                dtype=self.dtype,
                backward_noise=self.options.backward_noise,
                past=None if past is None else past.to(self.device),
            )
        return self._shown(rolled, captions, clip)

    def stream(self, stream: Stream, exit_step: int, chunk: tuple[int, int, int], clip: int) -> Shown:
        """Return the next segment of ``stream``, cut into clips; see ``roll``."""
        captions = stream.captions
        with region(self.device, self.dtype):
            rolled = stream.roll(
                self.bound(captions),
                self.schedule,
                exit_step=exit_step,
                like=self._like(captions, chunk),
                backward_noise=self.options.backward_noise,
            )
        return self._shown(rolled, captions, clip)

    def critic_loss(self, shown: Shown, generator: torch.Generator) -> Tensor:
        """Return the flow-matching error of the critic on the student's segment."""
        at = self.scores.noised(shown.clean, generator)
        with region(self.device, self.dtype):
            velocity = self.scores.velocity(self.critic, at, shown.captions)
        loss = velocity_loss(velocity, at.clean, at.noise, self.scores.weights(at.clean))
        if self.options.critic_overall:
            pieces = self.scores.pieces
            clips = overall_loss(pieces(velocity), pieces(at.clean), pieces(at.noise))
            loss = loss + self.options.critic_overall * clips
        return loss

    def student_loss(self, shown: Shown, generator: torch.Generator) -> Tensor:
        """Return the distribution-matching loss of the student's segment."""
        at = self.scores.noised(shown.clean, generator)
        with torch.no_grad():
            real = estimate(self.scores, self.teacher, at, shown.captions, self.guidance)
            with region(self.device, self.dtype):
                fake = estimate(self.scores, self.critic, at, shown.captions, 1.0)
        pieces, mask, weights = self.scores.pieces, shown.mask, self.scores.weights(shown.clean)
        if weights is not None:
            mask = weights if mask is None else weights * mask
        if mask is not None:
            mask = pieces(mask.expand(len(shown.clean), -1, -1, -1, -1))
        overall = self.options.overall
        return dmd_loss(pieces(shown.clean), pieces(real), pieces(fake), mask, overall=overall)

    def bound(self, captions: Sequence[str]) -> BoundStudent:
        """Return the student, bound to ``captions``."""
        model = self.student
        student = CausalStudent(
            model.network,
            model.config,
            attend=attention_of(model),
            dtype=self.dtype,
            checkpointing=self.options.checkpointing,
        )
        return student.bind(model.words(captions))

    def _like(self, captions: Sequence[str], chunk: tuple[int, int, int]) -> Tensor:
        """Return a tensor like one chunk of latents."""
        return torch.empty(len(captions), self.student.config.channels, *chunk, device=self.device)

    def _shown(self, rolled: Rolled, captions: Sequence[str], clip: int) -> Shown:
        """Return ``rolled`` as teacher and critic shall see it, clip by clip."""
        options = self.options
        clean, mask = as_clips(
            rolled, options.first_latent, self.autoencoder, masked=options.masked, length=clip
        )
        each = len(clean) // len(captions)
        return Shown(clean=clean, mask=mask, captions=[text for text in captions for _ in range(each)])
