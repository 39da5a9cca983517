"""A request as a table, kept in the manifest so that a run can be gone on with by its folder alone."""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..cues import SOFT, Change
from ..errors import CheckpointError, SettingsError
from ..latents_file import FOLDER, chunk_files
from ..request import Request
from ..script import read_script
from ..script_json import timed
from .manifest import is_run, read_manifest

_PATHS = ("student", "words", "text_encoder", "tokenizer", "text_cache", "start", "encoder", "latents", "run")
"""Fields that are paths, or ``None``."""


def request_table(request: Request, *, seconds: float) -> dict[str, Any]:
    """Return a request as a table of JSON; paths are absolute.

    Args:
        request: What is asked for.
        seconds: Length of the video. Scenes that are shares of it get times, to stay where they are in a
            longer one.
    """
    table = {field.name: getattr(request, field.name) for field in fields(Request) if field.name != "report"}
    script = read_script(request.prompt, change=request.switch)
    if any(scene.share for scene in script.scenes):
        table["prompt"] = timed(script, seconds)
    table["switch"] = str(request.switch)
    for name in _PATHS:
        table[name] = None if table[name] is None else str(Path(table[name]).absolute())
    if isinstance(request.decoder, Path):
        table["decoder"] = str(request.decoder.absolute())
    ends = request.out.endswith(("/", os.sep))
    table["out"] = str(Path(request.out).absolute()) + ("/" if ends else "")
    table["settings"] = dict(request.settings)
    table["loras"] = [[str(path.absolute()), strength] for path, strength in request.loras]
    return table


def request_fields(table: Mapping[str, Any], *, where: Path) -> dict[str, Any]:
    """Return the fields of the request that a table holds.

    Raises:
        CheckpointError: It holds something else: the run was begun by another front end.
    """
    names = {field.name for field in fields(Request)}
    if not {"prompt", "out"} <= table.keys() or not table.keys() <= names:
        raise CheckpointError(
            f"{where} was not begun on the command line; name the prompt, and all that was chosen for it."
        )
    given = dict(table)
    for name in (name for name in _PATHS if given.get(name) is not None):
        given[name] = Path(given[name])
    decoder = given.get("decoder")
    if decoder is not None and Path(decoder).is_absolute():
        given["decoder"] = Path(decoder)
    given["switch"] = Change.parse(given.get("switch", str(SOFT)))
    given["loras"] = tuple((Path(path), float(strength)) for path, strength in given.get("loras", ()))
    return given


def moved(given: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Return the fields of a request whose video lies in ``run``, if it lay in the folder the run had before.

    A run that was copied must not write over the video of the other.
    """
    before, out = given.get("run"), given["out"]
    if before is None or not Path(out).is_relative_to(before):
        return dict(given)
    ends = "/" if out.endswith(("/", os.sep)) else ""
    return {**given, "out": str(run.absolute() / Path(out).relative_to(before)) + ends}


def extended(run: Path | None, seconds: float) -> float:
    """Return how long a run will be, in seconds, with so many more.

    Raises:
        CheckpointError: There is no such run.
        SettingsError: It is not complete, so that nobody knows which length was meant; or would be shorter.
    """
    if run is None or not is_run(run):
        raise SettingsError(f"--extend makes a run longer, and {run} is none; begin one with --seconds.")
    geometry = read_manifest(run).geometry
    if len(chunk_files(run / FOLDER)) < geometry.chunks:
        raise SettingsError(
            f"{run} is not complete; let it end first, without --extend, or name the length with --seconds."
        )
    if not seconds > 0:
        raise SettingsError(f"--extend is {seconds:g}; name how many seconds more, e.g. 30.")
    return geometry.seconds + seconds
