"""Where a video may go and how large it is shown there: the checks made before anything is generated."""

import os
import re
import shutil
import tempfile
from pathlib import Path

from .errors import GeometryError, OutputError, SettingsError

OutputPath = str | os.PathLike[str]

SHOWN_SIDE = 512
"""Pixels of the longer side up to which small videos are enlarged, if the user does not say."""

LARGEST_SIDE = 8192
"""Pixels of the longer side up to which a video can be made: players take no more."""

_PICTURE_NAME = "frame_%06d.png"
_PROBE_BYTES = 4096  # an empty file often still fits on a full disk


def is_video(path: OutputPath) -> bool:
    """Return whether ``path`` asks for an MP4; everything else is a PNG sequence or a mistake."""
    return os.fspath(path).lower().endswith(".mp4")


def split_pattern(path: OutputPath) -> tuple[Path, str]:
    """Return the folder of a PNG sequence and the pattern of its names.

    Raises:
        OutputError: ``path`` is neither a folder nor a numbered PNG name.
    """
    text, target = os.fspath(path), Path(path)
    if text and (text.endswith(("/", os.sep)) or target.is_dir() or not target.suffix):
        return target, _PICTURE_NAME
    if re.fullmatch(r"[^%]*%0\d+d[^%]*\.png", target.name, re.IGNORECASE):
        return target.parent, target.name
    if target.suffix.lower() == ".png":
        numbered = target.with_name(f"{target.stem.replace('%', '')}_%06d.png")
        raise OutputError(
            f"{target} names one picture; for a sequence name a folder, or number it: {numbered}."
        )
    raise OutputError(
        f"the output is {text!r}; it must be a video (name.mp4), a folder for PNG pictures (name/), "
        "or a pattern for them (name_%06d.png)."
    )


def place_of(path: OutputPath) -> Path:
    """Return the folder an output is made in: that of pictures may not be there yet, and its parent must be.

    Raises:
        OutputError: ``path`` is neither a video nor pictures.
    """
    if is_video(path):
        return Path(path).parent
    folder, _ = split_pattern(path)
    return folder if folder.exists() else folder.parent


def check_output(path: OutputPath, *, expected_bytes: int = 0) -> None:
    """Refuse an output path that cannot work. Leaves nothing behind.

    Args:
        path: As for ``open_writer``.
        expected_bytes: Forecast size of the output, as from ``forecast_bytes``; compared with the free room.

    Raises:
        OutputError: Unknown ending, no such folder, not writable, a folder where a file is due, pictures of
            an earlier video in the way, or too little room.
    """
    if is_video(path):
        _check_file(Path(path))
    else:
        _refuse_mixing(*split_pattern(path))
    folder = place_of(path)
    check_folder(folder)
    _check_room(folder, expected_bytes)


def automatic_enlargement(width: int, height: int) -> int:
    """Return the side of the square each pixel becomes if the user does not say. 64x64 is 8, 832x480 is 1."""
    return max(1, SHOWN_SIDE // max(width, height))


def check_enlargement(enlarge: int, *, width: int, height: int) -> None:
    """Refuse a video whose longer side players would not take.

    Args:
        enlarge: Side, in pixels, of the square each pixel becomes.
        width: Pixels before enlarging.
        height: Pixels before enlarging.

    Raises:
        GeometryError: A side is too long even without enlarging.
        SettingsError: ``enlarge`` is below 1, or too large for this size.
    """
    for name, size in (("width", width), ("height", height)):
        if size > LARGEST_SIDE:
            raise GeometryError(f"{name} is {size}; players take at most {LARGEST_SIDE} pixels, use fewer.")
    largest = LARGEST_SIDE // max(width, height)
    if not 1 <= enlarge <= largest:
        raise SettingsError(f"enlarge is {enlarge}; at {width}x{height} use 1 to {largest}.")


def forecast_bytes(path: OutputPath, *, frames: int, width: int, height: int, enlarge: int = 1) -> int:
    """Return roughly how many bytes ``frames`` will take, rather too many than too few.

    Half a bit per pixel of an MP4. Six bytes per pixel of a PNG before enlarging, which costs it little.
    """
    pixels = frames * width * height
    return pixels * enlarge**2 // 16 if is_video(path) else pixels * 6


def _check_file(target: Path) -> None:
    if target.is_dir():
        raise OutputError(f"{target} is a folder; name a file in it, e.g. {target / 'video.mp4'}.")
    if target.exists() and not target.is_file():
        raise OutputError(f"{target} is not a regular file; choose another name.")
    if target.exists() and not os.access(target, os.W_OK):
        raise OutputError(f"{target} exists and is write-protected; choose another name.")


def _refuse_mixing(folder: Path, name: str) -> None:
    before, after = re.split(r"%\d+d", name)
    picture = re.compile(re.escape(before) + r"\d+" + re.escape(after), re.IGNORECASE)
    if folder.is_dir() and any(picture.fullmatch(entry.name) for entry in folder.iterdir()):
        raise OutputError(f"{folder} already holds pictures named {name}; empty it or choose another folder.")


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not there or cannot be written to. Leaves nothing behind.

    Raises:
        OutputError: It is so.
    """
    if not folder.exists():
        raise OutputError(f"the folder {folder} does not exist; make it first, or choose another.")
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file, not a folder; choose another.")
    try:
        # Only an attempt tells: read-only disks, quotas and access lists do not show in the permissions.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise OutputError(
            f"the folder {folder} cannot be written to ({error.strerror}); choose another."
        ) from error


def make_folder(folder: Path) -> None:
    """Make a folder, if it is not there.

    Raises:
        OutputError: It cannot be made.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {folder} cannot be made: {error.strerror or error}.") from error


def _check_room(folder: Path, expected_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < expected_bytes:
        raise OutputError(
            f"the disk of {folder} has {free / 1e6:.1f} MB free and the video needs about "
            f"{expected_bytes / 1e6:.1f} MB; free some room, choose another disk or ask for less."
        )
