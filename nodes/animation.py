"""The frames of a chunk as a small picture that moves.

Previews of the host are stills. Its frontends show whatever picture they are sent, so an animation travels as
a still whose ``save`` writes all of its frames; who does not know better sees the first one.

Legend: F frames, H and W pixels.
"""

from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

SIDE = 320
"""Longest side of an animation, in pixels."""

FRAMES = 12
"""Most frames of an animation; of more, one in two, three and so on is shown."""

QUALITY = 75
"""Of WebP, from 0 to 100."""


class Animation(Image.Image):
    """A picture that is saved as an animation, whatever format is asked for."""

    def __init__(self, pictures: list[Image.Image], encoded: bytes) -> None:
        """Take the pictures, of which the first stands for all, and what is written."""
        super().__init__()
        vars(self).update(vars(pictures[0]))
        self._encoded = encoded

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:  # noqa: A002, ARG002 - as in Pillow
        """Write the animation to an open file."""
        fp.write(self._encoded)


def animated(frames: Tensor, fps: float) -> Animation:
    """Return frames ``(F, 3, H, W)``, as ``small`` returns them, as an animation without end.

    Args:
        frames: uint8.
        fps: Frames per second.
    """
    pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    file = BytesIO()
    shown = {"duration": round(1000 / fps), "loop": 0, "quality": QUALITY, "method": 0}
    pictures[0].save(file, "WEBP", save_all=True, append_images=pictures[1:], **shown)
    return Animation(pictures, file.getvalue())


def small(frames: Tensor, fps: float) -> tuple[Tensor, float]:
    """Return some of the frames ``(F, 3, H, W)`` in [0, 1], as uint8 and small, and how many a second has.

    Those of tiny pictures become larger instead, each pixel a square.
    """
    step = -(-len(frames) // FRAMES)
    some, side = frames[::step].float(), max(frames.shape[2:])
    if side > SIDE:
        size = [max(1, round(pixels * SIDE / side)) for pixels in frames.shape[2:]]
        some = interpolate(some, size=size, mode="area")
    else:
        factor = SIDE // side
        some = some.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return (some.clamp(0, 1) * 255).round().to(torch.uint8).cpu(), fps / step
