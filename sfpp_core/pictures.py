"""Pictures and clips to start a video from, as frames of its size.

Both are scaled until they cover the frame and cut to it around the middle: nothing is stretched, and no bars
appear.

Legend: F frames, H and W height and width in pixels.
"""

import logging
import os
import subprocess
import tempfile
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from .encoder import find_ffmpeg, last_words
from .errors import GeometryError, PictureError
from .geometry import FPS
from .outputs import LARGEST_SIDE

PAPER = (255, 255, 255)
"""What shows through where a picture is transparent."""

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)


def read_picture(path: Path, *, width: int, height: int) -> Tensor:
    """Return a picture as one frame ``(1, 3, H, W)`` in [0, 1], float32.

    It is turned as its camera noted, and laid on white where it is transparent; of an animation, the first
    picture counts.

    Args:
        path: PNG, JPEG, WebP or whatever else Pillow reads.
        width: Pixels.
        height: Pixels.

    Raises:
        PictureError: There is no such file, or it is damaged, no picture, or far too large.
        GeometryError: The size asked for is impossible.
    """
    from PIL import Image, ImageOps

    _check(path, width, height)
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            picture = _opaque(upright)
    except (Image.UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise PictureError(f"{path} is not a picture that can be read ({error}); save it as PNG.") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise PictureError(f"{path} is damaged ({error}); save or copy it again.") from error
    scale = min(picture.width / width, picture.height / height)
    left, top = (picture.width - width * scale) / 2, (picture.height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    fitted = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None].float() / 255


def read_clip(
    path: Path,
    *,
    width: int,
    height: int,
    frames: int,
    least: int | None = None,
    end: Literal["last", "first"] = "last",
    fps: float = FPS,
) -> Tensor:
    """Return frames ``(F, 3, H, W)`` of a video in [0, 1], float32, at a steady rate.

    Args:
        path: Whatever ffmpeg reads; no more than the frames asked for are held in memory.
        width: Pixels.
        height: Pixels.
        frames: How many, after the change to ``fps``.
        least: How few will do if the clip is shorter; ``None`` wants all.
        end: Which frames: the last ones, to go on from, or the first.
        fps: Frames per second; frames are repeated or left out to keep the pace.

    Raises:
        PictureError: There is no such file, it is damaged or no video, or shorter than asked for.
        GeometryError: The size or the number asked for is impossible.
        OutputError: ffmpeg is missing.
    """
    _check(path, width, height)
    if frames < 1:
        raise GeometryError(f"frames is {frames}; ask for at least 1.")
    kept: deque[bytes] = deque(maxlen=frames)
    with tempfile.TemporaryFile() as said:
        command = _command(path, width=width, height=height, fps=fps)
        command += ["-frames:v", str(frames)] if end == "first" else []
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said
        ) as ffmpeg:
            assert ffmpeg.stdout is not None
            while len(picture := ffmpeg.stdout.read(3 * width * height)) == 3 * width * height:
                kept.append(picture)
        said.seek(0)
        why = last_words(line.decode(errors="replace") for line in said)
    if not kept:
        raise PictureError(f"{path} holds no frame that plays ({why}); is it a video?")
    if len(kept) < (wanted := frames if least is None else least):
        raise PictureError(
            f"{path} has {len(kept)} frames at {fps:g} per second and {wanted} are needed; choose a longer "
            "clip or ask for less of it."
        )
    if ffmpeg.returncode:
        logger.warning("%s is damaged (%s); its frames up to there are used.", path, why)
    pictures = np.frombuffer(b"".join(kept), np.uint8).reshape(-1, height, width, 3)
    return torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float() / 255


def is_picture(path: Path) -> bool:
    """Return whether ``path`` holds a single picture rather than a clip, going by its content."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            return getattr(file, "n_frames", 1) == 1
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _check(path: Path, width: int, height: int) -> None:
    """Refuse a file that is not there, and sizes that no video has."""
    for name, size in (("width", width), ("height", height)):
        if not 1 <= size <= LARGEST_SIDE:
            raise GeometryError(f"{name} is {size}; use 1 to {LARGEST_SIDE} pixels.")
    if not path.exists():
        raise PictureError(f"{path} does not exist; check the path.")
    if not path.is_file():
        raise PictureError(f"{path} is not a file; name a picture or a video.")
    if not path.stat().st_size:
        raise PictureError(f"{path} is empty; it was probably never downloaded to its end.")


def _opaque(picture: "Image.Image") -> "Image.Image":
    """Return a picture of any kind in RGB, laid on white."""
    from PIL import Image

    if picture.mode.startswith("I"):
        # Pillow would cut 16 bits off at 255 instead of scaling them.
        grey = np.asarray(picture, np.float64).clip(0, 65535) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    paper = Image.new("RGBA", layer.size, (*PAPER, 255))
    return Image.alpha_composite(paper, layer).convert("RGB")


def _command(path: Path, *, width: int, height: int, fps: float) -> list[str]:
    """Return the start of the command line: a local file in, its frames at the right pace and size."""
    cover = f"scale={width}:{height}:force_original_aspect_ratio=increase"
    filters = f"fps={fps:g},{cover}:flags=bicubic+accurate_rnd+full_chroma_int,crop={width}:{height}"
    # A playlist may name other files and addresses; only plain files are opened.
    source = ["-protocol_whitelist", "file", "-i", f"file:{os.fspath(path)}"]
    return [find_ffmpeg(), "-hide_banner", "-loglevel", "error", "-nostdin", "-threads", "1", *source,
            "-map", "0:v:0", "-vf", filters]  # fmt: skip
