"""The host's autoencoders, streamed: one chunk of latents in, its frames out, with no seam between chunks.

Legend: B batch, C channels, T latent frames, F frames, H and W pixels, h and w latent cells.
Latents are the host's (not normalised); frames are float32 in [0, 1] on the CPU.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle

from ..sfpp_core.errors import SettingsError
from ..sfpp_core.latent_space import WAN_2_1, WAN_2_2, LatentSpace
from ..sfpp_core.preview_decoder import PreviewDecoder
from ._host import from_host_latent, load
from .tiles import Stream, TiledStream

OVERLAP = 8
"""Latent frames decoded again before each chunk where an autoencoder cannot stream: all a tiny one sees."""

MADE_FOR = {
    WAN_2_1.name: "the Wan 2.1 VAE (wan_2.1_vae.safetensors) or a tiny one made for Wan 2.1",
    WAN_2_2.name: "the Wan 2.2 VAE (wan2.2_vae.safetensors) or a tiny one made for Wan 2.2",
}
"""What decodes latents, by the name of their space."""

logger = logging.getLogger(__name__)


def stream_of(vae: Any, *, space: LatentSpace = WAN_2_1, tile: int = 0) -> Stream:
    """Return a fresh stream of ``vae``, the demo's decoder or any of core's for Wan.

    Args:
        vae: The host's VAE, or the demo's.
        space: Where the latents to decode live, once they are normalised.
        tile: Side in pixels of the squares that a picture is decoded in; 0 decodes it whole. The demo's
            decoder is always whole.

    Raises:
        SettingsError: The autoencoder is not made for these latents.
    """
    vae.throw_exception_if_invalid()
    if vae.latent_channels != space.channels or vae.latent_dim != 3:
        raise SettingsError(
            f"this VAE has {vae.latent_channels} latent channels and decodes {vae.latent_dim - 1}-D latents; "
            f"the video has {space.channels}: use {MADE_FOR[space.name]}."
        )
    if hasattr(vae, "stream"):
        return vae.stream()
    kind = type(vae.first_stage_model).__name__
    stream = STREAMS.get((kind, space.name), OverlapStream)
    if stream is OverlapStream:
        logger.info("%s cannot be streamed exactly; chunks overlap.", kind)
    return TiledStream(lambda: stream(vae), tile, space.spatial_stride) if tile else stream(vae)


class WanStream:
    """Core's Wan 2.1 autoencoder, with the feature cache it uses itself inside one decode."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._model = vae.first_stage_model
        self._features: list[Any] = []

    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames of the next chunk."""
        vae = self._vae
        load([vae.patcher], vae.memory_used_decode(chunk.shape, vae.vae_dtype))
        self._move(vae.device)
        x = self._model.conv2(chunk.to(device=vae.device, dtype=vae.vae_dtype))
        frames = []
        if not self._features:
            self._features = [None] * sum(
                type(module).__name__ == "CausalConv3d" for module in self._model.modules()
            )
            frames.append(self._pass(x[:, :, :1]))
            x = x[:, :, 1:]
        frames += [self._pass(part) for part in x.split(self._step, dim=2) if part.shape[2]]
        pictures = vae.process_output(torch.cat(frames, dim=2).float())
        return pictures[0].transpose(0, 1).cpu()

    def park(self) -> None:
        """Put what is remembered into main memory until the next chunk."""
        self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        """Bring the features to ``device``."""
        self._features = [part.to(device) if isinstance(part, Tensor) else part for part in self._features]

    @property
    def _step(self) -> int:
        """Latent frames per pass: one, or all where the decoder splits its work itself."""
        return 1_000_000 if hasattr(self._model.decoder, "run_up") else 1

    def _pass(self, part: Tensor) -> Tensor:
        """Run the decoder over ``(1, C, T, h, w)``, and keep the features of the last two latent frames."""
        before = list(self._features)
        out = self._model.decoder(part, feat_cache=self._features, feat_idx=[0])
        for index, (old, new) in enumerate(zip(before, self._features, strict=True)):
            if isinstance(old, Tensor) and isinstance(new, Tensor) and new is not old and new.shape[2] == 1:
                self._features[index] = torch.cat((old[:, :, -1:], new), dim=2)
        return torch.cat(out, dim=2) if isinstance(out, list) else out


class Wan22Stream(WanStream):
    """Core's Wan 2.2 autoencoder, which is told where a video begins, and draws squares of four pixels."""

    _step = 1

    def _pass(self, part: Tensor) -> Tensor:
        """Run the decoder over one latent frame ``(1, C, 1, h, w)``; it keeps the features itself."""
        first = all(feature is None for feature in self._features)
        out = self._model.decoder(part, feat_cache=self._features, feat_idx=[0], first_chunk=first)
        # The four are numbered column by column, where PyTorch would have them row by row.
        return pixel_shuffle(out.movedim(2, 1).mT, 2).mT.movedim(1, 2)


