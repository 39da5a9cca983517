"""Encode prompts with core's CLIP. Runs in ComfyUI's Python and folder: ``encode_text.py FILE JSON OUT``.

``JSON`` holds prompts, and the sizes of a small umT5 in place of those of umT5-XXL, the only one core knows.
"""

import json
import pathlib
import sys

weights, request, target = sys.argv[1:]
sys.argv[1:] = ["--cpu"]
sys.path.insert(0, ".")

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402

table = json.loads(pathlib.Path(request).read_text())
torch.set_num_threads(1)
# Core tells umT5-XXL by its sizes, which a small one has not; the rest of the way is core's own.
comfy.sd.detect_te_model = lambda _: comfy.sd.TEModel.T5_XXL
clip = comfy.sd.load_clip(
    [weights], clip_type=comfy.sd.CLIPType.WAN, model_options={"umt5xxl_model_config": table["sizes"]}
)
assert type(clip.cond_stage_model).__name__ == "WanTEModel"
rows = {}
for number, prompt in enumerate(table["prompts"]):
    embeddings = clip.encode_from_tokens(clip.tokenize(prompt))
    rows[str(number)] = embeddings.float().contiguous()
comfy.utils.save_torch_file(rows, target)
