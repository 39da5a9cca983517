"""The numbers of a reproduction: of one clip, over clips and seeds, and between methods."""

import math
from dataclasses import replace

import numpy as np
import pytest

from training.reproduction.layout import ODE, PLAIN, PLUS
from training.reproduction.summary import NUMBERS, Student, clip_numbers, difference, spread_of
from training.world import caption, render, sample_scene
from training.world_metrics import measure


def student(method, seed, values):
    return Student(method=method, seed=seed, ablates="", seconds=[], at={1: dict.fromkeys(NUMBERS, values)})


def test_spread_is_between_seeds_and_over_clips():
    spread = spread_of("right", [[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert (spread.mean, spread.error) == (0.5, 0.25)  # binomial, of four clips
    assert spread.deviation == pytest.approx(0.5 / 2**0.5)
    assert spread.told(2) == "0.50 ± 0.35 (0.25)"
    some = spread_of("frozen", [[1.0, math.nan, 0.0, math.nan, 1.0, 0.0]])
    assert (some.mean, some.error) == (0.5, 0.25)  # of the four that show an object
    one = spread_of("exposure drift", [[1.0, 3.0]])
    assert (one.mean, one.error, one.deviation, one.told(1)) == (2.0, 1.0, None, "2.0 (1.0)")


def test_differences_are_of_the_same_clip_and_seed():
    plus = [student(PLUS, 0, [1.0, 2.0]), student(PLUS, 1, [3.0, 4.0])]
    plain = [student(PLAIN, 1, [2.0, 2.0])]
    apart = difference("exposure drift", plus, plain, 1)
    assert (apart.mean, apart.error, apart.deviation) == (1.5, 0.5, None)
    shared = difference("exposure drift", plus, [student(ODE, None, [1.0, 1.0])], 1)
    assert (shared.mean, shared.deviation) == (1.5, pytest.approx(2**0.5))
    assert difference("right", plus, [student(PLAIN, 5, [0.0, 0.0])], 1) is None


def test_the_truth_is_right_and_does_not_drift():
    scene = sample_scene(3)
    text = caption(scene, np.random.default_rng(1))
    seconds = measure(render([scene], 160)[0], text)
    numbers = clip_numbers(seconds, text)
    assert (numbers["right"], numbers["right at the end"], numbers["out of range"]) == (1.0, 1.0, 0.0)
    assert numbers["exposure drift"] < 0.02 and numbers["IoU"] > 0.9
    darker = clip_numbers([*seconds[:-1], replace(seconds[-1], luma_drift=-0.5, overshoot=0.3)], text)
    assert (darker["right"], darker["out of range"]) == (0.0, 1.0)
    assert darker["exposure drift"] - numbers["exposure drift"] == pytest.approx(0.1, abs=0.01)
