"""The first latent frame of a segment from the middle of a video, made fit for a teacher of whole clips.

A clip's first latent frame holds one frame, every later one four. A segment from further on has four frames
in its first latent frame too, which a teacher of clips has never seen there. Self-Forcing's trainer encodes
the last of the four again, as a picture, and leaves the first chunk out of the loss; Self-Forcing++ does not
say.

Legend: B batch, C channels, T latent frames, H and W latent height and width, F frames.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

from training.segments import Rolled

FirstLatent = Literal["keep", "mask", "reencode"]
"""``keep``: the segment as it is. ``mask``: no loss on its start. ``reencode``: its first latent frame
becomes that of a picture, and there is no loss on its start."""


class Pictures(Protocol):
    """An autoencoder: streams frames out of latents, and encodes clips."""

    def encode(self, frames: Tensor) -> Tensor:
        """Return the latents of frames ``(B, F, 3, 8H, 8W)``; one frame gives one latent frame."""
        ...

    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames of the next latents ``(B, C, T, H, W)``."""
        ...

    def reset(self) -> None:
        """Forget the video decoded so far."""
        ...


def as_clip(
    rolled: Rolled, handling: FirstLatent, autoencoder: Pictures | None, *, masked: int
) -> tuple[Tensor, Tensor | None]:
    """Return a segment as the teacher shall see it, and where the loss counts.

    Args:
        rolled: The segment.
        handling: What becomes of the first latent frame of a segment from the middle of a video.
        autoencoder: Of the latents; only ``reencode`` needs one.
        masked: Latent frames at the start of such a segment on which there is no loss, but for ``keep``.

    Returns:
        The segment, ``(B, C, T, H, W)``, and ``None`` or a mask for ``losses.dmd_loss``, ``(1, 1, T, 1, 1)``.
    """
    clean, covered = rolled.clean, rolled.old
    if rolled.before.shape[2] and handling != "keep":
        covered = max(covered, masked)
        if handling == "reencode":
            assert autoencoder is not None
            first = _picture(rolled, autoencoder).to(clean)
            clean = torch.cat((first, clean[:, :, 1:]), dim=2)
    if not covered:
        return clean, None
    mask = torch.ones(1, 1, clean.shape[2], 1, 1, device=clean.device)
    mask[:, :, :covered] = 0
    return clean, mask


@torch.no_grad()
def _picture(rolled: Rolled, autoencoder: Pictures) -> Tensor:
    """Return the latent frame ``(B, C, 1, H, W)`` of the last frame in the segment's first latent frame.

    A decoder carries memory, so the latent frames right before are decoded for it.
    """
    autoencoder.reset()
    seen = torch.cat((rolled.before, rolled.clean[:, :, :1].detach()), dim=2)
    frames = autoencoder.decode(seen)
    autoencoder.reset()
    # A copy: an encoder may run in inference mode, and its tensors cannot meet a gradient.
    return autoencoder.encode(frames[:, -1:]).clone()
