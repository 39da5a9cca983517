"""The demo's words as a CLIP: works in core's CLIP Text Encode, under core's memory management."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..sfpp_core.words import WordEncoder, check_prompt
from . import _host
from .plain_errors import plain_errors

logger = logging.getLogger(__name__)

Tokens = dict[str, list[list[tuple[str, float]]]]
"""What the host carries from tokenising to encoding: here, whole prompts."""

KEY = "sfpp_words"


def demo_clip(words: WordEncoder, groups: Mapping[str, tuple[str, ...]]) -> Any:
    """Return ``words`` as a CLIP; ``groups`` are the words worth telling a user, by heading."""
    weights = dict(words.state_dict())
    return _host.own_clip(partial(Tokenizer, words, groups), partial(Encoder, words), weights)


class Tokenizer:
    """Passes the prompt on, and warns of words that are lost on the demo."""

    def __init__(self, words: WordEncoder, groups: Mapping[str, tuple[str, ...]], **options: Any) -> None:  # noqa: ARG002 - the host's signature
        self._words = words
        self._groups = groups

    @plain_errors
    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> Tokens:  # noqa: ARG002
        """Return the prompt as the only token.

        Raises:
            ValueError: The demo knows no word of it. An empty prompt is allowed: it asks for nothing.
        """
        warnings = check_prompt(text, self._words, self._groups) if text.strip() else []
        for warning in warnings:
            logger.warning("%s", warning)
        if warnings:
            _host.say("\n".join(warnings))
        return {KEY: [[(text, 1.0)]]}

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: the vocabulary travels with the demo's weights."""
        return {}


class Encoder(nn.Module):
    """The word vectors, with the surface core expects of a text encoder."""

    disable_offload = True
    """Too small to be worth moving in pieces."""

    def __init__(self, words: WordEncoder, **options: Any) -> None:  # noqa: ARG002 - the host's signature
        super().__init__()
        self.words = words
        self.dtypes = {torch.float32}

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Accept the host's options; none applies."""

    def reset_clip_options(self) -> None:
        """Accept the host's options; none applies."""

    def encode_token_weights(self, tokens: Tokens) -> tuple[Tensor, None]:
        """Return the embeddings ``(1, text_length, text_dim)`` and no pooled vector."""
        prompts = [text for text, _ in tokens[KEY][0]]
        return self.words(prompts).cpu(), None

    def load_sd(self, weights: dict[str, Tensor]) -> Any:
        """Load a state dict of the words."""
        return self.words.load_state_dict(weights)
