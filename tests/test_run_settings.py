"""Drift controls and run settings of the Long Sampler: what they decide, and how a run goes on with them."""

import json
from types import SimpleNamespace

import pack
import pytest
import torch
from test_kept_generation import CHUNKS, model, queued, read, sampling

drift_controls = pack.module("nodes.drift_controls")
run_settings = pack.module("nodes.run_settings")
anchor = pack.module("sfpp_core.anchor")
redecode = pack.module("sfpp_core.redecode")
host = pack.module("nodes._host")
progress = pack.module("nodes.progress")


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """Return the host's output folder."""
    monkeypatch.setattr(host, "output_root", lambda: tmp_path, raising=False)
    monkeypatch.setattr(sampling.SFPPLongSampler, "hidden", SimpleNamespace(unique_id="1"))
    return tmp_path


LONG = 16.0
"""Seconds: 22 chunks, more than two windows of two beside the anchor's seven."""


def controls(anchor=0.0, context_sigma=0.0):
    """Return what the node hands on."""
    return drift_controls.SFPPDriftControls.execute(anchor, context_sigma).values[0]


def settings(replay="all", keep_cache=0):
    """Return what the node hands on."""
    return run_settings.SFPPRunSettings.execute(replay, keep_cache).values[0]


def manifest(output):
    return json.loads((output / "runs/a/manifest.json").read_text())


def test_off_they_change_nothing_and_are_not_written_down(output):
    expected = queued("")["samples"]
    assert torch.equal(queued("", drift=controls())["samples"], expected)
    assert torch.equal(queued(drift=controls(), run_settings=settings())["samples"], expected)
    assert not {"anchor", "context sigma"} & manifest(output)["sections"][0]["decisions"].keys()
    assert torch.equal(queued()["samples"], expected)


def test_the_anchor_holds_the_statistics_from_the_eighth_chunk_on():
    free = queued("", seconds=LONG)["samples"]
    held = queued("", seconds=LONG, drift=controls(anchor=1.0))["samples"]
    learnt = 3 * anchor.ANCHOR_CHUNKS
    assert torch.equal(held[:, :, :learnt], free[:, :, :learnt])
    target = anchor.LatentStatistics.of(host.from_host_latent(held[:, :, :learnt]))
    *whole_chunks, _ = host.from_host_latent(held[:, :, learnt:]).split(3, dim=2)
    for chunk in whole_chunks:
        seen = anchor.LatentStatistics.of(chunk)
        torch.testing.assert_close(seen.mean, target.mean, rtol=0, atol=1e-4)
        torch.testing.assert_close(seen.std, target.std, rtol=0, atol=1e-4)


@pytest.mark.parametrize("chosen", [{"anchor": 0.4}, {"context_sigma": 0.1}])
def test_a_run_under_controls_goes_on_exactly_and_is_refused_under_others(output, chosen):
    drift = controls(**chosen)
    whole = queued("", seconds=LONG, drift=drift)["samples"]
    assert not torch.equal(whole, queued("", seconds=LONG)["samples"])
    read(queued(seconds=LONG, drift=drift), 11)
    for other in (None, controls(**{name: value / 2 for name, value in chosen.items()})):
        ((name, value),) = drift.table().items()
        with pytest.raises(ValueError, match=f"{name} was {value:g} and is"):
            queued(seconds=LONG, **({} if other is None else {"drift": other}))
    assert torch.equal(queued(seconds=LONG, drift=drift)["samples"], whole)
    assert manifest(output)["sections"][0]["decisions"].items() >= drift.table().items()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ((1.5, 0.0), "the strength of the anchor is 1.5; use 0"),
        ((-0.1, 0.0), "the strength of the anchor is -0.1"),
        ((0.0, 1.0), "context_sigma is 1; it must be from 0 to below 1"),
    ],
)
def test_controls_that_cannot_be_are_refused_as_on_the_command_line(chosen, message):
    with pytest.raises(ValueError, match=message):
        controls(*chosen)


@pytest.mark.parametrize(
    ("chosen", "how", "exact"),
    [
        ({}, "all", True),
        ({"replay": "auto"}, "all", True),
        ({"replay": "window"}, "window", False),
        ({"keep_cache": 1}, "cache", True),
        ({"keep_cache": 100}, "cache", True),
    ],
)
def test_a_run_goes_on_as_it_is_told(output, chosen, how, exact):
    whole = queued("", seconds=LONG)["samples"]
    read(queued(seconds=LONG, run_settings=settings(**chosen)), 12)
    assert (output / "runs/a/cache.safetensors").exists() == ("keep_cache" in chosen)
    seen = queued(seconds=LONG, run_settings=settings(**chosen))["samples"]
    torch.testing.assert_close(seen, whole, rtol=0, atol=0 if exact else 0.5)
    (resume,) = manifest(output)["resumes"]
    assert (resume["how"], resume["exact"], resume["chunk"]) == (how, exact, 12)
    if how == "cache":
        assert resume["replayed"] <= 1


def test_settings_without_a_run_are_named(caplog):
    queued("", run_settings=settings(keep_cache=3))
    assert sampling.SETTINGS_WITHOUT_RUN in caplog.text
    assert pack.SAID[-1].startswith(sampling.SETTINGS_WITHOUT_RUN)


@pytest.mark.parametrize("name", ["", "runs/a"])
def test_the_user_is_told_which_chunk_is_replayed(monkeypatch, name):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_UPDATES", 0.0)
    latent = queued(name)
    read(latent, 4)
    pack.SAID.clear()
    assert latent["samples"].shape[2] == 3 * CHUNKS
    told = [text for text in pack.SAID if text.startswith("replaying")]
    assert told == [
        f"replaying chunk {chunk} of 4{' of run runs/a' if name else ''}" for chunk in (1, 2, 3, 4)
    ]


def test_a_run_of_the_demo_says_so_and_any_other_that_it_is_of_wan(output):
    read(queued(), 1)
    assert manifest(output)["space"] == "demo"
    loaded = model()
    loaded.settings = type(loaded.settings)(rollout=loaded.settings.rollout)
    assert loaded.settings.text_length == 512
    read(queued("runs/b", student=loaded), 1)
    assert json.loads((output / "runs/b/manifest.json").read_text())["space"] == "wan2.1"
    host_made = SimpleNamespace(out=str(output / "again.mp4"), device=torch.device("cpu"))
    job = redecode.plan_redecoding(output / "runs/a", decoder=None, **vars(host_made))
    assert job.decoder == pack.module("sfpp_core.demo").file("autoencoder.safetensors")
    with pytest.raises(ValueError, match=r"holds latents of wan2\.1; name their decoder"):
        redecode.plan_redecoding(output / "runs/b", decoder=None, **vars(host_made))


def test_the_numbers_in_the_help_pages_are_right():
    pages = {path.stem: path.read_text() for path in (pack.ROOT / "nodes/web/docs").glob("*.md")}
    going_on = pack.module("sfpp_core.run.going_on")
    assert anchor.ANCHOR_CHUNKS == 7
    assert "those of the first seven chunks, five seconds" in pages["SFPPDriftControls"]
    assert (going_on.AUTO_WINDOWS, going_on.REPLAYED_WINDOWS) == (8, 2)
    assert "up to 8 windows (42 s of Wan 2.1)" in pages["SFPPRunSettings"]
    assert 8 * pack.module("sfpp_core.config").RolloutSettings().window * 4 == 42 * 16
    assert "the passes of two windows" in pages["SFPPRunSettings"]
    assert progress.SECONDS_BETWEEN_PREVIEWS == 0.75
    assert "every three quarters of a second" in pages["SFPPLongSampler"]
