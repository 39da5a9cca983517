"""The spaces that latents live in: channels, scales, and what colour a cell is at a glance.

Figures published with the models: means and deviations in the configurations of Wan 2.1 and Wan 2.2, colours
fitted for previews and used by the common front ends.

Legend: B batch, C channels, T latent frames, h and w latent cells.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .errors import GeometryError, RolloutOrderError
from .geometry import FPS, TEMPORAL_STRIDE


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpace:
    """What the autoencoder of one family of models defines."""

    name: str
    """For people and for files, e.g. ``wan2.1``."""

    channels: int
    """Channels of a latent."""

    spatial_stride: int
    """Pixels along a side of one latent cell."""

    fps: int = FPS
    """Frames per second of the videos the models were trained on."""

    mean: tuple[float, ...] = ()
    """Per channel, what is subtracted from the autoencoder's latents to normalise them; empty: nothing."""

    std: tuple[float, ...] = ()
    """Per channel, what they are then divided by."""

    colours: tuple[tuple[float, float, float], ...] = ()
    """Per channel, how much red, green and blue one unit of a normalised latent adds, in [-1, 1]."""

    grey: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Colour of a latent that is zero, in [-1, 1]."""

    def normalise(self, latents: Tensor) -> Tensor:
        """Return the autoencoder's latents ``(B, C, T, h, w)``, centred and scaled, in float32."""
        if not self.mean:
            return latents.float()
        return (latents.float() - _column(self.mean, latents)) / _column(self.std, latents)

    def restore(self, latents: Tensor) -> Tensor:
        """Undo ``normalise``."""
        if not self.mean:
            return latents.float()
        return latents.float() * _column(self.std, latents) + _column(self.mean, latents)

    def check(self, chunk: Tensor, size: tuple[int, ...] | None = None) -> None:
        """Refuse latents that are not of this space or do not go on from a video.

        Args:
            chunk: Latents ``(B, C, T, h, w)``.
            size: ``(B, h, w)`` of the video decoded so far; ``None`` where it begins.

        Raises:
            GeometryError: The shape is wrong.
            RolloutOrderError: The chunk has another size than the video.
        """
        if chunk.ndim != 5 or chunk.shape[1] != self.channels or not all(chunk.shape):
            raise GeometryError(
                f"latents are {tuple(chunk.shape)}; this autoencoder, {self.name}, takes "
                f"(batch, {self.channels}, latent frames, height / {self.spatial_stride}, "
                f"width / {self.spatial_stride}). Use one that fits the student."
            )
        if size is not None and (chunk.shape[0], *chunk.shape[3:]) != size:
            raise RolloutOrderError(
                f"a chunk of shape {tuple(chunk.shape)} cannot go on from a video of another size; "
                "call reset() first."
            )

    def check_frames(self, frames: Tensor, size: tuple[int, ...] | None = None) -> None:
        """Refuse frames that cannot be encoded.

        Args:
            frames: ``(B, F, 3, H, W)``.
            size: ``(B, H, W)`` of the video encoded so far; ``None`` where it begins.

        Raises:
            GeometryError: The number or the size of the frames is wrong.
            RolloutOrderError: They differ in size from those encoded so far.
        """
        if frames.ndim != 5 or frames.shape[2] != 3 or not all(frames.shape):
            raise GeometryError(f"frames are {tuple(frames.shape)}; give (batch, frames, 3, height, width).")
        if frames.shape[3] % self.spatial_stride or frames.shape[4] % self.spatial_stride:
            raise GeometryError(
                f"frames are {frames.shape[4]}x{frames.shape[3]}; both sides must be multiples of "
                f"{self.spatial_stride}."
            )
        if (frames.shape[1] - (size is None)) % TEMPORAL_STRIDE:
            wanted = "1, 5, 9, ..." if size is None else "4, 8, 12, ..."
            raise GeometryError(f"there are {frames.shape[1]} frames; give {wanted}.")
        if size is not None and (frames.shape[0], *frames.shape[3:]) != size:
            raise RolloutOrderError(
                f"frames of shape {tuple(frames.shape)} cannot go on from a video of another size; "
                "call reset() first."
            )


class InSpace:
    """What encodes or decodes the latents of one space."""

    space: LatentSpace
    """The space."""

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.space.channels

    @property
    def spatial_stride(self) -> int:
        """Pixels along a side of one latent cell."""
        return self.space.spatial_stride


