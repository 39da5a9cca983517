"""LoRAs merged here and by core ComfyUI: the same weights, for every layout that core understands."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_lora import KOHYA, LAYOUTS, factors, save, written

from sfpp_core.checkpoint import parameter_shapes
from sfpp_core.config import StudentConfig
from sfpp_core.lora import read_adapter

pytestmark = pytest.mark.host

# Core takes heads of 128 channels and text embeddings of 4096 for granted.
CONFIG = StudentConfig(dim=128, ffn_dim=192, heads=1, layers=2, text_dim=4096)
SHAPES = parameter_shapes(CONFIG)
MODULES = sorted(
    name.removesuffix(".weight")
    for name, shape in SHAPES.items()
    if name.endswith(".weight") and len(shape) > 1
)
# Core reads what a LoRA says of modulations, but does not apply it.
DIFFERENCES = {
    f"diffusion_model.{name}".replace(".weight", ".diff").replace(".bias", ".diff_b"): shape
    for name, shape in SHAPES.items()
    if "modulation" not in name
}


def lora(layout, *, seed=0, dtype=torch.float32):
    """Return random factors for every matrix of the student, in a layout of the other tests."""
    pairs = factors(MODULES, seed=seed, shapes=SHAPES)
    return {name: tensor.to(dtype) for name, tensor in LAYOUTS[layout](pairs).items()}


def named(pairs):
    """Return a LoRA with PEFT's name of the adapter in every name."""
    return written(
        pairs,
        lambda module: f"diffusion_model.{module}",
        down=".lora_A.default.weight",
        up=".lora_B.default.weight",
    )


def flat_convolution():
    """Return the factors of the convolution as matrices."""
    pairs = factors(["patch_embedding"], shapes=SHAPES)
    return {name: (up.flatten(1), down.flatten(1)) for name, (up, down) in pairs.items()}


FILES = {
    "comfyui": lambda: lora("comfyui"),
    "factors of kohya": lambda: lora("comfyui, kohya's factors"),
    "named": lambda: named(factors(MODULES, shapes=SHAPES)),
    "kohya": lambda: lora("kohya", seed=1),
    "kohya half": lambda: lora("kohya", dtype=torch.float16),
    "kohya bfloat16": lambda: lora("kohya", dtype=torch.bfloat16),
    "wan fun": lambda: lora("wan fun"),
    "differences": lambda: {name: torch.randn(shape) for name, shape in DIFFERENCES.items()},
    "flat convolution": lambda: written(flat_convolution(), lambda m: f"diffusion_model.{m}", **KOHYA),
}
JOBS = {name: [(name, 0.7)] for name in FILES}
FILES["modulations"] = lambda: {
    f"diffusion_model.{name}.diff": torch.ones(shape)
    for name, shape in SHAPES.items()
    if "modulation" in name
}
JOBS |= {"none": [], "three": [("comfyui", 0.5), ("kohya", -1.25), ("differences", 2.0)]}


@pytest.fixture(scope="module")
def merged_by_core(tmp_path_factory):
    """Return the folder of the LoRA files and of the weights core makes with them."""
    source, python = (os.environ.get(name) for name in ("SFPP_COMFYUI", "SFPP_COMFYUI_PYTHON"))
    if not source or not python:
        pytest.skip("SFPP_COMFYUI and SFPP_COMFYUI_PYTHON name no ComfyUI")
    folder = tmp_path_factory.mktemp("lora")
    save(folder / "wan.safetensors", tiny.network(CONFIG).state_dict())
    for name, tensors in FILES.items():
        save(folder / f"{name}.safetensors", tensors())
    jobs = {
        str(folder / f"merged {job}"): [
            (str(folder / f"{name}.safetensors"), strength) for name, strength in loras
        ]
        for job, loras in (JOBS | {"modulations": [("modulations", 1.0)]}).items()
    }
    script = Path(__file__).parent / "merge_lora.py"
    command = [python, str(script), str(folder / "wan.safetensors"), json.dumps(jobs)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Core logs what it cannot merge, and goes on.
    assert not [text for text in ("not loaded", "mismatch", "error") if text in done.stderr.lower()]
    return folder


@pytest.mark.parametrize("job", JOBS)
def test_the_weights_are_those_of_core(merged_by_core, job):
    expected = load_file(merged_by_core / f"merged {job}")
    weights = tiny.network(CONFIG).state_dict()
    assert expected.keys() == weights.keys()
    changed = set()
    for name, strength in JOBS[job]:
        adapter = read_adapter(merged_by_core / f"{name}.safetensors", CONFIG, strength=strength)
        weights |= {key: adapter.merged(key, weights[key]) for key in adapter.changed}
        changed |= adapter.changed
    for name, before in tiny.network(CONFIG).state_dict().items():
        error = (weights[name] - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, name
        assert torch.equal(expected[name], before) == (name not in changed), name


def test_core_does_not_apply_what_a_lora_says_of_modulations(merged_by_core):
    expected = load_file(merged_by_core / "merged modulations")
    before = tiny.network(CONFIG).state_dict()
    assert all(torch.equal(expected[name], weight) for name, weight in before.items())
    adapter = read_adapter(merged_by_core / "modulations.safetensors", CONFIG)
    assert torch.equal(
        adapter.merged("head.modulation", before["head.modulation"]), before["head.modulation"] + 1
    )
