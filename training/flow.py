"""How fast a video moves, frame by frame, by optical flow.

OpenCV's dense inverse search needs no weights and finds a frame's flow in milliseconds on a CPU.

Legend: F frames, H and W pixels.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfpp_core.errors import SFPPError
from sfpp_core.motion import LEAST_SIDE, dense_search, grey_bytes

Speeds = Callable[[Tensor], Tensor]
"""Returns the mean length of the flow from each frame to the next, ``(F - 1,)``, of ``(F, 3, H, W)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSearch:
    """Optical flow by dense inverse search, arXiv:1603.03590, as OpenCV has it."""

    short_side: int = 256
    """Larger frames are reduced to this short side first; speeds are in pixels of what is searched."""

    wrap: int = 0
    """Pixels of the opposite edge shown beyond each edge, for a world that is a torus."""

    def __call__(self, video: Tensor) -> Tensor:
        """Return the mean length of the flow from each frame of ``(F, 3, H, W)`` in [0, 1] to the next.

        Returns:
            ``(F - 1,)``, float32, in pixels per frame.

        Raises:
            SFPPError: OpenCV is missing, or the frames are too small to search.
        """
        finder = dense_search()
        if finder is None:
            raise SFPPError(
                "optical flow needs OpenCV, which is not installed; run `pip install opencv-python-headless`."
            )
        pictures = grey_bytes(self._grey(video))
        inner = slice(self.wrap, -self.wrap or None)
        speeds = []
        for before, after in itertools.pairwise(pictures):
            flow = torch.from_numpy(finder.calc(before, after, None))[inner, inner]
            speeds.append(flow.norm(dim=-1).mean())
        return torch.stack(speeds) if speeds else torch.zeros(0)

    def _grey(self, video: Tensor) -> Tensor:
        """Return the frames as they are searched: grey, ``(F, H, W)``, on the CPU."""
        red, green, blue = video.detach().float().cpu().unbind(1)
        grey = (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]
        shrink = self.short_side / min(grey.shape[-2:])
        if shrink < 1:
            size = [round(side * shrink) for side in grey.shape[-2:]]
            grey = torch.nn.functional.interpolate(grey, size=size, mode="area")
        if self.wrap:
            grey = torch.nn.functional.pad(grey, (self.wrap,) * 4, mode="circular")
        if min(grey.shape[-2:]) < LEAST_SIDE:
            raise SFPPError(
                f"frames of {video.shape[-2]}x{video.shape[-1]} pixels are searched for motion at "
                f"{grey.shape[-2]}x{grey.shape[-1]}; both sides must be at least {LEAST_SIDE}: use larger "
                "frames or a larger short_side."
            )
        return grey[:, 0]