DEMO = LatentSpace(name="demo", channels=16, spatial_stride=8)
"""The demo's, whose autoencoder normalises by itself."""

WAN_2_1 = LatentSpace(
    name="wan2.1",
    channels=16,
    spatial_stride=8,
    mean=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    std=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
    colours=(
        (-0.1299, -0.1692, 0.2932), (0.0671, 0.0406, 0.0442), (0.3568, 0.2548, 0.1747),
        (0.0372, 0.2344, 0.1420), (0.0313, 0.0189, -0.0328), (0.0296, -0.0956, -0.0665),
        (-0.3477, -0.4059, -0.2925), (0.0166, 0.1902, 0.1975), (-0.0412, 0.0267, -0.1364),
        (-0.1293, 0.0740, 0.1636), (0.0680, 0.3019, 0.1128), (0.0032, 0.0581, 0.0639),
        (-0.1251, 0.0927, 0.1699), (0.0060, -0.0633, 0.0005), (0.3477, 0.2275, 0.2950),
        (0.1984, 0.0913, 0.1861),
    ),
    grey=(-0.1835, -0.0868, -0.336),
)  # fmt: skip
"""Wan 2.1, and Wan 2.2 of 14B."""

WAN_2_2 = LatentSpace(
    name="wan2.2",
    channels=48,
    spatial_stride=16,
    fps=24,
    mean=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
        -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
        -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
        -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
        0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
    std=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
        0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
        0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
        0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
        0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
    colours=(
        (0.0119, 0.0103, 0.0046), (-0.1062, -0.0504, 0.0165), (0.0140, 0.0409, 0.0491),
        (-0.0813, -0.0677, 0.0607), (0.0656, 0.0851, 0.0808), (0.0264, 0.0463, 0.0912),
        (0.0295, 0.0326, 0.0590), (-0.0244, -0.0270, 0.0025), (0.0443, -0.0102, 0.0288),
        (-0.0465, -0.0090, -0.0205), (0.0359, 0.0236, 0.0082), (-0.0776, 0.0854, 0.1048),
        (0.0564, 0.0264, 0.0561), (0.0006, 0.0594, 0.0418), (-0.0319, -0.0542, -0.0637),
        (-0.0268, 0.0024, 0.0260), (0.0539, 0.0265, 0.0358), (-0.0359, -0.0312, -0.0287),
        (-0.0285, -0.1032, -0.1237), (0.1041, 0.0537, 0.0622), (-0.0086, -0.0374, -0.0051),
        (0.0390, 0.0670, 0.2863), (0.0069, 0.0144, 0.0082), (0.0006, -0.0167, 0.0079),
        (0.0313, -0.0574, -0.0232), (-0.1454, -0.0902, -0.0481), (0.0714, 0.0827, 0.0447),
        (-0.0304, -0.0574, -0.0196), (0.0401, 0.0384, 0.0204), (-0.0758, -0.0297, -0.0014),
        (0.0568, 0.1307, 0.1372), (-0.0055, -0.0310, -0.0380), (0.0239, -0.0305, 0.0325),
        (-0.0663, -0.0673, -0.0140), (-0.0416, -0.0047, -0.0023), (0.0166, 0.0112, -0.0093),
        (-0.0211, 0.0011, 0.0331), (0.1833, 0.1466, 0.2250), (-0.0368, 0.0370, 0.0295),
        (-0.3441, -0.3543, -0.2008), (-0.0479, -0.0489, -0.0420), (-0.0660, -0.0153, 0.0800),
        (-0.0101, 0.0068, 0.0156), (-0.0690, -0.0452, -0.0927), (-0.0145, 0.0041, 0.0015),
        (0.0421, 0.0451, 0.0373), (0.0504, -0.0483, -0.0356), (-0.0837, 0.0168, 0.0055),
    ),
    grey=(0.0317, -0.0878, -0.1388),
)  # fmt: skip
"""Wan 2.2 TI2V of 5B."""

SPACES = {space.name: space for space in (DEMO, WAN_2_1, WAN_2_2)}
"""By name."""


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Return one number per channel, ready to meet ``(B, C, T, h, w)``."""
    return constant(values, like.device).view(1, -1, 1, 1, 1)


@cache
def constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """Return ``values`` as a float32 tensor on ``device``, copied there once: each copy makes a GPU wait."""
    with torch.inference_mode(mode=False):
        return torch.tensor(values, device=device)
