"""Against Rolling Forcing, github.com/TencentARC/RollingForcing: a sink that moves along with the window.

Its model is asked for one chunk at a time; that its own loop denoises five chunks together is another method.
Its window is 21 latent frames, its sink 3, its cache 24. What is replaced at run time: see ``run_wan``.
"""

import pytest
from harness import SCHEDULE, Reference, Rollout, compare_passes, worst

pytestmark = pytest.mark.slow
SIZES = Rollout(window=21, sink=3, positions="relative")


def test_its_sink_moves_along(measured, tmp_path):
    compare_passes(Reference.named("SFPP_ROLLING_FORCING"), SIZES, measured, tmp_path, cache=24)


def test_its_clean_pass_is_ours_until_it_loses_sight_of_the_sink(measured, tmp_path):
    """Where its loop marks the clean pass (``updating_cache``), that pass sees the last 21 latent frames.

    So it is ours for the 7 chunks of a window that is not yet full, and from chunk 7 on it is not: the sink
    is out of its sight, in no other pass.
    """
    inputs = SIZES.inputs()
    theirs = Reference.named("SFPP_ROLLING_FORCING").run(
        "run_wan.py",
        tmp_path,
        inputs,
        mode="passes",
        module="wan.modules.causal_model",
        cache=24,
        marks_clean=True,
        **SIZES.settings,
    )["velocity"]
    ours = SIZES.passes(inputs)[0]["velocity"]
    same = 7 * (len(SCHEDULE.sigmas) + 1) + len(SCHEDULE.sigmas)
    measured("velocity", worst(ours[:same], theirs[:same]))
    assert worst(ours[same:], theirs[same:]) > 1e-3
