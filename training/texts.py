"""Prompts with their embeddings on disk, as a stage reads them: umT5 itself is not needed for training.

The embeddings lie in a ``TextCache``, one small file per prompt; an index beside them lists the prompts.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from sfpp_core.durable import write_text
from sfpp_core.text_cache import TextCache
from sfpp_core.text_encoder import fill
from training.config import ConfigError
from training.precision import DTYPES

INDEX = "prompts.json"
"""Name of the index in the folder of the embeddings."""

"""Dtypes that settings may choose, by name."""


def write_index(cache: TextCache, prompts: Sequence[str], negative: str) -> None:
    """Write which prompts ``cache`` holds for training, and which one stands for none.

    Args:
        cache: What holds the embeddings.
        prompts: Cleaned prompts, in their order.
        negative: The cleaned prompt that guidance leads away from.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    table = {
        "key": cache.key,
        "dim": cache.dim,
        "dtype": names[cache.dtype],
        "text_length": cache.text_length,
        "negative": negative,
        "prompts": list(prompts),
    }
    write_text(cache.folder / INDEX, json.dumps(table, ensure_ascii=False, indent=0))


class Texts:
    """The prompts of a stage and their embeddings, read from disk when they are asked for.

    The empty prompt stands for the negative one: guidance asks for it by that name.
    """

    def __init__(self, folder: Path) -> None:
        """Read the index of ``folder``.

        Raises:
            ConfigError: There is none, or it lists a prompt whose embeddings are missing.
        """
        path = folder / INDEX
        if not path.is_file():
            raise ConfigError(f"{folder} holds no embeddings of prompts; run training.encode_prompts first.")
        table = json.loads(path.read_text(encoding="utf-8"))
        self.prompts: tuple[str, ...] = tuple(table["prompts"])
        self.negative: str = table["negative"]
        self._cache = TextCache(
            folder, table["key"], table["dim"], DTYPES[table["dtype"]], table["text_length"]
        )
        wanted = (self.negative, *self.prompts)
        if missing := [prompt for prompt in wanted if not self._cache.path(prompt).exists()]:
            raise ConfigError(
                f"{folder} lacks the embeddings of {len(missing)} of {len(wanted)} prompts, first of "
                f"{missing[0][:60]!r}; run training.encode_prompts again: it makes what is missing."
            )

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._cache.dim

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings of ``prompts``, ``(B, text_length, dim)``, zero after each text.

        Raises:
            ConfigError: Those of a prompt are not kept here, or are damaged.
        """
        rows = []
        for prompt in prompts:
            kept = self._cache.get(prompt or self.negative)
            if kept is None:
                raise ConfigError(
                    f"{self._cache.folder} has no usable embeddings of {prompt[:60]!r}; add the prompt to "
                    "your file of prompts, if it is not there, and run training.encode_prompts again."
                )
            rows.append(kept)
        return fill(rows, self._cache.text_length, self._cache.dim)

    def draw(self, rng: np.random.Generator, count: int) -> list[str]:
        """Return ``count`` prompts, drawn with replacement."""
        return [self.prompts[pick] for pick in rng.integers(len(self.prompts), size=count).tolist()]

    def __deepcopy__(self, _: object) -> "Texts":
        """Return itself: the copy of a model hears the same prompts."""
        return self
