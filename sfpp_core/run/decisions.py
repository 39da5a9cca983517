"""What decides the chunks of a run, in words and as keys.

A run is made in sections: the first from its beginning, a further one from wherever it was changed. All that
decides the chunks of a section, but for the text, is a table that people can read. The key of a chunk is a
digest of that table, of its text and of the key before it: chunks with equal keys are the same chunks.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from typing import Any

Texts = tuple[tuple[int, str], ...]
"""What is asked for, by the first chunk it is asked for at; chunks rise, from the first of the section on."""

SHOWN = 60
"""Characters of a value that a message shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A stretch of a run, made under one set of decisions."""

    chunk: int
    """First chunk it decides; it ends where the next begins."""

    decisions: Mapping[str, Any]
    """All that decides its chunks, but for the text: a table of JSON."""

    texts: Texts
    """What is asked for."""

    def text(self, chunk: int) -> str:
        """Return what is asked for at ``chunk``."""
        return next((text for first, text in reversed(self.texts) if first <= chunk), "")


def texts_of(texts: Sequence[str], *, first: int) -> Texts:
    """Return the texts of every chunk from ``first`` on as they change."""
    runs = groupby(enumerate(texts, start=first), key=lambda pair: pair[1])
    return tuple((next(pairs)[0], text) for text, pairs in runs)


def as_json(decisions: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table as it is after it was written and read again."""
    return json.loads(json.dumps(decisions, sort_keys=True))


def keys(sections: Sequence[Section]) -> Iterator[str]:
    """Yield the key of chunk after chunk, without end."""
    key, chunk = "", 0
    stops = [section.chunk for section in sections[1:]]
    for section, stop in zip(sections, [*stops, None], strict=True):
        table = json.dumps(section.decisions, sort_keys=True)
        while stop is None or chunk < stop:
            made = json.dumps([key, table, section.text(chunk)])
            key = blake2b(made.encode(), digest_size=16).hexdigest()
            yield key
            chunk += 1


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Say, for people, in what two sets of decisions differ."""
    old, new = dict(_flat(before)), dict(_flat(after))
    found = []
    for name in dict.fromkeys((*old, *new)):
        was, now = old.get(name, "none"), new.get(name, "none")
        if was != now:
            found.append(f"{name} was {_short(was)} and is {_short(now)}")
    return found


def _flat(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries of a table of tables, by names such as ``settings.window``."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _short(value: object) -> str:
    """Return a value for a message."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
