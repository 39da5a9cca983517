"""What the demo's stages leave behind, with random weights: models of runs, encoded clips, an autoencoder."""

import torch
from safetensors.torch import save_file
from torch import nn

from sfpp_core.config import StudentConfig
from sfpp_core.tiny_autoencoder import AutoencoderConfig, TinyAutoencoder
from training.teacher import DemoModel

CONFIG = StudentConfig(dim=128, ffn_dim=32, heads=1, layers=1, text_dim=8, text_length=16)


def model():
    """Return a small model whose velocity is not zero."""
    torch.manual_seed(0)
    made = DemoModel(CONFIG)
    nn.init.normal_(made.network.head.head.weight, std=0.05)
    return made


def write_run(path, **notes):
    """Write the saved state of a run, ``last.pt``, that trained ``model`` and return its path."""
    averaged = {f"module.{name}": value for name, value in model().state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": {"averaged": averaged}, **notes}, path)
    return path


def write_clips(path, *, clips=3):
    """Write a file of clips as the teacher's stage does, of noise, and return its path."""
    latents = torch.randn(clips, 16, 21, 8, 8, generator=torch.Generator().manual_seed(0))
    save_file({"latents": latents.half()}, path, metadata={"seed": "0"})
    return path


def autoencoder():
    """Return an autoencoder of random weights."""
    torch.manual_seed(0)
    return TinyAutoencoder(AutoencoderConfig()).eval().requires_grad_(False)
