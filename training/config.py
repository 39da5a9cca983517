"""Typed settings from a TOML file, with dotted overrides. An unknown key is an error, never ignored."""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ConfigError(ValueError):
    """A settings file does not match its dataclass."""


def load(kind: type[T], arguments: Sequence[str], *, stage: str) -> T:
    """Read the settings of one stage from its command line.

    Args:
        kind: Dataclass of the settings.
        arguments: A TOML file, then any number of ``section.key=value``; values are TOML, or bare text.
        stage: Name of the stage, for the message.

    Raises:
        ConfigError: The file is missing, or a key is unknown, missing or of the wrong type.
    """
    if not arguments:
        raise ConfigError(
            f"{stage} needs a settings file: python -m training.{stage} FILE.toml [key=value ...]"
        )
    path = Path(arguments[0])
    if not path.is_file():
        raise ConfigError(f"settings file {path} does not exist; examples are in training/configs/.")
    table = tomllib.loads(path.read_text())
    for argument in arguments[1:]:
        override(table, argument)
    return build(kind, table, where=path.name)


def override(table: dict[str, Any], argument: str) -> None:
    """Set one ``section.key=value`` in ``table``."""
    name, found, text = argument.partition("=")
    if not found:
        raise ConfigError(f"override {argument!r} has no '='; write section.key=value.")
    *sections, key = name.split(".")
    for section in sections:
        table = table.setdefault(section, {})
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
        return tuple(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ConfigError(f"{where} is {value!r}; it must be of type {hint.__name__}.")
    return value
