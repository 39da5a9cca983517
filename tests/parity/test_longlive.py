"""Against LongLive 1.0, github.com/NVlabs/LongLive, branch v1.0: a sink at its true time, or moved along.

What is replaced at run time is listed in ``run_wan``.
"""

import pytest
from harness import Reference, Rollout, compare_passes

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("sizes", [Rollout(window=12, sink=3), Rollout(window=12)], ids=str)
def test_its_sink_stays_at_its_true_time(sizes, measured, tmp_path):
    compare_passes(Reference.named("SFPP_LONGLIVE"), sizes, measured, tmp_path)


def test_its_endless_model_moves_the_sink_along(measured, tmp_path):
    sizes = Rollout(window=12, sink=3, positions="relative")
    module = "wan.modules.causal_model_infinity"
    compare_passes(Reference.named("SFPP_LONGLIVE"), sizes, measured, tmp_path, module=module)
