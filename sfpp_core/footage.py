"""Any video or numbered pictures as a stream of frames: all of them, in order, a few in memory at a time.

Legend: F frames, H and W pixels.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .encoder import find_ffmpeg, last_words
from .errors import OutputError, PictureError
from .geometry import FPS
from .outputs import OutputPath, split_pattern

PIECE = 12
"""Frames read at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footage:
    """A video that can be read from its first frame to its last."""

    path: Path
    """A video, or the folder of the pictures."""

    width: int
    """Pixels."""

    height: int
    """Pixels."""

    fps: float
    """Frames per second; of pictures, what was asked for."""

    announced: int = 0
    """Frames there should be, roughly; 0 where the file does not say, as one that still grows."""

    pictures: tuple[Path, ...] = ()
    """Files of a sequence, in order."""

    def pieces(self) -> Generator[Tensor]:
        """Yield the frames ``(F, 3, H, W)`` in [0, 1], float32, ``PIECE`` at a time.

        Raises:
            PictureError: The file is damaged, after the frames up to there; or a picture differs in size.
            OutputError: ffmpeg is missing.
        """
        together: list[np.ndarray] = []
        for picture in self._from_pictures() if self.pictures else self._from_video():
            together.append(picture)
            if len(together) == PIECE:
                yield _as_frames(together)
                together = []
        if together:
            yield _as_frames(together)

    def _from_pictures(self) -> Iterator[np.ndarray]:
        for path in self.pictures:
            picture = _read(path)
            if picture.shape != (self.height, self.width, 3):
                seen = f"{picture.shape[1]}x{picture.shape[0]}"
                raise PictureError(
                    f"{path} is {seen} and the first picture {self.width}x{self.height}; keep the pictures "
                    "of one video in a folder of its own."
                )
            yield picture

    def _from_video(self) -> Iterator[np.ndarray]:
        size = self.width * self.height * 3
        with tempfile.TemporaryFile() as said:
            command = [*_opening(self.path), "-loglevel", "error", "-fps_mode", "passthrough"]
            command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
            with subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, bufsize=size
            ) as ffmpeg:
                assert ffmpeg.stdout is not None
                try:
                    while len(picture := ffmpeg.stdout.read(size)) == size:
                        yield np.frombuffer(picture, np.uint8).reshape(self.height, self.width, 3)
                finally:
                    ffmpeg.stdout.close()
                    ffmpeg.terminate()
            said.seek(0)
            why = last_words(line.decode(errors="replace") for line in said)
        if ffmpeg.returncode > 0:
            raise PictureError(f"{self.path} is damaged ({why}); copy it again.")


def open_footage(path: OutputPath, *, picture_fps: float = FPS) -> Footage:
    """Return a video or a sequence of pictures, ready to be read.

    Args:
        path: Whatever ffmpeg reads; a folder of PNG pictures, or a pattern such as ``folder/frame_%06d.png``.
        picture_fps: Frames per second of pictures, which carry none.

    Raises:
        PictureError: There is no such file, or nothing in it plays.
        OutputError: ffmpeg is missing.
    """
    place = Path(path)
    if place.is_dir() or "%" in place.name:
        return _sequence(path, picture_fps)
    if not place.is_file():
        raise PictureError(f"{place} does not exist or is no file; name a video or a folder of pictures.")
    command = [*_opening(place), "-frames:v", "1", "-f", "null", "-"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    source, _, result = done.stderr.partition("Output #0")
    rate = re.search(r"Stream #0.*?: Video: .*?, ([\d.]+k?) (?:fps|tbr)", source)
    size = re.search(r"Stream #0.*?: Video: .*?, (\d+)x(\d+)", result)
    if done.returncode or size is None:
        why = last_words(done.stderr.splitlines())
        raise PictureError(f"{place} holds no frame that plays ({why}); is it a video?")
    fps = float(rate[1].replace("k", "e3")) if rate else float(FPS)
    length = re.search(r"Duration: (\d+):(\d+):([\d.]+)", source)
    seconds = int(length[1]) * 3600 + int(length[2]) * 60 + float(length[3]) if length else 0
    return Footage(
        path=place, width=int(size[1]), height=int(size[2]), fps=fps, announced=round(seconds * fps)
    )


def _sequence(path: OutputPath, fps: float) -> Footage:
    """Return the pictures of one sequence."""
    try:
        folder, name = split_pattern(path)
    except OutputError as error:
        raise PictureError(
            f"{path} is no sequence of pictures; name a folder, or folder/name_%06d.png."
        ) from error
    before, after = re.split(r"%\d+d", name) if "%" in Path(path).name else ("", ".png")
    wanted = re.compile(re.escape(before) + r".*?(\d+)" + re.escape(after), re.IGNORECASE)
    found = [(wanted.fullmatch(entry.name), entry) for entry in folder.iterdir()] if folder.is_dir() else []
    numbered = sorted((int(match[1]), entry) for match, entry in found if match)
    if not numbered:
        raise PictureError(
            f"{path} holds no numbered PNG pictures; name a video, or the folder of a sequence."
        )
    height, width, _ = _read(numbered[0][1]).shape
    pictures = tuple(entry for _, entry in numbered)
    return Footage(
        path=folder, width=width, height=height, fps=fps, announced=len(pictures), pictures=pictures
    )


def _read(path: Path) -> np.ndarray:
    """Return a picture as ``(H, W, 3)`` in bytes."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PictureError(f"{path} is not a picture that can be read ({error}).") from error


def _opening(path: Path) -> list[str]:
    """Return the start of the command line. A playlist may name other files; only plain files are opened."""
    return [find_ffmpeg(), "-hide_banner", "-nostdin", "-threads", "1", "-protocol_whitelist", "file,pipe",
            "-i", f"file:{os.fspath(path)}", "-map", "0:v:0"]  # fmt: skip


def _as_frames(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
