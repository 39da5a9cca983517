"""Against Wan 2.1 itself, github.com/Wan-Video/Wan2.1; what is replaced at run time: see ``run_wan``."""

import pytest
from harness import Reference, bidirectional_inputs, error, whole

pytestmark = pytest.mark.slow


def test_the_bidirectional_model_is_the_same(measured, tmp_path):
    inputs, wan = bidirectional_inputs(), Reference.named("SFPP_WAN")
    theirs = wan.run("run_wan.py", tmp_path, inputs, mode="whole", module="wan.modules.model")
    measured("velocity", error(whole(inputs), theirs["velocity"]))
