"""Our files in core ComfyUI, and core's in ours; no server, only its loader and its sampler."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import layouts
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sfpp_core.checkpoint import load_student, save
from sfpp_core.config import RolloutSettings
from sfpp_core.geometry import VideoGeometry
from sfpp_core.kv_cache import CacheShape, RollingKVCache
from sfpp_core.rollout import rollout
from sfpp_core.schedule import FewStepSchedule
from sfpp_core.student import CausalStudent

pytestmark = pytest.mark.host

CONFIG = replace(layouts.CONFIG, dim=256, heads=2, text_dim=4096)
SETTINGS = RolloutSettings(chunk=3, window=9)
SIGMAS = (1.0, 0.9375, 0.625)
SEED = 5


@pytest.fixture(scope="module")
def core():
    """Return a function that runs a script of this folder in ComfyUI."""
    source, python = (os.environ.get(name) for name in ("SFPP_COMFYUI", "SFPP_COMFYUI_PYTHON"))
    if not source or not python:
        pytest.skip("SFPP_COMFYUI and SFPP_COMFYUI_PYTHON name no ComfyUI")

    def run(*arguments):
        script = Path(__file__).parent / "sample_ar.py"
        done = subprocess.run([python, script, *arguments], cwd=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    run.causal = (Path(source) / "comfy_extras" / "nodes_ar_video.py").exists()
    return run


class CoreNoise:
    """Noise as core's sampler draws it, for a rollout of ours."""

    def __init__(self, noise):
        self.noise = noise

    def draw(self, shape, *, chunk, step, like):
        if step == 0:
            return self.noise[:, :, chunk * shape[2] : (chunk + 1) * shape[2]]
        torch.manual_seed(SEED + chunk * 1000 + step - 1)
        return torch.randn(shape)


def test_core_rolls_our_student_out_as_we_do(core, tmp_path):
    model, given, out = (tmp_path / f"{name}.safetensors" for name in ("model", "given", "out"))
    save(model, layouts.tensors(CONFIG), CONFIG, SETTINGS, stage="dmd")
    noise, text = tiny.latents(3, size=(8, 10)), torch.zeros(1, CONFIG.text_length, CONFIG.text_dim)
    text[:, :5] = tiny.text(replace(CONFIG, text_length=5))
    save_file({"noise": noise, "text": text, "sigmas": torch.tensor([*SIGMAS, 0.0])}, given)
    core(model, given, out, "3")
    with safe_open(out, "pt") as file:
        kind, seen = file.metadata()["class"], file.get_tensor("samples")
    if not core.causal:
        assert kind == "WanModel"  # loads it, knows no causal models
        return
    assert kind == "CausalWanModel"

    network, config, settings = load_student(model, dtype=torch.float32)
    geometry = VideoGeometry(height=64, width=80, frames=33, chunk=3)
    like = noise[:, :, :3]
    cache = RollingKVCache(CacheShape.of(config, geometry, settings), batch=1, like=like)
    student = CausalStudent(network, config).bind(text)
    with torch.no_grad():
        schedule = FewStepSchedule(SIGMAS)
        chunks = rollout(student, CoreNoise(noise), schedule, cache, chunks=3, like=like)
        expected = torch.cat(list(chunks), dim=2)
    assert float((seen - expected).norm() / expected.norm()) < 1e-5
    assert float((seen - noise).norm() / noise.norm()) > 0.01


def test_core_knows_no_causal_model_without_the_mark(core, tmp_path):
    model, given, out = (tmp_path / f"{name}.safetensors" for name in ("model", "given", "out"))
    layouts.write(model, layouts.tensors(CONFIG))
    save_file({"noise": torch.zeros(1)}, given)
    core(model, given, out, "3")
    with safe_open(out, "pt") as file:
        assert file.metadata()["class"] == "WanModel"
