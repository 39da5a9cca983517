"""What prompts over time are once they are read: scenes, and complaints that point at a character."""

from dataclasses import dataclass

from .cues import SOFT, Change
from .errors import ScriptError

SHOWN = 72
"""Characters of a line that an error shows around the one it points at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A prompt and when it begins: at ``seconds``, or at a ``share`` of the video."""

    prompt: str
    """All that is said, common text included."""

    seconds: float = 0.0
    """Where it begins, in seconds of the video."""

    share: float = 0.0
    """Where it begins, as a share of the video, whose length is not known when the scene is read."""

    change: Change = SOFT
    """How it takes over from the scene before."""

    def begins(self, length: float) -> float:
        """Return the second at which it begins in a video of ``length`` seconds."""
        return self.seconds + self.share * length


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """Scenes in order; the first begins with the video."""

    scenes: tuple[Scene, ...]

    seconds: float | None = None
    """When the last scene ends, if it says so."""

    remarks: tuple[str, ...] = ()
    """What the user should know of how it was read."""


@dataclass(frozen=True, slots=True)
class Source:
    """A text, and how to complain of a place in it."""

    text: str

    def wrong(self, place: int, what: str) -> ScriptError:
        """Return an error that says ``what``, shows the line and points at the character at ``place``."""
        start = self.text.rfind("\n", 0, place) + 1
        line, column = self.text[start:].split("\n", 1)[0], place - start
        first = max(0, min(column - SHOWN // 2, len(line) - SHOWN))
        before, after = "..." * (first > 0), "..." * (first + SHOWN < len(line))
        shown = before + line[first : first + SHOWN].replace("\t", " ") + after
        pointer = " " * (len(before) + column - first) + "^"
        number = f"line {self.text.count(chr(10), 0, place) + 1}, " if "\n" in self.text.strip() else ""
        return ScriptError(f"{what}\n  {shown}\n  {pointer} {number}character {column + 1}")


def joined(common: str, prompt: str) -> str:
    """Return a scene's own words after the common ones."""
    return " ".join(part for part in (common.strip(), prompt.strip()) if part)


def goes_on(ended: float, after: float) -> str:
    """Say what is shown between two scenes that leave a gap, in seconds."""
    return f"nothing is said of {ended:g} s to {after:g} s; the scene before goes on."
