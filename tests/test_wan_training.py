"""Students of Wan's shape in training: random weights in the real formats, from prompts to a file that loads."""

import json
from dataclasses import replace
from pathlib import Path

import layouts
import pytest
import torch
import wan_commands

from sfpp_core.checkpoint import load_student
from sfpp_core.config import WAN_1_3B, RolloutSettings
from sfpp_core.geometry import VideoGeometry
from training import encode_prompts, train_dmd
from training.config import ConfigError, load
from training.cost import MatchingCost, forward_operations
from training.texts import INDEX, Texts

CONFIGS = Path(__file__).parent.parent / "training" / "configs"
PROMPTS = ["A cat surfs a wave", "two children run", "", "a red ball", "a red  ball"]


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Return a folder of small random models, and prompts encoded in it."""
    folder = wan_commands.write(tmp_path_factory.mktemp("wan"))
    layouts.write(
        folder / "teacher/diffusion_pytorch_model.safetensors", layouts.tensors(wan_commands.CONFIG, seed=1)
    )
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    start(encode_prompts, encode_prompts.EncodeSettings, "wan_prompts", *encoding(folder))
    return folder


def start(stage, kind, name, *overrides):
    """Run one stage with its shipped settings but for ``overrides``."""
    stage.main(load(kind, [str(CONFIGS / f"{name}.toml"), *overrides], stage=name))


def encoding(folder, out="texts"):
    return [
        f"text_encoder={folder / 'umt5.safetensors'}",
        f"prompts={folder / 'prompts.txt'}",
        f"out={folder / out}",
        "device=cpu",
        "at_once=2",
    ]


def small(folder, out, *overrides):
    """Return what makes a shipped configuration small."""
    return [
        f"teacher_run={folder / 'teacher'}",
        f"student_run={folder / 'student.pt'}",
        f"autoencoder={folder / 'Wan2.1_VAE.pth'}",
        f"video.prompts={folder / 'texts'}",
        "video.height=32",
        "video.width=48",
        "video.sheet_prompts=1",
        "video.sheet_seconds=2",
        f"loop.out={out}",
        "loop.tensorboard=false",
        "loop.device=cpu",
        "loop.effective_batch=2",
        "rollout.window=6",
        "segment=6",
        *overrides,
    ]


def dmd(name, *overrides):
    start(train_dmd, train_dmd.DmdSettings, name, *overrides)


def test_extended_matching_trains_wan_from_files_and_prompts(wan, tmp_path):
    sizes = ["horizon=15", "loop.iterations=20", "every=2", "loop.effective_batch=1"]
    dmd("wan_1_3b_8gpu", *small(wan, tmp_path, *sizes))
    (line, *_) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert line["iteration"] == 20
    assert line["seconds"] > 0
    assert line["peak_gigabytes"] > 0
    assert (tmp_path / "sample_000020.png").exists()
    print(line)
