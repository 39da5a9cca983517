"""What a stage of Wan reads is there before anything is loaded."""

import logging
from pathlib import Path

import pytest

from training import train_dmd
from training.config import ConfigError, load
from training.inputs import open_texts
from training.models import VideoSettings

CONFIGS = Path(__file__).parent.parent / "training" / "configs"
WAN = VideoSettings(prompts="nowhere/prompts")


@pytest.fixture
def files(tmp_path):
    """Settings that name a checkpoint, a run of several ranks, and words that need no file."""
    (tmp_path / "teacher.safetensors").touch()
    (tmp_path / "run" / "last-000002").mkdir(parents=True)
    return {
        "teacher_run": str(tmp_path / "teacher.safetensors"),
        "student_run": str(tmp_path / "run" / "last.pt"),
        "critic_run": "wan-1.3b",
        "autoencoder": "preview",
        "latents": "",
    }


def test_all_missing_files_are_named_at_once(files, tmp_path):
    absent = {"autoencoder": "Wan2.1_VAE.pth", "student_run": str(tmp_path / "other" / "last.pt")}
    with pytest.raises(ConfigError) as told:
        open_texts(WAN, files | absent, loras=["style.safetensors:0.5"])
    text = str(told.value)
    assert "autoencoder Wan2.1_VAE.pth" in text
    assert f"student_run {absent['student_run']}" in text
    assert "LoRA 0 style.safetensors" in text
    assert "teacher" not in text


def test_what_is_there_leads_to_the_prompts(files):
    with pytest.raises(ConfigError, match="nowhere/prompts holds no embeddings"):
        open_texts(WAN, files)


def test_a_dry_run_tells_what_a_run_would_miss(files, caplog):
    with caplog.at_level(logging.INFO):
        assert open_texts(WAN, files, dry_run=True) is None
    assert caplog.messages == ["a run would miss video.prompts nowhere/prompts"]


def test_the_demo_needs_none_of_it():
    assert open_texts(VideoSettings(), {"autoencoder": "nowhere"}) is None


def test_a_stage_refuses_before_it_loads_a_model(monkeypatch):
    monkeypatch.setattr(train_dmd, "load_role", lambda *_, **__: pytest.fail("a model was loaded"))
    words = [str(CONFIGS / "wan_1_3b_1gpu.toml"), "teacher_run=wan-1.3b", "student_run=wan-1.3b"]
    settings = load(train_dmd.DmdSettings, [*words, "loop.device=cpu"], stage="train_dmd")
    with pytest.raises(ConfigError, match=r"autoencoder models/.*: not there"):
        train_dmd.main(settings)
