"""Against Infinity-RoPE, github.com/yesiltepe-hidir/infinity-rope: a sink that moves along with the window.

What is replaced at run time is listed in ``run_wan``.
"""

import pytest
from harness import Reference, Rollout, compare_passes

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("window", [9, 21])
def test_its_sink_moves_along(window, measured, tmp_path):
    """With a sink of a whole chunk; its own default, one latent frame, is no whole chunk of 3."""
    sizes = Rollout(window=window, sink=3, positions="relative")
    compare_passes(Reference.named("SFPP_INFINITY_ROPE"), sizes, measured, tmp_path)
