r"""Prompts over time, written as JSON.

Use::

    {
      "common": "a watercolour of a harbour.",
      "switch": "soft",
      "scenes": [
        {"at": 0, "prompt": "boats lie at anchor"},
        {"at": 12.5, "prompt": "a storm comes up", "switch": "blend:4"}
      ]
    }

``at`` is the second a scene begins at; ``for`` in its place is how many seconds it lasts; with neither,
scenes are equal shares of the video. ``common`` and every ``switch`` may be left out. A list of scenes alone
will do.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .cues import Change
from .errors import ScriptError, SettingsError
from .geometry import LONGEST_SECONDS
from .scenes import Scene, Script, Source, joined, no_change

_TOP = {"common": str, "switch": str, "scenes": list}
_SCENE = {"prompt": str, "at": (int, float), "for": (int, float), "switch": str}
_NAMES = {str: "a text", list: "a list", (int, float): "a number"}


def read_json(text: str, *, change: Change) -> Script:
    """Read a script.

    Args:
        text: JSON, as above.
        change: How scenes take over that do not say.

    Raises:
        ScriptError: It is no JSON, and the message points at the character; or it says something impossible.
    """
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise Source(text).wrong(error.pos, f"this is no JSON: {error.msg}; mend it here.") from error
    except (RecursionError, ValueError) as error:
        raise ScriptError("the JSON is nested too deeply or holds too long a number for a script.") from error
    if isinstance(table, list):
        table = {"scenes": table}
    table = _table(table, _TOP, "the script")
    scenes = [
        _table(scene, _SCENE, f"scene {number}") for number, scene in enumerate(table.get("scenes", ()), 1)
    ]
    if not scenes:
        raise ScriptError('the script has no scenes; write {"scenes": [{"at": 0, "prompt": "a cat"}, ...]}.')
    change = _change(table, change, "the script")
    return _script(table.get("common", ""), scenes, change)


def timed(script: Script, seconds: float) -> str:
    """Return a script as JSON in which every scene has a time, for a video of ``seconds``."""
    scenes = [
        {"at": scene.begins(seconds), "prompt": scene.prompt, "switch": str(scene.change)}
        for scene in script.scenes
    ]
    return json.dumps({"scenes": scenes}, ensure_ascii=False)


def _script(common: str, tables: Sequence[Mapping[str, Any]], change: Change) -> Script:
    """Return the scenes of ``tables``, each checked by itself."""
    timing = {key for table in tables for key in ("at", "for") if key in table}
    if len(timing) > 1:
        raise ScriptError("some scenes say at and others for; use one of them throughout.")
    key = timing.pop() if timing else None
    scenes: list[Scene] = []
    now = 0.0
    for number, table in enumerate(tables, start=1):
        where = f"scene {number}"
        if not (prompt := joined(common, table.get("prompt", ""))):
            raise ScriptError(f'{where} is empty; give it a "prompt".')
        last = number == len(tables)
        own = _change(table, change, where)
        if key is None:
            scenes.append(Scene(prompt=prompt, share=(number - 1) / len(tables), change=own))
            continue
        if key == "at":
            now = _seconds(table, "at", where, least=0.0)
            _check_order(scenes, now, where)
        scenes.append(Scene(prompt=prompt, seconds=now, change=own))
        if key == "for" and not (last and "for" not in table):
            now += _seconds(table, "for", where, least=1e-3)
    ended = now if key == "for" and "for" in tables[-1] else None
    remarks = (no_change(scenes[0].change),) if "switch" in tables[0] else ()
    return Script(scenes=tuple(scenes), seconds=ended, remarks=remarks)


def _check_order(before: Sequence[Scene], now: float, where: str) -> None:
    """Refuse a scene that does not begin after the one before it, or a first one that is not at 0."""
    if not before and now:
        raise ScriptError(f"{where} begins at {now:g} s; the first scene must begin at 0.")
    if before and now <= before[-1].seconds:
        raise ScriptError(
            f"{where} begins at {now:g} s and the one before at {before[-1].seconds:g} s; list scenes in the "
            "order they are shown."
        )


def _seconds(table: Mapping[str, Any], key: str, where: str, *, least: float) -> float:
    """Return a time."""
    if key not in table:
        raise ScriptError(f'{where} has no "{key}", and others have; give it one, in seconds.')
    value = float(min(table[key], LONGEST_SECONDS))  # a whole number may be too large for a float
    if not value >= least:
        raise ScriptError(f"{key} of {where} is {value:g}; it must be {least:g} seconds or more.")
    return value


def _change(table: Mapping[str, Any], change: Change, where: str) -> Change:
    """Return the change a table names, or ``change``."""
    if "switch" not in table:
        return change
    try:
        return Change.parse(table["switch"])
    except SettingsError as error:
        raise ScriptError(f"switch of {where}: {error}") from error


def _table(value: Any, known: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return ``value`` if it is a table of the keys and kinds in ``known``."""
    if not isinstance(value, dict):
        raise ScriptError(
            f'{where} is {json.dumps(value)[:40]}; it must be a table, e.g. {{"prompt": "a cat"}}.'
        )
    if unknown := sorted(set(value) - set(known)):
        raise ScriptError(
            f"{where} has an unknown key {unknown[0]!r}; known keys: {', '.join(sorted(known))}."
        )
    for key, found in value.items():
        if not isinstance(found, known[key]) or isinstance(found, bool):
            raise ScriptError(
                f"{key} of {where} is {json.dumps(found)[:40]}; it must be {_NAMES[known[key]]}."
            )
    return value
