"""The reward for being true to the demo's world: the truth earns most, and each fault costs up to a limit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from training.rewards import RewardSettings, make_reward, rate
from training.world import LUMA, caption, render, sample_scene
from training.world_metrics import LIMITS, measure
from training.world_rewards import EDGE, MOST, faults, truth

FRAMES = 33
RISING = torch.linspace(0, 0.2, FRAMES)[:, None, None, None]


def scene_of(seed, **changes):
    return replace(sample_scene((4, seed)), luma=0.5, gradation="plain", amplitude=0.0, **changes)


def filmed(scene):
    return render([scene], FRAMES)[0], caption(scene, np.random.default_rng(0))


@pytest.mark.parametrize("seed", range(6))
def test_a_true_clip_has_hardly_a_fault(seed):
    assert -0.1 < truth(*filmed(scene_of(seed))) <= 0


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda clip: clip - 0.3, id="dark"),
        pytest.param(lambda clip: clip + RISING, id="brightening"),
        pytest.param(lambda clip: clip[:1].expand(clip.shape), id="frozen"),
        pytest.param(lambda clip: clip.flip(1), id="other colours"),
        pytest.param(lambda clip: torch.cat([clip[:20], clip[20:].roll(24, -1)]), id="jumps"),
        pytest.param(lambda clip: torch.full_like(clip, 0.5), id="empty"),
    ],
)
def test_a_fault_costs(change):
    clip, text = filmed(scene_of(1))
    assert truth(change(clip), text) < truth(clip, text) - 0.3


def test_an_exposure_costs_the_more_the_nearer_it_is_to_the_end_of_the_range():
    lumas = [0.5, LUMA[1] - EDGE - 0.01, LUMA[1] - EDGE / 2, LUMA[1], LUMA[1] + LIMITS.overshoot]
    costs = []
    for luma in lumas:
        clip, text = filmed(replace(scene_of(1), luma=luma))
        counted = faults(measure(clip, text)[0])
        costs.append(counted["edge"] + counted["support"])
    assert costs[0] == costs[1] == 0
    assert costs[1:] == sorted(costs[1:])
    beyond = min(1 + LIMITS.overshoot / EDGE, MOST) + 1
    assert costs[2:] == pytest.approx([0.5, 1.0, beyond], abs=0.1)


def test_no_fault_costs_more_than_so_much():
    clip, text = filmed(scene_of(1))
    black = faults(measure(clip * 0, text)[0])
    assert max(black.values()) == MOST
    assert min(black.values()) >= 0


def test_it_is_named_in_a_configuration():
    reward = make_reward(RewardSettings(function="training.world_rewards:truth"))
    clip, text = filmed(scene_of(2))
    assert rate(reward, clip, text) == truth(clip, text)
