"""How far a picture moves from one frame to the next.

By optical flow (dense inverse search, arXiv:1603.03590, as OpenCV has it) where OpenCV is installed, else by
how much the picture changes for its gradients, which needs nothing but torch and underrates large steps.

Legend: H, W pixels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

FLOW = "optical flow (DIS)"
"""Name of the first way."""

GRADIENTS = "change over gradient (install opencv-python-headless for optical flow)"
"""Name of the second way."""

LEAST_SIDE = 32
"""Least side in pixels on which the search still finds anything."""

_FLAT = 1e-3
"""Mean gradient, per pixel, below which a picture shows no motion."""

Step = Callable[[Tensor, Tensor], float]
"""Returns the mean motion in pixels between two grey pictures ``(H, W)`` in [0, 1] on the CPU."""


def step_measure(height: int, width: int) -> tuple[str, Step]:
    """Return the name of the best way there is to measure pictures of this size, and the way itself."""
    if min(height, width) >= LEAST_SIDE and (search := _dense_search()) is not None:
        return FLOW, search
    return GRADIENTS, gradient_step


def gradient_step(before: Tensor, after: Tensor) -> float:
    """Return the mean change over the mean gradient: pixels, for motion small against what is shown."""
    mean = (before + after) / 2
    rows, columns = mean.diff(dim=0).abs().mean(), mean.diff(dim=1).abs().mean()
    gradient = float((rows.square() + columns.square()).sqrt())
    return float((after - before).abs().mean()) / max(gradient, _FLAT)


def _dense_search() -> Step | None:
    """Return the search, or ``None`` without OpenCV."""
    try:
        import cv2
    except ImportError:
        return None
    opencv: Any = cv2  # its stubs do not know the search
    finder = opencv.DISOpticalFlow_create(opencv.DISOPTICAL_FLOW_PRESET_FAST)

    def search(before: Tensor, after: Tensor) -> float:
        flow = finder.calc(_bytes(before), _bytes(after), None)
        return float(np.hypot(flow[..., 0], flow[..., 1]).mean())

    return search


def _bytes(picture: Tensor) -> np.ndarray:
    """Return a grey picture as OpenCV wants it."""
    return (picture.clamp(0, 1) * 255).round().byte().numpy()
