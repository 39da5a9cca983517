"""The drift report of a video: a table by second, its faults, and both as text, CSV and JSON."""

import csv
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from io import StringIO
from pathlib import Path

from torch import Tensor

from . import drift_faults, drift_plot
from .drift import Borders, DriftMeter, Second
from .drift_faults import FAULTS, LEAST_SECONDS, Fault, find_faults
from .durable import whole_file, write_text
from .errors import OutputError
from .outputs import check_folder

FORMAT, VERSION = "sfpp-drift", 1
"""First entries of the JSON. The version grows when an entry goes or changes its meaning."""

NAMES = {".csv": "drift.csv", ".json": "drift.json", ".png": "drift.png"}
"""Files of a report in a folder, by ending."""

_THRESHOLDS = (
    "LUMA_STEP", "CLIPPED_STEP", "SATURATION_STEP", "TINT_STEP", "RATIO", "STOPPED", "FLASH", "SEAM",
    "REPEATED",
)  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftReport:
    """What was measured of one video."""

    fps: float
    """Frames per second."""

    frames: int
    """Frames measured."""

    borders: Borders
    """Where its chunks meet."""

    motion_by: str
    """How motion was measured."""

    seconds: tuple[Second, ...]
    """The table."""

    faults: tuple[Fault, ...]
    """Every fault that could be judged, the strongest first; from a score of 1 it counts."""

    @property
    def findings(self) -> list[Fault]:
        """The faults that count, the strongest first."""
        return [fault for fault in self.faults if fault.score >= 1]

    @property
    def unjudged(self) -> list[str]:
        """Names of the faults there was nothing to judge by: too short, nothing moves, nothing repeats."""
        judged = {fault.name for fault in self.faults}
        return [name for name in FAULTS if name not in judged]

    def lines(self) -> list[str]:
        """Return the report for people: what it is of, then one line per finding."""
        lines = [f"{self.frames / self.fps:.1f} s, {self.frames} frames at {self.fps:g} per second"]
        lines[0] += f"; motion by {self.motion_by}." if self.motion_by else "."
        if len(self.seconds) < LEAST_SECONDS:
            lines.append(f"too short to judge drift: that takes {LEAST_SECONDS} s.")
        lines += [f"{fault.name} ({fault.score:.1f}): {fault.text}." for fault in self.findings]
        if not self.faults:
            lines.append("nothing could be judged.")
        elif not self.findings:
            nearest = self.faults[0]
            lines.append(
                f"no fault: every score is below 1; nearest is {nearest.name} ({nearest.score:.1f})."
            )
        return lines

    def as_csv(self) -> str:
        """Return the table: one row per second, a column per field of ``Second``; empty where unmeasured."""
        text = StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(Second)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(_rounded(second) for second in self.seconds)
        return text.getvalue()

    def as_json(self) -> str:
        """Return everything: the video, thresholds, scores, findings in words, and the table."""
        whole = {
            "format": FORMAT,
            "version": VERSION,
            "fps": self.fps,
            "frames": self.frames,
            "chunk_frames": self.borders.period,
            "first_chunk_frames": self.borders.first_frames if self.borders.period else 0,
            "motion_by": self.motion_by,
            "thresholds": {name.lower(): getattr(drift_faults, name) for name in _THRESHOLDS},
            "findings": [fault.text for fault in self.findings],
            "faults": [asdict(fault) | {"score": round(fault.score, 4)} for fault in self.faults],
            "not_judged": self.unjudged,
            "seconds": [_rounded(second) for second in self.seconds],
        }
        return json.dumps(whole, indent=1, allow_nan=False) + "\n"


