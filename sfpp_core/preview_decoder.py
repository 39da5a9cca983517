"""A decoder without weights: the rough colours of each latent cell, for a look at what is being made.

Legend: B batch, C channels, T latent frames, F frames, H and W pixels, h and w latent cells.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .geometry import TEMPORAL_STRIDE
from .latent_space import InSpace, LatentSpace, constant


def rough(latents: Tensor, space: LatentSpace) -> Tensor:
    """Return latents ``(B, C, T, h, w)`` as pictures ``(B, T, 3, h, w)`` in [0, 1], one pixel per cell.

    Args:
        latents: Normalised.
        space: Theirs; its colours are known.
    """
    colours = constant(space.colours, latents.device)
    grey = constant(space.grey, latents.device)
    pictures = torch.einsum("bcthw,cr->btrhw", latents.float(), colours) + grey[:, None, None]
    return pictures.add(1).div(2).clamp(0, 1)


class PreviewDecoder(InSpace):
    """Colours that are linear in the latents, enlarged to the size and the length of the video.

    Use::

        decoder = PreviewDecoder(WAN_2_1)
        for chunk in latents.split(3, dim=2):
            frames = decoder.decode(chunk)
    """

    def __init__(self, space: LatentSpace) -> None:
        """Draw latents of a space whose colours are known."""
        self.space = space
        self._size: tuple[int, ...] | None = None

    @torch.inference_mode()
    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames ``(B, F, 3, H, W)`` in [0, 1], float32, of the next latents ``(B, C, T, h, w)``.

        The first chunk since ``reset`` gives 1 + 4(T - 1) frames, every later one 4T.

        Raises:
            GeometryError: The latents are not of this space's shape.
            RolloutOrderError: The chunk's size differs from that of the video decoded so far.
        """
        self.space.check(chunk, self._size)
        pictures = rough(chunk, self.space)
        small = pictures.flatten(0, 1)
        large = interpolate(small, scale_factor=self.spatial_stride, mode="bilinear", align_corners=False)
        frames = large.unflatten(0, pictures.shape[:2]).repeat_interleave(TEMPORAL_STRIDE, dim=1)
        first = TEMPORAL_STRIDE - 1 if self._size is None else 0
        self._size = (chunk.shape[0], *chunk.shape[3:])
        return frames[:, first:]

    def rest(self, device: torch.device | str) -> None:
        """Do nothing: there is no memory of earlier chunks."""

    def reset(self) -> None:
        """Forget the video decoded so far."""
        self._size = None
