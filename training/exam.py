"""The same videos before, during and after reinforcement: reward, flow and the world's ground truth.

Legend: F frames, H and W pixels.
"""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

from training.flow import Speeds
from training.policy import VideoNoise
from training.rewards import (
    Reward,
    RewardSettings,
    rate,
    relative_change,
    spike,
    windowed_variance,
)
from training.sheets import sheet
from training.world import sample_scene
from training.world_metrics import clip_ok, mean_seconds, measure
from training.worlds import STANDARD, World

SEED = 1_000_003
"""Of the captions and the noise: no stage trains on them."""

SHOWN = 8
"""Videos on the sheet."""


def papers(videos: int, *, at_once: int, world: World = STANDARD) -> list[tuple[list[str], VideoNoise]]:
    """Return the captions and the noise of every batch of the exam; each video has its own of both."""
    rng = np.random.default_rng(SEED)
    captions = [world.caption(sample_scene(rng), rng) for _ in range(videos)]
    starts, actions = rng.integers(2**62, size=(2, videos)).tolist()
    parts = [slice(first, first + at_once) for first in range(0, videos, at_once)]
    return [(captions[part], VideoNoise(tuple(starts[part]), tuple(actions[part]))) for part in parts]


def examine(
    made: Iterable[tuple[Tensor, str]],
    reward: Reward,
    speeds_in: Speeds,
    settings: RewardSettings,
    path: Path,
) -> dict[str, float]:
    """Measure every video; write a sheet of the first ones, and the numbers beside it as JSON.

    Args:
        made: Videos ``(F, 3, H, W)`` in [0, 1] with their captions.
        reward: What a video is worth.
        speeds_in: Finds the flow, whatever the reward.
        settings: What its statistics are made with.
        path: The sheet, a .png file.

    Returns:
        The means over the videos, as in the JSON.
    """
    results, shown = [], []
    for video, text in made:
        speeds, seconds = speeds_in(video), measure(video, text)
        results.append(
            {
                "reward": rate(reward, video, text),
                "change": relative_change(speeds, softness=settings.softness),
                "variance": windowed_variance(speeds, window=settings.window),
                "spike": spike(speeds, softness=settings.softness),
                "speed": float(speeds.mean()),
                "right": float(clip_ok(seconds, text)),
                **mean_seconds(seconds),
            }
        )
        if len(shown) < SHOWN:
            shown.append((f"{text}: {results[-1]['reward']:.3f}", video))
    names = [name for name in results[0] if all(name in result for result in results)]
    means = {name: statistics.mean(result[name] for result in results) for name in names}
    rewards = [result["reward"] for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({"means": means, "rewards": rewards}, indent=1))
    sheet(shown, path)
    return means
