"""Models from the host's own loaders in the Long Sampler: each computes what its weights say."""

import os
from pathlib import Path

import files
import pytest
import torch
from prompts import PROMPT, core_loader, sampling, saving
from safetensors.torch import load_file
from wan_constants import normalised

from sfpp_core import demo

pytestmark = pytest.mark.host

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


def latent(host, prompt):
    """Return the normalised latent that the host computes."""
    (path,) = host.files(host.run(prompt | saving()), "save")
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
    assert (seen - files.alone(weights, words)[:, :, : seen.shape[2]]).abs().max() > 0.02


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
    assert "Without effect in the Long Sampler: torch.compile on the MODEL." in host.log


def test_a_model_that_does_not_say_it_is_causal_is_named_and_a_marked_one_is_not(host, folder, weights):
    warning = "does not say that it was trained to generate chunk by chunk"
    files.write(folder / "diffusion_models/marked.safetensors", weights, files.CAUSAL)
    before = host.log.count(warning)
    host.run(sampling(("SFPPLoadStudent", {"student": "marked.safetensors"}), seed=31) | saving())
    assert host.log.count(warning) == before
    host.run(sampling(core_loader("wan.safetensors"), seed=31) | saving())
    assert host.log.count(warning) == before + 1


LAYOUTS = {
    "self-forcing.pt": lambda weights: {
        "generator": {f"model.{name}": -tensor for name, tensor in weights.items()},
        "generator_ema": {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in weights.items()},
    },
    "bare.pt": lambda weights: dict(weights),
    "prefixed.safetensors": lambda weights: {f"diffusion_model.{name}": weights[name] for name in weights},
    "scaled-prefixed.safetensors": lambda weights: {
        f"diffusion_model.{name}": tensor for name, tensor in files.in_scaled_fp8(weights)[0].items()
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_load_student_gives_core_what_core_cannot_read(host, folder, weights, words, name):
    path, stored = folder / "diffusion_models" / name, LAYOUTS[name](weights)
    torch.save(stored, path) if path.suffix == ".pt" else files.write(path, stored)
    adapter = load_file(folder / "loras/style.safetensors")
    change = ("LoraLoaderModelOnly", {"lora_name": "style.safetensors", "strength_model": 0.7})
    seen = latent(host, sampling(("SFPPLoadStudent", {"student": name}), change))
    meant = files.in_scaled_fp8(weights)[1] if "scaled" in name else weights
    # Scaled weights reach core as bfloat16, and a LoRA is added to those.
    tolerance = 0.1 if "scaled" in name else 2e-3
    assert_same(seen, files.alone(files.merged(meant, adapter, 0.7), words), tolerance)


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
