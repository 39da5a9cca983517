"""A plan becomes a video: load its models, generate, decode, write.

For front ends without a graph; the command line is one.
"""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .anchor import anchoring
from .arithmetic import fast_products
from .checkpoint import load_student
from .compute import decoder_dtype, tiles_rest_on
from .cues import Cue
from .decoder import StreamingDecoder, StreamingEncoder, load_decoder, load_encoder
from .drift import Borders
from .drift_report import watched
from .errors import OutputError
from .geometry import TEMPORAL_STRIDE
from .latents_file import LatentsInfo, save_latents
from .plan import Plan
from .recording import Outcome, Progress, record
from .sampler import LongSampler
from .student import CausalStudent
from .tiling import TiledDecoder
from .transfers import fetch


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The models of a plan, in memory."""

    sampler: LongSampler
    cues: tuple[Cue, ...]
    decoder: StreamingDecoder

    start: Tensor | None = None
    """Latents the video begins with, ``(1, C, T, h, w)``."""


def load(planned: Plan) -> Loaded:
    """Load what a plan needs; the encoders of text and start are gone before the student comes.

    Raises:
        CheckpointError: A file is damaged where its header does not show it, e.g. holds weights that are NaN.
    """
    beginning = planned.beginning
    cues = planned.timetable.cues(planned.source.embeddings(planned.device))
    start = None
    if beginning is not None:
        start = beginning.encoded(lambda: _load_encoder(planned), chunk=planned.settings.chunk)
    network, config, _ = load_student(
        planned.student.path,
        device=planned.device,
        dtype=planned.dtype,
        adapters=planned.adapters,
        choice=planned.request.weights,
    )
    decoder = load_planned_decoder(planned, planned.device)
    sampler = LongSampler(
        student=CausalStudent(network, config, attend=planned.attend),
        geometry=planned.geometry,
        settings=planned.settings,
        seed=planned.request.seed,
        device=planned.device,
        storage=planned.request.storage,
        restart=_restart(planned, decoder),
        context_sigma=planned.request.context_sigma or None,
        finish=anchoring(planned.request.anchor),
    )
    return Loaded(sampler=sampler, cues=cues, decoder=decoder, start=start)


def load_planned_decoder(planned: Plan, device: torch.device) -> StreamingDecoder:
    """Load the decoder of a plan onto ``device``, in tiles if it asks for them.

    Raises:
        CheckpointError: As ``load``.
    """
    decoder = load_decoder(
        planned.decoder_place,
        device=device,
        dtype=decoder_dtype(device),
        channels=planned.decoder.space.channels,
    )
    if planned.request.tile is not None:
        decoder = TiledDecoder(decoder, tile=planned.request.tile, rest_on=tiles_rest_on(device))
    return decoder


def _load_encoder(planned: Plan) -> StreamingEncoder:
    """Load what encodes frames."""
    return load_encoder(
        planned.encoder_place,
        device=planned.device,
        dtype=decoder_dtype(planned.device),
        channels=planned.decoder.space.channels,
    )


def _restart(planned: Plan, decoder: StreamingDecoder) -> Callable[[Tensor], Tensor] | None:
    """Return what makes the beginning of a new window out of the last one, for students trained like that.

    As CausVid does: the first latent frame of a video holds one frame, so the frame before the latent frames
    that go on is encoded as a picture of its own.
    """
    if not planned.restarts:
        return None
    further = planned.settings.overlap - 1
    encoder = _load_encoder(planned)
    decoder = copy(decoder)

    def restart(before: Tensor) -> Tensor:
        decoder.reset()
        frames = decoder.decode(before)
        encoder.reset()
        place = frames.shape[1] - TEMPORAL_STRIDE * further - 1
        picture = encoder.encode(frames[:, place : place + 1]).to(before)
        decoder.reset()
        encoder.reset()  # what they remember would stay until the next window
        return torch.cat((picture, before[:, :, before.shape[2] - further :]), dim=2)

    return restart


def run(planned: Plan, loaded: Loaded, *, report: Callable[[Progress], None]) -> Outcome:
    """Generate, decode and write a video. Chunks are encoded by another process while later ones are made.

    ``KeyboardInterrupt`` ends the video early: what is made is kept, and the outcome says how much.

    Args:
        planned: The plan.
        loaded: Its models.
        report: Called after every chunk.

    Raises:
        NumericsError: The student produced numbers that are not finite.
        OutputError: As ``recording.record``.
    """
    borders = Borders(period=TEMPORAL_STRIDE * planned.settings.chunk, first=planned.geometry.frames_kept(0))
    watching = watched(planned.request.report, fps=planned.recording.fps, borders=borders)
    with fast_products(planned.device), watching as observe:
        return record(_pieces(planned, loaded), planned.recording, report=report, observe=observe)


def _pieces(planned: Plan, loaded: Loaded) -> Iterator[Tensor]:
    """Yield the frames ``(F, 3, H, W)`` of chunk after chunk; keep its latents first, if they are wanted."""
    geometry, folder = planned.geometry, planned.request.latents
    info = planned.latents_info if folder is not None else None  # once: it asks the disk about every file
    loaded.decoder.reset()
    for chunk, clean in enumerate(loaded.sampler.chunks(loaded.cues, start=loaded.start)):
        if folder is None or info is None:
            yield loaded.decoder.decode(clean)[0, : geometry.frames_kept(chunk)]
            continue
        host, arrive = fetch(clean)
        try:
            frames = loaded.decoder.decode(clean)[0, : geometry.frames_kept(chunk)]
        finally:
            arrive()
            trouble = _keep(folder, chunk, host, info)
        yield frames
        if trouble is not None:
            raise trouble


def _keep(folder: Path, chunk: int, latents: Tensor, info: LatentsInfo) -> OutputError | None:
    """Save one chunk, or return what is in the way: the frames it became are worth keeping all the same."""
    if not torch.isfinite(latents).all():
        return None  # the sampler says so, one chunk late on a GPU
    try:
        save_latents(folder, chunk, latents, info)
    except OutputError as error:
        return error
    return None
