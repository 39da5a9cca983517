"""A run as others use it: opened, gone on with, closed.

Legend: C channels, T latent frames of a chunk, h and w latent cells.
"""

import logging
import shutil
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..durable import remove_parts
from ..errors import NumericsError, OutputError
from ..latents_file import FOLDER, NAME, LatentsInfo, Link, chunk_files, read_chunk
from ..outputs import make_folder
from .agreement import (
    Wanted,
    begun,
    check_length,
    check_sections,
    continued,
    kept_chunks,
    shared_beginning,
)
from .aside import ASIDE, aside_folder, move_aside
from .chunks import add_chunk
from .decisions import Section, keys
from .lock import NAME as LOCK
from .lock import RunLock
from .manifest import COPY, Manifest, Resume, is_run, read_manifest, write_manifest
from .manifest import NAME as MANIFEST

LOG = "log.txt"
"""Name of the file that says what happened to a run, once each."""

CACHE = "cache.safetensors"
"""Name of the file with kept keys and values."""

logger = logging.getLogger(__name__)


class Run:
    """A run that this process has the right to work on; ``open_run`` gives it.

    Use::

        with open_run(folder, wanted) as run:
            for chunk in range(run.kept, run.chunks):
                run.add(chunk, latents)
    """

    def __init__(self, folder: Path, manifest: Manifest, lock: RunLock, *, kept: int) -> None:
        """Hold what ``open_run`` has found."""
        self.folder = folder
        self.manifest = manifest
        self.kept = kept
        self._lock = lock
        self._keys: list[str] = []

    @property
    def chunks(self) -> int:
        """Chunks of the whole video."""
        return self.manifest.geometry.chunks

    @property
    def complete(self) -> bool:
        """Whether every chunk is there."""
        return self.kept >= self.chunks

    @property
    def section(self) -> Section:
        """What decides the chunks to come."""
        return self.manifest.sections[-1]

    @property
    def latents(self) -> Path:
        """Folder of the chunks."""
        return self.folder / FOLDER

    def key(self, chunk: int) -> str:
        """Return the digest of all that decides a chunk; empty for the one before the first."""
        if len(self._keys) <= chunk:
            self._keys = list(islice(keys(self.manifest.sections), max(chunk + 1, self.chunks)))
        return self._keys[chunk] if chunk >= 0 else ""

    def chunk(self, chunk: int) -> Tensor:
        """Return the normalised latents ``(1, C, T, h, w)`` of a chunk that is there, float32.

        Raises:
            CheckpointError: The file was damaged or removed since the run was opened.
        """
        return read_chunk(self.latents / (NAME % chunk))

    def add(self, chunk: int, latents: Tensor) -> None:
        """Keep the next chunk ``(1, C, T, h, w)``; it is on the disk when this returns.

        Raises:
            NumericsError: It holds numbers that are not finite; it is not kept.
            OutputError: The disk is full, or the folder cannot be written to.
        """
        if not torch.isfinite(latents).all():
            raise NumericsError(
                f"chunk {chunk} came out as numbers that are not finite and was not kept; the weights are "
                "damaged or the compute dtype is too narrow: check the file, or use float32."
            )
        geometry = self.manifest.geometry
        info = LatentsInfo(
            space=self.manifest.space,
            width=geometry.width,
            height=geometry.height,
            frames=geometry.frames,
            chunks=geometry.chunks,
            seed=int(self.section.decisions.get("seed", 0)),
            prompt=self.section.text(chunk),
        )
        link = Link(key=self.key(chunk), before=self.key(chunk - 1))
        add_chunk(self.latents, chunk, latents, info, link)
        self.kept = chunk + 1

    def change(self, **fields: Any) -> None:
        """Write the manifest with some fields changed.

        Raises:
            OutputError: The disk is full, or the folder cannot be written to.
        """
        self.manifest = replace(self.manifest, **fields)
        write_manifest(self.folder, self.manifest)

    def note_resume(self, *, how: str, exact: bool, replayed: int) -> None:
        """Write down how the run is gone on with."""
        resume = Resume(chunk=self.kept, how=how, exact=exact, replayed=replayed, at=_now())
        self.change(resumes=(*self.manifest.resumes, resume))

    def say(self, text: str) -> None:
        """Add a line to the log of the run; a full disk loses it."""
        try:
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(f"{_now()}  {text}\n")
        except OSError as error:
            logger.debug("no log: %s", error)

    def close(self) -> None:
        """Let others work on the run; harmless if that is done."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ended: object) -> None:
        self.close()


def open_run(folder: Path, wanted: Wanted) -> Run:
    """Begin a run, or go on with the one in ``folder``; the longest beginning that is whole and fits is kept.

    What does not fit any more, or is damaged, is moved to the folder ``aside`` in it; nothing is deleted.

    Raises:
        CheckpointError: The run cannot be read.
        OutputError: Another process works on it, or the folder holds something else or cannot be written to.
        SettingsError: The run was made otherwise; the message says what differs, and what can be done.
    """
    _check_place(folder)
    fresh = not folder.exists()
    make_folder(folder)
    lock = RunLock(folder)
    try:
        _make_ready(folder, wanted)
        if is_run(folder):
            before = read_manifest(folder)
            manifest = continued(before, wanted, folder)
        else:
            before, manifest = None, begun(folder, wanted)
        kept, trouble = kept_chunks(folder, manifest)
        if before is not None:
            check_length(folder, manifest, before, kept)
        check_sections(folder, manifest, kept, trouble)
        stale = chunk_files(folder / FOLDER)[kept:]
        if stale or (before is not None and before.sections != manifest.sections):
            manifest = replace(manifest, shown=_still_shown(manifest, kept), video={})
        if manifest != before:  # before anything is moved: who dies in between finds the same again
            write_manifest(folder, manifest)
        run = Run(folder, manifest, lock, kept=kept)
        _clear(run, stale, trouble)
    except BaseException:
        lock.release()
        if fresh and not is_run(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return run


def _make_ready(folder: Path, wanted: Wanted) -> None:
    """Clear a folder of what is in the way of a run."""
    for place in (folder, folder / FOLDER):
        remove_parts(place)
    if wanted.anew:
        shared_beginning(folder, wanted)  # what cannot be is refused before anything is moved
        kept_here = (LOCK, ASIDE, LOG)
        # The manifest first: without it the rest is no run, and not half of one.
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name not in (MANIFEST, COPY))
        _put_aside(folder, [entry for entry in entries if entry.name not in kept_here])
    make_folder(folder / FOLDER)


def _check_place(folder: Path) -> None:
    """Refuse a folder that holds anything but a run."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; name a folder for the run.")
    if not folder.exists() and not folder.parent.is_dir():
        raise OutputError(f"the folder {folder.parent} does not exist; make it first, or choose another.")
    if not folder.is_dir() or is_run(folder):
        return
    if (folder / LOCK).is_file() and (folder / ASIDE).is_dir():
        return  # a run whose restart was ended half-way
    own = {LOCK, ASIDE, LOG, FOLDER}
    foreign = sorted(
        entry.name for entry in folder.iterdir() if entry.name not in own and entry.name[0] != "."
    )
    if foreign:
        raise OutputError(
            f"{folder} holds {foreign[0]} and no run; name an empty folder, or one that does not exist yet."
        )


def _still_shown(manifest: Manifest, kept: int) -> int:
    """Return how many frames of the video are right where only so many chunks are."""
    frames = manifest.geometry.frames_decoded(kept)
    return frames if manifest.shown is None else min(frames, manifest.shown)


def _clear(run: Run, stale: list[Path], trouble: str) -> None:
    """Move the chunks that cannot be kept aside, and say why."""
    if not stale:
        return
    aside = _put_aside(run.folder, stale, within=FOLDER)
    why = trouble or f"chunk {run.kept} is missing."
    said = f"{len(stale)} chunks from {run.kept} on were moved to {aside}: {why}"
    run.say(said)
    logger.warning("%s", said)


def _put_aside(folder: Path, entries: list[Path], *, within: str = "") -> Path:
    """Move some of what a run holds aside; return where to."""
    aside = aside_folder(folder) / within
    for entry in entries:
        move_aside(entry, aside)
    return aside


def _now() -> str:
    """Return the time of day, for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S")
