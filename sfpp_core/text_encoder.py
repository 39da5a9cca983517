"""Text for Wan without ComfyUI: umT5, read from its file layer by layer each time it encodes.

An encoder of 5.7 billion numbers serves a run once, at its start. So no more than one layer of it is ever in
memory, all prompts go through that layer, and nothing is left to release; float32 costs no more than time.

Legend: B batch.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .config import WAN_1_3B, StudentConfig
from .errors import ConditioningError, NumericsError, SettingsError
from .umt5_files import FLOATS, UMT5File, UMT5Sizes, open_umt5, umt5_shapes
from .umt5_tokenizer import END, TokenizerFile, clean_prompt, find_tokenizer, require

COMPUTED = (torch.float32, torch.bfloat16, torch.float64)
"""Dtypes umT5 can be computed in; float16 is too small for the numbers in it."""

TOKENS_AT_ONCE = 32_768
"""Tokens that go through a layer before the next is read, 64 prompts of full length."""

FARTHEST, EPS = 128, 1e-6
"""Distance in tokens from which all are equally far, and what every norm adds to variances; in every umT5."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderInfo:
    """What a text encoder is, from its header and its tokenizer."""

    file: UMT5File

    tokenizer: TokenizerFile

    def __str__(self) -> str:
        sizes, dtypes = self.file.sizes, ", ".join(self.file.dtypes())
        return (
            f"umT5 in {self.file.naming} names, {dtypes}: {sizes.layers} layers, width {sizes.dim}; "
            f"tokens by {self.tokenizer.name}"
        )


@dataclass(frozen=True, slots=True)
class Tokens:
    """One prompt, cleaned and cut to what the student can hear."""

    prompt: str
    """The prompt after cleaning."""

    numbers: list[int]
    """Its tokens, at most ``text_length``, the last one the end mark."""

    warning: str
    """What was cut of it; empty if nothing was."""


