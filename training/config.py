"""Typed settings from a TOML file, with dotted overrides. An unknown key is an error, never ignored.

Every stage's command line is ``FILE.toml [key=value ...] [--dry-run] [--smoke]``. ``--dry-run`` tells what
the stage would take, without training. ``--smoke`` makes a few tiny updates, in folders of their own: every
path under ``runs/`` in the file becomes one under ``runs/smoke/``, so that the stages can follow each other.
"""

import json
import logging
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

logger = logging.getLogger(__name__)

FLAGS = ("--dry-run", "--smoke")
"""Options of every stage."""

SMOKE_LOOP = {"iterations": 3, "sample_every": 3, "effective_batch": 0, "tensorboard": False}
"""The loop of a smoke run."""


class ConfigError(ValueError):
    """A settings file does not match its dataclass."""


def load(kind: type[T], arguments: Sequence[str], *, stage: str) -> T:
    """Read the settings of one stage from its command line.

    Args:
        kind: Dataclass of the settings.
        arguments: A TOML file, then any number of ``section.key=value``, whose values are TOML or bare text,
            and of ``FLAGS``. Overrides win over what ``--smoke`` makes small.
        stage: Name of the stage, for the message.

    Raises:
        ConfigError: The file is missing, or a key is unknown, missing or of the wrong type.
        SystemExit: A dry run of a stage that does not train: its settings were told.
    """
    flags = {argument for argument in arguments if argument.startswith("--")}
    if unknown := sorted(flags - set(FLAGS)):
        raise ConfigError(f"{stage} has no option {unknown[0]}; known options: {', '.join(FLAGS)}.")
    words = [argument for argument in arguments if argument not in flags]
    if not words:
        raise ConfigError(
            f"{stage} needs a settings file: python -m training.{stage} FILE.toml [key=value ...] "
            f"[{'] ['.join(FLAGS)}]"
        )
    path = Path(words[0])
    if not path.is_file():
        raise ConfigError(f"settings file {path} does not exist; examples are in training/configs/.")
    table = tomllib.loads(path.read_text())
    if "--smoke" in flags:
        make_small(table, kind)
    for argument in words[1:]:
        override(table, argument)
    if "--dry-run" in flags and "loop" in table:
        override(table, "loop.dry_run=true")
    settings = build(kind, table, where=path.name)
    if "--dry-run" in flags and "loop" not in table:
        lines = (f"  {name} = {value}" for name, value in flatten(asdict(cast(Any, settings))).items())
        logger.info("%s would run with\n%s", stage, "\n".join(lines))
        raise SystemExit(0)
    return settings


def make_small(table: dict[str, Any], kind: type) -> None:
    """Turn the settings of a stage into those of a smoke run.

    What is small for a stage it says itself, as overrides, in ``SMOKE`` of its settings.
    """
    _move_runs(table)
    if "loop" in table:
        table["loop"] |= SMOKE_LOOP
        if not table["loop"].get("out", "").startswith(_SMOKE_RUNS):
            table["loop"]["out"] = _SMOKE_RUNS + Path(table["loop"].get("out", "run")).name
    for argument in getattr(kind, "SMOKE", ()):
        override(table, argument)


_RUNS, _SMOKE_RUNS = "runs/", "runs/smoke/"


def _move_runs(table: dict[str, Any]) -> None:
    """Move every path under ``runs/`` to ``runs/smoke/``."""
    for name, value in table.items():
        if isinstance(value, dict):
            _move_runs(value)
        elif isinstance(value, str) and value.startswith(_RUNS):
            table[name] = _SMOKE_RUNS + value.removeprefix(_RUNS)


def flatten(table: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Return nested settings as text by dotted name."""
    flat: dict[str, str] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{above}{name}.")
        else:
            flat[above + name] = str(value)
    return flat


def defaults(kind: type, above: str = "") -> dict[str, str]:
    """Return the defaults of the settings ``kind`` as text by dotted name; what is required has none."""
    hints, flat = get_type_hints(kind), {}
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            flat |= defaults(hints[field.name], f"{above}{field.name}.")
        elif field.default is not MISSING:
            flat[above + field.name] = str(field.default)
    return flat


def override(table: dict[str, Any], argument: str) -> None:
    """Set one ``section.key=value`` in ``table``."""
    name, found, text = argument.partition("=")
    if not found:
        raise ConfigError(f"override {argument!r} has no '='; write section.key=value.")
    *sections, key = name.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {argument!r}: {section!r} is no section, its value is {table!r}.")
    try:
        table[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[key] = tomllib.loads(f"value = {json.dumps(text)}")["value"]


def build(kind: type[T], table: dict[str, Any], *, where: str) -> T:
    """Build the dataclass ``kind`` from ``table``, nested tables into nested dataclasses."""
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(table) - set(known)):
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(known))}.")
    values = dict(table)
    for name, field in known.items():
        if name not in table:
            if field.default is MISSING and field.default_factory is MISSING:
                raise ConfigError(f"{where}: key {name!r} is required.")
        elif is_dataclass(hints[name]):
            if not isinstance(table[name], dict):
                raise ConfigError(f"{where}: {name!r} must be a table, got {table[name]!r}.")
            values[name] = build(hints[name], table[name], where=f"{where}:[{name}]")
        else:
            values[name] = _typed(hints[name], table[name], where=f"{where}: {name}")
    return kind(**values)


def _typed(hint: Any, value: Any, *, where: str) -> Any:
    """Return ``value`` if it is a ``hint``; an integer may stand for a float, text for a path."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and Path in (hint, *get_args(hint)):
        return Path(value)
    if isinstance(value, list) and get_origin(hint) is tuple:
        return tuple(_typed(get_args(hint)[0], one, where=f"{where}, an element of it,") for one in value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ConfigError(f"{where} is {value!r}; it must be of type {hint.__name__}.")
    return value
