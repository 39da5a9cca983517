"""Our files in core ComfyUI, and core's in ours; no server, only its loader and its sampler."""

import json
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import layouts
import pytest
import tiny
import torch
from ranked import Recipe
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sfpp_core import demo
from sfpp_core.checkpoint import load_student, save
from sfpp_core.config import RolloutSettings
from sfpp_core.geometry import VideoGeometry
from sfpp_core.kv_cache import CacheShape, RollingKVCache
from sfpp_core.rollout import rollout
from sfpp_core.schedule import FewStepSchedule
from sfpp_core.student import CausalStudent
from training import export
from training.adapters import LoraSettings, export_adapters
from training.export import ExportSettings
from training.loop import LoopSettings, Loss, OptimiserSettings, Trained, descend, run
from training.state import read_averaged
from training.teacher import DemoModel

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

    def script(name, *arguments):
        words = [python, Path(__file__).parent / name, *arguments]
        done = subprocess.run(words, cwd=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    def run(*arguments):
        script("sample_ar.py", *arguments)

    run.script = script
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


def rolled_out_alike(core, model, folder, *, tolerance):
    """Check that core takes the file ``model`` for a causal model and rolls it out as the package does."""
    network, config, settings = load_student(model, dtype=torch.float32)
    given, out = folder / "given.safetensors", folder / "out.safetensors"
    noise, text = tiny.latents(3, size=(8, 10)), torch.zeros(1, config.text_length, config.text_dim)
    text[:, :5] = tiny.text(replace(config, text_length=5))
    save_file({"noise": noise, "text": text, "sigmas": torch.tensor([*SIGMAS, 0.0])}, given)
    core(model, given, out, "3")
    with safe_open(out, "pt") as file:
        kind, seen = file.metadata()["class"], file.get_tensor("samples")
    if not core.causal:
        assert kind == "WanModel"  # loads it, knows no causal models
        return
    assert kind == "CausalWanModel"

    geometry = VideoGeometry(height=64, width=80, frames=33, chunk=3)
    like = noise[:, :, :3]
    cache = RollingKVCache(CacheShape.of(config, geometry, settings), batch=1, like=like)
    student = CausalStudent(network, config).bind(text)
    with torch.no_grad():
        schedule = FewStepSchedule(SIGMAS)
        chunks = rollout(student, CoreNoise(noise), schedule, cache, chunks=3, like=like)
        expected = torch.cat(list(chunks), dim=2)
    assert float((seen - expected).norm() / expected.norm()) < tolerance
    assert float((seen - noise).norm() / noise.norm()) > 0.01


def test_core_rolls_our_student_out_as_we_do(core, tmp_path):
    model = tmp_path / "model.safetensors"
    save(model, layouts.tensors(CONFIG), CONFIG, SETTINGS, stage="dmd")
    rolled_out_alike(core, model, tmp_path, tolerance=1e-5)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentRecipe(Recipe):
    """Settings of a run that trains a student, which say how it is rolled out."""

    rollout: RolloutSettings = SETTINGS


def trained(out, optimiser):
    """Train a model of Wan's names for three updates and leave its run in ``out``."""
    model = DemoModel(CONFIG)
    torch.nn.init.normal_(model.network.head.head.weight, std=0.1)
    part = Trained(model, optimiser, updates=3)
    noisy = tiny.latents(1, size=(4, 4))

    def step(iteration):
        velocity = model.bind(["a red circle moves up"]).whole(noisy, torch.full((1, 1), 0.5))
        return descend(part, [Loss((velocity - 1).square().mean())], iteration, count=1)

    loop = LoopSettings(out=str(out), iterations=3, device="cpu", tensorboard=False)
    recipe = StudentRecipe(loop=loop, optimiser=optimiser)
    run(loop, {"model": part}, step, lambda path: None, recipe=recipe)
    return part


def test_core_rolls_a_student_out_that_was_trained_and_exported(core, tmp_path):
    trained(tmp_path / "run", OptimiserSettings(lr=1e-3, warmup=1))
    export.main(ExportSettings(run=str(tmp_path / "run"), stage="test", out=str(tmp_path / "demo")))
    # Of a file in half precision core computes in float32 what the package does.
    rolled_out_alike(core, tmp_path / "demo" / demo.STUDENT, tmp_path, tolerance=1e-3)


def test_core_merges_adapters_that_were_trained_and_exported_as_peft_does(core, tmp_path):
    lora = LoraSettings(rank=2, alpha=4.0)
    part = trained(tmp_path / "run", OptimiserSettings(lr=0.05, warmup=1, lora=lora))
    adapter, base, merged = (tmp_path / f"{name}.safetensors" for name in ("adapter", "base", "merged"))
    export_adapters(read_averaged(tmp_path / "run" / "last.pt"), adapter, lora, dtype=torch.float32)
    before = {
        name.replace(".base_layer", ""): weight.clone()
        for name, weight in part.averaged.network.state_dict().items()
        if ".lora_" not in name
    }
    layouts.write(base, before)
    core.script("merge_lora.py", base, json.dumps({str(merged): [[str(adapter), 0.5]]}))
    seen, changed = load_file(merged), set()
    for name, module in part.averaged.network.named_modules():
        if hasattr(module, "base_layer"):
            name, expected = (
                f"{name}.weight",
                module.base_layer.weight + 0.5 * module.get_delta_weight("default"),
            )
            torch.testing.assert_close(seen[name], expected, rtol=1e-4, atol=1e-6)
            assert (seen[name] - before[name]).abs().max() > 1e-3
            changed.add(name)
    assert len(changed) == 10 * CONFIG.layers
    assert all(torch.equal(seen[name], before[name]) for name in before.keys() - changed)


def test_core_knows_no_causal_model_without_the_mark(core, tmp_path):
    model, given, out = (tmp_path / f"{name}.safetensors" for name in ("model", "given", "out"))
    layouts.write(model, layouts.tensors(CONFIG))
    save_file({"noise": torch.zeros(1)}, given)
    core(model, given, out, "3")
    with safe_open(out, "pt") as file:
        assert file.metadata()["class"] == "WanModel"
