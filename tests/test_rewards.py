"""Rewards: steady motion wins over spikes and over standing still; any function can take their place."""

import builtins
import sys

import pytest
import torch

from sfpp_core.errors import SFPPError
from sfpp_core.tiny_autoencoder import AutoencoderConfig, TinyAutoencoder
from training.config import ConfigError
from training.flow import DenseSearch
from training.rewards import (
    RewardSettings,
    SteadyFlow,
    make_reward,
    rate,
    relative_change,
    speeds_of,
    spike,
    videos,
    windowed_variance,
)

FLOWS = ("change", "variance", "spike")
SMOOTH = torch.full((40,), 2.0)
SPIKED = torch.where(torch.arange(40) == 20, 12.0, 2.0)
BIGGER = torch.where(torch.arange(40) == 20, 24.0, 2.0)
FROZEN = torch.zeros(40)


def pan(shifts, *, size=96):
    """Return a video of soft texture moved right by so many pixels more in every frame."""
    texture = torch.randn(1, 3, size // 8, size * 2 // 8, generator=torch.Generator().manual_seed(0))
    wide = torch.nn.functional.interpolate(texture, size=(size, size * 2), mode="bicubic")[0]
    wide = (wide * 0.15 + 0.5).clamp(0, 1)
    places = torch.tensor([0, *shifts]).cumsum(0).tolist()
    return torch.stack([wide.roll(place, -1)[..., :size] for place in places])


def test_flow_is_found_in_pixels_per_frame():
    speeds = DenseSearch()(pan([1, 2, 3, 0]))
    assert speeds.shape == (4,)
    assert speeds.tolist() == pytest.approx([1, 2, 3, 0], abs=0.25)


def test_large_frames_are_reduced_first():
    video = pan([4, 4], size=256)
    assert DenseSearch(short_side=64)(video).tolist() == pytest.approx([1, 1], abs=0.2)


def test_a_torus_has_no_edge():
    video = pan([3] * 8)[:, :, :, :96]
    round_trip = torch.stack([video[0].roll(3 * step, -1) for step in range(8)])
    wrapped, cut = DenseSearch(wrap=16)(round_trip), DenseSearch()(round_trip)
    assert (wrapped - 3).abs().max() < (cut - 3).abs().max()
    assert wrapped.tolist() == pytest.approx([3] * 7, abs=0.15)


@pytest.mark.parametrize("flow", FLOWS)
def test_steady_motion_beats_spikes_and_no_video_wins_by_standing_still(flow):
    reward = SteadyFlow(RewardSettings(flow=flow), DenseSearch())
    smooth, spiked, bigger, frozen = map(reward.of, (SMOOTH, SPIKED, BIGGER, FROZEN))
    assert smooth > spiked > bigger
    assert smooth > frozen


@pytest.mark.parametrize("flow", FLOWS)
def test_the_same_holds_for_videos(flow):
    reward = make_reward(RewardSettings(flow=flow))
    shifts = [2] * 14
    shifts[7] = 8
    smooth, spiked, frozen = (reward(pan(list(moves)), "") for moves in ([2] * 14, shifts, [0] * 14))
    assert smooth > spiked
    assert smooth > frozen


def test_without_the_guard_a_frozen_video_would_win():
    slow = torch.tensor([0.9, 1.1] * 10)
    for guard, frozen_wins in ((0.0, True), (1.0, False)):
        reward = SteadyFlow(RewardSettings(guard=guard), DenseSearch())
        assert (reward.of(FROZEN) > reward.of(slow)) is frozen_wins


def test_the_statistics_of_known_speeds():
    assert relative_change(torch.tensor([1.0, 3.0, 3.0]), softness=0.5) == pytest.approx((2 / 2.5) / 2)
    assert spike(torch.tensor([1.0, 2.0, 9.0]), softness=1.0) == pytest.approx(3.0)
    speeds = torch.tensor([0.0, 2.0, 0.0, 4.0])
    assert windowed_variance(speeds, window=2) == pytest.approx((1 + 1 + 4) / 3)
    assert windowed_variance(speeds, window=8) == pytest.approx(2.75)
    assert relative_change(speeds[:1], softness=0.5) == 0


def test_a_clip_too_short_to_be_steady_is_refused():
    with pytest.raises(ConfigError, match="flow of 2 frames cannot be steady; roll out at least 3"):
        make_reward(RewardSettings())(pan([1]), "")


def brightness(video, caption):
    return video.mean().item() + len(caption)


def test_any_function_can_be_the_reward():
    module = sys.modules[__name__]
    sys.modules["own_rewards"] = module
    try:
        reward = make_reward(RewardSettings(function="own_rewards:brightness"))
    finally:
        del sys.modules["own_rewards"]
    assert rate(reward, torch.full((2, 3, 4, 4), 0.5), "abc") == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("brightness", "write module:function, e.g. my_rewards:smoothness"),
        ("no_such_module:f", "cannot be imported: No module named 'no_such_module'"),
        ("math:no_such_function", "cannot be imported"),
        ("math:pi", "which is no function"),
    ],
)
def test_a_reward_that_cannot_be_called_is_refused(function, message):
    with pytest.raises(ConfigError, match=message):
        make_reward(RewardSettings(function=function))


def test_a_reward_that_is_no_number_stops_the_run():
    with pytest.raises(FloatingPointError, match="the reward of a video of 'x' is nan; it must be finite"):
        rate(lambda video, caption: float("nan"), torch.zeros(1), "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flow": "smooth"}, "flow is 'smooth'; use 'change', 'variance', 'spike'"),
        ({"softness": 0.0}, "softness is 0.0; it must be above 0"),
        ({"window": 1}, "window is 1; it must be above 1"),
        ({"guard": -1.0}, "guard is -1.0; it must be 0 or more"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        RewardSettings(**change)


def test_without_opencv_the_remedy_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name == "cv2":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(SFPPError, match="run `pip install opencv-python-headless`"):
        speeds_of(RewardSettings())(pan([1]))


def test_frames_too_small_to_search_are_refused():
    with pytest.raises(SFPPError, match="16x16 pixels are searched for motion at 16x16; both sides must be"):
        DenseSearch()(torch.zeros(2, 3, 16, 16))


def test_videos_are_decoded_one_by_one_and_whole():
    torch.manual_seed(0)
    decoder = TinyAutoencoder(AutoencoderConfig(coarse=16, fine=16, mask=8, units=1)).eval()
    clip = torch.randn(2, 16, 6, 2, 2)
    decoder.reset()
    with torch.inference_mode():
        both = torch.cat([decoder.decode(part) for part in clip.split(3, dim=2)], dim=1)
    made = list(videos(decoder, clip.split(3, dim=2)))
    assert [video.shape for video in made] == [(21, 3, 16, 16)] * 2
    for video, expected in zip(made, both, strict=True):
        torch.testing.assert_close(video, expected)
