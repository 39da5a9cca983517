"""A file of prompts becomes umT5's embeddings on disk, so that no stage has to hold umT5.

Every prompt is kept at its true length, one small file each, in the layout of ``sfpp_core.text_cache``. A
second start makes only what is missing. The negative prompt is encoded too: guidance leads away from it.
Run ``python -m training.encode_prompts training/configs/wan_prompts.toml [key=value ...]``.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sfpp_core.config import WAN_1_3B
from sfpp_core.text_cache import TextCache
from sfpp_core.text_encoder import TextEncoder, TextEncoderInfo, check_text_encoder
from sfpp_core.umt5_tokenizer import clean_prompt
from training.config import ConfigError, load
from training.precision import DTYPES
from training.texts import write_index

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeSettings:
    """Settings of the prompt stage."""

    text_encoder: str
    """umT5: ComfyUI's single file, a folder of diffusers or of Wan, or Wan's ``.pth``."""

    prompts: str
    """Text file, one prompt per line; empty lines do not count."""

    out: str
    """Folder of the embeddings; several files of prompts may share it, one after the other."""

    negative: str
    """Prompt that guidance leads away from; Wan's own is in training/configs/wan_prompts.toml."""

    tokenizer: str = ""
    """Folder or file of the tokenizer; empty looks in the weights and beside them."""

    dtype: str = "bfloat16"
    """What umT5 computes in and embeddings are kept in: ``bfloat16``, as in Wan, or ``float32``."""

    at_once: int = 256
    """Prompts per pass through the file of weights, and the most that a kill can cost."""

    device: str = "auto"
    """``auto`` is the GPU if there is one."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; use one of {', '.join(DTYPES)}.")
        if self.at_once < 1:
            raise ConfigError(f"at_once is {self.at_once}; it must be at least 1.")


def read_prompts(path: Path) -> list[str]:
    """Return the cleaned prompts of a text file, each once, in their order.

    Raises:
        ConfigError: There is no such file, or no prompt in it.
    """
    if not path.is_file():
        raise ConfigError(f"prompts is {path}, which is not a file; write one prompt per line into it.")
    lines = path.read_text(encoding="utf-8").splitlines()
    prompts = list(dict.fromkeys(filter(None, map(clean_prompt, lines))))
    if not prompts:
        raise ConfigError(f"{path} holds no prompt; write one per line.")
    return prompts


def encode(info: TextEncoderInfo, cache: TextCache, prompts: list[str], settings: EncodeSettings) -> None:
    """Keep the embeddings of cleaned ``prompts``.

    Raises:
        ConfigError: They cannot be written.
    """
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = TextEncoder(info, device=device, dtype=cache.dtype, text_length=cache.text_length)
    with tqdm(total=len(prompts), desc="prompts") as bar:
        for first in range(0, len(prompts), settings.at_once):
            texts = [encoder.tokens(prompt) for prompt in prompts[first : first + settings.at_once]]
            for text, rows in zip(texts, encoder.rows(texts), strict=True):
                cache.put(text.prompt, rows.cpu(), warning=text.warning)
                if not cache.path(text.prompt).exists():
                    raise ConfigError(f"{cache.folder} takes no more embeddings; is the disk full?")
            bar.update(len(texts))


def main(settings: EncodeSettings) -> None:
    """Encode what is not yet encoded, and list all prompts of the file."""
    encoder = Path(settings.text_encoder)
    info = check_text_encoder(encoder, tokenizer=Path(settings.tokenizer) if settings.tokenizer else None)
    prompts, negative = read_prompts(Path(settings.prompts)), clean_prompt(settings.negative)
    cache = TextCache.of(
        info, Path(settings.out), dtype=DTYPES[settings.dtype], text_length=WAN_1_3B.text_length
    )
    missing = [text for text in dict.fromkeys((negative, *prompts)) if cache.get(text) is None]
    logger.info(
        "%d prompts in %s, %d texts to encode with %s", len(prompts), settings.prompts, len(missing), info
    )
    if missing:
        encode(info, cache, missing, settings)
    write_index(cache, prompts, negative)
    kept = sum(cache.path(prompt).stat().st_size for prompt in prompts)
    logger.info("%s holds them: %.1f kB per prompt", settings.out, kept / len(prompts) / 1000)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(EncodeSettings, sys.argv[1:], stage="encode_prompts"))
