"""Where the embeddings of prompts come from: the demo's words, or umT5."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from . import demo
from .checkpoint import load_words
from .config import WAN_1_3B, StudentConfig
from .errors import ConditioningError
from .text_cache import encode_prompts
from .text_encoder import check_text_encoder, text_encoder_bytes
from .words import WordEncoder, check_prompt

DTYPE = torch.float32
"""What umT5 computes in: a layer at a time, so width costs little, and a prompt is encoded once."""

logger = logging.getLogger(__name__)


class PromptSource(Protocol):
    """Makes the embeddings of a video's prompts, found possible before anything is loaded."""

    @property
    def bytes(self) -> int:
        """Most memory it takes while it works; it keeps none."""
        ...

    def embeddings(self, device: torch.device) -> Tensor:
        """Return the embeddings, ``(prompts, tokens, text_dim)``, on ``device``."""
        ...


@dataclass(frozen=True, slots=True)
class FromWords:
    """The demo's vocabulary."""

    prompts: tuple[str, ...]
    words: WordEncoder

    @property
    def bytes(self) -> int:
        """Of the table of vectors, which is loaded already."""
        return 0

    def embeddings(self, device: torch.device) -> Tensor:
        """Return the embeddings, ``(prompts, tokens, text_dim)``."""
        with torch.inference_mode():
            return self.words(self.prompts).to(device)

    def __str__(self) -> str:
        return f"the demo's {len(self.words.vocabulary)} words"


@dataclass(frozen=True, slots=True)
class FromUMT5:
    """Wan's text encoder."""

    prompts: tuple[str, ...]
    path: Path
    tokenizer: Path | None
    cache: Path | None
    text_length: int

    @property
    def bytes(self) -> int:
        """Of its widest layer with what it computes."""
        return text_encoder_bytes(self.path, DTYPE, text_length=self.text_length)

    def embeddings(self, device: torch.device) -> Tensor:
        """Encode the prompts, each by itself, or read what an earlier run has made of them."""
        with torch.inference_mode():
            return encode_prompts(
                self.path,
                self.prompts,
                device=device,
                dtype=DTYPE,
                tokenizer=self.tokenizer,
                text_length=self.text_length,
                cache=self.cache,
            )

    def __str__(self) -> str:
        return f"{check_text_encoder(self.path, tokenizer=self.tokenizer)}"


def is_of_the_demo(config: StudentConfig) -> bool:
    """Return whether a student is of the demo's world: no Wan hears so few words."""
    return config.text_length != WAN_1_3B.text_length


def prompt_source(
    prompts: str | Sequence[str],
    config: StudentConfig,
    *,
    words: Path | None = None,
    encoder: Path | None = None,
    tokenizer: Path | None = None,
    cache: Path | None = None,
    names: Sequence[str] = (),
) -> PromptSource:
    """Return what makes the embeddings of ``prompts`` for a student.

    Reads headers, the tokenizer and the demo's words; warns of words the demo does not know.

    Args:
        prompts: What the video shows, one after the other; a text alone is one prompt.
        config: The student.
        words: File of the student's word encoder; ``None`` is the demo's.
        encoder: umT5, as in ``check_text_encoder``; needed by students that are not of the demo.
        tokenizer: As in ``check_text_encoder``.
        cache: Folder in which embeddings are kept; ``None`` keeps none.
        names: What warnings and errors call each prompt, where there are several.

    Raises:
        CheckpointError: A file is damaged or holds something else.
        ConditioningError: The student and its text encoder do not fit, or none is named.
    """
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if encoder is not None:
        check_text_encoder(encoder, config, tokenizer)
        return FromUMT5(prompts, encoder, tokenizer, cache, config.text_length)
    if words is None and not is_of_the_demo(config):
        raise ConditioningError(
            f"this student hears {config.text_length} embeddings of {config.text_dim}, made by umT5; name "
            "the text encoder with --text-encoder, e.g. umt5_xxl_fp8_e4m3fn_scaled.safetensors."
        )
    loaded, groups = load_words(words or demo.file(demo.WORDS))
    if (loaded.table.embedding_dim, loaded.text_length) != (config.text_dim, config.text_length):
        raise ConditioningError(
            f"the word encoder makes {loaded.text_length} embeddings of {loaded.table.embedding_dim} and the "
            f"student hears {config.text_length} of {config.text_dim}; use the one it was trained with."
        )
    _warn_of_lost_words(prompts, names, loaded, groups)
    return FromWords(prompts, loaded)


def _warn_of_lost_words(
    prompts: Sequence[str], names: Sequence[str], words: WordEncoder, groups: Mapping[str, tuple[str, ...]]
) -> None:
    """Refuse a prompt that says nothing to the demo, and warn of words that are lost, each prompt by name."""
    named = len(prompts) > 1 and len(names) == len(prompts)
    for name, prompt in zip(
        [f"{name}: " for name in names] if named else [""] * len(prompts), prompts, strict=True
    ):
        try:
            for warning in check_prompt(prompt, words, groups):
                logger.warning("%s%s", name, warning)
        except ConditioningError as error:
            raise ConditioningError(f"{name}{error}") from error
