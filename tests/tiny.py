"""The tiny student of the tests, and the obvious twin of the rollout."""

import torch

from sfpp_core.config import StudentConfig
from sfpp_core.kv_cache import CacheShape
from sfpp_core.network import WanNetwork, initialise
from sfpp_core.student import CausalStudent

CONFIG = StudentConfig(dim=48, ffn_dim=96, heads=4, layers=3, text_dim=20, text_length=7)


def network(config=CONFIG, *, seed=0, dtype=torch.float32):
    """Return a network of random weights in which every parameter matters."""
    net = WanNetwork(config)
    initialise(net, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return net.to(dtype).requires_grad_(False)


def student(config=CONFIG, **options):
    """Return an unbound student of random weights."""
    return CausalStudent(network(config), config, **options)


def cache_shape(window):
    """Return the size of a cache of ``window`` chunks of clips of 4x6 latent cells."""
    return CacheShape(
        layers=CONFIG.layers,
        heads=CONFIG.heads,
        head_dim=CONFIG.head_dim,
        tokens_per_chunk=18,
        latent_frames_per_chunk=3,
        window=window,
    )


def text(config=CONFIG, *, batch=1, seed=3):
    """Return random text embeddings."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, config.text_length, config.text_dim, generator=generator)


def latents(chunks, *, chunk=3, batch=1, size=(4, 6), seed=5):
    """Return random latents of whole chunks, ``(B, 16, T, H, W)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CONFIG.channels, chunks * chunk, *size, generator=generator)


def transformer_of_diffusers():
    """Return a transformer of diffusers of the tiny student's sizes."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=CONFIG.heads,
        attention_head_dim=CONFIG.head_dim,
        text_dim=CONFIG.text_dim,
        ffn_dim=CONFIG.ffn_dim,
        num_layers=CONFIG.layers,
        cross_attn_norm=True,
    )
