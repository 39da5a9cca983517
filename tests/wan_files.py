"""Small autoencoders with random weights, in the layouts that people have."""

import re

import torch
from safetensors.torch import save_file

from sfpp_core.latent_space import WAN_2_1, WAN_2_2
from sfpp_core.taehv import TinySizes, TinyWanDecoder
from sfpp_core.wan_autoencoder import WanSizes

SMALL_2_1 = WanSizes(space=WAN_2_1, encoder_width=8, decoder_width=8)
SMALL_2_2 = WanSizes(space=WAN_2_2, encoder_width=8, decoder_width=8)
TINY = TinySizes(space=WAN_2_1, widths=(16, 8, 8, 8), growth=(1, 2, 2), normalised=True)


_TO_WAN = (
    (r"\.norm1\.", ".residual.0."),
    (r"\.conv1\.", ".residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"^quant_conv", "conv1"),
    (r"^post_quant_conv", "conv2"),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"mid_block\.attentions\.0", "middle.1"),
    (r"mid_block\.resnets\.(\d)", lambda found: f"middle.{2 * int(found[1])}"),
)
_IN_A_ROW = (
    ("down_blocks", "downsamples"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda found: f"upsamples.{4 * int(found[1]) + int(found[2])}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"upsamples.{4 * int(found[1]) + 3}"),
)
_NESTED = (
    (r"(up|down)_blocks\.(\d)\.resnets\.(\d)", r"\1samples.\2.\1samples.\3"),
    (r"down_blocks\.(\d)\.downsampler", r"downsamples.\1.downsamples.2"),
    (r"up_blocks\.(\d)\.upsampler", r"upsamples.\1.upsamples.3"),
)


def network(sizes):
    """Return diffusers' own autoencoder; its pictures use the range without leaving it."""
    torch.manual_seed(0)
    made = sizes.network().to_empty(device="cpu").eval().requires_grad_(False)
    for name, weights in made.named_parameters():
        spread = 0.5 * weights[0].numel() ** -0.5 if weights.ndim > 1 else 0.1
        weights.copy_(torch.ones_like(weights) if "gamma" in name else torch.randn_like(weights) * spread)
    return made


def wan_tensors(sizes, made):
    """Return the weights under Wan's own names: the way back, written apart from the code under test."""
    named = {}
    for name, weights in made.state_dict().items():
        for pattern, replacement in (*_TO_WAN, *(_NESTED if sizes.patch > 1 else _IN_A_ROW)):
            name = re.sub(pattern, replacement, name)
        named[name] = weights
    return named


def write_wan(path, sizes, made=None, *, naming="wan", change=None):
    """Write an autoencoder of Wan; ``change`` may alter its table of tensors. Return diffusers' network."""
    made = made or network(sizes)
    tensors = wan_tensors(sizes, made) if naming == "wan" else dict(made.state_dict())
    if change:
        change(tensors)
    tensors = {name: weights.clone() for name, weights in tensors.items()}
    if path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    return made


def write_tiny(path, sizes=TINY, *, dtype=torch.float16, change=None):
    """Write a tiny decoder, with an encoder's tensor beside it."""
    torch.manual_seed(0)
    tensors = {name: weights.to(dtype) for name, weights in TinyWanDecoder(sizes).state_dict().items()}
    tensors["encoder.0.weight"] = torch.zeros(1, dtype=dtype)
    if change:
        change(tensors)
    save_file(tensors, path)
