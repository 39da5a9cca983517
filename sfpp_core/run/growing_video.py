"""A video that can be gone on with: one MP4, encoded in parts of a fixed number of frames.

Each part is the work of an encoder of its own, so its bytes depend on its frames alone. Whatever ended the
encoder in the middle of a part, the file is cut where that part begins and the part is encoded again: in the
end the file is, byte for byte, that of a run that nothing ended.
"""

import os
import subprocess
from pathlib import Path
from typing import IO

import numpy as np

from ..durable import whole_file
from ..encoder import GROWING, Encoder, find_ffmpeg, last_words
from ..errors import OutputError
from .fragments import (
    Part,
    codec_of,
    fragments,
    head_of,
    moved,
    new_digest,
    parts,
    read_box,
    samples,
    seal,
    ticks_per_frame,
)

PART_FRAMES = 160
"""Frames of a part, 10 seconds at 16 per second: what is encoded again, at most, when a run goes on."""


class GrowingVideo:
    """Where the frames of a run end. Puts them into an MP4 that plays at every moment."""

    def __init__(self, path: Path, *, width: int, height: int, fps: float, enlarge: int, frames: int) -> None:
        """Go on with a video.

        Args:
            path: The video.
            width: Pixels of the frames put in.
            height: Pixels.
            fps: Frames per second.
            enlarge: Side, in pixels, of the square each pixel becomes.
            frames: Frames in the file, as ``cut_video`` returns them; 0 begins it anew.
        """
        self.path = path
        self._look = {"width": width, "height": height, "fps": fps, "enlarge": enlarge}
        self._frames = self._first = frames
        self._part: Encoder | None = None
        there = _after(path, frames)
        self._fragments, self._stop = there.fragments, there.stop

    def put(self, picture: np.ndarray) -> None:
        """Encode one frame, ``(H, W, 3)`` in bytes."""
        if self._part is None:
            self._first = self._frames
            self._part = Encoder(self.path, **self._look, receive=self._receive)
        self._part.put(picture)
        self._frames += 1
        if self._frames % PART_FRAMES == 0:
            self.finish()

    def finish(self) -> None:
        """Complete the part. Harmless after an error or without any frame."""
        part, self._part = self._part, None
        if part is not None:
            part.finish()

    def _receive(self, stream: IO[bytes]) -> None:
        """Append one part as it comes, a fragment at a time."""
        first, ticks, index, head = self._first, None, b"", b""
        digest = new_digest()
        with self.path.open("r+b" if self.path.exists() else "w+b", buffering=0) as file:
            while (found := read_box(stream))[0]:
                kind, content = found
                if kind in ("ftyp", "moov") and not first:
                    head += content
                elif kind == "moof":
                    ticks = ticks_per_frame(content) if ticks is None else ticks
                    self._fragments += 1
                    index = moved(content, number=self._fragments, ticks=first * ticks)
                elif kind == "mdat":
                    digest.update(head + index + content)
                    self._stop = _put(file, self._stop, head + index + content)
                    head = b""
            if self._frames - first == PART_FRAMES:
                self._stop = _put(file, self._stop, seal(digest.digest()))
            os.fsync(file.fileno())


def cut_video(path: Path, *, frames: int, width: int, height: int, fps: float, enlarge: int) -> int:
    """Make a video ready to be gone on with; return how many frames it keeps.

    Args:
        path: The video; it may be missing, torn, or finished.
        frames: Frames that are still right, from the first.
        width: Pixels of the frames before enlarging.
        height: Pixels.
        fps: Frames per second.
        enlarge: Side, in pixels, of the square each pixel becomes.

    Returns:
        A multiple of ``PART_FRAMES``, at most ``frames``: later ones are encoded once more, and the file does
        not change where they come out the same. 0 where the file is of no use; it is left as it is.

    Raises:
        OutputError: A finished video is to be gone on with and there is no room to take it apart; it stays.
    """
    if not path.is_file() or not path.stat().st_size:
        return 0
    head = _head(width=width, height=height, fps=fps, enlarge=enlarge)
    if not any(True for _ in fragments(path)) and not _take_apart(path, head):
        return 0
    if head_of(path) != head:
        return 0
    kept = _after(path, frames, exactly=False)
    right = (fragment.stop for fragment in fragments(path) if fragment.frames <= frames)
    with path.open("r+b") as file:
        file.truncate(max(kept.stop, *right, 0))
    return kept.frames


