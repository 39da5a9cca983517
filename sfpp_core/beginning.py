"""What a video begins with, as a user names it: a picture, a clip, or the latents another run has left.

Legend: B batch, C channels, T latent frames, F frames, H and W pixels, h and w latent cells.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .config import RolloutSettings
from .decoder import StreamingEncoder
from .errors import GeometryError
from .geometry import TEMPORAL_STRIDE, VideoGeometry, lead_of
from .latent_space import LatentSpace
from .latents_file import load_latents
from .pictures import is_picture, read_clip, read_picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """What a video begins with, found fitting; nothing of it is held."""

    path: Path

    latent_frames: int
    """Latent frames it is, or becomes."""

    lead: int
    """See ``geometry.lead_of``."""

    read: Callable[[], Tensor]
    """Reads it: frames ``(F, 3, H, W)`` in [0, 1], or normalised latents ``(1, C, T, h, w)``."""

    encodes: bool
    """Whether it is frames, still to be encoded."""

    def check(self, geometry: VideoGeometry) -> None:
        """Refuse a video that ends before anything is generated.

        Raises:
            GeometryError: It does.
        """
        if self.latent_frames >= geometry.latent_frames:
            seconds = VideoGeometry.frames_of(self.latent_frames) / geometry.fps
            raise GeometryError(
                f"the start is {seconds:g} s long and the whole video {geometry.seconds:g} s, the start "
                "included; ask for a longer video."
            )

    def encoded(self, load_encoder: Callable[[], StreamingEncoder], *, chunk: int) -> Tensor:
        """Return the latents ``(1, C, T, h, w)``, normalised.

        Args:
            load_encoder: Gives the encoder; called only if there are frames to encode.
            chunk: Latent frames encoded at once.
        """
        if not self.encodes:
            return self.read()
        frames, encoder, parts, first = self.read(), load_encoder(), [], 0
        encoder.reset()
        with torch.inference_mode():
            while first < len(frames):
                stop = max(first, 1) + TEMPORAL_STRIDE * (chunk if first else chunk - 1)
                parts.append(encoder.encode(frames[None, first:stop]))
                first = stop
        return torch.cat(parts, dim=2)

    def __str__(self) -> str:
        return f"{self.path}, {self.latent_frames} latent frames"


def read_beginning(
    path: Path, *, width: int, height: int, settings: RolloutSettings, space: LatentSpace
) -> Beginning:
    """Read what a video begins with.

    A picture is one latent frame. Of a clip the last frames count, as many as the window can see while the
    next chunk is made. Saved latents are taken whole.

    Args:
        path: A picture, a video, or a folder of latents.
        width: Pixels.
        height: Pixels.
        settings: How the student is rolled out.
        space: The student's latents.

    Raises:
        CheckpointError: The latents are damaged.
        GeometryError: The latents are of another size or model.
        PictureError: The file is missing, damaged, too short, or nothing to begin with.
    """
    if path.is_dir() or path.suffix == ".safetensors":
        return _from_latents(path, width=width, height=height, settings=settings, space=space)
    if is_picture(path):
        read = partial(read_picture, path, width=width, height=height)
        read()  # so that a damaged file is refused now
        return Beginning(
            path=path, latent_frames=1, lead=lead_of(1, chunk=settings.chunk), read=read, encodes=True
        )
    seen = max(1, settings.window_chunks - 1) * settings.chunk
    longest, shortest = VideoGeometry.frames_of(seen), VideoGeometry.frames_of(settings.chunk)
    clip = partial(read_clip, path, width=width, height=height, fps=space.fps)
    found = len(clip(frames=longest, least=shortest))
    chunks = (1 + (found - 1) // TEMPORAL_STRIDE) // settings.chunk
    latent_frames = chunks * settings.chunk
    read = partial(clip, frames=VideoGeometry.frames_of(latent_frames))
    return Beginning(path=path, latent_frames=latent_frames, lead=0, read=read, encodes=True)


def _from_latents(
    path: Path, *, width: int, height: int, settings: RolloutSettings, space: LatentSpace
) -> Beginning:
    """Return the latents of another run as what a video begins with."""
    saved = load_latents(path)
    if saved.info.space != space.name or (saved.info.width, saved.info.height) != (width, height):
        raise GeometryError(
            f"{path} holds latents of {saved.info.space} for {saved.info.width}x{saved.info.height} and this "
            f"run makes those of {space.name} for {width}x{height}; choose the same model and size."
        )

    def read() -> Tensor:
        return torch.cat([saved.chunk(chunk) for chunk in range(saved.chunks)], dim=2)

    lead = lead_of(saved.latent_frames, chunk=settings.chunk)
    return Beginning(path=path, latent_frames=saved.latent_frames, lead=lead, read=read, encodes=False)
