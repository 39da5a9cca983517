"""Our text path gives what ComfyUI's CLIP gives of the same file.

Core knows one umT5, XXL, with 24 layers; the script beside this test tells it smaller sizes and leaves
the rest to it: telling fp8, loading, the tokenizer in the file, encoding.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import tiny_umt5 as umt5
import torch
from safetensors.torch import load_file

from sfpp_core.text_encoder import load_text_encoder

pytestmark = pytest.mark.host

HERE = Path(__file__).parent
SIZES = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4, "num_layers": 24, "vocab_size": 150}
PROMPTS = [
    "A cat surfs a wave at sunset",
    "",
    "Ein Hund läuft durch den Schnee, 50% off!",
    "the sea is cold and the wind is strong " * 12,
    "日本語 and two   spaces",
]
PACKED = {
    "float32": lambda weights: weights,
    "float16": lambda weights: {name: value.half() for name, value in weights.items()},
    "fp8 old": lambda weights: umt5.fp8(weights, scale="scale_weight", mark="scaled_fp8"),
    "fp8 new": lambda weights: umt5.fp8(weights, scale="weight_scale", mark="comfy_quant"),
}


def by_core(path, prompts, folder):
    """Return core's embeddings of each prompt."""
    source, python = (os.environ.get(name) for name in ("SFPP_COMFYUI", "SFPP_COMFYUI_PYTHON"))
    if not source or not python:
        pytest.skip("SFPP_COMFYUI and SFPP_COMFYUI_PYTHON name no ComfyUI")
    request, target = folder / "request.json", folder / "core.safetensors"
    request.write_text(json.dumps({"sizes": SIZES, "prompts": prompts}))
    command = [python, str(HERE / "encode_text.py"), str(path), str(request), str(target)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = load_file(target)
    return torch.cat([rows[str(number)] for number in range(len(prompts))])


@pytest.mark.parametrize("kind", PACKED)
def test_our_text_is_that_of_comfyui(tmp_path, kind):
    weights = PACKED[kind](umt5.state(umt5.model(**SIZES)))
    path = umt5.write_single(tmp_path / "umt5.safetensors", weights, umt5.sentencepiece_model())
    core = by_core(path, PROMPTS, tmp_path)
    ours = load_text_encoder(path)(PROMPTS)
    assert core.shape == ours.shape == (len(PROMPTS), 512, 64)
    assert torch.equal(core.any(dim=-1), ours.any(dim=-1))
    for number, prompt in enumerate(PROMPTS):
        assert (ours[number] - core[number]).norm() / core[number].norm() < 1e-5, prompt
    assert core[0].std(dim=0).mean() > 0.1
