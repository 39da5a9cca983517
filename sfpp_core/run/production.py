"""A plan becomes a run: its models are loaded, its chunks made and kept, its video grows.

For front ends without a graph; the command line is one.
"""

import logging
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..arithmetic import fast_products
from ..deciding import decisions_of
from ..decoder import PREVIEW, StreamingDecoder
from ..errors import OutputError
from ..generate import Loaded, load, load_planned_decoder
from ..outputs import check_folder, forecast_bytes, place_of
from ..plan import Plan
from ..recording import Outcome, Progress, record
from ..video import WAITING_FRAMES, Writer
from .agreement import Wanted
from .fingerprint import fingerprint
from .folder import Run, open_run
from .going_on import Replay, go_on
from .manifest import Look
from .requests import request_table
from .video_file import PictureFolder, VideoFile, shown_at
from .warm_up import reach_of, warm_up

VIDEO = "video.mp4"
"""Name of the video in the folder of a run, where the user names no other place."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What else a user says of a run, beside what the video should be."""

    seconds_kept: float | None = None
    """See ``Wanted``."""

    branch: Path | None = None
    """See ``Wanted``."""

    anew: bool = False
    """See ``Wanted``."""

    replay: Replay = "auto"
    """See ``going_on.go_on``."""

    keep_cache: int = 0
    """See ``going_on.go_on``."""


def begin(planned: Plan, choices: Choices) -> Run:
    """Open the run of a plan, and see that there is room for what it lacks.

    Raises:
        SFPPError: As ``open_run``; or the disk is too small.
    """
    folder = planned.request.run
    assert folder is not None
    run = open_run(folder, wanted_of(planned, choices))
    try:
        _take_look(planned, run)
        _check_room(planned, run, keep_cache=bool(choices.keep_cache))
    except BaseException:
        run.close()
        raise
    return run


def produce(planned: Plan, run: Run, choices: Choices, *, report: Callable[[Progress], None]) -> Outcome:
    """Make what a run lacks, and its video.

    Where the GPU runs out of memory, the decoder goes on without it, once.

    Raises:
        NumericsError: The student produced numbers that are not finite; what came before is kept.
        OutputError: The disk is full or the encoder died; what came before is kept.
    """
    frames = planned.geometry.frames
    if run.complete and run.manifest.video == {**shown_at(planned.recording).state(), "frames": frames}:
        return Outcome(frames=frames, seconds=0.0, complete=True, before=frames)
    try:
        return _produce_twice(planned, run, choices, report)
    except Exception as error:
        run.say(f"ended by an error with {run.kept} chunks kept: {str(error) or repr(error)}")
        raise


def _produce_twice(planned: Plan, run: Run, choices: Choices, report: Callable[[Progress], None]) -> Outcome:
    """Make what a run lacks; where the GPU has no memory left, once more with the decoder elsewhere."""
    loaded = None if run.complete else load(planned)
    decoder = loaded.decoder if loaded else load_planned_decoder(planned, planned.device)
    try:
        return _produce(planned, run, choices, _Models(loaded, decoder), report)
    except torch.OutOfMemoryError as error:
        trouble = str(error).partition("\n")[0]
    # Outside of the handler: what the error holds on to would take the memory that is needed now.
    decoder = load_planned_decoder(planned, torch.device("cpu"))
    loaded = loaded and replace(loaded, decoder=decoder)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    said = f"the GPU ran out of memory at chunk {run.kept} ({trouble:.100}); the decoder goes on on the CPU"
    run.say(said)
    logger.warning("%s: %s.", run.folder, said)
    try:
        return _produce(planned, run, choices, _Models(loaded, decoder), report)
    except torch.OutOfMemoryError as error:
        error.add_note(
            f"{run.kept} chunks are kept in {run.folder}; --cache fp8 or host needs less: with --branch "
            f"{run.folder} and --from, a new --run goes on from what is there."
        )
        raise


@dataclass(frozen=True, slots=True)
class _Models:
    """What makes a run: the student and its text, where any chunk is lacking, and a decoder."""

    loaded: Loaded | None
    decoder: StreamingDecoder


def _produce(
    planned: Plan, run: Run, choices: Choices, models: _Models, report: Callable[[Progress], None]
) -> Outcome:
    """Make what a run lacks, once."""
    geometry, shown = planned.geometry, shown_at(planned.recording)
    right = geometry.frames_until(run.kept - 1)
    if run.manifest.shown is not None:
        right = min(right, run.manifest.shown)
    frames = shown.cut(right, run.folder)
    if run.manifest.shown is not None or run.manifest.video:
        run.change(shown=None, video={})
    first = next(
        (chunk for chunk in range(geometry.chunks) if geometry.frames_until(chunk) > frames), geometry.chunks
    )
    before = Progress(chunks=first, total_chunks=geometry.chunks, frames=frames)
    size = {"width": geometry.width, "height": geometry.height}
    writer = Writer(shown.sink(frames), waiting=WAITING_FRAMES, **size)
    with fast_products(planned.device):
        pieces = _pieces(planned, run, choices, models, before)
        try:
            outcome = record(pieces, planned.recording, report=report, writer=writer, before=before)
        finally:
            pieces.close()
    if outcome.complete:
        _finish(run, shown)
    run.say(f"{'complete' if outcome.complete else 'stopped'}: {run.kept} chunks, {outcome.frames} frames")
    return outcome