class TextEncoder:
    """Turns prompts into the embeddings Wan was trained with.

    Use::

        encoder = load_text_encoder(path, device="cuda")
        embeddings = encoder(["a cat surfs a wave", ""])    # (2, 512, 4096), zeros after each text
    """

    def __init__(
        self, info: TextEncoderInfo, *, device: torch.device | str, dtype: torch.dtype, text_length: int
    ) -> None:
        """Prepare; weights are read by every call."""
        if dtype not in COMPUTED:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in COMPUTED)
            raise SettingsError(f"umT5 cannot be computed in {dtype}; use {known}.")
        require("transformers", "transformers")
        self.info = info
        self.device, self.dtype, self.text_length = torch.device(device), dtype, text_length
        self.tokenizer = info.tokenizer.open(info.file.sizes.vocabulary)

    def tokens(self, prompt: str) -> Tokens:
        """Return the tokens of a cleaned prompt; what is beyond the length is cut, with a warning."""
        numbers, room, warning = self.tokenizer(prompt), self.text_length - 1, ""
        if len(numbers) > room:
            warning = (
                f"The prompt {prompt[:40]!r} has {len(numbers)} tokens; only the first {room} count, as in "
                f"Wan. Cut are {len(numbers) - room}, from {self.tokenizer.text(numbers[room:])[:80]!r} on."
            )
            logger.warning("%s", warning)
        return Tokens(prompt, [*numbers[:room], END], warning)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings of ``prompts``, ``(B, text_length, dim)``; rows after a text are zero.

        Raises:
            CheckpointError: A weight holds numbers that are not finite, or the file cannot be read.
            NumericsError: The embeddings are not finite.
        """
        rows = self.rows([self.tokens(clean_prompt(prompt)) for prompt in prompts])
        return fill(rows, self.text_length, self.info.file.sizes.dim)

    @torch.no_grad()
    def rows(self, texts: Sequence[Tokens]) -> list[Tensor]:
        """Return the embeddings of each text, ``(tokens, dim)``, as many as it has tokens."""
        done: list[Tensor] = []
        for group in _groups(texts):
            done += self._through_all_layers(group)
        for text, rows in zip(texts, done, strict=True):
            if not bool(torch.isfinite(rows).all()):
                raise NumericsError(
                    f"umT5 made numbers that are not finite of {text.prompt[:40]!r} in {self.dtype}; use "
                    "float32."
                )
        return done

    def _through_all_layers(self, texts: Sequence[Tokens]) -> list[Tensor]:
        """Encode each text by itself, so that none depends on the others; all through one layer at a time."""
        file, where = self.info.file, (self.dtype, self.device)
        together = torch.tensor([number for text in texts for number in text.numbers])
        streams = list(file.rows("shared.weight", together, *where).split([len(t.numbers) for t in texts]))
        layer, norm = _modules(file.sizes)
        for number in range(file.sizes.layers):
            names = file.layer(number)
            start = f"encoder.block.{number}."
            weights = {name: file.tensor(start + name, *where) for name in names}
            layer.load_state_dict(weights, assign=True)
            del weights
            for index, stream in enumerate(streams):
                after = layer(stream[None])
                streams[index] = (after if isinstance(after, Tensor) else after[0])[0]
            layer.to("meta")
        norm.load_state_dict({"weight": file.tensor("encoder.final_layer_norm.weight", *where)}, assign=True)
        return [norm(stream) for stream in streams]


def check_text_encoder(
    path: Path, config: StudentConfig | None = None, tokenizer: Path | None = None
) -> TextEncoderInfo:
    """Say what the text encoder at ``path`` is; only headers and the tokenizer are read.

    Args:
        path: A folder of diffusers or of Wan, ComfyUI's single file, or Wan's ``.pth``.
        config: The student it is for; ``None`` checks the encoder alone.
        tokenizer: Folder or file of the tokenizer; ``None`` looks in the weights and beside them.

    Raises:
        CheckpointError: This is no umT5, or an incomplete one, or its tokenizer is missing.
        ConditioningError: The student wants embeddings of another width.
    """
    file = open_umt5(path)
    if config is not None and file.sizes.dim != config.text_dim:
        raise ConditioningError(
            f"{path} makes embeddings of width {file.sizes.dim} and the student needs {config.text_dim}; "
            "use the text encoder the student was trained with."
        )
    return TextEncoderInfo(file=file, tokenizer=find_tokenizer(file.path, tokenizer, file.tokenizer()))


def load_text_encoder(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | None = None,
    text_length: int = WAN_1_3B.text_length,
) -> TextEncoder:
    """Make a text encoder ready; its weights are read by every call of it and not kept.

    Args:
        path: As in ``check_text_encoder``.
        device: Where layers are computed and embeddings end up.
        dtype: Dtype of the computation and of the embeddings. ComfyUI and Self-Forcing compute in float32.
        tokenizer: As in ``check_text_encoder``.
        text_length: Rows of the embeddings, ``StudentConfig.text_length``.

    Raises:
        CheckpointError: As ``check_text_encoder``.
        SettingsError: ``dtype`` is too small.
        SFPPError: transformers or sentencepiece is not installed.
    """
    info = check_text_encoder(path, tokenizer=tokenizer)
    return TextEncoder(info, device=device, dtype=dtype, text_length=text_length)


def text_encoder_bytes(
    path: Path, dtype: torch.dtype = torch.float32, *, text_length: int = WAN_1_3B.text_length
) -> int:
    """Return the bytes of memory that encoding a prompt of full length takes, from the header.

    At its widest this is the table of embeddings as stored, or a layer with what it computes.

    Raises:
        CheckpointError: As ``check_text_encoder``.
    """
    file = open_umt5(path)
    sizes, size = file.sizes, dtype.itemsize
    shapes = umt5_shapes(sizes)
    table = file.weights.entries[file.names["shared.weight"]]
    layer = [math.prod(shapes["encoder.block.0." + name]) for name in file.layer(0)]
    scores = 3 * sizes.heads * text_length
    widest = text_length * (4 * sizes.dim + max(3 * sizes.ffn_dim, scores))
    return max(math.prod(table.shape) * FLOATS[table.dtype], size * (sum(layer) + widest) + 4 * max(layer))


def fill(rows: Sequence[Tensor], text_length: int, dim: int) -> Tensor:
    """Return embeddings of ``text_length`` rows, ``(B, text_length, dim)``, zero after each text."""
    if not rows:
        return torch.zeros(0, text_length, dim)
    return torch.stack([functional.pad(text, (0, 0, 0, text_length - len(text))) for text in rows])


def _groups(texts: Sequence[Tokens]) -> Iterator[list[Tokens]]:
    """Yield the texts in groups of at most ``TOKENS_AT_ONCE`` tokens."""
    group: list[Tokens] = []
    held = 0
    for text in texts:
        held += len(text.numbers)
        if group and held > TOKENS_AT_ONCE:
            yield group
            group, held = [], len(text.numbers)
        group.append(text)
    if group:
        yield group


def _modules(sizes: UMT5Sizes) -> tuple[Any, Any]:
    """Return one layer of umT5 and its last norm, neither with memory of its own."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=sizes.vocabulary,
        d_model=sizes.dim,
        d_kv=sizes.head_dim,
        d_ff=sizes.ffn_dim,
        num_heads=sizes.heads,
        num_layers=1,
        relative_attention_num_buckets=sizes.buckets,
        relative_attention_max_distance=FARTHEST,
        layer_norm_epsilon=EPS,
        dropout_rate=0.0,
    )
    # Position biases go through every version's own code this way.
    config._attn_implementation = "eager"
    with torch.device("meta"):
        encoder = UMT5EncoderModel(config).encoder.eval().requires_grad_(False)
    return encoder.block[0], encoder.final_layer_norm
