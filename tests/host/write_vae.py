"""Write a VAE of random weights, in the Python and folder of ComfyUI: ``write_vae.py KIND FILE``.

Kinds: ``wan``, ``tiny``, ``tiny48``, and ``half``, a tiny one in float16.
"""

import sys

kind, target = sys.argv[1:]
sys.argv[1:] = ["--cpu"]
sys.path.insert(0, ".")

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ldm.wan.vae  # noqa: E402
import comfy.taesd.taehv  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402

torch.manual_seed(0)
if kind == "wan":
    sizes = {"dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]}
    vae, gain = comfy.ldm.wan.vae.WanVAE(**sizes), 0.1
else:
    vae, gain = comfy.taesd.taehv.TAEHV(latent_channels=48 if kind == "tiny48" else 16), 0.04
with torch.no_grad():
    for name, parameter in vae.named_parameters():
        parameter.copy_(torch.ones_like(parameter) if "gamma" in name else torch.randn_like(parameter) * gain)
dtype = torch.float16 if kind == "half" else torch.float32
comfy.utils.save_torch_file({name: tensor.to(dtype) for name, tensor in vae.state_dict().items()}, target)
