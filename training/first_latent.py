"""The first latent frame of a segment from the middle of a video, made fit for a teacher of whole clips.

A clip's first latent frame holds one frame, every later one four. A segment from further on has four frames
in its first latent frame too, which a teacher of clips has never seen there. Self-Forcing's trainer encodes
the last of the four again, as a picture, and leaves the first chunk out of the loss; Self-Forcing++ does not
say.

Legend: B batch, C channels, T latent frames, H and W latent height and width, F frames.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from sfpp_core.geometry import TEMPORAL_STRIDE
from training.segments import Rolled, cut

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


def as_clips(
    rolled: Rolled, handling: FirstLatent, autoencoder: Pictures | None, *, masked: int, length: int
) -> tuple[Tensor, Tensor | None]:
    """Return a segment as the clips the teacher shall see, and where the loss counts.

    Args:
        rolled: The segment.
        handling: What becomes of the first latent frame of a clip from the middle of a video.
        autoencoder: Of the latents; only ``reencode`` needs one.
        masked: Latent frames at the start of such a clip on which there is no loss, but for ``keep``.
        length: Latent frames of a clip; the segment holds a whole number of clips, P.

    Returns:
        The clips, ``(B * P, C, length, H, W)``, and ``None`` or a mask for ``losses.dmd_loss``,
        ``(B * P, 1, length, 1, 1)``.
    """
    clean, mask = rolled.clean, torch.ones_like(rolled.clean[:, :1, :, :1, :1])
    mask[:, :, : rolled.old] = 0
    begins = range(0 if rolled.before.shape[2] else length, clean.shape[2], length)
    handled = bool(begins) and handling != "keep"
    if handled:
        for begin in begins:
            mask[:, :, begin : begin + masked] = 0
        if handling == "reencode":
            assert autoencoder is not None
            places = torch.tensor(begins, device=clean.device)
            clean = clean.index_copy(2, places, _pictures(rolled, begins, autoencoder).to(clean))
    # Told from the numbers at hand: to ask the mask would make the host wait for a GPU.
    return cut(clean, length), cut(mask, length) if rolled.old or (handled and masked) else None


@torch.no_grad()
def _pictures(rolled: Rolled, begins: Sequence[int], autoencoder: Pictures) -> Tensor:
    """Return ``(B, C, len(begins), H, W)``: the last frame of each of these latent frames, as a picture's.

    A decoder carries memory, so the latent frames right before are decoded for it.
    """
    autoencoder.reset()
    seen = torch.cat((rolled.before, rolled.clean[:, :, : begins[-1] + 1].detach()), dim=2)
    frames = autoencoder.decode(seen)
    pictures = []
    for begin in begins:
        autoencoder.reset()
        last = TEMPORAL_STRIDE * (rolled.before.shape[2] + begin)
        # A copy: an encoder may run in inference mode, and its tensors cannot meet a gradient.
        pictures.append(autoencoder.encode(frames[:, last : last + 1]).clone())
    autoencoder.reset()
    return torch.cat(pictures, dim=2)
