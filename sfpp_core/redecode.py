"""Kept latents become a video again: in better quality than the first time, or after a crash."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import demo
from .compute import decoder_dtype, tiles_rest_on
from .decoder import check_decoder, load_decoder
from .decoder_memory import decoder_bytes
from .errors import SettingsError
from .latent_space import DEMO
from .latents_file import Latents, decode_latents, load_latents
from .machine import in_words, memory_of
from .outputs import automatic_enlargement, check_enlargement, check_output, forecast_bytes
from .recording import Outcome, Progress, Recording, record
from .run.manifest import is_run, read_manifest
from .tiling import TiledDecoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Redecoding:
    """Latents to be decoded, found possible."""

    latents: Latents
    decoder: Path | str
    tile: int | None
    device: torch.device
    recording: Recording

    @property
    def frames(self) -> int:
        """Frames there will be."""
        return self.latents.frames

    def lines(self) -> list[str]:
        """Return what will be made, for people."""
        info = self.latents.info
        missing = "" if self.latents.complete else f" of {info.chunks}: the run that made them did not end"
        return [
            f"latents  {self.latents.folder}, {self.latents.chunks} chunks{missing}",
            f"video    {self.frames} frames, {info.width}x{info.height}, to {self.recording.out}",
        ]


def plan_redecoding(
    path: Path,
    *,
    decoder: Path | str | None,
    out: str,
    device: torch.device,
    tile: int | None = None,
    enlarge: int | None = None,
) -> Redecoding:
    """Check what is asked for; only headers are read.

    Args:
        path: Folder of latents, or of a run.
        decoder: As for ``load_decoder``; ``None`` is the demo's, for latents of the demo.
        out: Video to write.
        device: Where the decoder computes.
        tile: Pixels along a side of the tiles a picture is decoded in; ``None`` decodes it whole.
        enlarge: Side, in pixels, of the square each pixel becomes; ``None`` chooses.

    Raises:
        SFPPError: Something is impossible; the message says what, and what to do instead.
    """
    latents = load_latents(path)
    if is_run(path):  # its chunks may be older than its length
        planned = read_manifest(path).geometry
        info = replace(latents.info, frames=planned.frames, chunks=planned.chunks)
        latents = replace(latents, info=info)
    info = latents.info
    if decoder is None:
        if info.space != DEMO.name:
            raise SettingsError(
                f"{path} holds latents of {info.space}; name their decoder with --decoder, "
                f"e.g. {info.space.title()}_VAE."
            )
        decoder = demo.file(demo.AUTOENCODER)
    found = check_decoder(decoder, channels=latents.space.channels)
    if found.space.name != info.space:
        raise SettingsError(
            f"{decoder} is {found.in_words} and the latents are of {info.space}; choose theirs."
        )
    sides = {"width": info.width, "height": info.height}
    needed = decoder_bytes(
        found,
        dtype=decoder_dtype(device),
        tile=tile,
        latent_frames=-(-latents.latent_frames // latents.chunks),
        rest_elsewhere=tiles_rest_on(device) is not None,
        **sides,
    )
    limit = memory_of(device)
    if limit is not None and needed > limit:
        raise SettingsError(
            f"the decoder needs about {in_words(needed)} and there is {in_words(limit)}; use --tile."
        )
    enlarge = automatic_enlargement(**sides) if enlarge is None else enlarge
    check_enlargement(enlarge, **sides)
    check_output(out, expected_bytes=forecast_bytes(out, frames=latents.frames, enlarge=enlarge, **sides))
    recording = Recording(out=out, fps=latents.space.fps, enlarge=enlarge, chunks=latents.chunks, **sides)
    return Redecoding(latents=latents, decoder=decoder, tile=tile, device=device, recording=recording)


def redecode(job: Redecoding, *, report: Callable[[Progress], None]) -> Outcome:
    """Decode and write; see ``record``."""
    decoder = load_decoder(
        job.decoder, device=job.device, dtype=decoder_dtype(job.device), channels=job.latents.space.channels
    )
    if job.tile is not None:
        decoder = TiledDecoder(decoder, tile=job.tile, rest_on=tiles_rest_on(job.device))
    with torch.inference_mode():
        return record(decode_latents(job.latents, decoder), job.recording, report=report)
