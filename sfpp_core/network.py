"""Weights of the Wan 2.1 transformer, under Wan's own parameter names.

Only weights: what is computed with them is in ``student``, which works over any modules with these names,
ComfyUI's own included. The classes of the layers come from outside, ``torch.nn`` by default.
"""

from typing import Any, Protocol

import torch
from torch import nn

from .config import StudentConfig
from .geometry import PATCH

PATCH_SIZE = (1, PATCH, PATCH)
"""Latent cells per token, in time, height and width."""


class LayerClasses(Protocol):
    """Where the layers come from: ``torch.nn``, or a host's classes that cast and offload."""

    Linear: Any
    Conv3d: Any
    LayerNorm: Any
    RMSNorm: Any


class Attention(nn.Module):
    """Projections of one attention, self or cross."""

    def __init__(self, config: StudentConfig, layers: LayerClasses, **place: Any) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            self.add_module(name, layers.Linear(config.dim, config.dim, **place))
        # Wan normalises queries and keys over all heads at once.
        self.norm_q = layers.RMSNorm(config.dim, eps=config.eps, **place)
        self.norm_k = layers.RMSNorm(config.dim, eps=config.eps, **place)


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, config: StudentConfig, layers: LayerClasses, **place: Any) -> None:
        super().__init__()
        plain = {"eps": config.eps, "elementwise_affine": False, **place}
        self.norm1 = layers.LayerNorm(config.dim, **plain)
        self.self_attn = Attention(config, layers, **place)
        self.norm3 = layers.LayerNorm(config.dim, eps=config.eps, elementwise_affine=True, **place)
        self.cross_attn = Attention(config, layers, **place)
        self.norm2 = layers.LayerNorm(config.dim, **plain)
        self.ffn = nn.Sequential(
            layers.Linear(config.dim, config.ffn_dim, **place),
            nn.GELU(approximate="tanh"),
            layers.Linear(config.ffn_dim, config.dim, **place),
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim, **place))


class Head(nn.Module):
    """Projection from the residual stream to the velocity of one patch."""

    def __init__(self, config: StudentConfig, layers: LayerClasses, **place: Any) -> None:
        super().__init__()
        patch = PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
        self.norm = layers.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False, **place)
        self.head = layers.Linear(config.dim, patch * config.channels, **place)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim, **place))


class WanNetwork(nn.Module):
    """All weights of one Wan 2.1 text-to-video transformer."""

    def __init__(
        self,
        config: StudentConfig,
        *,
        layers: LayerClasses = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the modules, without deciding their values: call ``initialise`` or load a checkpoint."""
        super().__init__()
        place = {"device": device, "dtype": dtype}
        dim = config.dim
        self.patch_embedding = layers.Conv3d(
            config.channels, dim, kernel_size=PATCH_SIZE, stride=PATCH_SIZE, **place
        )
        self.text_embedding = nn.Sequential(
            layers.Linear(config.text_dim, dim, **place),
            nn.GELU(approximate="tanh"),
            layers.Linear(dim, dim, **place),
        )
        self.time_embedding = nn.Sequential(
            layers.Linear(config.freq_dim, dim, **place), nn.SiLU(), layers.Linear(dim, dim, **place)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), layers.Linear(dim, 6 * dim, **place))
        # Wan calls its layers "blocks"; the name is part of every published checkpoint.
        self.blocks = nn.ModuleList(Layer(config, layers, **place) for _ in range(config.layers))
        self.head = Head(config, layers, **place)


@torch.no_grad()
def initialise(network: WanNetwork, *, seed: int, query_gain: float = 1.0) -> None:
    """Fill ``network`` with the values training starts from.

    Args:
        network: Weights to fill in place.
        seed: Of the draw.
        query_gain: Initial gain of the query norms; above 1 sharpens attention and speeds up learning motion.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            weight = module.weight
            nn.init.xavier_uniform_(weight.view(len(weight), -1), generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            module.reset_parameters()
    for layer in network.blocks:
        assert isinstance(layer, Layer)
        layer.modulation.normal_(std=network.head.modulation.shape[-1] ** -0.5, generator=generator)
        layer.self_attn.norm_q.weight.fill_(query_gain)
    network.head.modulation.normal_(std=network.head.modulation.shape[-1] ** -0.5, generator=generator)
    for linear in (*network.text_embedding, *network.time_embedding):
        if isinstance(linear, nn.Linear):
            linear.weight.normal_(std=0.02, generator=generator)
    # A network that starts at velocity 0 starts at the mean of the data.
    nn.init.zeros_(network.head.head.weight)
