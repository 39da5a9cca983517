"""A plan becomes a video: load its models, generate, decode, write.

For front ends without a graph; the command line is one.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .arithmetic import fast_products
from .checkpoint import load_student
from .decoder import StreamingDecoder, load_decoder
from .plan import Plan
from .sampler import LongSampler
from .student import CausalStudent
from .video import open_writer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The models of a plan, in memory."""

    sampler: LongSampler
    embeddings: Tensor
    decoder: StreamingDecoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is."""

    chunks: int
    """Chunks done."""

    total_chunks: int
    """Chunks of the whole video."""

    frames: int
    """Frames handed to the writer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    frames: int
    """Frames in the file."""

    seconds: float
    """Time from the start of the first chunk to the closed file."""

    complete: bool
    """Whether the whole video was made; otherwise Ctrl-C ended it."""


def load(planned: Plan) -> Loaded:
    """Load what a plan needs.

    Raises:
        CheckpointError: A file is damaged where its header does not show it, e.g. holds weights that are NaN.
    """
    network, config, _ = load_student(planned.student.path, device=planned.device, dtype=planned.dtype)
    sampler = LongSampler(
        student=CausalStudent(network, config, attend=planned.attend),
        geometry=planned.geometry,
        settings=planned.settings,
        seed=planned.request.seed,
        device=planned.device,
    )
    return Loaded(
        sampler=sampler,
        embeddings=planned.words([planned.request.prompt]),
        decoder=load_decoder(planned.decoder, device=planned.device),
    )


def run(planned: Plan, loaded: Loaded, *, report: Callable[[Progress], None]) -> Outcome:
    """Generate, decode and write a video. Chunks are encoded by another process while later ones are made.

    ``KeyboardInterrupt`` ends the video early: what is made is kept, and the outcome says how much.

    Args:
        planned: The plan.
        loaded: Its models.
        report: Called after every chunk.

    Raises:
        NumericsError: The student produced numbers that are not finite.
        OutputError: The disk is full or the encoder died. As after any error, the file plays up to there, and
            a note on the error says how far that is.
    """
    geometry = planned.geometry
    complete, start = False, time.perf_counter()
    writer = open_writer(
        planned.request.out, width=geometry.width, height=geometry.height, enlarge=planned.enlarge
    )
    try:
        with writer, fast_products(planned.device):
            loaded.decoder.reset()
            for chunk, clean in enumerate(loaded.sampler.chunks(loaded.embeddings)):
                frames = loaded.decoder.decode(clean)[0, : geometry.frames_kept(chunk)]
                writer.write(frames)
                done = min(geometry.frames, geometry.frames_of((chunk + 1) * geometry.chunk))
                report(Progress(chunks=chunk + 1, total_chunks=geometry.chunks, frames=done))
        complete = True
    except KeyboardInterrupt:
        logger.debug("interrupted")
    except Exception as error:
        if writer.frames_written:
            error.add_note(f"The first {writer.frames_written} frames are in {planned.request.out}.")
        raise
    return Outcome(frames=writer.frames_written, seconds=time.perf_counter() - start, complete=complete)
