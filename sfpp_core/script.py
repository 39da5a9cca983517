r"""Prompts over time: what a user writes becomes a ``Script``.

- ``a cat. [0s: it sleeps] [12.5s: it runs]``: each scene with the time it begins at. What stands outside the
  brackets is common text, put before every scene; until the first scene begins it is shown alone. A scene may
  name its end too, ``[3s-5s: it jumps]``. This is the form of FramePack-Studio.
- ``a cat sleeps [5s] | a cat runs [10s#]``: each scene with its length; the last may go without. This is the
  form of Infinity-RoPE, in which a ``#`` makes the scene of its own bracket begin with a cut.
- ``a cat sleeps | a cat runs``: equal shares of the video, as in WanVideoWrapper and diffusers.
- JSON, see ``script_json``.

A time is ``12.5s``, ``2m`` or ``1m30s``. How a scene takes over from the one before may stand after it in the
words of ``cues.CHANGES``: ``[5s cut: a dog]``, ``a dog [10s blend:4]``, ``a dog [cut]``. A text in none of
these forms is one scene, as it stands. ``\|``, ``\[`` and ``\]`` are the characters alone.
"""

import re
from pathlib import Path

from .cues import SOFT, Change
from .errors import ScriptError
from .scenes import Scene, Script
from .script_json import read_json
from .script_text import read_text

__all__ = ["Scene", "Script", "load_script", "read_script"]

LARGEST_FILE = 1_000_000
"""Bytes of the largest file that is read: a longer one is no script."""


def read_script(text: str, *, change: Change = SOFT) -> Script:
    """Read prompts over time, in any of their forms.

    Args:
        text: What the user wrote.
        change: How scenes take over that do not say.

    Raises:
        ScriptError: It cannot be read; the message points at the character.
    """
    # A brace or a list of tables; [0s: a cat] begins with a bracket too.
    if re.match(r"\s*(?:\{\s*[\"}]|\[\s*\{)", text):
        return read_json(text, change=change)
    return read_text(text, change=change)


def load_script(path: Path) -> str:
    """Return the text of a file that holds a script, for ``read_script``.

    Raises:
        ScriptError: It is missing, empty, or no text.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ScriptError(f"{path} cannot be read: {error.strerror or error}; check the path.") from error
    except UnicodeDecodeError as error:
        raise ScriptError(f"{path} is no text in UTF-8 at byte {error.start}; save it as UTF-8.") from error
    if len(content) > LARGEST_FILE:
        raise ScriptError(f"{path} is larger than {LARGEST_FILE / 1e6:g} MB; that is no script.")
    if not text.strip():
        raise ScriptError(f"{path} is empty; write a prompt, or scenes such as [0s: a cat] [5s: a dog].")
    return text.strip()
