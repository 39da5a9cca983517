"""The run on disk of a Long Sampler: where it lies, what it should be, what it holds."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..sfpp_core.errors import CheckpointError, OutputError, SettingsError
from ..sfpp_core.geometry import VideoGeometry
from ..sfpp_core.latent_space import LatentSpace
from ..sfpp_core.latents_file import FOLDER, NAME, read_link
from ..sfpp_core.run.agreement import Wanted, continued
from ..sfpp_core.run.decisions import keys
from ..sfpp_core.run.folder import Run, open_run
from ..sfpp_core.run.manifest import Manifest, is_run, read_manifest
from ..sfpp_core.timetable import Timetable
from ..sfpp_core.weights_file import read_header
from . import _host
from .model_fingerprint import latents_fingerprint

HERE = (
    "In ComfyUI: name another run, or set back what differs; what begins with -- is for "
    "`python -m sfpp_core generate`."
)
"""What is added to a refusal of the package, which speaks to the command line."""


@contextmanager
def _here() -> Iterator[None]:
    """Add what a refusal of the package means here, where it speaks of its command line."""
    try:
        yield
    except (CheckpointError, SettingsError) as error:
        if "--" not in str(error):
            raise
        raise type(error)(f"{error} {HERE}") from error


def folder_of(name: str) -> Path:
    """Return the folder of a run by the name the user gave it, relative to the output folder.

    Raises:
        SettingsError: It lies outside, or is the output folder itself.
    """
    path = Path(name)  # links that the user has put into the output folder may lead anywhere
    if path.anchor or not path.parts or ".." in path.parts or "\0" in name:
        raise SettingsError(
            f"run is {name!r}, which is no folder within the output folder; name one, e.g. runs/my_video."
        )
    return _host.output_root() / path


def spoken_texts(table: Timetable, embeddings: Sequence[Tensor]) -> list[tuple[int, str]]:
    """Return what is asked for, by the first chunk it is asked for at, as a run tells prompts apart.

    A conditioning does not say what it is made of, so the digest of the embeddings stands before the prompt.

    Args:
        table: When each scene is shown.
        embeddings: Of every scene of the script, ``(1, tokens, text_dim)``.
    """
    return [
        (entry.chunk, f"{latents_fingerprint(embeddings[entry.number - 1])} {entry.text}".strip())
        for entry in table.entries
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """A run as a node wants it; nothing is written before ``open``."""

    name: str
    """As the user gave it, relative to the output folder."""

    folder: Path

    space: LatentSpace

    geometry: VideoGeometry
    """Size of the video, and the length the node wants. A longer run stays longer: its beginning is read."""

    decisions: dict[str, Any]
    """All that decides its chunks, but for the text."""

    texts: Sequence[tuple[int, str]]
    """See ``spoken_texts``."""

    @property
    def key(self) -> str:
        """All that decides the video, in a few words."""
        return f"{self.decisions} {list(self.texts)} {self.geometry}"

    def kept(self) -> int:
        """Return how many chunks are there and fit, from the first. Their numbers are not read.

        Raises:
            CheckpointError: The run cannot be read.
            SettingsError: It was made otherwise; the message says what differs.
        """
        if not is_run(self.folder):
            return 0
        with _here():
            before = read_manifest(self.folder)
            manifest = continued(before, self._wanted(before), self.folder)
        for chunk, key in enumerate(keys(manifest.sections)):
            if chunk == self.geometry.chunks or not self._is_there(chunk, key):
                return chunk
        raise AssertionError  # keys never end

    def open(self) -> Run:
        """Return the run, locked; its ``close`` unlocks it.

        Raises:
            SFPPError: As ``open_run``.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"the folder {self.folder.parent} cannot be made ({error.strerror}); name another run."
            ) from error
        with _here():
            before = read_manifest(self.folder) if is_run(self.folder) else None
            return open_run(self.folder, self._wanted(before))

    def _wanted(self, before: Manifest | None) -> Wanted:
        """Return what the run should be, given what it is."""
        geometry = self.geometry
        if before is not None:
            geometry = replace(geometry, frames=max(geometry.frames, before.geometry.frames))
        return Wanted(
            space=self.space.name,
            geometry=geometry,
            decisions=self.decisions,
            text=lambda chunk: self._text(chunk, before),
            request={"front end": "ComfyUI"},
        )

    def _text(self, chunk: int, before: Manifest | None) -> str:
        """Return what is asked for at a chunk: after the end of the video what was asked for before."""
        if before is not None and self.geometry.chunks <= chunk < before.geometry.chunks:
            return before.sections[-1].text(chunk)
        return next(text for first, text in reversed(self.texts) if first <= chunk)

    def _is_there(self, chunk: int, key: str) -> bool:
        """Return whether a chunk is there that was made as the run is now."""
        path = self.folder / FOLDER / (NAME % chunk)
        try:
            link = read_link(path, read_header(path)) if path.is_file() else None
        except CheckpointError:
            return False
        return link is not None and link.key == key
