"""What the student hears and when: a prompt per stretch of the video, and how one gives way to the next.

Legend: B batch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .conditioning import fit_text
from .errors import ConditioningError, SettingsError
from .student import BoundStudent, CausalStudent

ChangeKind = Literal["soft", "cut", "blend"]

LONGEST_BLEND = 1000
"""Most chunks of a blend: a larger number is a slip of the finger."""

CHANGES = (
    "soft, cut, cut+sink or blend:N, e.g. blend:4 over 4 chunks; soft:N remembers the last N chunks alone"
)
"""How a change is written."""

DEFAULT_BLEND = 4
"""Chunks of a blend that does not say: 3 seconds of Wan 2.1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How a prompt gives way to the next.

    ``soft``: what the window remembers is computed again under the new prompt, so the picture goes on and the
    old prompt is forgotten at once (LongLive's KV recache, arXiv:2509.22622). With ``chunks`` only the last
    ones are, and the picture changes more. ``cut``: the memory is emptied
    and a new shot begins. ``blend``: the memory stays, and the embeddings move to the new ones in equal
    steps.
    """

    kind: ChangeKind = "soft"

    chunks: int = 0
    """Of a blend: over how many; the last of them is the first that hears the new prompt alone. Of a soft
    change: how many of the latest are remembered, besides the sink; 0 is the whole window. Windows that start
    anew remember what they always do."""

    sink: bool = False
    """Whether a cut keeps the sink, computed again under the new prompt: the look of the start survives."""

    def __post_init__(self) -> None:
        if self.kind == "blend" and not 1 <= self.chunks <= LONGEST_BLEND:
            raise SettingsError(
                f"a blend over {self.chunks} chunks cannot be; use 1 to {LONGEST_BLEND}, e.g. blend:4."
            )

    @classmethod
    def parse(cls, text: str) -> "Change":
        """Return the change that ``text`` names: see ``CHANGES``; ``#`` is a cut.

        Raises:
            SettingsError: It names none.
        """
        found = re.fullmatch(
            r"(soft)(?::([1-9]\d{0,8}))?|(cut|#)(\+sink)?|(blend)(?::(\d{1,9}))?", text.strip()
        )
        if found is None:
            raise SettingsError(f"{text!r} names no way to change the prompt; use {CHANGES}.")
        soft, least, cut, sink, _, chunks = found.groups()
        if soft:
            return cls(chunks=int(least or 0))
        if cut:
            return cls(kind="cut", sink=sink is not None)
        return cls(kind="blend", chunks=DEFAULT_BLEND if chunks is None else int(chunks))

    def __str__(self) -> str:
        if self.kind == "blend":
            return f"blend:{self.chunks}"
        if self.kind == "soft" and self.chunks:
            return f"soft:{self.chunks}"
        return "cut+sink" if self.sink else self.kind


SOFT = Change()
"""The default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cue:
    """A prompt and the chunk from which on it is heard."""

    chunk: int
    """Chunk of the video. That of the first cue is 0."""

    embeddings: Tensor
    """Of its prompt, ``(B, tokens, text_dim)``."""

    change: Change = SOFT
    """How it takes over from the cue before. Without meaning for the first."""


def as_cues(text: Tensor | Sequence[Cue]) -> tuple[Cue, ...]:
    """Return ``text`` as cues; embeddings alone are one prompt for the whole video.

    Raises:
        ConditioningError: The cues are of different batches.
        SettingsError: There is none, the first is not at chunk 0, or they are not in order.
    """
    cues = (Cue(chunk=0, embeddings=text),) if isinstance(text, Tensor) else tuple(text)
    places = [cue.chunk for cue in cues]
    if not places or places[0] != 0 or any(a >= b for a, b in pairwise(places)):
        raise SettingsError(
            f"cues are at chunks {places}; the first must be 0 and each after the one before."
        )
    if len(batches := {len(cue.embeddings) for cue in cues}) > 1:
        raise ConditioningError(f"cues hold embeddings for {sorted(batches)} videos; use one number for all.")
    return cues


class Voice:
    """The student bound to what it hears at a chunk. One binding is kept at a time.

    Use::

        voice = Voice(student, cues, device="cpu")
        velocity = voice.at(chunk)(noisy, sigma, cache)
    """

    def __init__(self, student: CausalStudent, cues: Sequence[Cue], *, device: torch.device | str) -> None:
        """Take the cues, as ``as_cues`` returns them.

        Raises:
            ConditioningError: Embeddings do not fit the student.
        """
        self._student = student
        self._device = device
        self._cues = [replace(cue, embeddings=fit_text(cue.embeddings, student.config)) for cue in cues]
        self._bound: tuple[tuple[int, int], BoundStudent] | None = None

    def at(self, chunk: int) -> BoundStudent:
        """Return the student bound to what is heard at ``chunk``."""
        key = self.key(chunk)
        if self._bound is None or self._bound[0] != key:
            self._bound = None  # its memory is free before another is made
            self._bound = key, self._student.bind(self.text(chunk).to(self._device))
        return self._bound[1]

    def until(self, chunk: int, stop: int) -> int:
        """Return the first chunk after ``chunk`` that hears something else, or ``stop``."""
        key, after = self.key(chunk), chunk + 1
        while after < stop and self.key(after) == key:
            after += 1
        return after

    def key(self, chunk: int) -> tuple[int, int]:
        """Return the cue heard at ``chunk`` and how many of its steps are taken; equal keys hear the same."""
        number = self._number(chunk)
        cue = self._cues[number]
        steps = cue.change.chunks if number and cue.change.kind == "blend" else 1
        return number, min(chunk - cue.chunk + 1, steps)

    def text(self, chunk: int) -> Tensor:
        """Return the embeddings heard at ``chunk``, ``(B, text_length, text_dim)``.

        With a blend over 4 chunks from chunk 10 on, chunk 9 hears the old prompt, 10 a quarter of the new
        one, and 13 and all after it the new one alone. A blend that is cut short goes on from where it was.
        """
        number, step = self.key(chunk)
        cue = self._cues[number]
        if not number or cue.change.kind != "blend" or step == cue.change.chunks:
            return cue.embeddings
        before = self.text(cue.chunk - 1).to(cue.embeddings)
        return torch.lerp(before, cue.embeddings, step / cue.change.chunks)

    def _number(self, chunk: int) -> int:
        """Return the number of the cue that is heard at ``chunk``."""
        return max(number for number, cue in enumerate(self._cues) if cue.chunk <= chunk)
