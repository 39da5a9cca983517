"""The command ``report``: any video measured, from its first frame to its last."""

import argparse
import signal
import sys
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

from .drift import CHUNK_FRAMES, Borders, DriftMeter, Second
from .drift_report import DriftReport, ReportFiles, report_of
from .errors import SFPPError
from .footage import open_footage
from .geometry import FPS

SUMMARY = "measure how a video drifts, second by second: any video, or a folder of PNG pictures"
"""What the command does, in a line."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of ``report``."""
    add = command.add_argument
    add("video", metavar="VIDEO", help="video file, folder of numbered PNG pictures, or name_%%06d.png")
    add("--csv", type=Path, metavar="FILE", help="write the table there, a row per second")
    add("--json", type=Path, metavar="FILE", help="write table, scores and findings there")
    add("--plot", type=Path, metavar="FILE", help="draw it there: .png, .svg or .pdf (needs matplotlib)")
    said = f"frames of a chunk, to look for seams; 0 for none (default {CHUNK_FRAMES})"
    add("--chunk-frames", type=int, default=CHUNK_FRAMES, metavar="N", help=said)
    said = "frames of the first chunk (default: 3 fewer; one more for a video that starts from an image)"
    add("--first-chunk-frames", type=int, metavar="N", help=said)
    add("--fps", type=float, default=FPS, metavar="X", help=f"of pictures, which have none (default {FPS})")
    add("--quiet", action="store_true", help="no progress and no text, only the files")


def run(arguments: argparse.Namespace, caught: list[int]) -> int:
    """Measure a video, write the files and tell the findings; return the exit code.

    Ctrl-C ends it early: what was measured by then is reported.

    Raises:
        SFPPError: The video cannot be read to its end, after what was measured is reported; or a file cannot
            be written.
    """
    torch.set_num_threads(1)  # the pictures are small: threads would wait for each other
    files = ReportFiles(csv=arguments.csv, json=arguments.json, plot=arguments.plot)
    files.check()
    borders = Borders(period=arguments.chunk_frames, first=arguments.first_chunk_frames)
    footage = open_footage(arguments.video, picture_fps=arguments.fps)
    meter, seconds, complete = DriftMeter(fps=footage.fps, borders=borders), [], True
    try:
        with _bar(footage.announced, quiet=arguments.quiet) as bar:
            for frames in footage.pieces():
                seconds += meter.add(frames)
                bar.update(len(frames))
    except KeyboardInterrupt:
        complete = False
    except SFPPError:
        if meter.frames:
            _tell(meter, seconds, files, quiet=arguments.quiet)
        raise
    _tell(meter, seconds, files, quiet=arguments.quiet)
    return 0 if complete else 128 + (caught[0] if caught else signal.SIGINT)


def _bar(frames: int, *, quiet: bool) -> "tqdm[NoReturn]":
    """Return the progress bar, counting frames; of 0 nothing is known."""
    pause = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=frames or None, unit=" frames", desc="measuring", disable=quiet, mininterval=pause)


def _tell(meter: DriftMeter, seconds: list[Second], files: ReportFiles, *, quiet: bool) -> DriftReport:
    """Write the report of what is measured, and say it."""
    report = report_of(meter, [*seconds, *meter.finish()])
    written = files.write(report)
    if not quiet:
        sys.stdout.write("\n".join([*report.lines(), *(f"written: {path}" for path in written)]) + "\n")
    return report
