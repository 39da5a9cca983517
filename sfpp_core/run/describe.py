"""A run explained to people."""

from pathlib import Path

from ..geometry import VideoGeometry
from ..latents_file import FOLDER, chunk_files
from .decisions import Section
from .folder import CACHE
from .lock import is_locked
from .manifest import Manifest, read_manifest

LISTED = 20
"""Changes of the prompt that are listed."""


def run_lines(folder: Path) -> list[str]:
    """Explain a run, for people. Chunks are counted, not checked.

    Raises:
        CheckpointError: The manifest is damaged.
    """
    manifest = read_manifest(folder)
    geometry, kept = manifest.geometry, len(chunk_files(folder / FOLDER))
    lines = [
        f"{folder}",
        f"holds      a run, {_state(folder, manifest, kept)}",
        f"video      {geometry.seconds:g} s, {geometry.frames} frames, {geometry.width}x{geometry.height}, "
        f"{_video(manifest)}",
        f"latents    {kept} of {geometry.chunks} chunks, {manifest.space}, in {folder / FOLDER}",
    ]
    if manifest.branch:
        lines.append(f"branch     of {manifest.branch}")
    for section in manifest.sections:
        lines += _section(section, geometry)
    if (folder / CACHE).is_file():
        lines.append("cache      kept keys and values: it goes on exactly, and at once")
    if manifest.resumes:
        last, inexact = manifest.resumes[-1], [each for each in manifest.resumes if not each.exact]
        lines.append(
            f"resumed    {len(manifest.resumes)} times, last at chunk {last.chunk}, {last.at} ({last.how}); "
            + (f"not bit for bit at chunk {inexact[0].chunk}" if inexact else "each time exactly")
        )
    lines.append(f"made with  {manifest.made_with}")
    return lines


def _state(folder: Path, manifest: Manifest, kept: int) -> str:
    """Say how far a run is."""
    geometry = manifest.geometry
    frames = geometry.frames_until(kept - 1)
    if is_locked(folder):
        return f"being made: {frames / geometry.fps:g} s are there"
    if kept >= geometry.chunks:
        return "complete" if manifest.video else "all chunks made, the video not finished; run it again"
    asked = "prompt" in manifest.request  # on the command line, and not in another front end
    how = f"`generate --run {folder}` goes on" if asked else "queue it again, and it goes on"
    return f"stopped at {frames / geometry.fps:g} s; {how}"


def _video(manifest: Manifest) -> str:
    """Say where the video of a run is."""
    if manifest.look is None:
        return "shown by another front end"
    return f"in {manifest.look.out}, {manifest.look.decoder}"


def _section(section: Section, geometry: VideoGeometry) -> list[str]:
    """Explain a section."""
    lines = []
    for chunk, text in section.texts[:LISTED]:
        lines.append(f"prompt     from {geometry.frames_decoded(chunk) / geometry.fps:g} s: {text}")
    if len(section.texts) > LISTED:
        lines.append(f"prompt     and {len(section.texts) - LISTED} more")
    seed, student = section.decisions.get("seed"), section.decisions.get("student")
    lines.append(f"made by    seed {seed}, student {student}, from chunk {section.chunk} on")
    return lines
