"""From a prompt to the tokens of umT5: cleaning as Wan does it, then sentencepiece.

ComfyUI does not clean prompts. What differs there: typographic quotes stay as typed, ``&amp;`` is not
resolved, ``(word:1.2)`` is a weight instead of text, and a prompt cut at 512 tokens loses its end mark.
"""

import hashlib
import html
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import CheckpointError, SFPPError

PAD, END = 0, 1
"""Tokens that fill and that end a text, in every T5."""

LARGEST_SURPLUS = 1024
"""Rows a table of embeddings may have beyond the tokens: sentinels, and padding to a round number."""

FILES = ("tokenizer.json", "spiece.model")
"""What a tokenizer is kept in. The first is what Wan itself reads.

They give the same tokens but for letters the vocabulary lacks, which the second may spell in bytes, and for a
prompt that says ``</s>`` or ``<pad>``, which only the first takes for the tokens of that name.
"""

PLACES = ("tokenizer", "../tokenizer", "google/umt5-xxl", ".")
"""Where a tokenizer is looked for, beside the weights: as in diffusers' folder, and as in Wan's."""

_PLAIN = re.compile(r"(?:[\t\n\r -%'-~]|&(?![\w#]))*")
"""Text that ftfy leaves as it is."""

logger = logging.getLogger(__name__)


def clean_prompt(prompt: str) -> str:
    """Return a prompt as Wan cleans it: repaired by ftfy, HTML entities resolved, white space made single.

    Without ftfy installed a prompt with letters beyond ASCII is not repaired, with a warning; ftfy would make
    its quotes straight and its wide commas narrow. Source: Wan 2.1, ``wan/modules/tokenizers.py``.
    """
    if find_spec("ftfy") is not None:
        import ftfy

        prompt = ftfy.fix_text(prompt)
    elif not _PLAIN.fullmatch(prompt):
        logger.warning(
            "The prompt %r goes without the repair of quotes and letters that Wan was trained with; for "
            "it, `pip install ftfy`.",
            prompt[:40],
        )
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """Where a tokenizer is: a file, or the bytes that the weights carry."""

    name: str
    """Of the place, for people."""

    content: bytes
    """A ``tokenizer.json`` or a sentencepiece model."""

    def digest(self) -> str:
        """Return what tells this tokenizer from others."""
        return hashlib.sha256(self.content).hexdigest()

    def open(self, vocabulary: int) -> "Tokenizer":
        """Make it ready for an encoder with ``vocabulary`` rows.

        Raises:
            CheckpointError: It is damaged, or belongs to another encoder.
            SFPPError: A library that reads it is not installed.
        """
        tokenizer = Tokenizer(self)
        if not 0 <= vocabulary - tokenizer.tokens <= LARGEST_SURPLUS or not tokenizer.is_t5():
            raise CheckpointError(
                f"{self.name} knows {tokenizer.tokens} tokens and the text encoder {vocabulary}; use the "
                "tokenizer of umT5-XXL."
            )
        return tokenizer


def find_tokenizer(weights: Path, named: Path | None, carried: bytes | None) -> TokenizerFile:
    """Return the tokenizer of an encoder.

    Args:
        weights: The encoder's file or folder, beside which a tokenizer is looked for.
        named: What the user named, a file or a folder; it comes first.
        carried: The tokenizer in the weights, which comes second.

    Raises:
        CheckpointError: There is none.
    """
    if named is None and carried is not None:
        return TokenizerFile(f"the tokenizer in {weights}", carried)
    folder = weights if weights.is_dir() else weights.parent
    places = [folder / place for place in PLACES] if named is None else [named]
    for place in places:
        for path in (place, *(place / name for name in FILES)):
            if path.is_file():
                return _read(path)
    looked = "it" if named is not None else " and ".join(str(place) for place in places)
    raise CheckpointError(
        f"{named or weights} has no tokenizer: neither {' nor '.join(FILES)} is in {looked}. Name the folder "
        "of google/umt5-xxl, or use the text encoder of ComfyUI, which carries it."
    )


def _read(path: Path) -> TokenizerFile:
    """Read a tokenizer from its file."""
    try:
        return TokenizerFile(str(path), path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


class Tokenizer:
    """Turns clean prompts into tokens, without the one that ends a text."""

    def __init__(self, file: TokenizerFile) -> None:
        """Parse the file; what it is, its content decides."""
        self._json = file.content.lstrip().startswith(b"{")
        self._model: Any = _parse_json(file) if self._json else _parse_model(file)
        self.tokens = self._model.get_vocab_size() if self._json else self._model.get_piece_size()

    def is_t5(self) -> bool:
        """Return whether filling and ending are the tokens they are in every T5."""
        names = [(self._model.id_to_token if self._json else self._model.id_to_piece)(i) for i in (PAD, END)]
        return names == ["<pad>", "</s>"]

    def __call__(self, prompt: str) -> list[int]:
        """Return the tokens of ``prompt``."""
        if self._json:
            return self._model.encode(prompt, add_special_tokens=False).ids
        return self._model.encode(prompt, add_bos=False, add_eos=False)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of some tokens."""
        return self._model.decode(list(tokens))


def _parse_json(file: TokenizerFile) -> Any:
    """Parse a ``tokenizer.json``."""
    require("tokenizers", "transformers")
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_str(file.content.decode())
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{file.name} is no tokenizer ({error}); get it again.") from error
    model.no_padding()
    model.no_truncation()
    return model


def _parse_model(file: TokenizerFile) -> Any:
    """Parse a sentencepiece model."""
    require("sentencepiece", "sentencepiece")
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=file.content)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{file.name} is no sentencepiece model ({error}); get it again.") from error


def require(library: str, package: str) -> None:
    """Refuse to go on without a library, naming what installs it.

    Raises:
        SFPPError: It is not installed.
    """
    if find_spec(library) is None:
        raise SFPPError(f"umT5 needs {library}, which is not installed; run `pip install {package}`.")
