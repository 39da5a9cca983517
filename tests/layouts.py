"""Random weights of a small Wan transformer, in the layouts such models have in the wild."""

import json
import re

import tiny
import torch

from sfpp_core import weights_file
from sfpp_core.config import StudentConfig

CONFIG = StudentConfig(dim=128, ffn_dim=64, heads=1, layers=2, text_dim=20)
"""Small, but with the head dim that files without metadata imply."""

DIFFUSERS = {
    "time_embedding.0.": "condition_embedder.time_embedder.linear_1.",
    "time_embedding.2.": "condition_embedder.time_embedder.linear_2.",
    "text_embedding.0.": "condition_embedder.text_embedder.linear_1.",
    "text_embedding.2.": "condition_embedder.text_embedder.linear_2.",
    "time_projection.1.": "condition_embedder.time_proj.",
    "head.modulation": "scale_shift_table",
    "head.head.": "proj_out.",
    ".modulation": ".scale_shift_table",
    ".norm3.": ".norm2.",
    ".ffn.0.": ".ffn.net.0.proj.",
    ".ffn.2.": ".ffn.net.2.",
    ".self_attn.": ".attn1.",
    ".cross_attn.": ".attn2.",
    ".q.": ".to_q.",
    ".k.": ".to_k.",
    ".v.": ".to_v.",
    ".o.": ".to_out.0.",
}
"""What the names of Wan become in diffusers, part by part."""


def tensors(config=CONFIG, *, seed=0, dtype=torch.float32):
    """Return random weights under Wan's names."""
    return tiny.network(config, seed=seed, dtype=dtype).state_dict()


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def wrapped(state):
    """Return the names as sharding, recomputation and compiling leave them."""
    return {
        "model._fsdp_wrapped_module."
        + re.sub(
            r"^(blocks\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod.", name
        ): t
        for name, t in state.items()
    }


def in_diffusers(state):
    """Return the state in the names of diffusers."""
    renamed = {}
    for name, tensor in state.items():
        for wans, theirs in DIFFUSERS.items():
            name = name.replace(wans, theirs)
        renamed[name] = tensor
    return renamed


def layers_of(state):
    """Return the names of the linear layers inside the transformer layers."""
    return [
        name.removesuffix(".weight")
        for name, t in state.items()
        if name.startswith("blocks.") and name.endswith("weight") and t.ndim == 2
    ]


def quantised(state, *, dtype=torch.float8_e4m3fn, scale="scale_weight", per_row=False):
    """Return the state with fp8 layers and their scales, and what it means in float32."""
    kept, meant = dict(state), {name: tensor.float() for name, tensor in state.items()}
    for layer in layers_of(state):
        weight = state[f"{layer}.weight"].float()
        largest = weight.abs().amax(1) if per_row else weight.abs().amax()
        factor = largest / 400.0
        rows = factor[:, None] if per_row else factor
        kept[f"{layer}.weight"] = (weight / rows).to(dtype)
        kept[f"{layer}.{scale}"] = factor
        meant[f"{layer}.weight"] = kept[f"{layer}.weight"].float() * rows
    return kept, meant


def old_fp8(state):
    """Return the layout of ComfyUI's first fp8 files: a marker, scales of weights and of inputs."""
    kept, meant = quantised(state)
    inputs = {f"{layer}.scale_input": torch.ones(()) for layer in layers_of(state)}
    return {**kept, **inputs, "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, meant


def new_fp8(state):
    """Return the layout of ComfyUI's later fp8 files: each layer says how it is kept."""
    kept, meant = quantised(state, scale="weight_scale")
    told = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    for layer in layers_of(state):
        kept |= {f"{layer}.comfy_quant": told.clone(), f"{layer}.input_scale": torch.ones(())}
    return kept, meant


def write(path, state, metadata=None):
    """Write a safetensors file of any dtype, as others do."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in state.items()}, path, metadata or {"format": "pt"})
    return path


def write_shards(
    folder, state, *, shards=3, stem="diffusion_pytorch_model", save=write, suffix="safetensors"
):
    """Write a state in several files and an index; return the path of the index."""
    folder.mkdir(parents=True, exist_ok=True)
    place = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05}-of-{shards:05}.{suffix}"
        part = dict(list(state.items())[shard::shards])
        save(folder / file, part)
        place |= dict.fromkeys(part, file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": place}))
    return index


def write_pickle(path, table, *, old=False):
    torch.save(table, path, _use_new_zipfile_serialization=not old)
    return path


def change_header(path, change):
    """Rewrite the header of a safetensors file as ``change`` leaves its table."""
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:size])
    change(table)
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[size:])


def header(path):
    return weights_file.read_header(path)
