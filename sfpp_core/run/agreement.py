"""What a run should be, and what becomes of one that is there: gone on with, changed on the way, refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, SettingsError
from ..geometry import LONGEST_SECONDS, VideoGeometry
from ..latent_space import SPACES
from ..latents_file import FOLDER
from .chunks import good_chunks, share_chunks
from .decisions import Section, as_json, differences, keys, texts_of
from .manifest import Manifest, read_manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a run should be."""

    space: str
    """Name of the space its latents live in."""

    geometry: VideoGeometry
    """Size and length."""

    decisions: Mapping[str, Any]
    """All that decides its chunks but for the text and the size, in a table of JSON that people can read."""

    text: Callable[[int], str]
    """What is asked for at a chunk."""

    request: Mapping[str, Any]
    """What the user asked for, in a table of JSON; kept to be asked again."""

    seconds_kept: float | None = None
    """What comes before this second is kept, and what follows is made under these decisions, whatever decided
    it before. ``None`` goes on with what is there."""

    branch: Path | None = None
    """Folder of the run that a new one shares its beginning with, up to ``seconds_kept``."""

    anew: bool = False
    """Whether to move what is there aside and begin again."""

    def __post_init__(self) -> None:
        if self.seconds_kept is not None and not 0 <= self.seconds_kept <= LONGEST_SECONDS:
            raise SettingsError(f"--from is {self.seconds_kept:g}; name a second of the video, e.g. 42.5.")


def chunks_before(seconds: float, geometry: VideoGeometry) -> int:
    """Return how many chunks lie wholly before a second of the video."""
    frames = round(seconds * geometry.fps)
    chunks = 0
    while geometry.frames_decoded(chunks + 1) <= frames:
        chunks += 1
    return chunks


def begun(folder: Path, wanted: Wanted) -> Manifest:
    """Return the manifest of a new run; one that branches gets its chunks."""
    section = Section(chunk=0, decisions=_decisions(wanted, 0), texts=_texts(wanted, 0))
    manifest = Manifest(
        space=wanted.space,
        geometry=wanted.geometry,
        sections=(section,),
        request=as_json(wanted.request),
        made_with=f"torch {torch.__version__}",
    )
    shared = shared_beginning(folder, wanted)
    if wanted.branch is None or shared is None:
        return manifest
    old, chunk = shared
    sections = _cut(old.sections, chunk)
    share_chunks(wanted.branch / FOLDER, folder / FOLDER, chunks=chunk)
    return replace(manifest, sections=_joined(sections, wanted, chunk), branch=str(wanted.branch.resolve()))


def shared_beginning(folder: Path, wanted: Wanted) -> tuple[Manifest, int] | None:
    """Return the run that a new one in ``folder`` branches from, and the first chunk it does not share.

    Raises:
        SettingsError: It cannot be; what there is to keep or to share is said otherwise.
    """
    if wanted.branch is None:
        if wanted.seconds_kept:
            raise SettingsError(f"{folder} holds no run to go on from; name the one to share with --branch.")
        return None
    if wanted.branch.resolve() == folder.resolve():
        raise SettingsError(f"{folder} cannot branch from itself; leave --branch out to change it in place.")
    old = read_manifest(wanted.branch)
    return old, _place(wanted, old, wanted.branch)


def continued(before: Manifest, wanted: Wanted, folder: Path) -> Manifest:
    """Return the manifest of a run that is gone on with as it is wanted now."""
    if wanted.branch is not None and before.branch != str(wanted.branch.resolve()):
        raise SettingsError(f"{folder} is another run already; name a new folder for the branch.")
    _check_size(before, wanted, folder)
    new = replace(before, geometry=wanted.geometry, request=as_json(wanted.request))
    section = before.sections[-1]
    differing = differences(section.decisions, _decisions(wanted, section.chunk))
    first = _first_other_text(section, wanted, before)
    if wanted.seconds_kept is not None:
        chunk = chunks_before(wanted.seconds_kept, before.geometry)
        if (differing or first is not None or section.chunk > chunk) and wanted.branch is None:
            chunk = _place(wanted, before, folder)
            return replace(new, sections=_joined(_cut(before.sections, chunk), wanted, chunk))
    if differing:
        raise SettingsError(_other(folder, differing, before))
    if first is not None and first == section.chunk:
        was, now = section.text(first), wanted.text(first)
        raise SettingsError(_other(folder, [f"the prompt was {was!r:.60} and is {now!r:.60}"], before))
    section = replace(section, texts=_texts(wanted, section.chunk))
    return replace(new, sections=(*before.sections[:-1], section))


def _first_other_text(section: Section, wanted: Wanted, before: Manifest) -> int | None:
    """Return the first chunk of a section that is asked for otherwise than before, of those there were."""
    chunks = range(section.chunk, min(before.geometry.chunks, wanted.geometry.chunks))
    return next((chunk for chunk in chunks if section.text(chunk) != wanted.text(chunk)), None)