def report_of(meter: DriftMeter, seconds: Sequence[Second]) -> DriftReport:
    """Return the report of what ``meter`` has measured, given all the seconds it returned."""
    return DriftReport(
        fps=meter.fps,
        frames=meter.frames,
        borders=meter.borders,
        motion_by=meter.motion_by,
        seconds=tuple(seconds),
        faults=tuple(find_faults(seconds, fps=meter.fps, borders=meter.borders)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFiles:
    """Where a report goes. Each file appears whole or not at all."""

    csv: Path | None = None
    """The table."""

    json: Path | None = None
    """Table, scores and findings."""

    plot: Path | None = None
    """A picture of the table; its ending says of which kind, e.g. ``.png`` or ``.svg``."""

    @classmethod
    def at(cls, place: Path) -> "ReportFiles":
        """Return the files meant by one path: a ``.csv``, ``.json`` or ``.png``, or a folder for all three.

        Without matplotlib a folder gets no plot, and a warning says so.

        Raises:
            OutputError: It is none of these, or the folder cannot be made.
        """
        match place.suffix.lower():
            case ".csv":
                return cls(csv=place)
            case ".json":
                return cls(json=place)
            case ".png":
                return cls(plot=place)
            case ending if ending and not place.is_dir():
                raise OutputError(f"the report is {place}; name a .csv, .json or .png file, or a folder.")
        try:
            place.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"the folder {place} cannot be made ({error.strerror}); choose another."
            ) from error
        table, whole, plot = (place / name for name in NAMES.values())
        if why := drift_plot.missing():
            logger.warning("%s The report goes without its plot.", why)
            return cls(csv=table, json=whole)
        return cls(csv=table, json=whole, plot=plot)

    def check(self) -> None:
        """Refuse files that cannot be written. Leaves nothing behind.

        Raises:
            OutputError: A folder is missing or write-protected, two files are one, or a plot is asked for
                without matplotlib.
        """
        if self.plot is not None:
            drift_plot.check_plot(self.plot)
        seen: set[Path] = set()
        for path in filter(None, (self.csv, self.json, self.plot)):
            if path.is_dir():
                raise OutputError(f"{path} is a folder; name a file in it.")
            if path.resolve() in seen:
                raise OutputError(f"{path} is named for two parts of the report; name a file for each.")
            seen.add(path.resolve())
            check_folder(path.parent)

    def write(self, report: DriftReport) -> list[Path]:
        """Write the report; return the files.

        Raises:
            OutputError: The disk is full, or a file cannot be written.
        """
        if self.csv is not None:
            write_text(self.csv, report.as_csv())
        if self.json is not None:
            write_text(self.json, report.as_json())
        if self.plot is not None:
            with whole_file(self.plot) as part:
                drift_plot.save_plot(report, part)
        return [path for path in (self.csv, self.json, self.plot) if path is not None]


class DriftWatch:
    """Measures a video while it is recorded. Trouble here never ends the video: it is told in a warning.

    Use::

        watch = DriftWatch(ReportFiles.at(folder), fps=16)
        try:
            record(pieces, recording, report=report, observe=watch.add)
        finally:
            finished = watch.finish()   # also of what a cancelled run has made

    ``watched`` does the same in one line.
    """

    def __init__(self, files: ReportFiles, *, fps: float, borders: Borders | None = None) -> None:
        """Prepare; refuse what cannot be written.

        Args:
            files: Where the report goes.
            fps: Frames per second.
            borders: As for ``DriftMeter``.

        Raises:
            OutputError: As ``ReportFiles.check``.
        """
        files.check()
        self._files = files
        self._meter = DriftMeter(fps=fps, borders=borders)
        self._seconds: list[Second] = []
        self._broken = False

    def add(self, frames: Tensor) -> None:
        """Measure the next frames ``(F, 3, H, W)`` in [0, 1]."""
        if self._broken:
            return
        try:
            self._seconds += self._meter.add(frames)
        except Exception as error:  # any: hours of video must not end for a number in a table
            self._broken = True
            logger.warning("the drift report ends at frame %d: %s", self._meter.frames, error)

    def finish(self) -> DriftReport | None:
        """Write the report, tell its findings in warnings, and return it.

        ``None`` where nothing was made or it could not be written.
        """
        if not self._meter.frames:
            return None
        try:
            self._seconds += self._meter.finish()
            report = report_of(self._meter, self._seconds)
            self._files.write(report)
        except Exception as error:  # any, as above: the video is there
            logger.warning("the drift report could not be written: %s", error)
            return None
        for fault in report.findings:
            logger.warning("drift, %s (%.1f): %s.", fault.name, fault.score, fault.text)
        return report


@contextmanager
def watched(
    place: Path | None, *, fps: float, borders: Borders | None = None
) -> Iterator[Callable[[Tensor], None] | None]:
    """Yield what shall see the frames of a video that is made meanwhile; report on them at the end.

    Args:
        place: As for ``ReportFiles.at``; ``None`` wants no report, and ``None`` is yielded.
        fps: Frames per second.
        borders: As for ``DriftMeter``.

    Raises:
        OutputError: The report cannot be written there.
    """
    if place is None:
        yield None
        return
    watch = DriftWatch(ReportFiles.at(place), fps=fps, borders=borders)
    try:
        yield watch.add
    finally:
        watch.finish()


def _rounded(second: Second) -> dict[str, float | int | None]:
    """Return a row with numbers as long as they mean something."""
    row = asdict(second)
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()}
