"""Every workflow against the host's own node schemas, and run there with small files of random weights.

The text encoder is the demo's: the host knows umT5 in its full size alone.
"""

import json
import subprocess
from pathlib import Path

import files
import numpy as np
import pytest
import torch
from PIL import Image
from prompts import PROMPT, saving
from safetensors.torch import load_file

from sfpp_core.video import open_writer, video_info

pytestmark = pytest.mark.host

ROOT = Path(__file__).parent.parent.parent
WORKFLOWS = sorted(path for path in (ROOT / "workflows").glob("*.json") if not path.stem.startswith("demo"))
SIZE = 64
CLIP_FRAMES = 24


@pytest.fixture(scope="module")
def furnished(host):
    """Return the host, with small files under the names the workflows ask for."""
    models, weights = host.base / "models", files.wan()
    state = {"generator_ema": {f"model.{name}": tensor for name, tensor in weights.items()}}
    torch.save(state, models / "diffusion_models/self_forcing_dmd.pt")
    files.write(models / "diffusion_models/causal_forcing-framewise.safetensors", weights, files.CAUSAL)
    for kind, name in (("wan", "wan_2.1_vae"), ("half", "taew2_1")):
        target = models / f"vae/{name}.safetensors"
        command = [host.python, str(Path(__file__).parent / "write_vae.py"), kind, str(target)]
        subprocess.run(command, cwd=host.source, check=True, capture_output=True)
    picture = np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)
    Image.fromarray(picture).save(host.base / "input/example.png")
    with open_writer(host.base / "input/clip.mp4", width=80, height=48, fps=16) as writer:
        writer.write(torch.rand(CLIP_FRAMES, 3, 48, 80))
    return host


def named(node):
    """Return the values of a node's widgets by name."""
    widgets = [entry["widget"]["name"] for entry in node["inputs"] if "widget" in entry]
    values = dict(zip(widgets, node.get("widgets_values") or [], strict=True))
    values.pop("upload", None)  # the button, which the frontend adds
    return values


def prompt_of(workflow, **changes):
    """Return the API form of a workflow, reduced: the demo's words, and ``changes`` to any widget by name."""
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] != "MarkdownNote"}
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for number, node in nodes.items():
        if node["type"] == "CLIPLoader":
            prompt[str(number)] = ("SFPPLoadDemo", {})
            continue
        inputs = {entry["name"]: links[entry["link"]] for entry in node["inputs"] if entry.get("link")}
        values = named(node)
        prompt[str(number)] = (
            node["type"],
            inputs | values | {k: v for k, v in changes.items() if k in values},
        )
    return prompt


def of_type(prompt, kind):
    """Return the key of the only node of a type."""
    (key,) = (key for key, (found, _) in prompt.items() if found == kind)
    return key


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_fits_the_schemas_of_the_host(furnished, path):
    for node in json.loads(path.read_text())["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        (info,) = furnished.get(f"/object_info/{node['type']}").values()
        known = info["input"].get("required", {}) | info["input"].get("optional", {})
        asked = {entry["name"] for entry in node["inputs"]} - {"upload"}
        assert asked <= known.keys()
        assert set(info["input"].get("required", {})) <= asked
        outputs = [output["type"] for output in node["outputs"]]
        assert outputs == info["output"][: len(outputs)]
        files_named = {model["name"] for model in node["properties"].get("models", [])}
        for name, value in named(node).items():
            kind, *options = known[name]
            choices = kind if isinstance(kind, list) else (options or [{}])[0].get("options")
            if choices is not None and not (node["type"] == "CLIPLoader" and value in files_named):
                assert value in choices, f"{node['type']}.{name}"


FRAMES = {"text_to_video": 16, "image_to_video": 17, "extend_video": 21 + 16, "small_card": 16}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs(furnished, path):
    prompt = prompt_of(json.loads(path.read_text()), width=SIZE, height=SIZE, seconds=1.0, text=PROMPT)
    outputs = furnished.run(prompt)
    (video,) = furnished.files(outputs, of_type(prompt, "SFPPDecodeToVideo"))
    info = video_info(video)
    assert (info.frames, info.width, info.height) == (FRAMES[path.stem], 8 * SIZE, 8 * SIZE)


def test_the_image_is_the_first_frame_of_its_video(furnished):
    workflow = json.loads((ROOT / "workflows/image_to_video.json").read_text())
    prompt = prompt_of(workflow, width=SIZE, height=SIZE, seconds=1.0, text=PROMPT)
    prompt["alone"] = (
        "SaveLatent",
        {"samples": [of_type(prompt, "VAEEncode"), 0], "filename_prefix": "image"},
    )
    outputs = furnished.run(prompt | saving(of_type(prompt, "SFPPLongSampler")))
    whole, image = (
        load_file(furnished.files(outputs, node)[0])["latent_tensor"] for node in ("save", "alone")
    )
    torch.testing.assert_close(whole[:, :, :1], image, rtol=0, atol=1e-5)
    assert whole.shape[2] == 5  # 1 + 16 frames, chunk by chunk of 1


def test_one_sampler_goes_on_from_another_and_both_are_read_as_they_are_made(furnished):
    workflow = json.loads((ROOT / "workflows/text_to_video.json").read_text())
    prompt = prompt_of(workflow, width=SIZE, height=SIZE, seconds=2.0, text=PROMPT, decoder="preview")
    first, video = of_type(prompt, "SFPPLongSampler"), of_type(prompt, "SFPPDecodeToVideo")
    whole = furnished.run(
        prompt | {first: (prompt[first][0], prompt[first][1] | {"seconds": 4.0})} | saving(first)
    )
    kind, settings = prompt[first]
    prompt["second"] = (kind, settings | {"start": [first, 0]})
    prompt[video][1]["samples"] = ["second", 0]
    outputs = furnished.run(prompt | saving("second"))
    assert video_info(furnished.files(outputs, video)[0]).frames == 33 + 32
    long, plain = (
        load_file(furnished.files(found, "save")[0])["latent_tensor"] for found in (outputs, whole)
    )
    frames = min(long.shape[2], plain.shape[2])
    torch.testing.assert_close(long[:, :, :frames], plain[:, :, :frames], rtol=0, atol=1e-3)


def test_a_start_of_another_size_is_named_before_anything_is_generated(furnished):
    workflow = json.loads((ROOT / "workflows/image_to_video.json").read_text())
    prompt = prompt_of(workflow, seconds=1.0, text=PROMPT)
    scale = of_type(prompt, "ImageScale")
    prompt[scale][1].update(width=64, height=32)
    kind, message = furnished.error(prompt)
    assert kind == "SFPPLongSampler"
    assert "start is 64x32 and the video 832x480; scale the image or clip to 832x480" in message
