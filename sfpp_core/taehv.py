"""The tiny decoder for Wan: a hundredth of the work of the full one, for a little less detail.

Reads the decoders of madebyollin/taehv (MIT), ``taew2_1`` and ``taew2_2``, and LightX2V's of the same layout,
``lighttaew2_1`` and ``lighttaew2_2``. The layers are two-dimensional; some also see their own input of the
frame before, which is all that is remembered.

Parameter names such as ``decoder.3.conv.0.weight`` are taehv's and number the layers.

Legend: B batch, C channels, T latent frames, F frames, H and W pixels, h and w latent cells, N = B * T, or at
a later layer the frames there are by then.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle

from .errors import CheckpointError
from .geometry import TEMPORAL_STRIDE
from .inspection import listed
from .latent_space import WAN_2_1, WAN_2_2, InSpace, LatentSpace
from .weights import Weights
from .weights_file import DTYPES

STAGES = (3, 9, 15)
"""First layers of the stages. A stage: three remembering units, then one that enlarges, one that adds frames
and one that narrows."""

LAST = 22
"""The layer that draws."""

LIMIT = 3.0
"""Latents are bent smoothly into plus or minus this."""

LARGEST_WIDTH = 4096
"""Channels a layer may ask for; more is a damaged file."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySizes:
    """Sizes of a tiny decoder."""

    space: LatentSpace
    """Of its latents."""

    widths: tuple[int, int, int, int]
    """Channels of each stage, and of what is drawn from."""

    growth: tuple[int, int, int]
    """Frames that each stage makes of one."""

    normalised: bool
    """Whether it takes the latents as the student gives them: taehv's do, LightX2V's do not."""

    @property
    def patch(self) -> int:
        """Pixels along a side of what the network takes for one."""
        return 2 if self.space is WAN_2_2 else 1


class Unit(nn.Module):
    """A residual unit that also sees its input of the frame before."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide, deep, out = (
            nn.Conv2d(2 * channels, channels, 3),
            *(nn.Conv2d(channels, channels, 3) for _ in "ab"),
        )
        for layer in (wide, deep, out):
            layer.padding = (1, 1)
        self.conv = nn.Sequential(wide, nn.ReLU(), deep, nn.ReLU(), out)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Return ``(N, C, H, W)``; ``before`` is the same one frame earlier."""
        return torch.relu(self.conv(torch.cat([x, before], 1)) + x)


class Grow(nn.Module):
    """Makes several frames of one."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.growth = growth
        self.conv = nn.Conv2d(channels, channels * growth, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N * growth, C, H, W)``, the frames made of one after each other."""
        return self.conv(x).unflatten(1, (self.growth, -1)).flatten(0, 1)


def _layers(sizes: TinySizes) -> nn.ModuleDict:
    """Return the layers that have weights, by their number."""
    widths = sizes.widths
    layers: dict[str, nn.Module] = {"1": nn.Conv2d(sizes.space.channels, widths[0], 3, padding=1)}
    for stage, start in enumerate(STAGES):
        layers |= {str(start + unit): Unit(widths[stage]) for unit in range(3)}
        layers[str(start + 4)] = Grow(widths[stage], sizes.growth[stage])
        layers[str(start + 5)] = nn.Conv2d(widths[stage], widths[stage + 1], 3, padding=1, bias=False)
    layers[str(LAST)] = nn.Conv2d(widths[3], 3 * sizes.patch**2, 3, padding=1)
    return nn.ModuleDict(layers)