def _other(folder: Path, differing: list[str], before: Manifest) -> str:
    """Return the message of a run that was made otherwise."""
    there = f"{before.geometry.seconds:g} s"
    return (
        f"{folder} was made otherwise: {'; '.join(differing)}. To change it from a second on, say which with "
        f"--from (of {there}); to keep it and make another, --run a new folder, with --branch {folder} to "
        "share the beginning; to begin again, --restart moves what is there aside."
    )


def _check_size(before: Manifest, wanted: Wanted, folder: Path) -> None:
    """Refuse another size: no chunk could be kept."""
    now = {"space": wanted.space, **_size(wanted.geometry)}
    if differing := differences({"space": before.space, **_size(before.geometry)}, now):
        raise SettingsError(
            f"{folder} was made in another size: {'; '.join(differing)}. Name another folder, or begin again "
            "with --restart, which moves what is there aside."
        )


def _size(geometry: VideoGeometry) -> dict[str, int]:
    """Return what of a geometry can never change."""
    return {name: getattr(geometry, name) for name in ("width", "height", "chunk", "lead", "stride", "fps")}


def check_length(folder: Path, manifest: Manifest, before: Manifest, kept: int) -> None:
    """Refuse to make a run shorter than it is: nothing is thrown away."""
    if kept > manifest.geometry.chunks and before.geometry.frames > manifest.geometry.frames:
        there = manifest.geometry.frames_decoded(kept)
        raise SettingsError(
            f"{folder} holds {min(there, before.geometry.frames) / before.geometry.fps:g} s and "
            f"{manifest.geometry.seconds:g} s are asked for; ask for at least as much, or --run a new "
            f"folder with --branch {folder} and --from."
        )


def check_sections(folder: Path, manifest: Manifest, kept: int, trouble: str) -> None:
    """Refuse a run that lacks a chunk from before it was changed: made as the run is now, it is another.

    Raises:
        CheckpointError: It is so; the message says what can be done.
    """
    if kept < manifest.sections[-1].chunk:
        seconds = manifest.geometry.frames_decoded(kept) / manifest.geometry.fps
        raise CheckpointError(
            f"{folder} lacks chunk {kept}, which was made before the run was changed. {trouble} ".rstrip()
            + f" To make it, and what follows, as the run is now, add --from {seconds:g}; to begin again, "
            "--restart moves what is there aside."
        )


def _place(wanted: Wanted, old: Manifest, folder: Path) -> int:
    """Return the chunk from which on a run is changed, after a check that all before it is there."""
    if wanted.seconds_kept is None:
        raise SettingsError("a branch begins somewhere; say at which second with --from.")
    _check_size(old, wanted, folder)
    chunk = chunks_before(wanted.seconds_kept, old.geometry)
    kept, trouble = kept_chunks(folder, old, most=chunk)
    if kept < chunk:
        there = old.geometry.frames_decoded(kept) / old.geometry.fps
        raise SettingsError(
            f"{folder} holds {there:g} s and --from is {wanted.seconds_kept:g}; name an earlier second. "
            f"{trouble}".strip()
        )
    if chunk > wanted.geometry.chunks:
        raise SettingsError(
            f"--from is {wanted.seconds_kept:g} and the video {wanted.geometry.seconds:g} s; make it longer."
        )
    return chunk


def kept_chunks(folder: Path, manifest: Manifest, *, most: int | None = None) -> tuple[int, str]:
    """Return how many chunks can be kept, and what is wrong with the next."""
    found = keys(manifest.sections)
    known = found if most is None else islice(found, most)
    return good_chunks(folder / FOLDER, known, geometry=manifest.geometry, space=SPACES[manifest.space])


def _cut(sections: tuple[Section, ...], chunk: int) -> tuple[Section, ...]:
    """Return the sections that begin before ``chunk``."""
    return tuple(section for section in sections if section.chunk < chunk)


def _joined(sections: tuple[Section, ...], wanted: Wanted, chunk: int) -> tuple[Section, ...]:
    """Return ``sections`` and what is wanted from ``chunk`` on."""
    section = Section(chunk=chunk, decisions=_decisions(wanted, chunk), texts=_texts(wanted, chunk))
    return (*sections, section)


def _decisions(wanted: Wanted, first: int) -> dict[str, Any]:
    """Return what decides a section from ``first`` on, prompts that are over by then among it."""
    heard = texts_of([wanted.text(chunk) for chunk in range(first + 1)], first=0)
    earlier = {"earlier prompts": [list(pair) for pair in heard[:-1]]} if len(heard) > 1 else {}
    return as_json({**wanted.decisions, **earlier})


def _texts(wanted: Wanted, first: int) -> tuple[tuple[int, str], ...]:
    """Return what is asked for from ``first`` on."""
    chunks = range(first, max(wanted.geometry.chunks, first + 1))
    return texts_of([wanted.text(chunk) for chunk in chunks], first=first)
