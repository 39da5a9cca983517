"""Chunks of latents into a video file that grows while later chunks are generated, as a ComfyUI node."""

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..sfpp_core.errors import SettingsError
from ..sfpp_core.geometry import FPS
from ..sfpp_core.latent_space import WAN_2_1, LatentSpace
from ..sfpp_core.outputs import SHOWN_SIDE, automatic_enlargement, check_enlargement
from ..sfpp_core.video import check_output, forecast_bytes, open_writer
from . import _host
from ._host import io
from .host_decoder import MADE_FOR, PreviewStream, stream_of
from .lazy_latent import ChunkSource, source_of
from .pace import Pace
from .plain_errors import plain_errors
from .progress import Progress
from .tiles import SMALLEST, Stream
from .turns import Turns

VAE = "vae"
"""Choice of decoder: what is connected."""

PREVIEW = "preview"
"""Choice of decoder: rough pictures that need no VAE."""

LARGEST_FACTOR = automatic_enlargement(16, 16)
"""Most a picture is enlarged: as much as the smallest is by itself."""

logger = logging.getLogger(__name__)


class SFPPDecodeToVideo(io.ComfyNode):
    """Decode a latent chunk by chunk straight into an MP4."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return _host.schema(
            node_id="SFPPDecodeToVideo",
            display_name="Decode to Video (Self-Forcing++)",
            category="video/self-forcing++",
            description="Decodes chunk by chunk into an MP4 in the output folder. With the Long Sampler, "
            "generation happens here too: the file grows while later chunks are made, and Cancel leaves what "
            "is done.",
            search_aliases=["save video", "vae decode video", "long video", "streaming decode"],
            inputs=[
                io.Latent.Input(
                    "samples",
                    tooltip="From the Long Sampler, which is asked for one chunk after the other. Other "
                    "latents of Wan work too.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="video/SelfForcing",
                    tooltip="Name of the MP4 in the output folder; may name subfolders.",
                ),
                io.Int.Input(
                    "enlarge",
                    default=0,
                    min=0,
                    max=LARGEST_FACTOR,
                    tooltip="Each pixel of the video becomes a square of this many pixels, with sharp edges. "
                    f"0: automatic, up to {SHOWN_SIDE} pixels; 1 for pictures that large already.",
                ),
                io.Float.Input(
                    "image_seconds",
                    default=5.0,
                    min=0.0,
                    max=600.0,
                    step=1.0,
                    tooltip="Longest video, in seconds, that is given as IMAGE too; 5 s are up to 81 frames. "
                    "Pictures take memory: a minute of 832x480 is 4.6 GB. Longer ones come as VIDEO only.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Quality: the Wan 2.1 VAE. Fast: a tiny VAE for Wan 2.1 (taew2_1, lighttaew2_1). "
                    "For Wan 2.2 of 5B those of Wan 2.2. The demo has its own. Open: for a preview.",
                ),
                io.Combo.Input(
                    "decoder",
                    options=[VAE, PREVIEW],
                    default=VAE,
                    optional=True,
                    tooltip="vae: the one connected. preview: rough pictures straight from the latents, at "
                    "once and without a VAE; choose vae later to decode the same video again in quality.",
                ),
                io.Int.Input(
                    "tile",
                    default=0,
                    min=0,
                    max=2048,
                    step=32,
                    optional=True,
                    extra_dict={"advanced": True},
                    tooltip="Pixels. For small cards: pictures are decoded in squares of this side that "
                    "overlap by a quarter, e.g. 256, at least 128. Slower; takes a fraction of the memory. "
                    "0: whole.",
                ),
            ],
            outputs=[
                io.Video.Output(display_name="VIDEO", tooltip="The MP4. Nothing of it is kept in memory."),
                io.Image.Output(
                    display_name="IMAGE",
                    tooltip="The frames, not enlarged, of a video up to image_seconds long. 16 per second, "
                    "24 of Wan 2.2 of 5B.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    @plain_errors
    def execute(
        cls,
        samples: dict[str, Any],
        filename_prefix: str,
        enlarge: int,
        image_seconds: float,
        vae: Any = None,
        decoder: str = VAE,
        tile: int = 0,
    ) -> io.NodeOutput:
        """Write the video, and return it with its frames if they are few."""
        source = source_of(samples)
        width, height = source.size
        enlarge = enlarge or automatic_enlargement(width, height)
        check_enlargement(enlarge, width=width, height=height)
        turns = Turns(
            source,
            vae=None if decoder == PREVIEW else vae,
            open_stream=partial(chosen_stream, vae, decoder, tile, source.space),
        )
        path, subfolder = _host.output_file(filename_prefix, width * enlarge, height * enlarge, ".mp4")
        images = [] if source.frames <= 1 + image_seconds * source.space.fps else None
        shown, metadata = _host.player(path, subfolder), _host.metadata_of(cls)

        def stopped() -> None:
            _host.seal(path, metadata)
            _host.show_now(shown)

        with closing(decoded(turns, source.frames)) as frames:
            write_video(path, frames, source, enlarge=enlarge, images=images, stopped=stopped)
        _host.seal(path, metadata)
        pictures = (
            _host.blocked(too_long(source.frames, image_seconds, fps=source.space.fps))
            if images is None
            else as_images(images)
        )
        return io.NodeOutput(_host.video(path), pictures, ui=shown)


def chosen_stream(vae: Any, decoder: str, tile: int, space: LatentSpace = WAN_2_1) -> Stream:
    """Return a fresh decoder.

    Args:
        vae: What is connected, or ``None``.
        decoder: ``VAE`` or ``PREVIEW``.
        tile: Side of the squares to decode in, in pixels; 0 for whole pictures.
        space: Where the latents to decode live, once they are normalised.

    Raises:
        SettingsError: A VAE is needed and none is connected, or it is made for other latents; or the squares
            are too small.
    """
    if 0 < tile < SMALLEST:
        raise SettingsError(f"tile is {tile} pixels; use at least {SMALLEST}, or 0 for whole pictures.")
    if decoder == PREVIEW:
        return PreviewStream(space)
    if vae is None:
        raise SettingsError(
            f"no VAE is connected; connect {MADE_FOR[space.name]} with Load VAE, or set decoder to preview."
        )
    return stream_of(vae, space=space, tile=tile)


def too_long(frames: int, limit: float, *, fps: int = FPS) -> str:
    """Return what the user is told who reads IMAGE of a long video."""
    return (
        f"IMAGE is given for videos up to {limit:g} s and this one has {frames / fps:g} s; connect VIDEO "
        "instead, or raise image_seconds on Decode to Video if the memory allows."
    )


def as_images(parts: list[Tensor]) -> Tensor:
    """Return frames ``(F, 3, H, W)`` as the host's IMAGE ``(F, H, W, 3)``."""
    return torch.cat(parts).movedim(1, -1).contiguous()


