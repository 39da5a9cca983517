"""Where the frames of a run are shown: an MP4 or numbered pictures, cut to what is right, gone on with."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..outputs import is_video, split_pattern
from ..recording import Recording
from ..video import Pictures
from .aside import aside_folder, move_aside
from .growing_video import GrowingVideo, cut_video, finish_video


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFile:
    """An MP4."""

    path: Path

    picture: Mapping[str, Any]
    """See ``Recording``."""

    def cut(self, right: int, run: Path) -> int:  # noqa: ARG002 - pictures need it
        """Remove what comes after the first ``right`` frames; return after how many it is gone on with."""
        return cut_video(self.path, **self.picture, frames=right)

    def sink(self, frames: int) -> GrowingVideo:
        """Return where the frames after the first ``frames`` end."""
        return GrowingVideo(self.path, **self.picture, frames=frames)

    def finish(self) -> None:
        """Make it an ordinary MP4.

        Raises:
            OutputError: There is no room; it stays as it is.
        """
        finish_video(self.path)

    def state(self) -> dict[str, int]:
        """Return what tells that it is the one that was finished; nothing where there is none."""
        return {"bytes": self.path.stat().st_size} if self.path.is_file() else {}

    def put_aside(self, run: Path) -> None:
        """Move it to where a run keeps what it does not need, if it is there."""
        if self.path.exists():
            move_aside(self.path, aside_folder(run))


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureFolder:
    """Numbered PNG files."""

    folder: Path

    name: str
    """Pattern of their names, with the place of the number."""

    enlarge: int
    """Side, in pixels, of the square each pixel becomes."""

    def cut(self, right: int, run: Path) -> int:
        """Move what comes after the first ``right`` pictures aside; return how many there are."""
        there = self._pictures()
        self._move(range(right, there), run)
        return min(there, right)

    def sink(self, frames: int) -> Pictures:
        """Return where the frames after the first ``frames`` end."""
        return Pictures(self.folder, self.name, self.enlarge, first=frames)

    def finish(self) -> None:
        """Nothing is left to do: every picture is complete by itself."""

    def state(self) -> dict[str, int]:
        """Return what tells that they are those that were finished."""
        return {"pictures": self._pictures()}

    def put_aside(self, run: Path) -> None:
        """Move all pictures to where a run keeps what it does not need."""
        self._move(range(self._pictures()), run)

    def _move(self, numbers: range, run: Path) -> None:
        aside = aside_folder(run) / "pictures"
        # The last one first: whenever this ends, those that are left follow each other without a gap.
        for number in reversed(numbers):
            move_aside(self.folder / (self.name % number), aside)

    def _pictures(self) -> int:
        """Return how many pictures there are, from number 0 on without a gap."""
        before, after = re.split(r"%\d+d", self.name)
        if not self.folder.is_dir():
            return 0
        names = {entry.name for entry in self.folder.iterdir() if entry.name.startswith(before)}
        names = {name for name in names if name.endswith(after)}
        return next(number for number in range(len(names) + 1) if self.name % number not in names)


def shown_at(recording: Recording) -> VideoFile | PictureFolder:
    """Return where the frames of a recording are shown.

    Raises:
        OutputError: It is neither a video nor pictures.
    """
    if is_video(recording.out):
        return VideoFile(path=Path(recording.out), picture=recording.picture)
    folder, name = split_pattern(recording.out)
    return PictureFolder(folder=folder, name=name, enlarge=recording.enlarge)
