"""The autoencoders of Wan 2.1 and 2.2, streamed through the layers of diffusers.

Each causal convolution keeps its last two inputs from call to call, as it does inside one whole decode:
frames do not depend on how the latents were cut into chunks.

Legend: B batch, C channels, T latent frames, F frames, H and W pixels, h and w latent cells, G frames that
the network takes at a time.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError, RolloutOrderError, SFPPError
from .geometry import TEMPORAL_STRIDE
from .inspection import listed
from .latent_space import WAN_2_1, WAN_2_2, InSpace, LatentSpace
from .wan_names import diffusers_name
from .weights import Weights
from .weights_file import DTYPES

LARGEST_WIDTH = 1024
"""Channels at the finest resolution an autoencoder may ask for; more is a damaged file."""

State = list[Any]
"""Per causal convolution its last inputs ``(B, channels, 1 or 2, height, width)``, or a mark of diffusers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WanSizes:
    """What differs between the autoencoders of Wan."""

    space: LatentSpace
    """Of its latents."""

    encoder_width: int
    """Channels at the encoder's finest resolution."""

    decoder_width: int
    """Channels at the decoder's finest resolution."""

    @property
    def patch(self) -> int:
        """Pixels along a side of what the network takes for one."""
        return 2 if self.space is WAN_2_2 else 1

    def network(self) -> nn.Module:
        """Return diffusers' autoencoder of these sizes, without weights.

        Raises:
            SFPPError: diffusers is not installed.
        """
        try:
            from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
        except ImportError as error:
            raise SFPPError(
                f"the autoencoder of Wan needs diffusers ({error}); run `pip install diffusers`, or choose a "
                "tiny one (taew2_1.safetensors) or the preview."
            ) from error
        with torch.device("meta"):
            return AutoencoderKLWan(
                base_dim=self.encoder_width,
                decoder_base_dim=self.decoder_width,
                z_dim=self.space.channels,
                is_residual=self.patch > 1,
                patch_size=self.patch if self.patch > 1 else None,
                in_channels=3 * self.patch**2,
                out_channels=3 * self.patch**2,
                scale_factor_spatial=self.space.spatial_stride,
            )


def recognise(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> WanSizes | None:
    """Return the sizes of the autoencoder of Wan that a file holds, or ``None`` if it holds something else.

    Args:
        path: For messages.
        shapes: Of its tensors, by their names in the file.

    Raises:
        CheckpointError: It is one of Wan, but incomplete, with foreign tensors, or of impossible sizes.
        SFPPError: diffusers is not installed.
    """
    found = {diffusers_name(name): shape for name, shape in shapes.items()}
    if "decoder.mid_block.resnets.0.norm1.gamma" not in found:
        return None
    space = WAN_2_2 if any(".upsampler." in name for name in found) else WAN_2_1
    try:
        channels = found["post_quant_conv.weight"][1]
        decoder_width = found["decoder.norm_out.gamma"][0]
        encoder_width = found.get("encoder.conv_in.weight", (decoder_width,))[0]
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{path} is an incomplete autoencoder of Wan ({error}); get it again."
        ) from error
    if channels != space.channels:
        raise CheckpointError(
            f"{path} is an autoencoder of {channels} latent channels, and {space.name} has {space.channels}; "
            "choose the one made for the student."
        )
    if not (1 <= decoder_width <= LARGEST_WIDTH and 1 <= encoder_width <= LARGEST_WIDTH):
        raise CheckpointError(
            f"{path} is {encoder_width} and {decoder_width} wide; it is damaged, get it again."
        )
    sizes = WanSizes(space=space, encoder_width=encoder_width, decoder_width=decoder_width)
    _check_shapes(path, found, sizes)
    return sizes


