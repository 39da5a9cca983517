"""The demo autoencoder: a small causal video autoencoder with Wan's strides 4x8x8 and 16 channels.

The encoder sees four frames at a time (the first frame alone) and nothing else. The decoder sees the latent
frame before as well, so it streams with a state of one latent frame per residual unit.

A picture is drawn as two smooth colour fields and, per pixel, how much of each: outlines stay sharp although
almost all the work is done at an eighth and a quarter of the resolution.

Legend: B batch, C channels, T latent frames, F frames, H and W pixels, h and w latent cells, N = B * T.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle, pixel_unshuffle, silu

from .errors import CheckpointError, RolloutOrderError
from .geometry import TEMPORAL_STRIDE
from .latent_space import DEMO, InSpace
from .weights_file import DTYPES, read_header, read_tensors, write

METADATA_KEY = "sfpp_decoder"
"""Name of the configuration in the metadata of a weights file."""

State = list[Tensor]
"""What a decoder remembers between chunks: per remembering unit its last input, (B, 1, C, H, W)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderConfig:
    """Sizes of the demo autoencoder."""

    channels: int = 16
    """Channels of the latent."""

    coarse: int = 96
    """Channels at an eighth of the resolution."""

    fine: int = 48
    """Channels at a quarter of the resolution."""

    mask: int = 24
    """Channels at half of the resolution, in the decoder."""

    units: int = 2
    """Residual units per resolution."""

    padding: str = "circular"
    """What lies beyond a picture's edge: ``circular`` (the world is a torus), ``replicate`` or ``zeros``."""


class Conv(nn.Conv2d):
    """A 3x3 convolution that keeps the size and the channels-last layout."""

    def __init__(self, inputs: int, outputs: int, padding: str) -> None:
        super().__init__(inputs, outputs, 3)
        self.weight = nn.Parameter(self.weight.data.contiguous(memory_format=torch.channels_last))
        self.beyond = padding

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return ``(N, outputs, H, W)``."""
        return super().forward(pad(input, self.beyond))


class Unit(nn.Module):
    """A residual unit without norm: the picture's brightness has to pass through unchanged."""

    def __init__(self, channels: int, padding: str, *, taps: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.first = Conv(taps * channels, channels, padding)
        self.second = Conv(channels, channels, padding)

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """Return ``(N, C, H, W)``; ``before`` is the same at the latent frame before, for two taps."""
        seen = x if before is None else torch.cat([before, x], 1)
        return x + self.gain * self.second(silu(self.first(silu(seen))))


class Encoder(nn.Module):
    """Frames to latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        coarse, fine, padding = config.coarse, config.fine, config.padding
        self.enter = Conv(TEMPORAL_STRIDE * 3 * 16, fine, padding)
        self.fine = nn.ModuleList(Unit(fine, padding, taps=1) for _ in range(config.units - 1))
        self.down = Conv(4 * fine, coarse, padding)
        self.coarse = nn.ModuleList(Unit(coarse, padding, taps=1) for _ in range(config.units))
        self.leave = nn.Conv2d(coarse, config.channels, 1)

    def forward(self, frames: Tensor) -> Tensor:
        """Return the latents ``(B, C, T, h, w)``, not normalised, of 1 + 4(T - 1) frames."""
        batch, _, _, height, width = frames.shape
        first = frames[:, :1].expand(-1, TEMPORAL_STRIDE - 1, -1, -1, -1)
        groups = torch.cat([first, frames], 1).reshape(-1, TEMPORAL_STRIDE * 3, height, width)
        x = pixel_unshuffle(groups * 2 - 1, 4).contiguous(memory_format=torch.channels_last)
        x = self.enter(x)
        for unit in self.fine:
            x = unit(x)
        x = self.down(pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last))
        for unit in self.coarse:
            x = unit(x)
        return self.leave(silu(x)).unflatten(0, (batch, -1)).transpose(1, 2)


class Decoder(nn.Module):
    """Latents to frames, causal in time."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        coarse, fine, mask, padding = config.coarse, config.fine, config.mask, config.padding
        self.padding = padding
        self.enter = Conv(config.channels, coarse, padding)
        self.coarse = nn.ModuleList(Unit(coarse, padding, taps=2) for _ in range(config.units))
        self.up = Conv(coarse, 4 * fine, padding)
        self.fine = nn.ModuleList(Unit(fine, padding, taps=2) for _ in range(config.units))
        self.fields = Conv(fine, TEMPORAL_STRIDE * 6, padding)
        self.widen = Conv(fine, 4 * mask, padding)
        self.mask = Conv(mask, 4 * TEMPORAL_STRIDE, padding)

    def forward(self, latents: Tensor, state: Sequence[Tensor] = ()) -> tuple[Tensor, State]:
        """Decode ``(B, C, T, h, w)``, not normalised, into ``(B, 4T, 3, 8h, 8w)`` and the state after it.

        Values may leave [0, 1] a little. With no state, the first latent frame is its own past.
        """
        batch, memory, after = latents.shape[0], iter(state), []
        x = self.enter(latents.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last))
        for unit in self.coarse:
            x = unit(x, _before(x, batch, memory, after))
        x = pixel_shuffle(self.up(x), 2).contiguous(memory_format=torch.channels_last)
        for unit in self.fine:
            x = unit(x, _before(x, batch, memory, after))
        return self._draw(silu(x)).unflatten(0, (batch, -1)).flatten(1, 2), after

    def _draw(self, x: Tensor) -> Tensor:
        """Return the frames ``(N, 4, 3, H, W)`` of features at a quarter of the resolution."""
        fields = enlarge(self.fields(x), self.padding).unflatten(1, (2, TEMPORAL_STRIDE, 3))
        wide = pixel_shuffle(self.widen(x), 2).contiguous(memory_format=torch.channels_last)
        share = pixel_shuffle(self.mask(silu(wide)), 2).sigmoid()[:, :, None]
        return torch.lerp(fields[:, 0], fields[:, 1], share.to(fields.dtype))