class TinyWanDecoder(InSpace, nn.Module):
    """Latents of Wan to frames; all latent frames of a chunk at once.

    Use::

        decoder = TinyWanDecoder.load(weights, sizes, dtype=torch.bfloat16)
        for chunk in latents.split(3, dim=2):
            frames = decoder.decode(chunk)
    """

    def __init__(self, sizes: TinySizes) -> None:
        super().__init__()
        self.sizes, self.space = sizes, sizes.space
        self.decoder = _layers(sizes)
        self._state: list[Tensor] = []
        self._size: tuple[int, ...] | None = None

    @classmethod
    def load(cls, weights: Weights, sizes: TinySizes, *, dtype: torch.dtype) -> "TinyWanDecoder":
        """Read the weights of the decoder; an encoder in the file is left alone.

        Raises:
            CheckpointError: They are not finite, or not floating point numbers.
        """
        with torch.device("meta"):
            decoder = cls(sizes)
        own = {name: tensor.to(dtype) for name, tensor in _decoding(weights)}
        decoder.load_state_dict(own, assign=True)
        if not sizes.normalised:
            logger.info("%s is no float16 file and taken for LightX2V's, whose latents differ.", weights.path)
        return decoder.eval().requires_grad_(False)

    @torch.inference_mode()
    def decode(self, chunk: Tensor) -> Tensor:
        """Return the frames ``(B, F, 3, H, W)`` in [0, 1], float32, of the next latents ``(B, C, T, h, w)``.

        The first chunk since ``reset`` gives 1 + 4(T - 1) frames, every later one 4T.

        Raises:
            GeometryError: The latents are not of this decoder's shape.
            RolloutOrderError: The chunk's size differs from that of the video decoded so far.
        """
        self.space.check(chunk, self._size)
        like = next(self.parameters())
        latents = chunk.to(like.device)
        latents = latents.float() if self.sizes.normalised else self.space.restore(latents)
        x, state = self._grow(latents.to(like.dtype).transpose(1, 2), [past.to(like) for past in self._state])
        frames = pixel_shuffle(x, self.sizes.patch).float().clamp(0, 1).unflatten(0, (len(chunk), -1))
        first = TEMPORAL_STRIDE - 1 if self._size is None else 0
        self._state, self._size = state, (chunk.shape[0], *chunk.shape[3:])
        return frames[:, first:]

    def _grow(self, latents: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Run the layers over ``(B, T, C, h, w)``; return ``(N, 3 * patch^2, ...)`` and the state after."""
        batch, memory, after = len(latents), iter(state), []
        x = torch.tanh(latents.flatten(0, 1) / LIMIT) * LIMIT
        x = torch.relu(self.decoder["1"](x))
        for start in STAGES:
            for unit in range(start, start + 3):
                x = self.decoder[str(unit)](x, _before(x, batch, memory, after))
            x = self.decoder[str(start + 4)](x)
            if start != STAGES[-1]:
                x = self.decoder[str(start + 5)](interpolate(x, scale_factor=2, mode="nearest"))
        # At full size nothing is remembered any more, so a few frames at a time do.
        return torch.cat([self._draw(part) for part in x.split(TEMPORAL_STRIDE)]), after

    def _draw(self, x: Tensor) -> Tensor:
        """Return ``(N, 3 * patch^2, ...)`` of the last features, at half the resolution."""
        x = self.decoder[str(STAGES[-1] + 5)](interpolate(x, scale_factor=2, mode="nearest"))
        return self.decoder[str(LAST)](x.relu_())

    def rest(self, device: torch.device | str) -> None:
        """Keep the memory of the video on ``device`` until the next chunk."""
        self._state = [past.to(device) for past in self._state]

    def reset(self) -> None:
        """Forget the video decoded so far."""
        self._state, self._size = [], None


def recognise(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> TinySizes | None:
    """Return the sizes of the tiny decoder that a file holds, or ``None`` if it holds something else.

    taehv's files and LightX2V's have the same tensors and take different latents; like ComfyUI, this goes by
    the dtype: taehv publishes float16, LightX2V does not.

    Args:
        path: For messages.
        tensors: Name of the dtype, such as ``F16``, and shape, by name.

    Raises:
        CheckpointError: It is one of another family of models or layout, or incomplete.
    """
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    if (
        "decoder.0.weight" in shapes
        and "decoder.7.conv.weight" not in shapes
        and "decoder.1.conv.0.weight" in shapes
    ):
        raise CheckpointError(f"{path} is taehv's larger variant, 'super', which is not read; use taew2_2.")
    if f"decoder.{LAST}.bias" not in shapes or "decoder.3.conv.0.weight" not in shapes:
        return None
    try:
        space = {16: WAN_2_1, 48: WAN_2_2}[shapes["decoder.1.weight"][1]]
        grown = [shapes[f"decoder.{start + 4}.conv.weight"] for start in STAGES]
        widths = (*(shape[1] for shape in grown), shapes[f"decoder.{LAST}.weight"][1])
        if not all(1 <= width <= LARGEST_WIDTH for width in widths):
            raise KeyError(f"widths {widths}")
        growth = tuple(shape[0] // shape[1] for shape in grown)
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{path} is a tiny decoder, but of no Wan ({error}); use taew2_1, or taew2_2 for Wan 2.2 of 5B."
        ) from error
    if len(widths) != 4 or growth != (1, 2, 2):
        raise CheckpointError(f"{path} makes {growth} frames of one; a decoder for Wan makes (1, 2, 2).")
    half = tensors["decoder.1.weight"][0] == "F16"
    sizes = TinySizes(space=space, widths=widths, growth=(1, 2, 2), normalised=half)
    _check_shapes(path, shapes, sizes)
    return sizes


def _check_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]], sizes: TinySizes) -> None:
    """Refuse a file whose decoder is incomplete or has other tensors."""
    with torch.device("meta"):
        wanted = {name: tuple(weights.shape) for name, weights in TinyWanDecoder(sizes).state_dict().items()}
    found = {name: shape for name, shape in shapes.items() if not name.startswith("encoder.")}
    if wrong := sorted(wanted.items() ^ found.items()):
        names = list(dict.fromkeys(name for name, _ in wrong))
        raise CheckpointError(f"{path}: {listed(names)} missing, foreign or of a wrong shape; get it again.")


def _decoding(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the decoder."""
    for name, tensor in weights.read():
        if name.startswith("encoder."):
            continue
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(f"{weights.path}: {name} is {tensor.dtype}; get it in float16 or wider.")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{weights.path}: {name} holds numbers that are not finite; get it again.")
        yield name, tensor


def _before(x: Tensor, batch: int, memory: Iterator[Tensor], after: list[Tensor]) -> Tensor:
    """Return ``x`` one frame earlier, zeros before the first; note its last frame for the next chunk."""
    frames = x.unflatten(0, (batch, -1))
    past = next(memory, None)
    past = torch.zeros_like(frames[:, :1]) if past is None else past
    after.append(frames[:, -1:].clone())
    return torch.cat([past, frames[:, :-1]], 1).flatten(0, 1)
