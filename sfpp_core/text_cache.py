"""Text embeddings kept on disk, so that a prompt is encoded once in its life.

One small file per text. Its name is a digest of all that decides the numbers: the encoder, its tokenizer, the
cleaned prompt, the length it is cut to and the dtype.
"""

import hashlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import WAN_1_3B
from .errors import CheckpointError, OutputError, SettingsError
from .text_encoder import TextEncoder, TextEncoderInfo, check_text_encoder, fill
from .umt5_tokenizer import clean_prompt
from .weights_file import read_header, read_tensors, write

FOLDER = "selfforcing-plusplus/text"
"""Folder in the user's cache."""

TENSOR, PROMPT, WARNING = "embeddings", "prompt", "warning"
"""Names in the file: of its tensor, and in its metadata."""

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """Return where the embeddings of this user are kept unless a folder is named.

    Raises:
        SettingsError: The user has no home.
    """
    try:
        return _users_caches() / FOLDER
    except RuntimeError as error:
        raise SettingsError("there is no home folder to keep text embeddings in; name a folder.") from error


def _users_caches() -> Path:
    """Return where programs keep what they can make again."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base)


@dataclass(frozen=True, slots=True)
class TextCache:
    """The embeddings of one encoder, cut to one length, in one dtype, in a folder.

    Use::

        cache = TextCache.of(info, folder, dtype=torch.float32, text_length=512)
        rows = cache.get("a cat")           # (tokens, dim), or None
        cache.put("a cat", rows, warning="")
    """

    folder: Path

    key: str
    """Digest of all that decides the numbers but the prompt."""

    dim: int
    """Width of the embeddings."""

    dtype: torch.dtype

    text_length: int
    """Most rows a text has."""

    @classmethod
    def of(cls, info: TextEncoderInfo, folder: Path, *, dtype: torch.dtype, text_length: int) -> "TextCache":
        """Return the cache of an encoder; the folder is made if it is not there.

        Raises:
            OutputError: The folder cannot be made.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder} cannot keep text embeddings: {error.strerror or error}; name another folder."
            ) from error
        parts = (info.file.fingerprint(), info.tokenizer.digest(), str(dtype), str(text_length))
        key = hashlib.sha256(" ".join(parts).encode()).hexdigest()
        return cls(folder, key, info.file.sizes.dim, dtype, text_length)

    def path(self, prompt: str) -> Path:
        """Return the file of a cleaned prompt."""
        name = hashlib.sha256(f"{self.key} {prompt}".encode()).hexdigest()[:32]
        return self.folder / f"{name}.safetensors"

    def get(self, prompt: str) -> Tensor | None:
        """Return the embeddings of a cleaned prompt, ``(tokens, dim)``, or ``None``; damage is warned of."""
        path = self.path(prompt)
        if not path.exists():
            return None
        try:
            header = read_header(path)
            ((_, rows),) = read_tensors(path, header)
            fits = rows.ndim == 2 and rows.shape[1] == self.dim and 0 < len(rows) <= self.text_length
            if not fits or rows.dtype != self.dtype or header.metadata.get(PROMPT) != prompt:
                raise CheckpointError(f"{path} holds something else")
            if not bool(torch.isfinite(rows).all()):
                raise CheckpointError(f"{path} holds numbers that are not finite")
        except (CheckpointError, ValueError) as error:
            logger.warning("Kept text embeddings are of no use and made again: %s", error)
            return None
        if warning := header.metadata.get(WARNING):
            logger.warning("%s", warning)
        return rows

    def put(self, prompt: str, rows: Tensor, *, warning: str) -> None:
        """Keep the embeddings of a cleaned prompt; a full disk is warned of, for the run can go on.

        Args:
            prompt: Cleaned prompt.
            rows: Its embeddings, ``(tokens, dim)``.
            warning: What the user was told of the prompt, to be told again each time; may be empty.
        """
        try:
            write(self.path(prompt), {TENSOR: rows}, {PROMPT: prompt, WARNING: warning})
        except OutputError as error:
            logger.warning("Text embeddings are not kept: %s", error)


def encode_prompts(
    path: Path,
    prompts: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | None = None,
    text_length: int = WAN_1_3B.text_length,
    cache: Path | None = None,
) -> Tensor:
    """Return the embeddings of ``prompts``, ``(B, text_length, dim)``; rows after a text are zero.

    Equal prompts are encoded once. If all are found in the cache, no weight is read and neither transformers
    nor a tokenizer library is needed.

    Args:
        path: Text encoder, as in ``check_text_encoder``.
        prompts: What the video shows; may be empty texts.
        device: Where layers are computed and embeddings end up.
        dtype: Dtype of the computation and of the embeddings.
        tokenizer: As in ``check_text_encoder``.
        text_length: ``StudentConfig.text_length``.
        cache: Folder in which embeddings are kept, e.g. ``default_folder()``; ``None`` keeps none.

    Raises:
        CheckpointError: As ``check_text_encoder``, or a weight is not finite.
        OutputError: The folder of the cache cannot be made.
        SettingsError: ``dtype`` is too small.
        SFPPError: A library is not installed.
    """
    info = check_text_encoder(path, tokenizer=tokenizer)
    kept = None if cache is None else TextCache.of(info, cache, dtype=dtype, text_length=text_length)
    clean = [clean_prompt(prompt) for prompt in prompts]
    found: dict[str, Tensor] = {}
    for prompt in dict.fromkeys(clean):
        rows = kept.get(prompt) if kept else None
        if rows is not None:
            found[prompt] = rows.to(device)
    if missing := [prompt for prompt in dict.fromkeys(clean) if prompt not in found]:
        encoder = TextEncoder(info, device=device, dtype=dtype, text_length=text_length)
        texts = [encoder.tokens(prompt) for prompt in missing]
        for text, rows in zip(texts, encoder.rows(texts), strict=True):
            found[text.prompt] = rows
            if kept:
                kept.put(text.prompt, rows, warning=text.warning)
    return fill([found[prompt] for prompt in clean], text_length, info.file.sizes.dim)
