"""Classifier-free guidance in one forward: a batch of clips with their captions, and once more without.

Legend: B clips.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from training.losses import guide


@dataclass(frozen=True, slots=True)
class Guidance:
    """How a model is asked under guidance.

    Use::

        guidance = Guidance(4.0)
        bound = model.bind(guidance.captions(captions))
        velocity = guidance.of(bound.whole(guidance.batch(noisy), guidance.batch(sigma)))
    """

    scale: float
    """Conventional scale, see ``losses.guide``: 1 is none, and costs half."""

    @property
    def copies(self) -> int:
        """How often each clip is in the batch."""
        return 1 if self.scale == 1 else 2

    def captions(self, captions: Sequence[str]) -> list[str]:
        """Return the captions of the batch: ``captions``, then as many empty ones if there is guidance."""
        return [*captions, *[""] * ((self.copies - 1) * len(captions))]

    def batch(self, x: Tensor) -> Tensor:
        """Return ``x`` ``(B, ...)`` for the whole batch, ``(copies * B, ...)``."""
        return x.repeat(self.copies, *[1] * (x.ndim - 1))

    def of(self, velocity: Tensor) -> Tensor:
        """Return the guided velocity ``(B, ...)`` of a batch's, ``(copies * B, ...)``."""
        if self.copies == 1:
            return velocity
        conditional, unconditional = velocity.chunk(2)
        return guide(conditional, unconditional, self.scale)
