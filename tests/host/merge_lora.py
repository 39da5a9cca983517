"""Merge LoRAs as core ComfyUI does. Runs in its Python and folder: ``merge_lora.py WAN JOBS``.

JOBS is a JSON table: the file to write by ``[[LoRA, strength], ...]``.
"""

import json
import sys

wan, jobs = sys.argv[1:]
sys.argv[1:] = ["--cpu"]
sys.path.insert(0, ".")

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402

model = comfy.sd.load_diffusion_model(wan, model_options={"dtype": torch.float32})
with torch.inference_mode():
    for target, loras in json.loads(jobs).items():
        patched = model
        for path, strength in loras:
            lora = comfy.utils.load_torch_file(path, safe_load=True)
            patched, _ = comfy.sd.load_lora_for_models(patched, None, lora, strength, 0)
        comfy.model_management.load_models_gpu([patched], force_full_load=True)
        weights = patched.model.diffusion_model.state_dict()
        comfy.utils.save_torch_file({name: weight.clone() for name, weight in weights.items()}, target)
        comfy.model_management.unload_all_models()
