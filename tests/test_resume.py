"""A run that was killed and started again makes the same weights, bit for bit: every stage."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stage_runs import ROOT, STAGES, PowerFailureError, begin

TRAINED = [name for name in STAGES if name != "pairs"]


@pytest.fixture(scope="module")
def smoked(tmp_path_factory):
    """A folder in which every stage was run with --smoke, one after the other, most without samples."""
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.chdir(folder), contextlib.redirect_stderr(io.StringIO()):
        for name in STAGES:
            sampled = name in ("autoencoder", "teacher", "causal", "pairs", "grpo")
            begin(name, *([] if sampled else ["loop.sample_every=1000"]))
    return folder


@pytest.fixture
def place(smoked, monkeypatch):
    monkeypatch.chdir(smoked)
    return smoked


def options(out):
    return [f"loop.out={out}", "loop.iterations=10", "loop.save_seconds=0", "loop.sample_every=1000"]


def compare(one, other):
    """Check that two runs ended in the same state: weights, averages, optimisers."""
    a, b = (torch.load(Path(out) / "last.pt", weights_only=True) for out in (one, other))
    for state in (a, b):
        assert state["done"] == 10
        del state["seconds"]
    assert a["recipe"] == b["recipe"]
    assert same(a, b)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_smoke_runs_every_stage_after_the_other_in_folders_of_their_own(smoked):
    assert sorted(path.name for path in (smoked / "runs").iterdir()) == ["smoke"]
    runs = {path.name for path in (smoked / "runs/smoke").iterdir()}
    trained = {"autoencoder", "teacher", "causal", "ode", "self_forcing", "streaming", "grpo"}
    assert runs == trained | {"latents.safetensors", "pairs"}
    for name in trained:
        assert torch.load(smoked / "runs/smoke" / name / "last.pt", weights_only=True)["done"] == 3
    assert (smoked / "runs/smoke/teacher/sample_000003.png").exists()
    assert (smoked / "runs/smoke/autoencoder/autoencoder.safetensors").exists()
    for name in ("causal", "grpo"):
        videos = {path.name for path in (smoked / "runs/smoke" / name).glob("*.mp4")}
        assert {path.rpartition("_")[2] for path in videos} == {"1s.mp4", "2s.mp4"}
        *_, last = (smoked / "runs/smoke" / name / "log.jsonl").read_text().splitlines()
        assert json.loads(last)["2s/luma_drift"] >= 0


@pytest.mark.parametrize("name", TRAINED)
def test_ten_updates_equal_four_and_six_after_a_power_failure(place, name):
    begin(name, *options(f"{name}_whole"))
    with pytest.raises(PowerFailureError):
        begin(name, *options(f"{name}_cut"), until=4)
    assert torch.load(f"{name}_cut/last.pt", weights_only=True)["done"] == 4
    begin(name, *options(f"{name}_cut"))
    compare(f"{name}_whole", f"{name}_cut")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_ten_updates_equal_four_and_six_after_a_real_kill(place, name):
    begin(name, *options(f"{name}_unharmed"))
    runs = json.dumps([[name, 4, options(f"{name}_killed")]])
    words = [sys.executable, str(ROOT / "tests" / "stage_runs.py"), runs]
    place_of_modules = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    killed = subprocess.run(words, env={**os.environ, "PYTHONPATH": place_of_modules}, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    begin(name, *options(f"{name}_killed"))
    compare(f"{name}_unharmed", f"{name}_killed")
