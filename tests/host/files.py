"""Model files of random weights in the layouts people have, small enough for a test."""

import torch
from safetensors.torch import save_file

from sfpp_core.config import RolloutSettings, StudentConfig
from sfpp_core.geometry import VideoGeometry, frames_in
from sfpp_core.network import WanNetwork, initialise
from sfpp_core.plan import space_of
from sfpp_core.sampler import LongSampler
from sfpp_core.student import CausalStudent

CONFIG = StudentConfig(dim=256, ffn_dim=512, heads=2, layers=2)
"""Wan 2.1 with the head dim, text and latents of the published sizes, and little else."""

CAUSAL = {"config": '{"transformer": {"causal_ar": true}}'}
"""Metadata by which core knows a student that generates chunk by chunk."""


def wan(config=CONFIG, *, seed=0):
    """Return the tensors of a Wan under Wan's own names."""
    network = WanNetwork(config)
    initialise(network, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def lora(tensors, *, rank=4, seed=9):
    """Return a LoRA in ComfyUI's layout for every matrix of the layers."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, weight in tensors.items():
        if name.startswith("blocks.") and name.endswith("weight") and weight.ndim == 2:
            stem = f"diffusion_model.{name.removesuffix('.weight')}"
            adapter[f"{stem}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator) * 0.1
            adapter[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
    return adapter


def merged(tensors, adapter, strength=1.0):
    """Return ``tensors`` with a LoRA added to them."""
    result = dict(tensors)
    for name in tensors:
        stem = f"diffusion_model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in adapter:
            delta = adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            result[name] = tensors[name] + strength * delta
    return result


def write(path, tensors, metadata=None):
    """Write a safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def in_fp8(tensors):
    """Return the tensors as a file of unscaled fp8 has them: all but the patch embedding."""
    return {
        name: tensor if name.startswith("patch_embedding") else tensor.to(torch.float8_e4m3fn)
        for name, tensor in tensors.items()
    }


def in_scaled_fp8(tensors):
    """Return the tensors as older files of scaled fp8 have them, and what they stand for."""
    stored = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    meant = {}
    for name, tensor in tensors.items():
        if name.startswith("blocks.") and name.endswith("weight") and tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + "scale_weight"] = scale
            meant[name] = stored[name].float() * scale
        else:
            stored[name] = meant[name] = tensor
    return stored, meant


def write_gguf(path, tensors):
    """Write the matrices of the layers as Q8_0 and the rest as F32; return what they stand for."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0
    writer, meant = gguf.GGUFWriter(path, "wan"), {}
    for name, tensor in tensors.items():
        if name.startswith("blocks.") and name.endswith("weight") and tensor.ndim == 2:
            stored = gguf.quants.quantize(tensor.numpy(), kind)
            meant[name] = torch.from_numpy(gguf.quants.dequantize(stored, kind).copy())
            writer.add_tensor(name, stored, raw_dtype=kind)
            continue
        meant[name] = tensor
        if tensor.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
        writer.add_tensor(name, (tensor.flatten(1) if tensor.ndim > 4 else tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def alone(tensors, embeddings, *, seconds=1.0, seed=1, config=CONFIG, size=64, settings=None, start=None):
    """Return the normalised latent that the package makes of ``tensors`` without a host.

    ``start`` is the normalised latent of an image, which is added to the ``seconds``.
    """
    network = WanNetwork(config)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    settings = settings or RolloutSettings()
    space, lead = space_of(config), 0 if start is None else 1
    geometry = VideoGeometry(
        width=size,
        height=size,
        frames=frames_in(seconds, fps=space.fps) + lead,
        chunk=settings.chunk,
        lead=lead,
        stride=space.spatial_stride,
        fps=space.fps,
    )
    sampler = LongSampler(
        student=CausalStudent(network.requires_grad_(False), config),
        geometry=geometry,
        settings=settings,
        seed=seed,
    )
    return torch.cat(list(sampler.chunks(embeddings, start=start)), dim=2)
