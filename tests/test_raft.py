"""RAFT: against the authors' own code where it is at hand, and its parts against plain arithmetic."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sfpp_core.errors import CheckpointError, SFPPError
from training.raft import CELL, LEVELS, RADIUS, Raft, RaftSearch, enlarge, load_raft, look_up, places, pyramid
from training.rewards import RewardSettings, SteadyFlow, make_reward

AUTHORS = """
import sys, types
from argparse import Namespace
import torch
scipy = types.ModuleType("scipy")
scipy.interpolate = None
sys.modules["scipy"] = scipy
sys.path.insert(0, sys.argv[1] + "/core")
from raft import RAFT
network = torch.nn.DataParallel(RAFT(Namespace(small=False, mixed_precision=False))).eval()
torch.manual_seed(0)
for value in network.state_dict().values():
    if value.dtype == torch.float32:
        value.add_(torch.randn_like(value).abs() * 0.01)
torch.save(network.state_dict(), sys.argv[2] + "/raft.pth")
before, after = torch.load(sys.argv[2] + "/frames.pt")
with torch.no_grad():
    _, flow = network.module(before * 255, after * 255, iters=5, test_mode=True)
torch.save(flow, sys.argv[2] + "/flow.pt")
"""


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Raft().eval().requires_grad_(False)


def save(network, path):
    """Write weights as the authors do: from within a DataParallel, the shortcuts' norms twice."""
    state = network.state_dict()
    state = {f"module.{name.replace('update.', 'update_block.')}": state[name] for name in state}
    twice = {name.replace("downsample.1", "norm3"): v for name, v in state.items() if "downsample.1" in name}
    torch.save(state | twice, path)


@pytest.mark.slow
def test_the_flow_is_that_of_the_authors(tmp_path):
    folder = os.environ.get("SFPP_RAFT")
    if not folder:
        pytest.skip("SFPP_RAFT names no checkout of princeton-vl/RAFT")
    frames = torch.rand(2, 2, 3, 128, 136)
    torch.save(frames, tmp_path / "frames.pt")
    subprocess.run([sys.executable, "-c", AUTHORS, folder, str(tmp_path)], check=True)
    expected = torch.load(tmp_path / "flow.pt")
    before, after = 2 * frames - 1
    flow = load_raft(tmp_path / "raft.pth")(before, after, 5)
    assert expected.abs().max() > 0.1
    assert (flow - expected).abs().max() < 1e-4 * expected.abs().max()


def test_comparisons_are_found_where_the_guess_points():
    first, second = torch.randn(2, 1, 8, 16, 16)
    levels = pyramid(first, second)
    assert [level.shape[-1] for level in levels] == [16, 8, 4, 2]
    shift = torch.tensor([3.0, -2.0])[None, :, None, None]
    found = look_up(levels, places(first) + shift)
    assert found.shape == (1, LEVELS * (2 * RADIUS + 1) ** 2, 16, 16)
    # The middle of the finest level is the comparison with the cell pointed at: (8, 9) with (8 - 2, 9 + 3).
    middle = (2 * RADIUS + 1) ** 2 // 2
    expected = (first[0, :, 8, 9] * second[0, :, 6, 12]).sum() / 8**0.5
    torch.testing.assert_close(found[0, middle, 8, 9], expected, rtol=1e-4, atol=1e-5)


def test_a_uniform_flow_stays_uniform_when_it_is_enlarged():
    flow = torch.tensor([1.5, -0.5])[None, :, None, None].expand(1, 2, 5, 6)
    large = enlarge(flow, torch.randn(1, 9 * CELL**2, 5, 6))
    assert large.shape == (1, 2, 40, 48)
    inner = large[..., CELL:-CELL, CELL:-CELL]
    torch.testing.assert_close(inner, CELL * flow[..., :1, :1].expand_as(inner))


def test_published_weights_load_and_reward_videos(network, tmp_path):
    save(network, tmp_path / "raft.pth")
    loaded = load_raft(tmp_path / "raft.pth")
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    settings = RewardSettings(raft=str(tmp_path / "raft.pth"), short_side=96, wrap=16)
    reward = make_reward(settings)
    assert isinstance(reward, SteadyFlow)
    assert isinstance(reward.speeds, RaftSearch)
    speeds = reward.speeds(torch.rand(3, 3, 100, 192))
    assert speeds.shape == (2,)
    assert speeds.isfinite().all()


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist; get raft-things"):
        load_raft(tmp_path / "none.pth")
    torch.save({"module.conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not hold the weights of RAFT"):
        load_raft(tmp_path / "other.pth")
    Path(tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(CheckpointError, match="does not hold the weights of RAFT"):
        load_raft(tmp_path / "text.pth")


def test_frames_too_small_for_the_coarsest_comparison_are_refused(network):
    with pytest.raises(SFPPError, match="flow of 64x64 pixels; both sides must be at least 128"):
        RaftSearch(network=network)(torch.zeros(2, 3, 64, 64))
