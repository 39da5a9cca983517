"""What a video of the demo's world is worth: how true it is to the caption and to the world.

A reward as anybody may write one: ``reward.function = "training.world_rewards:truth"``.
"""

import math
import statistics
from collections.abc import Mapping

from torch import Tensor

from training.world import LUMA
from training.world_metrics import LIMITS, Second, measure

EDGE = 0.02
"""Luma from either end of the world's range within which a background already costs something."""

MOST = 2.0
"""What one fault costs at most, in limits: a lost cause shall not outweigh all others."""


def truth(video: Tensor, caption: str) -> float:
    """Return minus the faults of ``(F, 3, H, W)`` in [0, 1]; 0 is a video without any.

    A fault counts in multiples of the limit that ``world_metrics`` sets it, averaged over the seconds.
    """
    return -statistics.mean(sum(faults(second).values()) for second in measure(video, caption))


def faults(second: Second) -> Mapping[str, float]:
    """Return each fault of a second in multiples of its limit, from 0 to ``MOST``."""
    limits, (darkest, brightest) = LIMITS, LUMA
    least_sharp, _ = limits.sharpness
    near_edge = max(darkest + EDGE - second.luma, second.luma - brightest + EDGE)
    sizes = {
        "edge": near_edge / EDGE,
        "support": second.overshoot / limits.overshoot,
        "drift": abs(second.luma_drift) / limits.drift,
        "shape": (1 - second.iou) / (1 - limits.iou),
        "motion": second.motion_error / limits.motion,
        "jump": second.jump / limits.jump,
        "colour": second.colour_error / limits.colour,
        "soft": (1 - second.sharpness) / (1 - least_sharp),
    }
    return {name: MOST if math.isnan(size) else min(max(size, 0.0), MOST) for name, size in sizes.items()}
