"""Measuring students: streamed as well as whole, and from where an earlier measurement ended."""

from dataclasses import replace

import pytest
import torch
from tiny_runs import write_run

from sfpp_core.anchor import ANCHOR_CHUNKS
from sfpp_core.config import RolloutSettings
from sfpp_core.errors import SettingsError
from sfpp_core.tiny_autoencoder import AutoencoderConfig, TinyAutoencoder
from training import evaluate
from training.measuring import Roller, picks, whole_seconds
from training.world_metrics import measure


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Return the folder of a student's run and of a decoder."""
    folder = tmp_path_factory.mktemp("given")
    write_run(folder / "last.pt", done=1, seconds=1.0, recipe={})
    decoder = TinyAutoencoder(AutoencoderConfig(coarse=16, fine=16, mask=8, units=1))
    decoder.save(folder / "autoencoder.safetensors")
    return folder


def test_streaming_measures_what_the_whole_video_would(given):
    roller = Roller(
        str(given / "last.pt"),
        str(given / "autoencoder.safetensors"),
        RolloutSettings(steps=1),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    captions = ["a red circle moves right slowly", "a blue square moves up fast"]
    with torch.inference_mode():
        videos = torch.cat(list(roller._decoded(captions, 5, 50)), dim=1)
    assert videos.shape[:2] == (2, 50)
    measured = roller.measure(captions, seed=5, frames=50)
    for video, text, seconds, strip in zip(videos, captions, measured.seconds, measured.strips, strict=True):
        assert repr(measure(video, text)) == repr(seconds)  # nan equals itself here
        shown = (video[picks(50)].clamp(0, 1) * 255).round().byte()
        torch.testing.assert_close(strip, shown, rtol=0, atol=0)


def test_an_anchor_holds_what_is_measured(given, tmp_path):
    """What drifts is pulled back, but nothing before the anchor has learnt its target."""
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    files = str(given / "last.pt"), str(given / "autoencoder.safetensors"), RolloutSettings(steps=1)
    frames, first = 150, 1 + 4 * (3 * ANCHOR_CHUNKS - 1)
    with torch.inference_mode():
        free, held = (
            torch.cat(list(Roller(*files, **options, anchor=anchor)._decoded(["a red circle"], 5, frames)), 1)
            for anchor in (0.0, 0.5)
        )
    torch.testing.assert_close(free[:, :first], held[:, :first], rtol=0, atol=0)
    assert not torch.equal(free[:, first:], held[:, first:])
    settings = evaluate.EvaluateSettings(out=str(tmp_path))
    assert "anchor" not in evaluate.recipe_of(settings)
    assert evaluate.recipe_of(replace(settings, anchor=0.2))["anchor"] == "0.2"
    with pytest.raises(SettingsError, match="anchor is 2; use 0"):
        replace(settings, anchor=2.0)


def test_seconds_are_cut_from_parts_without_waiting_for_the_end():
    taken, video = [], torch.arange(50.0)[None, :, None, None, None]

    def parts():
        for part in video.split((9, 12, 12, 12, 5), dim=1):
            taken.append(part)
            yield part

    seconds = whole_seconds(parts())
    first = next(seconds)
    assert len(taken) == 2
    torch.testing.assert_close(torch.cat([first, *seconds], dim=1), video[:, :48], rtol=0, atol=0)


def test_a_measurement_goes_on_with_the_next_batch(given, tmp_path, monkeypatch):
    settings = evaluate.EvaluateSettings(
        out=str(tmp_path),
        student=str(given / "last.pt"),
        autoencoder=str(given / "autoencoder.safetensors"),
        prompts=3,
        batch=2,
        horizons=(1,),
        rollout=RolloutSettings(steps=1),
    )
    evaluate.main(settings)
    whole = (tmp_path / "seconds.json").read_text()
    (tmp_path / "videos" / "videos_00001.json").unlink()
    made, plain = [], Roller.measure

    def counted(self, captions, **options):
        made.append(len(captions))
        return plain(self, captions, **options)

    monkeypatch.setattr(Roller, "measure", counted)
    evaluate.main(settings)
    assert made == [1]
    assert (tmp_path / "seconds.json").read_text() == whole
    evaluate.main(replace(settings, seed=3))
    assert made == [1, 2, 1]
