"""``manifest.json``: what a run is, in words, with a checksum of its own.

It is written before the chunks it decides, and twice: a second copy takes its place if it is damaged.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..durable import write_text
from ..errors import CheckpointError, SFPPError
from ..geometry import VideoGeometry
from ..latent_space import SPACES
from .decisions import Section

NAME = "manifest.json"
"""Name of the file in the folder of a run."""

COPY = ".manifest.copy.json"
"""Name of the second copy."""

FORMAT = 1
"""Version of the format: a file of another is refused."""

LARGEST = 64_000_000
"""Bytes of the largest manifest that is read."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How the chunks of a run are shown: nothing of it decides them."""

    out: str
    """Absolute path of the video, or of the pictures."""

    enlarge: int
    """Side, in pixels, of the square each pixel becomes."""

    decoder: str
    """What decoded them, in words and as a fingerprint."""

    tile: int | None = None
    """Pixels along a side of the tiles a picture was decoded in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """How a run was gone on with."""

    chunk: int
    """First chunk that was made."""

    how: str
    """``cache``: from kept keys and values. ``all``: every chunk before was remembered again. ``window``: the
    last ones were."""

    exact: bool
    """Whether what follows is, bit for bit, what an undisturbed run makes."""

    replayed: int
    """Chunks that were remembered again."""

    at: str
    """Time of day, as the clock of the machine had it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that is known of a run but for its chunks."""

    space: str
    """Name of the space its latents live in."""

    geometry: VideoGeometry
    """Size and planned length."""

    sections: tuple[Section, ...]
    """What decides its chunks; the first begins at chunk 0."""

    look: Look | None = None
    """How they are shown; ``None`` where somebody else shows them."""

    request: Mapping[str, Any]
    """What the user asked for, to be asked again; a table of JSON."""

    shown: int | None = None
    """Frames of its video that are still right; ``None`` are all that are there."""

    video: Mapping[str, int] = field(default_factory=dict)
    """Frames of the finished video, and its bytes or pictures; empty before it is finished."""

    branch: str = ""
    """Folder of the run whose first chunks it shares."""

    resumes: tuple[Resume, ...] = ()
    """Every time it was gone on with."""

    made_with: str = ""
    """Versions of the software, for people."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write both copies, one after the other: one of them is whole at any moment.

    Raises:
        OutputError: The folder cannot be written to, or is full.
    """
    table = {"format": FORMAT, **asdict(manifest)}
    text = json.dumps({**table, "checksum": _checksum(table)}, indent=1) + "\n"
    write_text(folder / COPY, text)
    write_text(folder / NAME, text)


def read_manifest(folder: Path) -> Manifest:
    """Read what a run is.

    Raises:
        CheckpointError: There is no run, or both copies are damaged; the message says what can still be done.
    """
    try:
        return _read(folder / NAME)
    except CheckpointError as error:
        if not (folder / COPY).is_file():
            raise
        manifest = _read(folder / COPY)
        logger.warning("%s Its second copy is whole and was taken.", error)
        return manifest


def is_run(folder: Path) -> bool:
    """Return whether a folder holds a run."""
    return (folder / NAME).is_file() or (folder / COPY).is_file()


def _read(path: Path) -> Manifest:
    """Read one copy."""
    try:
        if path.stat().st_size > LARGEST:
            raise _damaged(path, f"has {path.stat().st_size:,} bytes, which no manifest has")
        table = json.loads(path.read_bytes())
        checksum = table.pop("checksum")
        version = table["format"]
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, "is no manifest of a run") from error
    if version != FORMAT:
        raise CheckpointError(
            f"{path} is of format {json.dumps(version):.20} and this package knows {FORMAT}; install the "
            "version that made it, or the newest."
        )
    if checksum != _checksum(table):
        raise _damaged(path, "was changed or damaged since it was written")
    try:
        return _manifest(table)
    except (TypeError, KeyError, ValueError, AttributeError, IndexError, SFPPError) as error:
        raise _damaged(path, f"says something impossible ({error})") from error


def _damaged(path: Path, what: str) -> CheckpointError:
    """Return the error of a manifest that is of no use."""
    return CheckpointError(
        f"{path} {what}. The latents beside it can still be decoded: `decode {path.parent / 'latents'}`. "
        "To make the run again, --restart moves what is there aside."
    )


def _manifest(table: dict[str, Any]) -> Manifest:
    """Return the manifest of a table whose checksum is right; it may still be another program's work."""
    given = {known.name: table[known.name] for known in fields(Manifest)}
    given["geometry"] = VideoGeometry(**given["geometry"])
    given["sections"] = tuple(_section(section) for section in given["sections"])
    given["look"] = Look(**given["look"]) if given["look"] else None
    given["resumes"] = tuple(Resume(**resume) for resume in given["resumes"])
    starts = [section.chunk for section in given["sections"]]
    if given["space"] not in SPACES or starts[0] != 0 or starts != sorted(set(starts)):
        raise ValueError("its sections do not follow each other")
    if not isinstance(given["request"], dict) or not isinstance(given["video"], dict):
        raise ValueError("its request or its video is no table")
    return Manifest(**given)


def _section(table: dict[str, Any]) -> Section:
    """Return one section of a table."""
    texts = tuple((int(chunk), str(text)) for chunk, text in table["texts"])
    return Section(chunk=int(table["chunk"]), decisions=dict(table["decisions"]), texts=texts)


def _checksum(table: Mapping[str, Any]) -> str:
    """Return a digest of all a manifest says."""
    return blake2b(json.dumps(table, sort_keys=True).encode(), digest_size=16).hexdigest()
