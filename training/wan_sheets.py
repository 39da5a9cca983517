"""Wan's pictures in training: an autoencoder for the first latent frame, and the samples.

Legend: B batch, C channels, T latent frames, F frames, H and W pixels, h and w latent cells.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from sfpp_core.attention import sdpa
from sfpp_core.config import RolloutSettings, StudentConfig
from sfpp_core.decoder import (
    DecoderInfo,
    StreamingDecoder,
    StreamingEncoder,
    check_decoder,
    load_decoder,
    load_encoder,
)
from sfpp_core.decoder_memory import decoder_bytes
from sfpp_core.geometry import frames_in
from sfpp_core.latent_space import WAN_2_1, WAN_2_2
from sfpp_core.sampler import LongSampler
from sfpp_core.student import CausalStudent
from sfpp_core.tiny_autoencoder import TinyAutoencoder
from sfpp_core.wan_autoencoder import WanSizes, weight_bytes
from training.models import VideoSettings, WanModel, geometry_of, space_of, texts_of
from training.precision import narrow_on, region
from training.samples import in_bytes, keep_samples

logger = logging.getLogger(__name__)

_PUBLISHED = {
    sizes.space.channels: sizes
    for sizes in (
        WanSizes(space=WAN_2_1, encoder_width=96, decoder_width=96),
        WanSizes(space=WAN_2_2, encoder_width=160, decoder_width=256),
    )
}

SIDE = 208
"""Pixels of the longer side of a sample, at most."""


class WanPictures:
    """A decoder and, where a stage encodes, an encoder: the ``Pictures`` of ``first_latent``."""

    def __init__(self, decoder: StreamingDecoder, encoder: StreamingEncoder | None) -> None:
        """Take both; without an encoder nothing can be encoded."""
        self._decoder, self._encoder = decoder, encoder

    @classmethod
    def load(
        cls, choice: str, config: StudentConfig, *, device: torch.device, encodes: bool
    ) -> "WanPictures | None":
        """Load an autoencoder; ``None`` where none is named.

        Args:
            choice: Wan's autoencoder, a tiny decoder, ``preview``, or nothing.
            config: The student, whose latents they must be.
            device: Where it computes: in bfloat16 on a GPU, else in float32.
            encodes: Whether the stage encodes.

        Raises:
            CheckpointError: It is something else, or damaged.
            SettingsError: It is for other latents, or cannot encode.
        """
        if not choice:
            return None
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        where = {"device": device, "dtype": dtype, "channels": config.channels}
        check_decoder(choice, channels=config.channels)
        encoder = load_encoder(Path(choice), **where) if encodes else None
        return cls(load_decoder(choice, **where), encoder)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Return the latents ``(B, C, T, h, w)`` of a clip ``(B, F, 3, H, W)`` of its own."""
        assert self._encoder is not None
        self._encoder.reset()
        latents = self._encoder.encode(frames)
        self._encoder.reset()
        return latents

    @torch.no_grad()
    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames ``(B, F, 3, H, W)`` of the next latents ``(B, C, T, h, w)``."""
        return self._decoder.decode(chunk)

    def reset(self) -> None:
        """Forget the video decoded so far."""
        self._decoder.reset()


def load_pictures(
    choice: str, video: VideoSettings, config: StudentConfig, *, device: torch.device, encodes: bool = False
) -> TinyAutoencoder | WanPictures | None:
    """Return the demo's autoencoder, or Wan's if one is named and this is no dry run.

    Raises:
        CheckpointError: As ``WanPictures.load``.
        SettingsError: As ``WanPictures.load``.
    """
    if not video.is_wan:
        with torch.random.fork_rng(devices=[]):  # adapters are drawn after this
            return TinyAutoencoder.load(Path(choice)).to(device)
    if device.type == "meta":
        return None
    return WanPictures.load(choice, config, device=device, encodes=encodes)


def picture_bytes(choice: str, video: VideoSettings, config: StudentConfig) -> int:
    """Return the bytes an autoencoder holds on a GPU while it makes a picture of a latent frame.

    Args:
        choice: Its file; one that is not there yet is taken for Wan's own.
        video: Size of the videos.
        config: The student, whose latents they are.

    Raises:
        CheckpointError: As ``check_decoder``.
        SettingsError: As ``check_decoder``.
    """
    sizes = _PUBLISHED.get(config.channels, _PUBLISHED[WAN_2_1.channels])
    if Path(choice).exists():
        info = check_decoder(choice, channels=config.channels)
    else:
        info = DecoderInfo(space=sizes.space, in_words="", sizes=sizes)
    at_work = decoder_bytes(info, width=video.width, height=video.height, dtype=torch.bfloat16)
    sizes = info.sizes if isinstance(info.sizes, WanSizes) else sizes
    return at_work + weight_bytes(sizes, "encoder", torch.bfloat16)


@torch.inference_mode()
def roll_wan_samples(
    model: WanModel,
    pictures: StreamingDecoder | WanPictures | None,
    settings: RolloutSettings,
    video: VideoSettings,
    path: Path,
    *,
    seconds: Sequence[float],
) -> dict[str, float]:
    """Roll out the first prompts and keep them, reduced, as ``samples.keep_samples`` does.

    Args:
        model: The student.
        pictures: What shows its latents; ``None`` makes no samples, and says so.
        settings: How it is rolled out.
        video: Prompts and size.
        path: The sheet, a .png file.
        seconds: Lengths of the videos.

    Returns:
        The numbers of ``keep_samples``.
    """
    texts = texts_of(model)
    if pictures is None or texts is None or not video.sample_prompts:
        logger.info("no samples: autoencoder is empty, or video.sample_prompts 0")
        return {}
    device = model.network.head.modulation.device
    kept = model.network.head.modulation.dtype
    dtype = narrow_on(device) if kept == torch.float32 else kept  # narrow weights meet narrow latents alone
    fps = space_of(model.config).fps
    frames = frames_in(max(seconds), fps=fps)
    geometry = geometry_of(video, model.config, chunk=settings.chunk, frames=frames)
    prompts, videos = texts.prompts[: video.sample_prompts], []
    for prompt in prompts:
        with region(device, dtype):
            student = CausalStudent(model.network, model.config, attend=sdpa, dtype=dtype)
            sampler = LongSampler(
                student=student, geometry=geometry, settings=settings, seed=1, device=device
            )
            clean = [chunk.cpu() for chunk in sampler.chunks(model.words([prompt]))]
        pictures.reset()
        videos.append(torch.cat([_small(pictures.decode(chunk.to(device))[0]) for chunk in clean])[:frames])
        pictures.reset()
    labels = [text[:100] for text in prompts]
    return keep_samples(torch.stack(videos), labels, path, seconds=seconds, fps=fps)


def _small(frames: Tensor) -> Tensor:
    """Return frames ``(F, 3, H, W)`` in [0, 1] reduced, as bytes, on the CPU."""
    shrink = SIDE / max(frames.shape[-2:])
    if shrink < 1:
        size = [2 * round(length * shrink / 2) for length in frames.shape[-2:]]
        frames = functional.interpolate(frames.float(), size=size, mode="area")
    return in_bytes(frames)
