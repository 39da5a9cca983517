"""Our decoders against ComfyUI's own, over the same random weights in Wan's own names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

pytestmark = pytest.mark.host

PROGRAM = """
import sys
kind, weights, given, result = sys.argv[1:]
sys.argv[1:] = ["--cpu"]
sys.path.insert(0, ".")
import comfy.options
comfy.options.enable_args_parsing()
import comfy.ldm.wan.vae, comfy.ldm.wan.vae2_2, comfy.latent_formats, comfy.taesd.taehv, comfy.utils, torch
from safetensors.torch import load_file, save_file
tensors, given = load_file(weights), load_file(given)
scale = comfy.latent_formats.Wan22() if kind.endswith("2.2") else comfy.latent_formats.Wan21()
if kind.startswith("tiny"):
    vae = comfy.taesd.taehv.TAEHV(latent_channels=scale.latent_channels, parallel=True)
    wanted = vae.state_dict()
    decoder = {name: tensors[name].float() for name in wanted if name.startswith("decoder.")}
    vae.load_state_dict(wanted | decoder)
    decode = lambda latents: vae.decode(latents)
else:
    module = comfy.ldm.wan.vae2_2 if kind.endswith("2.2") else comfy.ldm.wan.vae
    width = tensors["decoder.head.0.gamma"].shape[0]
    options = {"dec_dim": width} if kind.endswith("2.2") else {}
    vae = module.WanVAE(dim=tensors["encoder.conv1.weight"].shape[0], z_dim=scale.latent_channels,
        dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True], **options)
    vae.load_state_dict(tensors)
    decode = lambda latents: vae.decode(scale.process_out(latents)) / 2 + 0.5
out = {}
with torch.no_grad():
    out["frames"] = decode(given["latents"]).float().contiguous()
    if "pictures" in given:
        out["latents"] = scale.process_in(vae.encode(given["pictures"] * 2 - 1)).float().contiguous()
save_file(out, result)
"""


def in_host(kind, weights, given, folder):
    """Return what ComfyUI makes of ``given``."""
    source, python = (os.environ.get(name) for name in ("SFPP_COMFYUI", "SFPP_COMFYUI_PYTHON"))
    if not source or not python:
        pytest.skip("SFPP_COMFYUI and SFPP_COMFYUI_PYTHON name no ComfyUI")
    save_file(given, folder / "given.safetensors")
    files = [str(folder / name) for name in ("given.safetensors", "result.safetensors")]
    command = [python, "-c", PROGRAM, kind, str(weights), *files]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(files[1])


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", ["2.1", "2.2"])
def test_wans_autoencoder_is_comfyuis(tmp_path, family):
    from wan_files import SMALL_2_1, SMALL_2_2, write_wan

    from sfpp_core.decoder import load_decoder, load_encoder

    sizes = SMALL_2_2 if family == "2.2" else SMALL_2_1
    path = tmp_path / "vae.safetensors"
    write_wan(path, sizes)
    side = 4 * sizes.space.spatial_stride
    latents, pictures = torch.randn(1, sizes.space.channels, 5, 4, 4), torch.rand(1, 3, 9, side, side)
    theirs = in_host(f"wan{family}", path, {"latents": latents, "pictures": pictures}, tmp_path)
    decoder, encoder = load_decoder(path), load_encoder(path)
    frames = torch.cat([decoder.decode(chunk) for chunk in latents.split([1, 3, 1], dim=2)], 1)
    assert distance(frames, theirs["frames"].transpose(1, 2)) < 1e-5
    ours = [encoder.encode(part) for part in pictures.transpose(1, 2).split([1, 8], dim=1)]
    assert distance(torch.cat(ours, 2), theirs["latents"]) < 1e-5


@pytest.mark.parametrize("family", ["2.1", "2.2"])
def test_the_tiny_decoder_is_comfyuis(tmp_path, family):
    from dataclasses import replace

    from wan_files import SMALL_2_1, SMALL_2_2, TINY, write_tiny

    from sfpp_core.decoder import load_decoder

    space = SMALL_2_2.space if family == "2.2" else SMALL_2_1.space
    path = tmp_path / "tiny.safetensors"
    write_tiny(path, replace(TINY, widths=(256, 128, 64, 64), space=space))
    latents = torch.randn(1, space.channels, 5, 4, 4)
    theirs = in_host(f"tiny{family}", path, {"latents": latents}, tmp_path)
    decoder = load_decoder(path)
    frames = torch.cat([decoder.decode(chunk) for chunk in latents.split([1, 3, 1], dim=2)], 1)
    assert distance(frames, theirs["frames"].transpose(1, 2).clamp(0, 1)) < 1e-5
