"""The text encoder of the demo: one learned vector per word of its small vocabulary."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .errors import ConditioningError


class WordEncoder(nn.Module):
    """Turns captions into embeddings, as umT5 does for Wan: one row per word, zeros after the last.

    Words outside the vocabulary have no vector and are left out; ``unknown`` lists them.
    """

    def __init__(self, vocabulary: Sequence[str], *, text_dim: int, text_length: int) -> None:
        """Keep the vocabulary; the vectors start random."""
        super().__init__()
        self.vocabulary = tuple(vocabulary)
        self.text_length = text_length
        self.table = nn.Embedding(len(self.vocabulary), text_dim)
        self._index = {word: index for index, word in enumerate(self.vocabulary)}

    def indices(self, prompt: str) -> list[int]:
        """Return the vocabulary indices of the known words, at most ``text_length`` of them."""
        known = [self._index[word] for word in _words(prompt) if word in self._index]
        return known[: self.text_length]

    def unknown(self, prompt: str) -> list[str]:
        """Return the words of ``prompt`` that the encoder does not know, in order, each once."""
        return list(dict.fromkeys(word for word in _words(prompt) if word not in self._index))

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Return embeddings of ``prompts``, ``(B, text_length, text_dim)``; the empty prompt is all zeros."""
        rows = []
        for prompt in prompts:
            indices = torch.tensor(self.indices(prompt), dtype=torch.long, device=self.table.weight.device)
            words = self.table(indices)
            rows.append(nn.functional.pad(words, (0, 0, 0, self.text_length - len(words))))
        return torch.stack(rows)

    def check(self, prompt: str) -> None:
        """Refuse a prompt of which no word is known.

        Raises:
            ConditioningError: Nothing of the prompt would reach the student.
        """
        if not self.indices(prompt):
            raise ConditioningError(
                f"the demo knows no word of the prompt {prompt!r}; it knows: {', '.join(self.vocabulary)}."
            )


def _words(prompt: str) -> list[str]:
    """Split a prompt into lower-case words."""
    return re.findall(r"[a-z]+", prompt.lower())