def decoded(turns: Turns, frames: int) -> Generator[Tensor]:
    """Yield the frames ``(F, 3, H, W)`` of each chunk; what is past ``frames``, the video, is left out."""
    left = frames
    with closing(turns.chunks()) as chunks:
        for chunk in chunks:
            pictures = turns.decode(chunk)[:left]
            left -= len(pictures)
            yield pictures


def write_video(
    path: Path,
    video: Iterator[Tensor],
    source: ChunkSource,
    *,
    enlarge: int,
    images: list[Tensor] | None,
    stopped: Callable[[], None] = lambda: None,
) -> None:
    """Write a video.

    Args:
        path: Where to.
        video: The frames of ``source`` by chunks, ``(F, 3, H, W)``.
        source: What they are of.
        enlarge: Side, in pixels, of the square each pixel becomes.
        images: Collects the frames, if somebody wants them.
        stopped: Called if it ends early and something is in the file.
    """
    (width, height), fps = source.size, source.space.fps
    size = forecast_bytes(path, frames=source.frames, width=width, height=height, enlarge=enlarge)
    check_output(path, expected_bytes=size)
    pace = Pace(source.total_chunks, kept=source.kept, origin=source.origin)
    _host.say("starting")
    writer = open_writer(path, width=width, height=height, fps=fps, enlarge=enlarge)
    try:
        with Progress(source.total_chunks, source.maker) as progress, writer:
            for frames in video:
                writer.write(frames)
                if images is not None:
                    images.append(frames)
                text = pace.tick(len(frames))
                progress.show(pace.done, text, partial(_seen, frames, fps))
    finally:
        if pace.done < source.total_chunks and writer.frames_written:
            kept = f"{writer.frames_written / fps:.1f} s of {source.frames / fps:.1f} s"
            logger.warning(
                "Stopped early: %s are in %s. Queue again to go on after the last chunk.", kept, path
            )
            _host.say(f"stopped: {kept} are in {path.name}")
            stopped()


def _seen(frames: Tensor, fps: float) -> tuple[Tensor, float] | None:
    """Return what a preview shows of a chunk, if there is anything."""
    return (frames, fps) if len(frames) else None