class PreviewStream:
    """No autoencoder: one colour per latent cell, for rough pictures at once."""

    def __init__(self, space: LatentSpace = WAN_2_1) -> None:
        self._decoder = PreviewDecoder(space)

    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames of the next chunk."""
        return self._decoder.decode(from_host_latent(chunk))[0].cpu()

    def park(self) -> None:
        """Do nothing: nothing is remembered."""


class TinyStream:
    """Core's tiny autoencoder: each of its layers with a memory keeps the latest frame it has seen."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._model = vae.first_stage_model
        self._past: dict[int, Tensor] = {}
        self._surplus = self._model.frames_to_trim

    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames of the next chunk."""
        vae = self._vae
        load([vae.patcher], vae.memory_used_decode(chunk[:, :, :1].shape, vae.vae_dtype))
        # Files in float16 are taew2_1, made for normalised latents; core takes them for HunyuanVideo's.
        latent = chunk if self._model.latent_format is None else from_host_latent(chunk)
        x = latent.to(device=vae.device, dtype=vae.vae_dtype)
        frames = torch.cat([self._pass(part.squeeze(2)) for part in x.split(1, dim=2)])[self._surplus :]
        self._surplus = 0
        frames = pixel_shuffle(frames, getattr(self._model, "patch_size", 1))
        return vae.process_output(frames.float()).clamp(0, 1).cpu()

    def park(self) -> None:
        """Do nothing: what is remembered is small."""

    def _pass(self, x: Tensor) -> Tensor:
        """Return the frames ``(4, 3, H, W)`` of one latent frame ``(1, C, h, w)``."""
        for index, module in enumerate(self._model.decoder):
            if type(module).__name__ == "MemBlock":
                past = torch.cat((self._past.get(index, torch.zeros_like(x[:1])), x[:-1]))
                self._past[index] = x[-1:].clone()
                x = module(x, past)
            else:
                x = module(x)
        return x


class OverlapStream:
    """Any other autoencoder: each chunk is decoded behind a piece of its past, whose frames are dropped."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._past: Tensor | None = None

    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames of the next chunk."""
        seen = chunk if self._past is None else torch.cat((self._past, chunk), dim=2)
        pictures = self._vae.decode(seen)[0].movedim(-1, 1).float().cpu()
        fresh = len(pictures) if self._past is None else 4 * chunk.shape[2]
        self._past = seen[:, :, -OVERLAP:]
        return pictures[-fresh:]

    def park(self) -> None:
        """Do nothing: what is remembered is small, and in main memory."""


STREAMS = {
    ("WanVAE", WAN_2_1.name): WanStream,
    ("WanVAE", WAN_2_2.name): Wan22Stream,
    ("TAEHV", WAN_2_1.name): TinyStream,
    ("TAEHV", WAN_2_2.name): TinyStream,
}
"""The autoencoders that can be streamed exactly: core's name, and the latents it is for."""
