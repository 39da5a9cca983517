"""The pack in a real ComfyUI: it loads, generates, decodes, stops, goes on, and says what is wrong."""

import itertools
import json
import subprocess
from pathlib import Path

import numpy as np
import pack
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from wan_constants import wan_constants

from sfpp_core import demo
from sfpp_core.config import RolloutSettings
from sfpp_core.geometry import VideoGeometry
from sfpp_core.sampler import LongSampler
from sfpp_core.student import CausalStudent
from sfpp_core.video import video_info

pytestmark = pytest.mark.host

ROOT = Path(__file__).parent.parent.parent
COUNT = itertools.count()
PROMPT = "a red circle moves right quickly"


def generating(*, seconds=2.0, seed=1, text=PROMPT, model=("student", 0), **sampler):
    """Return the nodes from the demo to the LATENT of ``sampler``."""
    settings = {"width": 64, "height": 64, "seconds": seconds, "video_seed": seed} | sampler
    return {
        "student": ("SFPPLoadStudent", {"student": "demo (built in)"}),
        "demo": ("SFPPLoadDemo", {}),
        "text": ("CLIPTextEncode", {"clip": ["demo", 0], "text": text}),
        "sampler": ("SFPPLongSampler", {"model": list(model), "conditioning": ["text", 0], **settings}),
    }


def decoding(prefix, *, vae=("demo", 1), **settings):
    """Return the node that writes a video."""
    settings = {"filename_prefix": f"video/{prefix}", "enlarge": 0, "image_seconds": 5.0} | settings
    return {"video": ("SFPPDecodeToVideo", {"samples": ["sampler", 0], "vae": list(vae), **settings})}


def saving():
    """Return the node of the host that saves the latent, never the same twice: the host would not run it."""
    prefix = f"latent{next(COUNT)}"
    return {"save": ("SaveLatent", {"samples": ["sampler", 0], "filename_prefix": prefix})}


def pictures(prefix, images):
    """Return the node of the host that saves pictures."""
    return {prefix: ("SaveImage", {"images": list(images), "filename_prefix": prefix})}


def latent_of(host, outputs):
    (path,) = host.files(outputs, "save")
    return load_file(path)["latent_tensor"]


def pixels(paths):
    return np.stack([np.asarray(Image.open(path), dtype=np.int16) for path in paths])


def test_the_nodes_are_there_as_the_pack_describes_them(host):
    for name, schema in pack.schemas().items():
        info = host.get(f"/object_info/{name}")[name]
        seen = {
            key: entry
            for group in ("required", "optional")
            for key, entry in info["input"].get(group, {}).items()
        }
        assert list(seen) == [socket.name for socket in schema.inputs]
        assert [entry[0] for entry in seen.values()] == [socket.kind for socket in schema.inputs]
        assert list(info["output"]) == [socket.kind for socket in schema.outputs]
        assert (info["display_name"], info["category"]) == (schema.display_name, schema.category)


def test_the_help_pages_are_served(host):
    for name in pack.schemas():
        with host.open(f"/extensions/ComfyUI-SelfForcingPP/docs/{name}.md") as page:
            assert page.read().decode().startswith("# ")


