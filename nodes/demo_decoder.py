"""The demo's autoencoder as a VAE: works in core's VAE Decode and, streamed, in Decode to Video.

Legend: B batch, C channels, T latent frames, F frames, H and W pixels, h and w latent cells.
"""

from typing import Any

import torch
from torch import Tensor

from ..sfpp_core.geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE
from ..sfpp_core.tiny_autoencoder import TinyAutoencoder
from . import _host

LATENT_FRAMES = 12
"""Latent frames decoded at a time: memory stays small however long the video."""


class DemoVAE:
    """The demo's autoencoder with the surface of core's VAE.

    The host's latents are scaled as those of Wan are; the demo's own are normalised. The two differ by Wan's
    constants, which are undone here.
    """

    latent_channels = 16
    latent_dim = 3
    output_channels = 3

    def __init__(self, autoencoder: TinyAutoencoder) -> None:
        self.first_stage_model = autoencoder
        self.patcher = _host.own_patcher(autoencoder)

    def __str__(self) -> str:
        return "the decoder of the demo"

    def stream(self) -> "DemoStream":
        """Return a decoder with the memory of one video."""
        return DemoStream(self)

    def decode(self, samples: Tensor, vae_options: Any = None) -> Tensor:  # noqa: ARG002 - the host's signature
        """Return the frames ``(B, F, H, W, 3)`` of ``(B, C, T, h, w)``."""
        videos = []
        for video in samples.split(1):
            stream = self.stream()
            videos.append(torch.cat([stream.decode(part) for part in video.split(LATENT_FRAMES, dim=2)]))
        return torch.stack(videos).movedim(2, -1)

    def decode_tiled(self, samples: Tensor, **tiles: Any) -> Tensor:  # noqa: ARG002 - there is nothing to tile
        """Return the frames, as ``decode`` does."""
        return self.decode(samples)

    def encode(self, pictures: Tensor) -> Tensor:
        """Return the latent ``(1, C, T, h, w)`` of frames ``(F, H, W, 3)``; a surplus over 1 + 4n is cut."""
        _host.load([self.patcher], 0)
        whole = 1 + (len(pictures) - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE
        frames = pictures[None, :whole, ..., :3].movedim(-1, 2).to(self.patcher.load_device)
        return _host.to_host_latent(self.first_stage_model.encode(frames).float().cpu())

    def throw_exception_if_invalid(self) -> None:
        """Accept: a demo decoder is always whole."""

    def spacial_compression_decode(self) -> int:
        """Return the pixels along a side of one latent cell."""
        return SPATIAL_STRIDE

    spacial_compression_encode = spacial_compression_decode

    def temporal_compression_decode(self) -> int:
        """Return the frames of one latent frame."""
        return TEMPORAL_STRIDE


class DemoStream:
    """One video through the demo's decoder."""

    def __init__(self, vae: DemoVAE) -> None:
        self._vae = vae
        vae.first_stage_model.reset()

    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames ``(F, 3, H, W)`` of the next chunk ``(1, C, T, h, w)`` in the host's latents."""
        patcher = self._vae.patcher
        _host.load([patcher], 0)
        normalised = _host.from_host_latent(chunk).to(patcher.load_device)
        return self._vae.first_stage_model.decode(normalised)[0].float().cpu()

    def park(self) -> None:
        """Do nothing: what is remembered is small."""
