"""A folder of files as Wan's users have them, small and random, and commands that use them."""

from dataclasses import replace

import layouts
import tiny_umt5
import torch
import wan_files
from PIL import Image

from sfpp_core.pictures import read_clip

CONFIG = replace(layouts.CONFIG, text_dim=tiny_umt5.SIZES["d_model"])
PROMPT = "A cat surfs a wave at sunset"


def write(folder):
    """Write a student, an autoencoder, a tiny decoder, a text encoder, a LoRA and a picture."""
    state = layouts.tensors(CONFIG)
    layouts.write_pickle(folder / "student.pt", {"generator": layouts.prefixed(state, "model.")})
    wan_files.write_wan(folder / "Wan2.1_VAE.pth", wan_files.SMALL_2_1)
    wan_files.write_tiny(folder / "taew2_1.safetensors")
    weights = tiny_umt5.state(tiny_umt5.model())
    tiny_umt5.write_single(folder / "umt5.safetensors", weights, tiny_umt5.sentencepiece_model())
    down, up = torch.randn(4, 128), torch.randn(128, 4)
    name = "diffusion_model.blocks.0.self_attn.q"
    layouts.write(folder / "lora.safetensors", {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
    Image.new("RGB", (80, 60), (200, 40, 40)).save(folder / "start.png")
    return folder


def words(wan, out, *more, seconds="1", size="32", decoder="Wan2.1_VAE.pth"):
    """Return the words of a command that makes a small video."""
    models = ("--student", wan / "student.pt", "--text-encoder", wan / "umt5.safetensors")
    if decoder:
        models += ("--decoder", decoder if decoder == "preview" else wan / decoder)
    shape = ("--seconds", seconds, "--width", size, "--height", size, "--enlarge", "1", "--window", "9")
    return [str(word) for word in ("generate", PROMPT, "--out", out, *models, *shape, *more)]


def frames(path, count):
    """Return the last frames of a video."""
    return read_clip(path, width=32, height=32, frames=count)