def prompt_of(workflow, **changes):
    """Return the API form of a workflow saved by the frontend, with widgets of any node changed by name."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    schemas, prompt = pack.schemas(), {}
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        inputs = {entry["name"]: links[entry["link"]] for entry in node["inputs"] if entry.get("link")}
        sockets = schemas[node["type"]].inputs if node["type"] in schemas else [pack.Socket("STRING", "text")]
        widgets = [socket.name for socket in sockets if socket.is_widget]
        values = dict(zip(widgets, node.get("widgets_values") or [], strict=False))  # some came later
        inputs |= values | {name: value for name, value in changes.items() if name in values}
        prompt[str(node["id"])] = (node["type"], inputs)
    return prompt


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("demo*.json")), ids=lambda path: path.stem)
def test_a_demo_workflow_runs_and_its_video_plays(host, path):
    prompt = prompt_of(json.loads(path.read_text()), seconds=4)
    outputs = host.run(prompt)
    (node,) = (key for key, (kind, _) in prompt.items() if kind == "SFPPDecodeToVideo")
    (video,) = host.files(outputs, node)
    info = video_info(video)
    assert (info.frames, info.width, info.height, info.fps) == (64, 512, 512, 16)
    assert b"SFPPLongSampler" in video.read_bytes()


def test_the_video_is_a_video_to_the_host(host):
    prompt = generating() | decoding("again")
    prompt["copy"] = (
        "SaveVideo",
        {"video": ["video", 0], "filename_prefix": "copy", "format": "auto", "codec": "auto"},
    )
    (path,) = host.files(host.run(prompt), "copy")
    assert video_info(path).frames == 32


def test_core_decodes_the_lazy_latent_to_the_same_pictures(host):
    prompt = (
        generating()
        | decoding("same")
        | pictures("streamed", ("video", 1))
        | pictures("whole", ("decode", 0))
    )
    prompt["decode"] = ("VAEDecode", {"samples": ["sampler", 0], "vae": ["demo", 1]})
    outputs = host.run(prompt)
    whole, streamed = (pixels(host.files(outputs, name)) for name in ("whole", "streamed"))
    assert (len(whole), len(streamed)) == (33, 32)  # whole latent frames; frames asked for
    assert np.abs(whole[:32] - streamed).max() <= 1


@pytest.mark.parametrize("kind", ["wan", "tiny"])
def test_a_vae_of_the_host_decodes_in_chunks_what_it_decodes_whole(host, kind):
    target = vae_file(host, kind)
    prompt = generating(seconds=4) | decoding(kind, vae=("vae", 0))
    prompt |= pictures(f"{kind}_streamed", ("video", 1)) | pictures(f"{kind}_whole", ("decode", 0))
    prompt["vae"] = ("VAELoader", {"vae_name": target.name})
    prompt["decode"] = ("VAEDecode", {"samples": ["sampler", 0], "vae": ["vae", 0]})
    outputs = host.run(prompt)
    whole, streamed = (pixels(host.files(outputs, f"{kind}_{way}")) for way in ("whole", "streamed"))
    assert (len(whole), len(streamed)) == (65, 64)
    assert whole.std(axis=0).max() > 1  # the pictures change, so a wrong past would show
    assert np.abs(whole[:64] - streamed).max() <= 1


def vae_file(host, kind):
    """Return the file of a VAE of random weights in the host's folder."""
    target = host.base / f"models/vae/{kind}.safetensors"
    if not target.exists():
        script = [host.python, str(Path(__file__).parent / "write_vae.py"), kind, str(target)]
        subprocess.run(script, cwd=host.source, check=True, capture_output=True)
    return target


@pytest.mark.parametrize("kind", ["wan", "tiny"])
def test_tiles_give_nearly_the_same_pictures(host, kind):
    """Random weights see further than trained ones, and Wan's the whole picture; a seam would be far off."""
    size = {"width": 192, "height": 128}
    target, found = vae_file(host, kind), {}
    for tile in (0, 128):
        prompt = generating(seconds=1, **size) | decoding(f"{kind}{tile}", vae=("vae", 0), tile=tile)
        prompt |= pictures(f"tile_{kind}{tile}", ("video", 1))
        prompt["vae"] = ("VAELoader", {"vae_name": target.name})
        found[tile] = pixels(host.files(host.run(prompt), f"tile_{kind}{tile}"))
    difference = np.abs(found[0] - found[128]).mean()
    assert 0 < difference < 0.1 * found[0].std()


def test_half_precision_tiny_files_get_normalised_latents(host):
    """Core takes them for another model's; their own frames come from latents without mean and deviation."""
    target = vae_file(host, "half")
    prompt = (
        generating(seconds=1) | decoding("half", vae=("vae", 0)) | pictures("half", ("video", 1)) | saving()
    )
    prompt["vae"] = ("VAELoader", {"vae_name": target.name})
    outputs = host.run(prompt)
    seen = pixels(host.files(outputs, "half"))
    latent = latent_of(host, outputs)
    mean, std = wan_constants()
    expected = whole_tiny(load_file(target), (latent - mean) / std)
    assert np.abs(seen - (expected.clamp(0, 1) * 255).numpy()[: len(seen)]).max() < 3


