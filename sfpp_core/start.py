"""How a video begins from given latents: an image, a clip, or all that a stopped run has made.

Legend: B batch, C channels, T latent frames, h and w latent height and width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import GeometryError, NumericsError, SettingsError
from .geometry import VideoGeometry, lead_of


def check_start(start: Tensor | None, geometry: VideoGeometry, *, batch: int, channels: int) -> None:
    """Refuse latents that cannot start a video.

    Args:
        start: Normalised clean latents ``(B, C, T, h, w)``, or ``None``.
        geometry: Size of the video, which includes the start; its ``lead`` must be that of the start.
        batch: Videos to be made at once.
        channels: Channels of the student's latents.

    Raises:
        GeometryError: The start is of another size, holds a number of latent frames that is no start, or
            leaves nothing to generate.
        NumericsError: It holds numbers that are not finite.
        SettingsError: The geometry was made for another kind of start.
    """
    if start is None:
        return
    expected = (batch, channels, *geometry.chunk_shape[1:])
    if start.ndim != 5 or (*start.shape[:2], *start.shape[3:]) != expected:
        raise GeometryError(
            f"the start has shape {tuple(start.shape)}; this run needs ({batch}, {channels}, latent frames, "
            f"{expected[2]}, {expected[3]}): encode pictures of {geometry.width}x{geometry.height}."
        )
    latent_frames = start.shape[2]
    if (lead := lead_of(latent_frames, chunk=geometry.chunk)) != geometry.lead:
        raise SettingsError(
            f"the geometry has lead {geometry.lead} and a start of {latent_frames} latent frames has lead "
            f"{lead}; build the geometry with lead_of(latent_frames, chunk=chunk)."
        )
    if latent_frames >= geometry.latent_frames:
        longest = VideoGeometry.frames_of(latent_frames)
        raise GeometryError(
            f"the start is {longest / geometry.fps:g} s long and the whole video {geometry.seconds:g} s, "
            "the start included; ask for a longer video."
        )
    if not torch.isfinite(start).all():
        raise NumericsError("the start holds numbers that are not finite; encode it again, in float32.")


def given_chunks(start: Tensor | None, past: Sequence[Tensor], geometry: VideoGeometry) -> list[Tensor]:
    """Return the chunks a run does not generate, in order; the lead, if there is one, is the first.

    Args:
        start: Latents the video starts with, ``(B, C, T, h, w)``, or ``None``.
        past: Pieces a stopped run has yielded, the start among them; they come before ``start``.
        geometry: Size of the video.

    Raises:
        SettingsError: The geometry has a lead and nothing gives it.
    """
    chunks = [chunk for piece in past[:1] for chunk in _split(piece, geometry)] + list(past[1:])
    if start is not None:
        chunks += _split(start, geometry)[len(chunks) :]
    if geometry.lead and not chunks:
        raise SettingsError("the geometry has a lead of 1 latent frame; pass the image's latents as start.")
    return chunks


def _split(latents: Tensor, geometry: VideoGeometry) -> list[Tensor]:
    """Cut ``latents`` ``(B, C, T, h, w)`` into the lead, if there is one, and chunks."""
    lead, rest = latents[:, :, : geometry.lead], latents[:, :, geometry.lead :]
    return [part for part in (lead, *rest.split(geometry.chunk, dim=2)) if part.shape[2]]
