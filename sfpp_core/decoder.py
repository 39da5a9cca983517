"""Latents to frames, one chunk at a time.

Legend: B batch, C channels, T latent frames, F frames, h and w latent height and width.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .errors import CheckpointError
from .inspection import describe
from .tiny_autoencoder import METADATA_KEY, AutoencoderConfig, TinyAutoencoder
from .weights_file import Header, read_header

LARGEST_SIZE = 4096
"""Channels or units a demo autoencoder may ask for; more is a damaged file."""


class StreamingDecoder(Protocol):
    """Decodes a video chunk by chunk, remembering what the next chunk needs."""

    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames ``(B, F, 3, 8h, 8w)`` in [0, 1] of the next chunk.

        Args:
            chunk: Normalised latents ``(B, C, T, h, w)``. The first chunk since ``reset`` gives 1 + 4(T - 1)
                frames, every later one 4T.
        """
        ...

    def reset(self) -> None:
        """Forget the video decoded so far."""
        ...


def check_decoder(path: Path) -> None:
    """Refuse a file that holds no decoder; only its header is read.

    Raises:
        CheckpointError: The file is missing or damaged, or holds something else.
    """
    header = read_header(path)
    info = describe(path, header)
    if info.kind != "autoencoder":
        raise CheckpointError(
            f"{path} is not a decoder; it looks like {info.looks_like}. Choose the autoencoder of a demo, "
            "such as sfpp_core/demo/autoencoder.safetensors."
        )
    _check_config(path, header)


def load_decoder(path: Path, *, device: torch.device | str = "cpu") -> TinyAutoencoder:
    """Load the decoder a file holds.

    Args:
        path: Weights file.
        device: Where it computes, in float32.

    Raises:
        CheckpointError: As ``check_decoder``; and the weights do not fit the file's own configuration, or are
            not finite.
    """
    check_decoder(path)
    autoencoder = TinyAutoencoder.load(path)
    for name, weights in autoencoder.state_dict().items():
        if not torch.isfinite(weights).all():
            raise CheckpointError(f"{path}: {name} holds numbers that are not finite; get the file again.")
    return autoencoder.to(device)


def _check_config(path: Path, header: Header) -> None:
    """Refuse sizes that no autoencoder has."""
    table = header.table(METADATA_KEY, where=str(path)) or {}
    kinds = {field.name: type(field.default) for field in fields(AutoencoderConfig)}
    for name, value in table.items():
        right = type(value) is kinds.get(name)
        if not right or (isinstance(value, int) and not 1 <= value <= LARGEST_SIZE):
            raise CheckpointError(f"{path}: {name} is {json.dumps(value):.40}; save the file again.")
