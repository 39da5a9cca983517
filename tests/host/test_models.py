"""Models from the host's own loaders in the Long Sampler: each computes what its weights say."""

import itertools
import os
from pathlib import Path

import files
import pytest
import torch
from safetensors.torch import load_file
from wan_constants import normalised

from sfpp_core import demo

pytestmark = pytest.mark.host

COUNT = itertools.count()
PROMPT = "a red circle moves right quickly"
GGUF = os.environ.get("SFPP_COMFYUI_GGUF")
"""Folder of the ComfyUI-GGUF pack; its test is skipped without it."""


@pytest.fixture(scope="module")
def words():
    """Return the embeddings of the prompt: the demo's words, as wide as Wan's text."""
    return demo.load().words([PROMPT])


@pytest.fixture(scope="module")
def weights():
    return files.wan()


@pytest.fixture(scope="module")
def folder(host, weights):
    """Return the model folders of the host, with a plain Wan and a LoRA in them."""
    models = host.base / "models"
    files.write(models / "diffusion_models/wan.safetensors", weights)
    files.write(models / "loras/style.safetensors", files.lora(weights))
    return models


def sampling(loader, *changes, seconds=1.0, seed=1):
    """Return a prompt that samples the model of ``loader`` after ``changes`` of it, and saves the latent."""
    prompt = {
        "loader": loader,
        "demo": ("SFPPLoadDemo", {}),
        "text": ("CLIPTextEncode", {"clip": ["demo", 0], "text": PROMPT}),
    }
    model = ["loader", 0]
    for number, (kind, settings) in enumerate(changes):
        prompt[f"change{number}"] = (kind, {"model": model, **settings})
        model = [f"change{number}", 0]
    size = {"width": 64, "height": 64, "seconds": seconds, "video_seed": seed}
    prompt["sampler"] = ("SFPPLongSampler", {"model": model, "conditioning": ["text", 0], **size})
    prompt["save"] = ("SaveLatent", {"samples": ["sampler", 0], "filename_prefix": f"m{next(COUNT)}"})
    return prompt


def core_loader(name, dtype="default"):
    return "UNETLoader", {"unet_name": name, "weight_dtype": dtype}


def latent(host, prompt):
    """Return the normalised latent that the host computes."""
    (path,) = host.files(host.run(prompt), "save")
    return normalised(load_file(path)["latent_tensor"])


def assert_same(seen, expected, tolerance=2e-3):
    torch.testing.assert_close(seen, expected[:, :, : seen.shape[2]], rtol=0, atol=tolerance)


@pytest.mark.parametrize("metadata", [None, files.CAUSAL], ids=["plain", "marked"])
def test_core_loads_a_wan_and_it_computes_what_the_package_computes(host, folder, weights, words, metadata):
    files.write(folder / "diffusion_models/own.safetensors", weights, metadata)
    assert_same(latent(host, sampling(core_loader("own.safetensors"))), files.alone(weights, words))


def test_a_lora_gives_what_weights_with_the_lora_in_them_give(host, folder, weights, words):
    plain = files.alone(weights, words)
    adapter = load_file(folder / "loras/style.safetensors")
    expected = files.alone(files.merged(weights, adapter, 0.7), words)
    assert (expected - plain).abs().max() > 0.05
    change = ("LoraLoaderModelOnly", {"lora_name": "style.safetensors", "strength_model": 0.7})
    assert_same(latent(host, sampling(core_loader("wan.safetensors"), change)), expected)
    assert_same(latent(host, sampling(core_loader("wan.safetensors"))), plain)  # and it leaves no trace


def test_two_loras_add_up(host, folder, weights, words):
    other = files.lora(weights, seed=10)
    files.write(folder / "loras/other.safetensors", other)
    first = files.merged(weights, load_file(folder / "loras/style.safetensors"), 0.5)
    changes = [
        ("LoraLoaderModelOnly", {"lora_name": f"{name}.safetensors", "strength_model": 0.5})
        for name in ("style", "other")
    ]
    seen = latent(host, sampling(core_loader("wan.safetensors"), *changes))
    assert_same(seen, files.alone(files.merged(first, other, 0.5), words))


@pytest.mark.parametrize("where", ["in the loader", "in the file"])
def test_fp8_weights_compute_what_they_hold(host, folder, weights, words, where):
    files.write(folder / "diffusion_models/fp8.safetensors", files.in_fp8(weights))
    name, dtype = ("wan", "fp8_e4m3fn") if where == "in the loader" else ("fp8", "default")
    seen = latent(host, sampling(core_loader(f"{name}.safetensors", dtype)))
    assert_same(seen, files.alone(files.in_fp8(weights), words))


def test_scaled_fp8_weights_compute_what_they_stand_for(host, folder, weights, words):
    stored, meant = files.in_scaled_fp8(weights)
    files.write(folder / "diffusion_models/scaled.safetensors", stored)
    assert_same(latent(host, sampling(core_loader("scaled.safetensors"))), files.alone(meant, words))


def test_a_compiled_model_runs_and_the_user_is_told_that_compiling_has_no_effect(
    host, folder, weights, words
):
    change = ("TorchCompileModel", {"backend": "inductor"})
    seen = latent(host, sampling(core_loader("wan.safetensors"), change))
    assert_same(seen, files.alone(weights, words))
    assert "torch.compile" in host.log


@pytest.mark.skipif(not GGUF, reason="SFPP_COMFYUI_GGUF names no ComfyUI-GGUF")
@pytest.mark.parametrize("strength", [0.0, 0.7], ids=["plain", "lora"])
def test_gguf_weights_compute_what_they_stand_for(gguf_host, weights, words, strength):
    models = gguf_host.base / "models"
    meant = files.write_gguf(models / "diffusion_models/small.gguf", weights)
    adapter = files.lora(weights)
    files.write(models / "loras/style.safetensors", adapter)
    change = ("LoraLoaderModelOnly", {"lora_name": "style.safetensors", "strength_model": strength})
    loader = ("UnetLoaderGGUF", {"unet_name": "small.gguf"})
    seen = latent(gguf_host, sampling(loader, *([change] if strength else [])))
    assert_same(seen, files.alone(files.merged(meant, adapter, strength), words))


@pytest.fixture(scope="module")
def gguf_host(new_host):
    server = new_host()
    (server.base / "custom_nodes/ComfyUI-GGUF").symlink_to(Path(GGUF))
    yield server.start()
    server.stop()
