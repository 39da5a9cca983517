"""Latents as rough pictures, without an autoencoder: one colour per latent cell.

Legend: C channels, T latent frames, F frames, H and W pixels, h and w latent cells.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ..sfpp_core.geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE
from . import _host


class PreviewStream:
    """A decoder that costs nothing and shows what moves where, blurred, in about the right colours."""

    def __init__(self) -> None:
        self._first = True

    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames ``(F, 3, H, W)`` of the next ``(1, C, T, h, w)``: 1 + 4(T - 1), later 4T."""
        factors, offset = _host.latent_colours()
        latent = _host.from_host_latent(chunk)[0].float().cpu()
        colours = torch.einsum("cthw,cd->tdhw", latent, factors) + offset[:, None, None]
        frames = functional.interpolate(
            (colours + 1) / 2, scale_factor=SPATIAL_STRIDE, mode="bilinear", align_corners=False
        )
        frames = frames.clamp(0, 1).repeat_interleave(TEMPORAL_STRIDE, dim=0)
        if self._first:
            frames = frames[TEMPORAL_STRIDE - 1 :]
        self._first = False
        return frames
