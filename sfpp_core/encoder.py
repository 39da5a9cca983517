"""The ffmpeg process that makes an MP4 grow, and the one that reads it back.

ffmpeg is the binary that imageio-ffmpeg brings along; it comes without ffprobe.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO

import numpy as np

from .durable import unwritable
from .errors import OutputError
from .outputs import OutputPath

FRAGMENT_SECONDS = 0.25
"""Seconds of video per MP4 fragment: what a killed encoder may take with it."""

KEYFRAME_SECONDS = 1.0
"""Seconds between the frames a player can jump to."""

GROWING = ("-movflags", "+frag_keyframe+empty_moov+default_base_moof")
GROWING += ("-frag_duration", str(round(FRAGMENT_SECONDS * 1e6)))
"""Options of ffmpeg for an MP4 that plays while it grows."""

_FULL = "No space left on device"


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What a video file holds."""

    frames: int
    """Frames that decode; all of them were decoded to count them."""

    width: int
    """Pixels."""

    height: int
    """Pixels."""

    fps: float
    """Frames per second."""


def video_info(path: OutputPath) -> VideoInfo:
    """Decode a video from end to end and say what it holds; a file cut short counts up to the cut.

    Raises:
        OutputError: No such file, or nothing in it plays.
    """
    if not Path(path).is_file():
        raise OutputError(f"{path} is not a file; check the path.")
    count = "-map 0:v:0 -fps_mode passthrough -f null -progress pipe:1 -nostats -"
    command = [find_ffmpeg(), "-hide_banner", "-nostdin", "-threads", "1", "-i", f"file:{os.fspath(path)}"]
    command += count.split()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    counts = re.findall(r"^frame=\s*(\d+)", done.stdout, re.MULTILINE)
    stream = re.search(r"Stream #0.*?: Video: .*?, (\d+)x(\d+).*?, ([\d.]+) fps", done.stderr)
    if stream is None or not counts or not int(counts[-1]):
        said = last_words(done.stderr.splitlines())
        raise OutputError(f"{path} holds no frame that plays ({said}); is it a video?")
    width, height, fps = stream.groups()
    return VideoInfo(frames=int(counts[-1]), width=int(width), height=int(height), fps=float(fps))


class Encoder:
    """One ffmpeg process per MP4. It starts with the first frame and ends when its input ends."""

    def __init__(
        self,
        path: Path,
        *,
        width: int,
        height: int,
        fps: float,
        enlarge: int,
        receive: Callable[[IO[bytes]], None] | None = None,
    ) -> None:
        """Prepare, without touching ``path`` yet. Sizes are those of the frames put in.

        Args:
            path: The video.
            width: Pixels.
            height: Pixels.
            fps: Frames per second.
            enlarge: Side, in pixels, of the square each pixel becomes.
            receive: Reads the MP4 to its end and stores it, in a thread of its own; may raise OSError.
                ``None`` lets the encoder write ``path``.
        """
        self._path = path
        target = ["-f", "mp4", "pipe:1"] if receive else [f"file:{path}"]
        self._command = [*_command(width=width, height=height, fps=fps, enlarge=enlarge), *target]
        self._receive = receive
        self._receiver = Thread(target=self._take, name="encoder-output", daemon=True)
        self._trouble: OSError | None = None
        self._frames = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._said: deque[bytes] = deque(maxlen=20)
        self._listener = Thread(target=self._listen, name="encoder-messages", daemon=True)

    def put(self, picture: np.ndarray) -> None:
        """Encode one frame, ``(H, W, 3)`` in bytes."""
        try:
            if self._process is None:
                self._process = self._start()
            assert self._process.stdin is not None
            self._process.stdin.write(picture.data)
            self._process.stdin.flush()
        except OSError as error:
            self.finish()
            raise OutputError(f"{self._path}: the encoder takes no frames ({error}); start again.") from error
        self._frames += 1

    def finish(self) -> None:
        """Complete the file. Harmless after an error or without any frame."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a broken pipe; the exit status says more
            self._process.stdin.close()
        if self._receive is not None:
            self._receiver.join()
        status = self._process.wait()
        self._listener.join()
        if self._trouble is not None:
            raise unwritable(self._path, self._trouble) from self._trouble
        if status:
            raise self._failure(status)

    def _start(self) -> subprocess.Popen[bytes]:
        # Its own session: Ctrl-C in a terminal is for us, not for the encoder, which has a file to finish.
        flags = 0
        if sys.platform == "win32":
            flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL if self._receive is None else subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            creationflags=flags,
        )
        self._listener.start()
        if self._receive is not None:
            self._receiver.start()
        return self._process

    def _take(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._receive is not None
        try:
            self._receive(self._process.stdout)
        except OSError as error:
            self._trouble = error
            self._process.kill()  # it would wait for ever for somebody to read
        finally:
            self._process.stdout.close()

    def _listen(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        self._said.extend(self._process.stderr)

    def _failure(self, status: int) -> OutputError:
        lines = [line.decode(errors="replace") for line in self._said]
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        why, remedy = last_words(lines), "start again."
        if any(_FULL in line for line in lines):
            why, remedy = _FULL, "free some room or write to another disk."
        return OutputError(
            f"{self._path}: the encoder {how} after {self._frames} frames ({why}). "
            f"The file keeps what reached it; {remedy}"
        )


def find_ffmpeg() -> str:
    """Return the path of the encoder.

    Raises:
        OutputError: imageio-ffmpeg is missing or brings none for this machine.
    """
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise OutputError(f"no video encoder ({error}); run `pip install imageio-ffmpeg`.") from error


def last_words(lines: Iterable[str]) -> str:
    """Return the last line of ffmpeg that says something, without its ``[component @ address]``."""
    bare = [re.sub(r"^(\[[^]]*] *)+", "", line).strip() for line in lines]
    telling = [line for line in bare if line and not line.startswith(("Last message", "Conversion failed"))]
    return telling[-1].rstrip(".") if telling else "it said nothing"


def _command(*, width: int, height: int, fps: float, enlarge: int) -> list[str]:
    """Return the command but for its output: raw RGB in, fragmented H.264 MP4, in limited-range BT.709."""
    bt709 = (
        "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
    )
    filters = [bt709, "format=yuv420p"]
    if enlarge > 1:
        # Colours first: on the small picture they cost nothing, and the large one repeats its pixels exactly.
        larger = f"scale={width * enlarge}:{height * enlarge}:flags=neighbor"
        filters = [bt709, "format=yuv444p", larger, "format=yuv420p"]
    filters.append("setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709")
    source = f"-f rawvideo -pixel_format rgb24 -video_size {width}x{height} -framerate {fps:g} -i pipe:0"
    # Zero latency: no lookahead, so that frames reach the file at once. One thread encodes far faster than a
    # student generates, and leaves the other cores to it.
    codec = "-c:v libx264 -preset veryfast -crf 17 -tune zerolatency -threads 1"
    keyframes = f"-g {max(1, round(fps * KEYFRAME_SECONDS))}"
    colours = "-color_range tv -colorspace bt709 -color_primaries bt709 -color_trc bt709"
    command = [find_ffmpeg(), "-hide_banner", "-loglevel", "error", "-y", *source.split()]
    command += ["-filter_threads", "1", "-vf", ",".join(filters)]
    return [*command, *f"{codec} {keyframes} {colours}".split(), *GROWING, "-flush_packets", "1"]