def _pieces(
    planned: Plan, run: Run, choices: Choices, models: _Models, before: Progress
) -> Generator[Tensor]:
    """Yield the frames ``(F, 3, H, W)`` a video lacks: of the chunks that are there, then of further ones."""
    geometry, decoder = planned.geometry, models.decoder
    reach = reach_of(planned.decoder)
    warm_up(decoder, run.chunk, chunk=before.chunks, reach=reach, per_chunk=geometry.chunk)
    skipped = before.frames - geometry.frames_until(before.chunks - 1)
    with torch.inference_mode():
        for chunk in range(before.chunks, min(run.kept, geometry.chunks)):
            yield decoder.decode(run.chunk(chunk))[0, skipped : geometry.frames_kept(chunk)]
            skipped = 0
    if models.loaded is None:
        return
    made = go_on(
        run,
        models.loaded.sampler,
        models.loaded.cues,
        start=models.loaded.start,
        replay=choices.replay,
        keep_cache=choices.keep_cache,
    )
    try:
        for chunk, piece in enumerate(made, start=run.kept):
            frames = decoder.decode(piece.clean)[0, : geometry.frames_kept(chunk)]
            piece.keep()  # before they are shown: what is not finite is not
            yield frames
    finally:
        made.close()


def _finish(run: Run, shown: VideoFile | PictureFolder) -> None:
    """Finish the video of a complete run."""
    try:
        shown.finish()
    except OutputError as error:
        logger.warning("%s The growing video stays as it is; it plays.", error)
        return
    run.change(video={**shown.state(), "frames": run.manifest.geometry.frames})


def wanted_of(planned: Plan, choices: Choices) -> Wanted:
    """Return what the run of a plan should be."""
    return Wanted(
        space=planned.decoder.space.name,
        geometry=planned.geometry,
        decisions=decisions_of(planned),
        text=planned.timetable.text,
        request=request_table(planned.request, seconds=planned.geometry.seconds),
        seconds_kept=choices.seconds_kept,
        branch=choices.branch,
        anew=choices.anew,
    )


def look_of(planned: Plan) -> Look:
    """Return how the chunks of a plan are shown."""
    place = planned.decoder_place
    holds = "" if place == PREVIEW else f" ({fingerprint(Path(place))})"
    return Look(
        out=str(Path(planned.request.out).resolve()),
        enlarge=planned.enlarge,
        decoder=f"{planned.decoder.in_words}{holds}",
        tile=planned.request.tile,
    )


def _take_look(planned: Plan, run: Run) -> None:
    """Show a run as it is wanted now; a video that looked otherwise is put aside, to be made again."""
    before, look = run.manifest.look, look_of(planned)
    if before == look:
        return
    check_folder(place_of(planned.request.out))
    if before is not None:
        said = f"the video is made again as {look.out}, with {look.decoder}; the earlier one is kept"
        run.say(said)
        logger.warning("%s: %s.", run.folder, said)
    shown_at(planned.recording).put_aside(run.folder)
    run.change(look=look, shown=None, video={})


def _check_room(planned: Plan, run: Run, *, keep_cache: bool) -> None:
    """Refuse a run that the disk has no room for."""
    geometry, space = planned.geometry, planned.decoder.space
    lacking = max(0, geometry.chunks - run.kept)
    needed = lacking * (4 * prod(geometry.chunk_shape) * space.channels + 4096)
    if keep_cache:
        needed += 2 * (planned.forecast.cache + planned.forecast.cache_on_host)  # the last one, and the next
    share = lacking / geometry.chunks
    size = {"width": geometry.width, "height": geometry.height, "enlarge": planned.enlarge}
    video = forecast_bytes(planned.request.out, frames=geometry.frames, **size)
    rooms = {run.folder: needed}
    place = place_of(planned.request.out)
    rooms[place] = rooms.get(place, 0) + round(share * video)
    for folder, bytes_needed in rooms.items():
        free = shutil.disk_usage(folder).free
        if free < bytes_needed:
            raise OutputError(
                f"the disk of {folder} has {free / 1e6:.1f} MB free and the run needs about "
                f"{bytes_needed / 1e6:.1f} MB more; free some room or ask for less. What is there stays."
            )