def whole_tiny(weights, latent):
    """Return the frames ``(F, H, W, 3)`` of a tiny decoder, written down from its description."""
    from torch.nn import functional

    def conv(x, name):
        bias = weights.get(f"{name}.bias")
        kernel = weights[f"{name}.weight"].float()
        padding = kernel.shape[-1] // 2
        return functional.conv2d(x, kernel, None if bias is None else bias.float(), padding=padding)

    def remembering(x, name):
        past = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
        y = torch.cat((x, past), dim=1)
        for layer in (0, 2):
            y = conv(y, f"{name}.conv.{layer}").relu()
        return (conv(y, f"{name}.conv.4") + x).relu()

    x = conv(torch.tanh(latent[0].movedim(0, 1) / 3) * 3, "decoder.1").relu()
    for first, frames in ((3, 1), (9, 2), (15, 2)):
        for unit in range(first, first + 3):
            x = remembering(x, f"decoder.{unit}")
        x = functional.interpolate(x, scale_factor=2)
        x = conv(x, f"decoder.{first + 4}.conv").unflatten(1, (frames, -1)).flatten(0, 1)
        x = conv(x, f"decoder.{first + 5}")
    return conv(x.relu(), "decoder.22")[3:].movedim(1, -1)


def test_a_preview_needs_no_vae_and_the_same_video_is_decoded_again_without_sampling(host):
    prompt = generating(seconds=2, seed=21)
    preview = {
        "samples": ["sampler", 0],
        "filename_prefix": "video/preview",
        "enlarge": 0,
        "image_seconds": 5.0,
    }
    prompt["video"] = ("SFPPDecodeToVideo", preview | {"decoder": "preview"})
    (path,) = host.files(host.run(prompt), "video")
    info = video_info(path)
    assert (info.frames, info.width, info.height) == (32, 512, 512)
    seconds = host.log.count("Requested to load WAN21")
    outputs = host.run(generating(seconds=2, seed=21) | decoding("quality"))
    assert video_info(host.files(outputs, "video")[0]).frames == 32
    assert host.log.count("Requested to load WAN21") == seconds


def test_a_missing_vae_is_named(host):
    prompt = generating() | decoding("none")
    del prompt["video"][1]["vae"]
    kind, message = host.error(prompt)
    assert (kind, "no VAE is connected" in message) == ("SFPPDecodeToVideo", True)


def test_the_host_computes_what_the_package_computes_alone(host):
    seen = latent_of(host, host.run(generating(seconds=3) | saving()))
    parts = demo.load()
    geometry = VideoGeometry(width=64, height=64, frames=48, chunk=parts.settings.chunk)
    student = CausalStudent(parts.network, parts.config)
    sampler = LongSampler(student=student, geometry=geometry, settings=parts.settings, seed=1)
    expected = torch.cat(list(sampler.chunks(parts.words([PROMPT]))), dim=2)[:, :, : seen.shape[2]]
    mean, std = wan_constants()
    torch.testing.assert_close((seen - mean) / std, expected, rtol=0, atol=2e-3)


def test_a_cancelled_video_plays_and_is_continued_exactly(host):
    whole = latent_of(host, host.run(generating(seconds=30, seed=7) | saving()))
    host.forget()
    number = host.queue(generating(seconds=30, seed=7) | decoding("cancelled"))
    growing = host.wait_for_file("video/cancelled*.mp4")
    assert video_info(growing).frames > 0
    host.interrupt()
    assert host.result(number)[1] == "execution_interrupted"
    assert 0 < video_info(growing).frames < 480
    assert f"are in {growing}" in host.log
    again = latent_of(host, host.run(generating(seconds=30, seed=7) | saving()))
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-5)


