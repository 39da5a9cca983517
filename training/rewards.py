"""What a video is worth: smooth motion, measured by optical flow, or any function of yours.

Self-Forcing++ (arXiv:2510.02283, section 3.3) rewards steady optical flow between frames and publishes no
formula. Three readings are offered, each with a guard, because the steadiest video of all stands still.

Legend: B videos, C channels, T latent frames, F frames, H and W pixels.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from sfpp_core.decoder import StreamingDecoder
from training.config import ConfigError
from training.flow import DenseSearch, Speeds
from training.raft import RaftSearch, load_raft

Reward = Callable[[Tensor, str], float]
"""Returns the worth of a video ``(F, 3, H, W)`` in [0, 1] with this caption; more is better."""

FlowKind = Literal["change", "variance", "spike"]
"""The reading of "steady flow": see ``relative_change``, ``windowed_variance`` and ``spike``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSettings:
    """What a video is rewarded for."""

    function: str = ""
    """``module:function`` of a reward of your own, called with a video and its caption; empty is the flow."""

    flow: str = "change"
    """``change``, ``variance`` or ``spike``."""

    softness: float = 0.5
    """Pixels per frame added to what a change or a spike is compared with: slower motion is noise."""

    window: int = 8
    """Frame pairs per window of ``variance``."""

    guard: float = 1.0
    """Worth of reaching ``least_motion``: more than the steadiness a frozen video could gain."""

    least_motion: float = 1.0
    """Mean speed in pixels per frame from which on more motion earns nothing."""

    short_side: int = 256
    """Larger frames are reduced to this short side before flow is searched."""

    wrap: int = 0
    """Pixels shown beyond each edge from the opposite one, for a world that is a torus; else 0."""

    raft: str = ""
    """Weights of RAFT, ``raft-things.pth``, to find the flow with; empty is OpenCV's search."""

    def __post_init__(self) -> None:
        if self.flow not in get_args(FlowKind):
            raise ConfigError(f"flow is {self.flow!r}; use {', '.join(map(repr, get_args(FlowKind)))}.")
        for name, least in (("softness", 0), ("least_motion", 0), ("window", 1), ("short_side", 31)):
            if not getattr(self, name) > least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above {least}.")
        for name in ("guard", "wrap"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more.")


def relative_change(speeds: Tensor, *, softness: float) -> float:
    """Return how much the speed changes from one frame to the next, as a share of the speed itself.

    Args:
        speeds: Pixels per frame, ``(F - 1,)``.
        softness: Added to the speed it is a share of.
    """
    around = (speeds[1:] + speeds[:-1]) / 2
    return float((speeds.diff().abs() / (around + softness)).mean()) if len(speeds) > 1 else 0.0


def windowed_variance(speeds: Tensor, *, window: int) -> float:
    """Return the variance of the speed within ``window`` frame pairs, averaged over all such windows.

    The statistic of figure 5 in the paper.
    """
    windows = speeds.unfold(0, min(window, len(speeds)), 1)
    return float(windows.var(dim=1, correction=0).mean())


def spike(speeds: Tensor, *, softness: float) -> float:
    """Return how far the fastest frame stands out: its speed over the median one plus ``softness``."""
    return float(speeds.max() / (speeds.median() + softness))


class SteadyFlow:
    """Reward for steady motion that a frozen video does not win."""

    def __init__(self, settings: RewardSettings, speeds: Speeds) -> None:
        """Measure with ``speeds``."""
        self.settings, self.speeds = settings, speeds

    def __call__(self, video: Tensor, caption: str) -> float:  # noqa: ARG002 - flow asks for no caption
        """Return the worth of ``(F, 3, H, W)``: minus its unsteadiness, plus up to ``guard`` for moving."""
        return self.of(self.speeds(video))

    def of(self, speeds: Tensor) -> float:
        """Return the worth of a video of these ``speeds``, ``(F - 1,)`` in pixels per frame.

        Raises:
            ConfigError: There is nothing to compare.
        """
        if len(speeds) < 2:
            raise ConfigError(f"flow of {len(speeds) + 1} frames cannot be steady; roll out at least 3.")
        settings = self.settings
        unsteady = {
            "change": lambda: relative_change(speeds, softness=settings.softness),
            "variance": lambda: windowed_variance(speeds, window=settings.window),
            "spike": lambda: spike(speeds, softness=settings.softness),
        }[settings.flow]()
        moving = min(float(speeds.mean()) / settings.least_motion, 1.0)
        return settings.guard * moving - unsteady


def speeds_of(settings: RewardSettings, *, device: torch.device | str = "cpu") -> Speeds:
    """Return the flow estimator of ``settings``; RAFT computes on ``device``.

    Raises:
        CheckpointError: The weights are not those of RAFT.
    """
    if not settings.raft:
        return DenseSearch(short_side=settings.short_side, wrap=settings.wrap)
    network = load_raft(Path(settings.raft)).to(device)
    return RaftSearch(network=network, short_side=settings.short_side, wrap=settings.wrap)


def make_reward(settings: RewardSettings, *, device: torch.device | str = "cpu") -> Reward:
    """Return the reward of ``settings``.

    Raises:
        CheckpointError: As ``speeds_of``.
        ConfigError: The function named cannot be found or called.
    """
    if not settings.function:
        return SteadyFlow(settings, speeds_of(settings, device=device))
    module, found, name = settings.function.partition(":")
    if not (module and found and name):
        raise ConfigError(
            f"function is {settings.function!r}; write module:function, e.g. my_rewards:smoothness."
        )
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"function is {settings.function!r}, which cannot be imported: {error}.") from error
    if not callable(function):
        raise ConfigError(f"function is {settings.function!r}, which is no function.")
    return cast(Reward, function)


def videos(decoder: StreamingDecoder, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield each video ``(F, 3, H, W)`` in [0, 1] of a batch, decoded alone: one is in memory at a time.

    Args:
        decoder: Any decoder that streams.
        chunks: Clean chunks ``(B, C, T, h, w)``, oldest first.
    """
    clip = list(chunks)
    for row in range(len(clip[0])):
        decoder.reset()
        with torch.inference_mode():
            frames = torch.cat([decoder.decode(chunk[row : row + 1]) for chunk in clip], dim=1)
        yield frames[0].cpu()
    decoder.reset()


def rate(reward: Reward, video: Tensor, caption: str) -> float:
    """Return the reward of one video as a number.

    Raises:
        FloatingPointError: It is not finite.
    """
    worth = float(reward(video, caption))
    if not math.isfinite(worth):
        raise FloatingPointError(f"the reward of a video of {caption!r} is {worth}; it must be finite.")
    return worth