def finish_video(path: Path) -> None:
    """Turn a growing video into an ordinary one, which every player and every editor knows how to search.

    Nothing is encoded again. The file is replaced once the other is whole.

    Raises:
        OutputError: There is no room for both at a time; the growing one stays and plays.
    """
    with whole_file(path) as part:
        command = [*_copying(path), "-movflags", "+faststart", "-f", "mp4", f"file:{part}"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            said = last_words(done.stderr.splitlines())
            raise OutputError(
                f"{path} cannot be made an ordinary video ({said}); free some room and start again."
            )


def _put(file: IO[bytes], place: int, content: bytes) -> int:
    """Put a fragment into a file and return where it ends.

    What is there already, bit for bit, stays, and so does all that comes after it: encoded once more, a part
    that was interrupted gives the same fragments. Otherwise the file ends here.
    """
    file.seek(place)
    if file.read(len(content)) == content:
        return place + len(content)
    file.seek(place)
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(place)
        raise
    file.truncate()
    return place + len(content)


def _after(path: Path, frames: int, *, exactly: bool = True) -> Part:
    """Return the last whole part that ends at so many frames, or, not ``exactly``, before; or none."""
    last = Part(stop=0, frames=0, fragments=0)
    for part in parts(path) if frames else ():
        if part.frames % PART_FRAMES or part.frames > frames:
            break
        last = part
    return last if not exactly or last.frames == frames else Part(stop=0, frames=0, fragments=0)


def _head(*, width: int, height: int, fps: float, enlarge: int) -> bytes:
    """Return what a video of these sizes begins with: parts can be joined where that is the same."""
    found = bytearray()

    def receive(stream: IO[bytes]) -> None:
        while (box := read_box(stream))[0]:
            if box[0] in ("ftyp", "moov"):
                found.extend(box[1])

    encoder = Encoder(Path("head"), width=width, height=height, fps=fps, enlarge=enlarge, receive=receive)
    encoder.put(np.zeros((height, width, 3), np.uint8))
    encoder.finish()
    return bytes(found)


def _take_apart(path: Path, head: bytes) -> bool:
    """Undo ``finish_video``; return whether the file was a video of this encoder at all.

    Raises:
        OutputError: There is no room for both at a time, or the encoder was killed; the file stays as it is.
    """
    process = subprocess.Popen(
        [*_copying(path), *GROWING, "-f", "mp4", "pipe:1"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        with whole_file(path) as part, part.open("wb") as file:
            frames = _loosen(process.stdout, file, head)
            process.stdout.close()  # a stream that makes no sense is not read on, and ffmpeg would wait
            status = process.wait()
            if status < 0:
                raise OutputError(f"{path}: ffmpeg was killed by signal {-status}; start again.")
            if status or not frames:
                raise _AnotherVideoError
    except _AnotherVideoError:
        return False
    finally:
        process.stdout.close()  # which ends it, if anybody else has not
        process.wait()
    return True


class _AnotherVideoError(Exception):
    """A file is no video that parts can be joined to."""


def _loosen(stream: IO[bytes], file: IO[bytes], head: bytes) -> int:
    """Write the fragments of a stream behind ``head``, sealed part by part; return their frames."""
    digest, index, frames, sealed = new_digest(), head, 0, 0
    while (found := read_box(stream))[0]:
        kind, content = found
        if kind == "moov" and codec_of(content) != codec_of(head):
            raise _AnotherVideoError
        if kind == "moof":
            index += content
            frames += samples(content)
        elif kind == "mdat":
            digest.update(index + content)
            file.write(index + content)
            index = b""
            if frames % PART_FRAMES == 0 and frames > sealed:
                file.write(seal(digest.digest()))
                digest, sealed = new_digest(), frames
    return frames


def _copying(source: Path) -> list[str]:
    """Return the command, but for its end, that writes a video again, bit for bit the same pictures."""
    command = [find_ffmpeg(), "-hide_banner", "-loglevel", "error", "-nostdin", "-y", "-i", f"file:{source}"]
    return [*command, "-map", "0:v:0", "-c", "copy"]