def _check_shapes(path: Path, found: Mapping[str, tuple[int, ...]], sizes: WanSizes) -> None:
    """Refuse a file whose tensors are not those of the autoencoder; the encoder may be left out."""
    wanted = {name: tuple(weights.shape) for name, weights in sizes.network().state_dict().items()}
    if foreign := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(
            f"{path} holds what no autoencoder of Wan has: {listed(foreign)}. Get it again."
        )
    encodes = any(name.startswith("encoder.") for name in found)
    needed = {name for name in wanted if encodes or _is_for("decoder", name)}
    if missing := sorted(needed - found.keys()):
        raise CheckpointError(f"{path} lacks {listed(missing)}; it is incomplete, get it again.")
    for name, shape in found.items():
        if shape != wanted[name]:
            raise CheckpointError(
                f"{path}: {name} is {shape} and has to be {wanted[name]}; it is damaged, get it again."
            )


def _is_for(half: str, name: str) -> bool:
    """Return whether the parameter called ``name`` belongs to the ``encoder`` or the ``decoder``."""
    return name.startswith((f"{half}.", "post_quant_conv." if half == "decoder" else "quant_conv."))


def _half(weights: Weights, sizes: WanSizes, half: str, dtype: torch.dtype) -> nn.Module:
    """Return diffusers' autoencoder with the weights of one half; the other half stays empty."""
    network = sizes.network()
    own = {name: tensor for name, tensor in _converted(weights, dtype) if _is_for(half, name)}
    if not own:
        raise CheckpointError(f"{weights.path} holds no {half}; choose the complete autoencoder of Wan.")
    network.load_state_dict(own, strict=False, assign=True)
    return network.eval().requires_grad_(False)