class TinyAutoencoder(InSpace, nn.Module):
    """Encoder and streaming decoder of the demo world.

    Latents are normalised at this surface: zero mean and unit variance per channel.

    Use::

        autoencoder = TinyAutoencoder.load(path)
        latents = autoencoder.encode(frames)
        autoencoder.reset()
        for chunk in latents.split(3, dim=2):
            frames = autoencoder.decode(chunk)
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: AutoencoderConfig | None = None) -> None:
        super().__init__()
        self.config = config or AutoencoderConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.register_buffer("mean", torch.zeros(self.config.channels))
        self.register_buffer("std", torch.ones(self.config.channels))
        self.space = replace(DEMO, channels=self.config.channels)
        self._state: State = []

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        """Return the normalised latents ``(B, C, T, h, w)`` of frames ``(B, F, 3, H, W)`` in [0, 1].

        There are F = 1 + 4(T - 1) frames.
        """
        return (self.encoder(frames.to(self.mean)) - _column(self.mean)) / _column(self.std)

    @torch.inference_mode()
    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames ``(B, F, 3, 8h, 8w)`` in [0, 1] of the next latents ``(B, C, T, h, w)``.

        The first chunk since ``reset`` gives 1 + 4(T - 1) frames, every later one 4T.

        Raises:
            RolloutOrderError: The chunk's size differs from that of the video decoded so far.
        """
        first = not self._state
        if not first and (chunk.shape[0], *chunk.shape[3:]) != (
            self._state[0].shape[0],
            *self._state[0].shape[3:],
        ):
            raise RolloutOrderError(
                f"a chunk of shape {tuple(chunk.shape)} cannot go on from a video of another size; "
                "call reset() first."
            )
        latents = chunk.to(self.mean) * _column(self.std) + _column(self.mean)
        # Convolutions round a lone picture differently; drawn twice, chunks of any length agree bit by bit.
        lone = latents.shape[0] * latents.shape[2] == 1
        pair = latents.expand(2 if lone else -1, -1, -1, -1, -1)
        frames, state = self.decoder(
            pair, [past.to(pair).expand(len(pair), -1, -1, -1, -1) for past in self._state]
        )
        self._state = [past[: len(chunk)] for past in state]
        return frames[: len(chunk), TEMPORAL_STRIDE - 1 if first else 0 :].clamp(0, 1)

    def rest(self, device: torch.device | str) -> None:
        """Keep the memory of the video on ``device`` until the next chunk."""
        self._state = [past.to(device) for past in self._state]

    def reset(self) -> None:
        """Forget the video decoded so far."""
        self._state = []

    def save(self, path: Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Write the weights and the configuration as one safetensors file; it appears once it is whole.

        Raises:
            OutputError: The file cannot be written.
        """
        tensors = {name: value.to(dtype) for name, value in self.state_dict().items()}
        write(path, tensors, {METADATA_KEY: json.dumps(asdict(self.config), sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> "TinyAutoencoder":
        """Read a file written by ``save``; the weights are float32, ready to use.

        Raises:
            CheckpointError: The file is missing or damaged, or is not a demo autoencoder.
        """
        header = read_header(path)
        table = header.table(METADATA_KEY, where=str(path))
        if table is None:
            raise CheckpointError(
                f"{path.name} has no {METADATA_KEY!r} in its metadata, so it is not a demo autoencoder; "
                "choose the file sfpp_core/demo/autoencoder.safetensors or one written by training."
            )
        if foreign := {info.dtype for info in header.tensors.values()} - DTYPES.keys():
            raise CheckpointError(
                f"{path.name} holds {min(foreign)} numbers; weights are {', '.join(DTYPES)}. Get it again."
            )
        tensors = {name: value.float() for name, value in read_tensors(path, header)}
        autoencoder = cls(AutoencoderConfig(**table))
        try:
            autoencoder.load_state_dict(tensors)
        except RuntimeError as error:
            raise CheckpointError(f"{path.name} does not fit its own configuration: {error}") from error
        return autoencoder.eval().requires_grad_(False)


class TinyEncoder:
    """The encoder of a demo autoencoder with the surface of a streaming one."""

    def __init__(self, autoencoder: TinyAutoencoder) -> None:
        self.space = autoencoder.space
        self._autoencoder = autoencoder
        self._size: tuple[int, ...] | None = None

    def encode(self, frames: Tensor) -> Tensor:
        """Return the normalised latents ``(B, C, T, h, w)`` of the next frames ``(B, F, 3, H, W)`` in [0, 1].

        The first call since ``reset`` takes 1 + 4(T - 1) frames, every later one 4T.

        Raises:
            GeometryError: The number or the size of the frames is wrong.
            RolloutOrderError: The frames differ in size from those encoded so far.
        """
        self.space.check_frames(frames, self._size)
        begins, self._size = self._size is None, (frames.shape[0], *frames.shape[3:])
        if begins:
            return self._autoencoder.encode(frames)
        # Each latent frame sees its own frames alone: one put before them changes nothing but itself.
        return self._autoencoder.encode(torch.cat([frames[:, :1], frames], 1))[:, :, 1:]

    def reset(self) -> None:
        """Forget the video encoded so far."""
        self._size = None


class _Pad(torch.autograd.Function):
    """Add one cell on each side, copied from inside, in channels-last layout forward and backward.

    The padding modes of ``F.pad`` and joined slices both lose that layout, which costs several times more.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: int, last: int) -> Tensor:
        """Return ``(N, C, H + 2, W + 2)``; the edges copy the padded cells ``first`` and ``last``."""
        ctx.first, ctx.last = first, last
        size = (*x.shape[:2], x.shape[2] + 2, x.shape[3] + 2)
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        y[..., 1:-1, 1:-1] = x
        y[..., 0, 1:-1], y[..., -1, 1:-1] = y[..., first, 1:-1], y[..., last, 1:-1]
        y[..., 0], y[..., -1] = y[..., first], y[..., last]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient ``(N, C, H, W)``: each copy's share goes back to its source."""
        grad = grads[0].clone(memory_format=torch.channels_last)
        grad[..., ctx.first] += grad[..., 0]
        grad[..., ctx.last] += grad[..., -1]
        grad[..., ctx.first, :] += grad[..., 0, :]
        grad[..., ctx.last, :] += grad[..., -1, :]
        return grad[..., 1:-1, 1:-1].contiguous(memory_format=torch.channels_last), None, None


def pad(x: Tensor, padding: str) -> Tensor:
    """Return ``(N, C, H + 2, W + 2)``: one cell more on each side."""
    if padding == "zeros":
        return nn.functional.pad(x, (1, 1, 1, 1))
    first, last = (-2, 1) if padding == "circular" else (1, -2)
    return _Pad.apply(x, first, last)


def enlarge(x: Tensor, padding: str) -> Tensor:
    """Return ``x`` four times as large in each direction, bilinear, ``(N, C, 4H, 4W)``."""
    x = interpolate(pad(x, padding), scale_factor=4, mode="bilinear", align_corners=False)
    return x[..., 4:-4, 4:-4]


def _before(x: Tensor, batch: int, memory: Iterator[Tensor], after: State) -> Tensor:
    """Return ``x`` one latent frame earlier, ``(N, C, H, W)``; add to ``after`` what the next chunk needs."""
    frames = x.unflatten(0, (batch, -1))
    past = next(memory, frames[:, :1])
    after.append(frames[:, -1:])
    earlier = torch.cat([past, frames[:, :-1]], 1).flatten(0, 1)
    return earlier.contiguous(memory_format=torch.channels_last)


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]
