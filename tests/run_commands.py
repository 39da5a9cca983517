"""Commands that make small runs, and what is compared of them."""

import json

from tiny_demo import PROMPT

from sfpp_core.latents_file import read_chunk


def run_words(files, run, *more, prompt=PROMPT, seconds="3"):
    """Return the words of a command that makes or goes on with a small run; later ones win."""
    models = ("--student", files.student, "--words", files.words, "--decoder", files.decoder)
    shape = ("--seconds", seconds, "--width", "32", "--height", "32", "--enlarge", "1", "--quiet")
    asked = () if prompt is None else (prompt,)
    return [str(word) for word in ("generate", *asked, "--run", run, *models, *shape, *more)]


def latents(run):
    """Return the latents of all chunks, in order."""
    return [read_chunk(file) for file in sorted((run / "latents").glob("[!.]*.safetensors"))]


def made_of(run):
    """Return all that a run has made, byte for byte: its chunks and its video."""
    files = [*sorted((run / "latents").glob("[!.]*.safetensors")), run / "video.mp4"]
    return {file.name: file.read_bytes() for file in files}


def manifest(run):
    """Return what the manifest of a run says."""
    return json.loads((run / "manifest.json").read_text())


def aside(run):
    """Return the names of all files that were put aside."""
    return sorted(file.name for file in (run / "aside").rglob("*") if file.is_file())
