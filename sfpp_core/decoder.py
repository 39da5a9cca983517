"""Latents to frames and back, one chunk at a time: what a file can do, and loading it.

Legend: B batch, C channels, T latent frames, F frames, H and W pixels, h and w latent cells.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from . import taehv, wan_autoencoder
from .errors import CheckpointError, SettingsError
from .inspection import inspect
from .latent_space import DEMO, WAN_2_1, WAN_2_2, LatentSpace
from .preview_decoder import PreviewDecoder
from .taehv import TinySizes, TinyWanDecoder
from .tiny_autoencoder import METADATA_KEY, AutoencoderConfig, TinyAutoencoder, TinyEncoder
from .wan_autoencoder import WanDecoder, WanEncoder, WanSizes
from .weights import Weights, open_weights

PREVIEW = "preview"
"""The choice that needs no file."""

LARGEST_SIZE = 4096
"""Channels or units a demo autoencoder may ask for; more is a damaged file."""

SUBFOLDER = "vae"
"""Where a pipeline of diffusers keeps its autoencoder."""


class StreamingDecoder(Protocol):
    """Decodes a video chunk by chunk, remembering what the next chunk needs.

    A ``copy.copy`` shares the weights; after ``reset`` it has a video of its own.
    """

    space: LatentSpace
    """Of the latents it takes."""

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        ...

    @property
    def spatial_stride(self) -> int:
        """Pixels along a side of one latent cell."""
        ...

    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames ``(B, F, 3, H, W)`` in [0, 1], float32, of the next chunk.

        Args:
            chunk: Normalised latents ``(B, C, T, h, w)``. The first chunk since ``reset`` gives 1 + 4(T - 1)
                frames, every later one 4T.
        """
        ...

    def rest(self, device: torch.device | str) -> None:
        """Keep the memory of the video on ``device`` until the next chunk."""
        ...

    def reset(self) -> None:
        """Forget the video decoded so far."""
        ...


