"""Sample videos while training: their files, and numbers that see a drift."""

import pytest
import tiny_runs
import torch

from sfpp_core.config import RolloutSettings
from sfpp_core.tiny_autoencoder import AutoencoderConfig, TinyAutoencoder
from sfpp_core.video import video_info
from training.config import ConfigError
from training.loop import LoopSettings
from training.samples import drift, keep_samples, roll_samples
from training.worlds import HARD, STANDARD


def fading(seconds, *, to):
    """Return a grey video ``(F, 3, 16, 16)`` whose luma goes from 0.5 to ``to``."""
    return torch.linspace(0.5, to, 16 * seconds)[:, None, None, None].expand(-1, 3, 16, 16)


def test_the_numbers_see_what_drifts():
    still = drift(fading(4, to=0.5))
    assert still == pytest.approx({"luma_drift": 0, "saturation_drift": 0, "clipped": 0}, abs=1e-6)
    bright = drift(fading(8, to=1.0))
    assert bright["luma_drift"] == pytest.approx(0.5 * 112 / 127, abs=1e-3)  # of the means of two seconds
    assert 0.2 < bright["clipped"] < 0.5
    assert drift(fading(8, to=0.0))["luma_drift"] == pytest.approx(bright["luma_drift"])
    red = torch.stack((fading(4, to=1.0)[:, 0], *fading(4, to=0.5)[:, :2].unbind(1)), dim=1)
    assert drift(red)["saturation_drift"] > 0.3


def test_a_short_and_a_long_video_are_written_and_the_long_one_drifts_more(tmp_path):
    videos = torch.stack([fading(4, to=0.9), fading(4, to=0.7)])
    seconds = [1, 3.5]
    numbers = keep_samples(
        (videos * 255).byte(), ["one", "other"], tmp_path / "sample_000007.png", seconds=seconds
    )
    assert (tmp_path / "sample_000007.png").exists()
    for length in seconds:
        info = video_info(tmp_path / f"sample_000007_{length:g}s.mp4")
        assert (info.frames, info.width, info.height) == (16 * length, 64, 32)
    assert numbers["1s/luma_drift"] == 0
    assert numbers["3.5s/luma_drift"] == pytest.approx(0.3 * 40 / 63, abs=0.01)


def test_lengths_are_those_of_a_video_of_another_speed(tmp_path):
    """Wan 2.2 makes 24 frames a second."""
    videos = (fading(6, to=0.9)[None] * 255).byte()  # 96 frames: 4 s of it
    numbers = keep_samples(videos, ["one"], tmp_path / "s.png", seconds=[1, 4], fps=24)
    info = video_info(tmp_path / "s_1s.mp4")
    assert (info.frames, info.fps) == (24, 24)
    assert video_info(tmp_path / "s_4s.mp4").frames == 96
    assert numbers["4s/luma_drift"] == pytest.approx(0.4 * 72 / 95, abs=0.01)


@pytest.mark.parametrize("world", [STANDARD, HARD], ids=lambda world: world.name)
def test_a_student_is_rolled_out_once_for_all_lengths_and_measured_by_its_world(tmp_path, world):
    model = tiny_runs.model()
    decoder = TinyAutoencoder(AutoencoderConfig(coarse=16, fine=16, mask=8, units=1))
    decoder.mean.zero_()
    decoder.std.fill_(1)
    asked = []
    model.words.register_forward_hook(lambda _, given, __: asked.append(given[0]))
    numbers = roll_samples(
        model,
        decoder,
        RolloutSettings(steps=1),
        tmp_path / "sample.png",
        device=torch.device("cpu"),
        seconds=(1.0, 2.0),
        world=world,
    )
    assert asked == [world.prompts]
    for length in ("1s", "2s"):
        assert {f"{length}/luma_drift", f"{length}/clipped", f"{length}/right", f"{length}/steady"} <= set(
            numbers
        )
        assert video_info(tmp_path / f"sample_{length}.mp4").width == 6 * 64


def test_a_missing_encoder_does_not_end_a_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("sfpp_core.encoder.find_ffmpeg", no_ffmpeg)
    numbers = keep_samples((fading(2, to=1.0)[None] * 255).byte(), ["one"], tmp_path / "s.png", seconds=[2])
    assert numbers["2s/luma_drift"] > 0.2
    assert "no sample video: no ffmpeg" in caplog.text
    assert not (tmp_path / "s_2s.mp4").exists()


def no_ffmpeg():
    from sfpp_core.errors import OutputError

    raise OutputError("no ffmpeg here")


def test_lengths_must_be_lengths():
    with pytest.raises(ConfigError, match=r"loop.sample_seconds is \[5, 0\]; give lengths above 0"):
        LoopSettings(out="x", iterations=1, sample_seconds=(5, 0))
