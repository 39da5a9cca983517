"""The text encoder of the demo: one learned vector per word of its small vocabulary."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .errors import ConditioningError


class WordEncoder(nn.Module):
    """Turns captions into embeddings, as umT5 does for Wan: one row per word, zeros after the last.

    Words outside the vocabulary have no vector and are left out; ``unknown`` lists them. Of those inside, the
    first ``text_length`` count; ``surplus`` lists the others.
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
        return [self._index[word] for word in self._known(prompt)[: self.text_length]]

    def unknown(self, prompt: str) -> list[str]:
        """Return the words of ``prompt`` that the encoder does not know, in order, each once."""
        return list(dict.fromkeys(word for word in _words(prompt) if word not in self._index))

    def surplus(self, prompt: str) -> list[str]:
        """Return the known words of ``prompt`` that no longer count, in order."""
        return self._known(prompt)[self.text_length :]

    def _known(self, prompt: str) -> list[str]:
        """Return the known words of ``prompt``, in order."""
        return [word for word in _words(prompt) if word in self._index]

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Return embeddings of ``prompts``, ``(B, text_length, text_dim)``; the empty prompt is all zeros."""
        rows = []
        for prompt in prompts:
            indices = torch.tensor(self.indices(prompt), dtype=torch.long, device=self.table.weight.device)
            words = self.table(indices)
            rows.append(nn.functional.pad(words, (0, 0, 0, self.text_length - len(words))))
        return torch.stack(rows)


def check_prompt(prompt: str, words: WordEncoder, groups: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Refuse a prompt that says nothing to the demo; return warnings of what is lost of one that does.

    Args:
        prompt: What the user typed.
        words: The demo's text encoder.
        groups: Words worth telling a user, by heading.

    Raises:
        ConditioningError: The prompt is empty, or no word of it is known.
    """
    known = "".join(f"\n  {heading}: {', '.join(group)}" for heading, group in groups.items())
    if not prompt.strip():
        raise ConditioningError(f"the prompt is empty; say what moves and where. The demo knows{known}")
    if not words.indices(prompt):
        raise ConditioningError(f"the demo knows no word of the prompt {prompt!r}. It knows{known}")
    warnings = []
    if unknown := words.unknown(prompt):
        warnings.append(f"the demo does not know: {', '.join(unknown)}. It goes without. It knows{known}")
    if surplus := words.surplus(prompt):
        warnings.append(
            f"only the first {words.text_length} known words count; left out: {', '.join(surplus)}."
        )
    return warnings


def _words(prompt: str) -> list[str]:
    """Split a prompt into lower-case words, of any script."""
    return re.findall(r"\w+", prompt.lower())
