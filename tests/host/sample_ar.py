"""Roll a student out with the sampler that core ComfyUI has for them: ``sample_ar.py MODEL IN OUT CHUNK``.

Runs in the Python and folder of ComfyUI. IN holds ``noise``, ``text`` and ``sigmas``; OUT gets the latent and
the name of the class that core took the model for.
"""

import sys

model_file, source, target, chunk = sys.argv[1:]
sys.argv[1:] = ["--cpu"]
sys.path.insert(0, ".")

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

given = load_file(source)
model = comfy.sd.load_diffusion_model(model_file)
kind = type(model.model.diffusion_model).__name__
samples = torch.zeros(1)
if kind == "CausalWanModel":
    from comfy_extras.nodes_ar_video import SamplerARVideo

    sampler = SamplerARVideo.execute(int(chunk)).args[0]
    text = [[given["text"], {}]]
    blank = torch.zeros_like(given["noise"])
    samples = comfy.sample.sample_custom(
        model, given["noise"], 1.0, sampler, given["sigmas"], text, text, blank, seed=5, disable_pbar=True
    )
    samples = model.model.process_latent_in(samples)
save_file({"samples": samples.float().contiguous()}, target, {"class": kind})