class StreamingEncoder(Protocol):
    """Encodes a video piece by piece, remembering what the next piece needs."""

    space: LatentSpace
    """Of the latents it gives."""

    def encode(self, frames: Tensor) -> Tensor:
        """Return the normalised latents ``(B, C, T, h, w)``, float32, of the next frames.

        Args:
            frames: ``(B, F, 3, H, W)`` in [0, 1]. The first call since ``reset`` takes 1 + 4(T - 1), every
                later one 4T.
        """
        ...

    def reset(self) -> None:
        """Forget the video encoded so far."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderInfo:
    """A decoder found usable, not yet loaded."""

    space: LatentSpace
    """Of the latents it takes."""

    in_words: str
    """What it is, for people."""

    weights: Weights | None = None
    """Where its weights are; ``None`` for the preview."""

    sizes: WanSizes | TinySizes | AutoencoderConfig | None = None
    """Of its network; ``None`` for the preview."""


def check_decoder(choice: Path | str, *, channels: int | None = None) -> DecoderInfo:
    """Refuse what is no decoder; no weight is read.

    Args:
        choice: A file or folder, or ``preview``.
        channels: Of the student's latents; ``None`` accepts any, and means 16 for the preview.

    Raises:
        CheckpointError: The file is missing or damaged, or holds something else.
        SettingsError: The decoder takes latents of another number of channels.
        SFPPError: A library is missing.
    """
    info = _preview(channels) if is_preview(choice) else _recognise(_place(Path(choice)))
    if channels not in (None, info.space.channels):
        hint = {48: "Wan 2.2 of 5B: Wan2.2_VAE or taew2_2", 16: "Wan 2.1: Wan2.1_VAE or taew2_1"}.get(
            channels, "it"
        )
        raise SettingsError(
            f"{choice} decodes latents of {info.space.channels} channels and these have {channels}; "
            f"choose the autoencoder made for {hint}."
        )
    return info


def is_preview(choice: Path | str) -> bool:
    """Return whether ``choice`` means the decoder that needs no file."""
    return str(choice) == PREVIEW and not Path(choice).exists()


def load_decoder(
    choice: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels: int | None = None,
) -> StreamingDecoder:
    """Load a decoder: the demo's, that of Wan 2.1 or 2.2, a tiny one for either, or the preview.

    Args:
        choice: A file or folder, recognised by its content, or ``preview``.
        device: Where it computes.
        dtype: What it computes in; the demo's and the preview always in float32.
        channels: As for ``check_decoder``.

    Raises:
        CheckpointError: As ``check_decoder``; and the weights are not finite.
        SettingsError: As ``check_decoder``.
        SFPPError: A library is missing.
    """
    info = check_decoder(choice, channels=channels)
    weights, sizes = info.weights, info.sizes
    if weights is None:
        return PreviewDecoder(info.space)
    if isinstance(sizes, WanSizes):
        return WanDecoder.load(weights, sizes, dtype=dtype).to(device)
    if isinstance(sizes, TinySizes):
        return TinyWanDecoder.load(weights, sizes, dtype=dtype).to(device)
    return _load_demo(weights.path).to(device)


def check_encoder(path: Path | str, *, channels: int | None = None) -> DecoderInfo:
    """Refuse what cannot encode pictures and clips to start from; no weight is read.

    Raises:
        CheckpointError: As ``check_decoder``.
        SettingsError: As ``check_decoder``; or this decoder cannot encode.
        SFPPError: A library is missing.
    """
    info = check_decoder(path, channels=channels)
    if info.weights is None or isinstance(info.sizes, TinySizes):
        raise SettingsError(
            f"{path} cannot encode the frames to start from; choose a complete autoencoder, Wan2.1_VAE or "
            "Wan2.2_VAE, for it."
        )
    return info


def load_encoder(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels: int | None = None,
) -> StreamingEncoder:
    """Load an encoder, for pictures and clips to start from.

    Args:
        path: A file or folder with the autoencoder of Wan 2.1 or 2.2, or the demo's.
        device: Where it computes.
        dtype: What it computes in; the demo's always in float32.
        channels: As for ``check_decoder``.

    Raises:
        CheckpointError: As ``load_decoder``.
        SettingsError: As ``check_encoder``.
        SFPPError: A library is missing.
    """
    info = check_encoder(path, channels=channels)
    assert info.weights is not None
    if isinstance(info.sizes, WanSizes):
        return WanEncoder.load(info.weights, info.sizes, dtype=dtype).to(device)
    return TinyEncoder(_load_demo(info.weights.path).to(device))


def _place(path: Path) -> Path:
    """Return where the autoencoder is: in a folder of its own if ``path`` is a pipeline of diffusers."""
    return path / SUBFOLDER if (path / SUBFOLDER).is_dir() else path


def _preview(channels: int | None) -> DecoderInfo:
    """Return the preview of latents of so many channels."""
    space = {48: WAN_2_2}.get(channels or 16, WAN_2_1)
    return DecoderInfo(space=space, in_words=f"a preview of {space.name} without weights")


def _recognise(path: Path) -> DecoderInfo:
    """Return what decoder a file holds."""
    weights = open_weights(path)
    if METADATA_KEY in weights.metadata:
        config = _read_config(path, weights)
        return DecoderInfo(space=DEMO, in_words="the demo's autoencoder", weights=weights, sizes=config)
    tensors = {name: (entry.dtype, entry.shape) for name, entry in weights.entries.items()}
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    sizes = wan_autoencoder.recognise(path, shapes)
    if sizes is not None:
        return DecoderInfo(
            space=sizes.space,
            in_words=f"the autoencoder of {sizes.space.name}",
            weights=weights,
            sizes=sizes,
        )
    tiny = taehv.recognise(path, tensors)
    if tiny is None:
        raise CheckpointError(
            f"{path} is not a decoder; it looks like {_looks_like(path, shapes)}. Choose the autoencoder of "
            "the student: Wan2.1_VAE.pth, wan_2.1_vae.safetensors or taew2_1.safetensors; for the demo "
            "sfpp_core/demo/autoencoder.safetensors."
        )
    kind = f"a tiny decoder for {tiny.space.name}"
    return DecoderInfo(space=tiny.space, in_words=kind, weights=weights, sizes=tiny)


def _looks_like(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Say what a file that is no decoder for video looks like."""
    kernels = [
        len(shape) for name, shape in shapes.items() if name.startswith(("decoder.conv_in", "decoder.conv1"))
    ]
    if 4 in kernels:
        return "an autoencoder for single pictures, such as that of Stable Diffusion or FLUX"
    if 5 in kernels:
        return "an autoencoder for another video model"
    try:
        return inspect(path).looks_like
    except CheckpointError:
        return "another model"


def _load_demo(path: Path) -> TinyAutoencoder:
    """Return the demo's autoencoder."""
    autoencoder = TinyAutoencoder.load(path)
    for name, weights in autoencoder.state_dict().items():
        if not torch.isfinite(weights).all():
            raise CheckpointError(f"{path}: {name} holds numbers that are not finite; get the file again.")
    return autoencoder


def _read_config(path: Path, weights: Weights) -> AutoencoderConfig:
    """Return the sizes of a demo autoencoder; refuse some that none has."""
    table = weights.table(METADATA_KEY, where=str(path)) or {}
    kinds = {field.name: type(field.default) for field in fields(AutoencoderConfig)}
    for name, value in table.items():
        right = type(value) is kinds.get(name)
        if not right or (isinstance(value, int) and not 1 <= value <= LARGEST_SIZE):
            raise CheckpointError(f"{path}: {name} is {json.dumps(value):.40}; save the file again.")
    return AutoencoderConfig(**table)