def _converted(weights: Weights, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file under the names of diffusers."""
    for name, tensor in weights.read():
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(f"{weights.path}: {name} is {tensor.dtype}; get it in float16 or wider.")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{weights.path}: {name} holds numbers that are not finite; get it again.")
        yield diffusers_name(name), tensor.to(dtype)


class _Half(InSpace, nn.Module):
    """What encoder and decoder have in common: a latent space, and the memory of one video."""

    def __init__(self, sizes: WanSizes) -> None:
        super().__init__()
        self.sizes, self.space = sizes, sizes.space
        self._state: State = []
        self._size: tuple[int, ...] | None = None

    def rest(self, device: torch.device | str) -> None:
        """Keep the memory of the video on ``device`` until the next call."""
        self._state = _moved(self._state, torch.device(device))

    def reset(self) -> None:
        """Forget the video so far."""
        self._state, self._size = [], None

    def _take(self, network: nn.Module, device: torch.device) -> State:
        """Return the state on ``device``, keeping none: the old and the new need not both be held."""
        if self._size is None:
            return [None] * sum(type(module).__name__ == "WanCausalConv3d" for module in network.modules())
        if not self._state:
            raise RolloutOrderError(
                "the piece of video before was interrupted; call reset() and begin again."
            )
        state, self._state = _moved(self._state, device), []
        return state


class WanDecoder(_Half):
    """Latents of Wan to frames, one latent frame after the other.

    Use::

        decoder = WanDecoder.load(weights, sizes, dtype=torch.bfloat16)
        for chunk in latents.split(3, dim=2):
            frames = decoder.decode(chunk)
    """

    def __init__(self, network: Any, sizes: WanSizes) -> None:
        """Take the decoding half of diffusers' autoencoder."""
        super().__init__(sizes)
        self.enter, self.decoder = network.post_quant_conv, network.decoder
        for layers in self.decoder.modules():
            if isinstance(layers, nn.Sequential) and type(layers[0]).__name__ == "WanUpsample":
                # diffusers' own goes through float32, which repeats the same values in twice the memory.
                layers[0] = nn.Upsample(scale_factor=2.0, mode="nearest-exact")

    @classmethod
    def load(cls, weights: Weights, sizes: WanSizes, *, dtype: torch.dtype) -> "WanDecoder":
        """Read the weights of the decoder.

        Raises:
            CheckpointError: They are not finite, or not floating point numbers.
        """
        return cls(_half(weights, sizes, "decoder", dtype), sizes)

    @torch.inference_mode()
    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames ``(B, F, 3, H, W)`` in [0, 1], float32, of the next latents ``(B, C, T, h, w)``.

        The first chunk since ``reset`` gives 1 + 4(T - 1) frames, every later one 4T.

        Raises:
            GeometryError: The latents are not of this autoencoder's shape.
            RolloutOrderError: The chunk's size differs from that of the video decoded so far.
        """
        self.space.check(chunk, self._size)
        like, begins = self.enter.weight, self._size is None
        state = self._take(self.decoder, like.device)
        self._size = (chunk.shape[0], *chunk.shape[3:])
        x = self.enter(self.space.restore(chunk.to(like.device)).to(like.dtype))
        frames = []
        for part in x.split(1, dim=2):
            out = self.decoder(part, feat_cache=state, feat_idx=[0], first_chunk=begins)
            frames.append(_to_frames(out, self.sizes.patch))
            begins = False
        self._state = state
        return torch.cat(frames, 1)


class WanEncoder(_Half):
    """Frames to latents of Wan, four frames at a time."""

    def __init__(self, network: Any, sizes: WanSizes) -> None:
        """Take the encoding half of diffusers' autoencoder."""
        super().__init__(sizes)
        self.leave, self.encoder = network.quant_conv, network.encoder

    @classmethod
    def load(cls, weights: Weights, sizes: WanSizes, *, dtype: torch.dtype) -> "WanEncoder":
        """Read the weights of the encoder.

        Raises:
            CheckpointError: The file has no encoder, or weights that are not finite floating point numbers.
        """
        return cls(_half(weights, sizes, "encoder", dtype), sizes)

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        """Return the normalised latents ``(B, C, T, h, w)``, float32, of the next ``(B, F, 3, H, W)``.

        The first call since ``reset`` takes 1 + 4(T - 1) frames, every later one 4T; all
        are in [0, 1]. A latent is the most likely one, not a draw.

        Raises:
            GeometryError: The number or the size of the frames is wrong.
            RolloutOrderError: The frames differ in size from those encoded so far.
        """
        self.space.check_frames(frames, self._size)
        like, first = self.leave.weight, int(self._size is None)
        state = self._take(self.encoder, like.device)
        self._size = (frames.shape[0], *frames.shape[3:])
        latents = []
        for group in (frames[:, :first], *frames[:, first:].split(TEMPORAL_STRIDE, 1)):
            if group.shape[1]:
                pixels = _from_frames(group.to(like.device, torch.float32) * 2 - 1, self.sizes.patch)
                out = self.encoder(pixels.to(like.dtype), feat_cache=state, feat_idx=[0])
                latents.append(self.leave(out))
        self._state = state
        return self.space.normalise(torch.cat(latents, 2).chunk(2, dim=1)[0])


def weight_bytes(sizes: WanSizes, half: str, dtype: torch.dtype) -> int:
    """Return the bytes of the weights of the ``encoder`` or the ``decoder``."""
    shapes = (weights.shape for name, weights in sizes.network().state_dict().items() if _is_for(half, name))
    return dtype.itemsize * sum(math.prod(shape) for shape in shapes)


def _moved(state: State, device: torch.device) -> State:
    """Return a copy of the list, its tensors on ``device``."""
    return [entry.to(device) if isinstance(entry, Tensor) else entry for entry in state]


def _to_frames(out: Tensor, patch: int) -> Tensor:
    """Return the frames ``(B, G, 3, H, W)`` in [0, 1] of what the network draws.

    That is ``(B, 3 * patch^2, G, ...)``; of one patch, the columns come before the rows.
    """
    out = out.float().clamp(-1, 1).add(1).div(2).unflatten(1, (3, patch, patch))
    return out.permute(0, 4, 1, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def _from_frames(frames: Tensor, patch: int) -> Tensor:
    """Return frames ``(B, F, 3, H, W)`` as the network takes them, ``(B, 3 * patch^2, F, ...)``."""
    patches = frames.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    return patches.permute(0, 2, 6, 4, 1, 3, 5).flatten(1, 3)