def test_a_killed_server_leaves_a_video_that_plays(new_host):
    server = new_host().start()
    server.queue(generating(seconds=600) | decoding("killed"))
    growing = server.wait_for_file("video/killed*.mp4")
    server.kill()
    assert video_info(growing).frames > 0


def test_a_student_file_is_read_like_the_demo_and_takes_a_lora(host):
    folder = host.base / "models"
    (folder / "diffusion_models/own.safetensors").symlink_to(demo.file(demo.STUDENT))
    torch.manual_seed(0)
    name = "diffusion_model.blocks.0.self_attn.q"
    save_file(
        {f"{name}.lora_A.weight": torch.randn(4, 256), f"{name}.lora_B.weight": torch.randn(256, 4)},
        folder / "loras/some.safetensors",
    )
    plain = latent_of(host, host.run(generating() | saving()))
    own = {"own": ("SFPPLoadStudent", {"student": "own.safetensors"})}
    same = latent_of(host, host.run(generating(model=("own", 0)) | own | saving()))
    torch.testing.assert_close(same, plain, rtol=0, atol=0)
    changed = {"lora": ("LoraLoaderModelOnly", {"model": ["own", 0], "lora_name": "some.safetensors"})}
    changed["lora"][1]["strength_model"] = 1.0
    other = latent_of(host, host.run(generating(model=("lora", 0)) | own | changed | saving()))
    assert (other - plain).abs().max() > 0.01
    back = latent_of(host, host.run(generating() | saving()))
    torch.testing.assert_close(back, plain, rtol=0, atol=0)


def test_what_other_nodes_put_on_the_model_in_vain_is_named(host):
    shifted = {"shift": ("ModelSamplingSD3", {"model": ["student", 0], "shift": 8.0})}
    other = latent_of(host, host.run(generating(model=("shift", 0)) | shifted | saving()))
    assert "Without effect in the Long Sampler: model_sampling on the MODEL." in host.log
    torch.testing.assert_close(other, latent_of(host, host.run(generating() | saving())), rtol=0, atol=0)


def test_a_longer_video_begins_with_the_shorter_one(host):
    short, long = (latent_of(host, host.run(generating(seconds=s) | saving())) for s in (2, 5))
    torch.testing.assert_close(long[:, :, : short.shape[2]], short, rtol=0, atol=1e-5)


def test_cache_settings_reach_the_rollout(host):
    def run(window, sink):
        cache = {
            "cache": ("SFPPCacheSettings", {"window": window, "sink": sink, "sink_positions": "relative"})
        }
        return latent_of(host, host.run(generating(seconds=4, cache=["cache", 0]) | cache | saving()))

    assert not torch.allclose(run(6, 0), run(9, 3), atol=1e-3)
    assert RolloutSettings().window == 21


def test_wrong_settings_are_named_before_anything_is_generated(host):
    kind, message = host.error(generating(width=70) | saving())
    assert kind == "SFPPLongSampler"
    assert "width is 70; it must be a multiple of 16, e.g. 64" in message
    cache = {"cache": ("SFPPCacheSettings", {"window": 20, "sink": 0, "sink_positions": "absolute"})}
    kind, message = host.error(generating(cache=["cache", 0]) | cache | saving())
    assert kind == "SFPPLongSampler"
    assert "window is 20 latent frames; it must be a multiple of the chunk, 3" in message


def test_unknown_words_are_named(host):
    kind, message = host.error(generating(text="ein roter Kreis") | saving())
    assert kind == "CLIPTextEncode"
    assert "the demo knows no word of the prompt" in message
    host.run(generating(text="a red dragon moves left", seconds=1) | saving())
    assert "the demo does not know: dragon" in host.log


def test_pictures_of_a_long_video_are_refused_and_the_video_is_kept(host):
    prompt = generating() | decoding("long", image_seconds=1.0) | pictures("refused", ("video", 1))
    outputs = host.run(prompt)  # the message goes to the browser alone; the host counts the run as a success
    assert "refused" not in outputs
    (video,) = host.files(outputs, "video")
    assert video_info(video).frames == 32
