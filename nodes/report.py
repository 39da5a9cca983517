"""How a video drifts, second by second, as a ComfyUI node."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..sfpp_core.drift import CHUNK_FRAMES, Borders, DriftMeter
from ..sfpp_core.drift_plot import missing, plot_picture
from ..sfpp_core.drift_report import DriftReport, ReportFiles, report_of
from ..sfpp_core.errors import SettingsError
from ..sfpp_core.footage import PIECE, open_footage
from ..sfpp_core.geometry import FPS
from . import _host
from ._host import io
from .plain_errors import plain_errors
from .progress import Progress


class SFPPDriftReport(io.ComfyNode):
    """Measure a video and say what drifts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return _host.schema(
            node_id="SFPPDriftReport",
            display_name="Drift Report (Self-Forcing++)",
            category="video/self-forcing++",
            description="Measures any video second by second: luma, contrast, colour, clipping, sharpness, "
            "motion, flicker, seams between chunks, repetition. Says what is wrong, draws it, and saves the "
            "table (CSV, JSON) and the plot in the output folder.",
            search_aliases=["video quality", "colour drift", "flicker", "loop detection"],
            inputs=[
                io.String.Input(
                    "filename_prefix",
                    default="video/Drift",
                    tooltip="Name of the files in the output folder; may name subfolders.",
                ),
                io.Int.Input(
                    "chunk_frames",
                    default=CHUNK_FRAMES,
                    min=0,
                    max=1024,
                    tooltip="Frames generated together, to look for seams: 12 for chunks of 3 latent frames. "
                    "0: the video was not made in chunks.",
                ),
                io.Float.Input(
                    "images_fps",
                    default=float(FPS),
                    min=1.0,
                    max=240.0,
                    step=1.0,
                    tooltip="Frames per second of images, which have none, and of a video that states none. "
                    "Others bring their own.",
                ),
                io.Int.Input(
                    "first_chunk_frames",
                    default=0,
                    min=0,
                    max=1024,
                    optional=True,
                    extra_dict={"advanced": True},
                    tooltip="Frames of the first chunk. 0: three fewer than the others, as of a video from "
                    "text; 13 for one that starts from an image.",
                ),
                io.Video.Input(
                    "video",
                    optional=True,
                    tooltip="Read a few frames at a time, however long it is.",
                ),
                io.Image.Input("images", optional=True, tooltip="In place of a video: its frames in order."),
            ],
            outputs=[
                io.String.Output(display_name="STRING", tooltip="What was found, strongest first."),
                io.Image.Output(display_name="IMAGE", tooltip="The plot. Needs matplotlib."),
            ],
            is_output_node=True,
        )

    @classmethod
    @plain_errors
    def execute(
        cls,
        filename_prefix: str,
        chunk_frames: int,
        images_fps: float,
        video: Any = None,
        images: Tensor | None = None,
        first_chunk_frames: int = 0,
    ) -> io.NodeOutput:
        """Measure, save, and return the findings and the plot."""
        if (video is None) == (images is None):
            seen = "nothing is" if video is None else "both are"
            raise SettingsError(f"{seen} connected to video and images; connect one of them.")
        borders = Borders(period=chunk_frames, first=first_chunk_frames or None)
        table, subfolder = _host.output_file(filename_prefix, 0, 0, ".csv")
        why = missing()
        plot = None if why else table.with_suffix(".png")
        files = ReportFiles(csv=table, json=table.with_suffix(".json"), plot=plot)
        files.check()
        with _frames(video, images, images_fps) as (pieces, total, fps):
            report = _measured(pieces, total, DriftMeter(fps=fps, borders=borders))
        files.write(report)
        text = "\n".join(report.lines())
        _host.say(text)
        if plot is None:
            return io.NodeOutput(text, _host.blocked(why))
        return io.NodeOutput(text, plot_picture(report), ui=_host.picture(plot, subfolder))


@contextmanager
def _frames(
    video: Any, images: Tensor | None, images_fps: float
) -> Iterator[tuple[Iterator[Tensor], int, float]]:
    """Yield frames ``(F, 3, H, W)`` by pieces, how many there should be, and frames per second."""
    if images is not None:
        yield (part.movedim(-1, 1)[:, :3] for part in images.split(PIECE)), len(images), images_fps
        return
    with _host.video_on_disk(video) as path:
        footage = open_footage(path, picture_fps=images_fps)
        pieces: Generator[Tensor] = footage.pieces()
        try:
            yield pieces, footage.announced, footage.fps
        finally:
            pieces.close()  # a Cancel must not leave the reader at work


def _measured(pieces: Iterator[Tensor], total: int, meter: DriftMeter) -> DriftReport:
    """Return the report of a video, showing how far it is."""
    seconds = []
    with Progress(max(1, total)) as progress:
        for frames in pieces:
            seconds += meter.add(frames)
            progress.show(min(meter.frames, max(1, total)), f"measured {meter.frames / meter.fps:.0f} s")
    return report_of(meter, [*seconds, *meter.finish()])
