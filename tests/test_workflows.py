"""Every workflow names only nodes, inputs and values that exist, and every node is explained."""

import json
import re
from pathlib import Path

import pytest
import torch
from pack import ROOT, Socket, schemas

from sfpp_core.config import WAN_1_3B, RolloutSettings
from sfpp_core.forecast import forecast
from sfpp_core.geometry import VideoGeometry

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
NODES = schemas()
SURFACE = {
    "SFPPLoadStudent": (["student", "weights", "preset"], ["MODEL"]),
    "SFPPLoadDemo": ([], ["CLIP", "VAE"]),
    "SFPPPromptSchedule": (["clip", "text", "switch"], ["CONDITIONING"]),
    "SFPPCacheSettings": (["window", "sink", "sink_positions", "storage"], ["SFPP_CACHE"]),
    "SFPPLongSampler": (
        [
            "model",
            "conditioning",
            "width",
            "height",
            "seconds",
            "video_seed",
            "cache",
            "start",
            "run",
            "drift",
            "run_settings",
        ],
        ["LATENT", "STRING"],
    ),
    "SFPPDriftControls": (["anchor", "context_sigma"], ["SFPP_DRIFT"]),
    "SFPPRunSettings": (["replay", "keep_cache"], ["SFPP_RUN_SETTINGS"]),
    "SFPPDecodeToVideo": (
        ["samples", "filename_prefix", "enlarge", "image_seconds", "vae", "decoder", "tile"],
        ["VIDEO", "IMAGE"],
    ),
    "SFPPDriftReport": (
        ["filename_prefix", "chunk_frames", "images_fps", "first_chunk_frames", "video", "images"],
        ["STRING", "IMAGE"],
    ),
}
"""Saved workflows refer to nodes by these names; they never change."""

CORE = {
    "CLIPTextEncode": ([Socket("CLIP", "clip"), Socket("STRING", "text")], ["CONDITIONING"]),
    "MarkdownNote": ([Socket("STRING", "text")], []),
    "CLIPLoader": (
        [
            Socket("COMBO", "clip_name", options=[]),
            Socket("COMBO", "type", options=["wan"]),
            Socket("COMBO", "device", options=["default", "cpu"]),
        ],
        ["CLIP"],
    ),
    "VAELoader": ([Socket("COMBO", "vae_name", options=[])], ["VAE"]),
    "VAEEncode": ([Socket("IMAGE", "pixels"), Socket("VAE", "vae")], ["LATENT"]),
    "LoadImage": (
        [Socket("COMBO", "image", options=["example.png"]), Socket("COMBO", "upload", options=["image"])],
        ["IMAGE", "MASK"],
    ),
    "LoadVideo": (
        [Socket("COMBO", "file", options=["clip.mp4"]), Socket("COMBO", "upload", options=["image"])],
        ["VIDEO"],
    ),
    "GetVideoComponents": ([Socket("VIDEO", "video")], ["IMAGE", "AUDIO", "FLOAT"]),
    "ImageScale": (
        [
            Socket("IMAGE", "image"),
            Socket("COMBO", "upscale_method", options=["lanczos"]),
            Socket("INT", "width", min=0, max=16384),
            Socket("INT", "height", min=0, max=16384),
            Socket("COMBO", "crop", options=["center"]),
        ],
        ["IMAGE"],
    ),
}
"""What the workflows use of the host: inputs and kinds of output. tests/host asks the host itself."""

FOLDERS = {
    "SFPPLoadStudent": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "VAELoader": "vae",
}
"""Where the host looks for the files of a loader."""


def name_of(path):
    return path.stem


def described(kind):
    """Return the inputs and the kinds of output of a node type."""
    if kind in CORE:
        return CORE[kind]
    assert kind in NODES, f"no node is called {kind}"
    return NODES[kind].inputs, [output.kind for output in NODES[kind].outputs]


def models_of(node):
    """Return the files to download that a node names."""
    return {model["name"]: model for model in node["properties"].get("models", [])}


def problem(socket: Socket, value, files=()):
    """Return what is wrong with the value of a widget, or an empty text."""
    limits = socket.fields
    if socket.kind == "COMBO" and value not in [*limits["options"], *files]:
        return f"{value!r} is not one of {limits['options']}"
    if socket.kind == "STRING" and not isinstance(value, str):
        return f"{value!r} is not a text"
    if socket.kind in ("INT", "FLOAT") and not limits["min"] <= value <= limits["max"]:
        return f"{value!r} is not from {limits['min']} to {limits['max']}"
    if socket.kind == "INT" and (value - limits["min"]) % limits.get("step", 1):
        return f"{value!r} is not a step of {limits['step']}"
    return ""


def test_there_is_a_workflow():
    assert WORKFLOWS


def test_saved_names_are_frozen():
    seen = {
        name: ([socket.name for socket in node.inputs], [socket.kind for socket in node.outputs])
        for name, node in NODES.items()
    }
    assert seen == SURFACE


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_every_widget_has_a_value_that_is_allowed(path):
    for node in json.loads(path.read_text())["nodes"]:
        widgets = [socket for socket in described(node["type"])[0] if socket.is_widget]
        values = node.get("widgets_values") or []
        lacking = widgets[len(values) :]  # came after the workflow was saved
        assert len(values) <= len(widgets)
        assert all(socket.fields.get("optional") for socket in lacking), (
            f"{node['type']} has widgets {[socket.name for socket in widgets]}"
        )
        files = models_of(node)
        problems = [problem(socket, value, files) for socket, value in zip(widgets, values, strict=False)]
        assert not any(problems), f"{node['type']}: {problems}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_every_link_joins_sockets_of_one_kind(path):
    workflow = json.loads(path.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, origin, slot, target, place, kind in workflow["links"]:
        entry = nodes[target]["inputs"][place]
        assert entry["link"] == number
        (socket,) = (socket for socket in described(nodes[target]["type"])[0] if socket.name == entry["name"])
        assert described(nodes[origin]["type"])[1][slot] == socket.kind == kind


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_nothing_that_must_be_linked_is_left_open(path):
    for node in json.loads(path.read_text())["nodes"]:
        linked = {entry["name"] for entry in node.get("inputs", []) if entry.get("link") is not None}
        sockets = described(node["type"])[0]
        needed = {
            socket.name for socket in sockets if not socket.is_widget and not socket.fields.get("optional")
        }
        assert needed <= linked, f"{node['type']} lacks {needed - linked}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_a_note_explains_the_workflow_and_names_every_file_and_its_folder(path):
    nodes = json.loads(path.read_text())["nodes"]
    (note,) = (node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    for node in nodes:
        for name, model in models_of(node).items():
            assert f"- `{model['directory']}`: [{name}]({model['url']})" in note


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_a_file_that_is_needed_can_be_downloaded_into_the_folder_of_its_loader(path):
    for node in json.loads(path.read_text())["nodes"]:
        for name, model in models_of(node).items():
            assert name in node["widgets_values"]
            assert model["directory"] == FOLDERS[node["type"]]
            assert re.fullmatch(
                rf"https://huggingface\.co/[\w./-]+/resolve/main/[\w./-]*{name}", model["url"]
            )


def test_the_memory_in_the_notes_is_what_is_forecast():
    video = VideoGeometry(width=832, height=480, frames=960)
    plain = forecast(WAN_1_3B, video, RolloutSettings(), torch.float16)
    told = (
        f"takes {plain.weights / 1e9:.1f} GB of video memory in 16 bits",
        f"{plain.cache / 1e9:.0f} GB, however",
    )
    assert all(text in note_of("text_to_video") for text in told)
    small = RolloutSettings(window=12, sink=3)
    least = forecast(WAN_1_3B, video, small, torch.float16, storage="fp8-host")
    assert least.cache + least.text + least.activations < 1e9
    assert f"takes {forecast(WAN_1_3B, video, small, torch.float16, storage='fp8').cache / 1e9:.1f} GB" in (
        note_of("small_card")
    )


def note_of(name):
    nodes = json.loads((ROOT / "workflows" / f"{name}.json").read_text())["nodes"]
    return next(node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")


@pytest.mark.parametrize("name", NODES)
def test_a_node_is_explained_where_the_user_meets_it(name):
    node = NODES[name]
    assert node.description
    assert node.display_name
    assert sum(not socket.fields.get("optional") for socket in node.inputs) <= 6
    assert sum(socket.is_widget for socket in node.inputs) <= 6
    assert len(node.inputs) <= 11
    assert all(socket.fields.get("tooltip") for socket in node.inputs)


@pytest.mark.parametrize("name", NODES)
def test_the_help_page_names_every_input_and_output(name):
    page = Path(ROOT / "nodes/web/docs" / f"{name}.md").read_text()
    assert page.startswith(f"# {NODES[name].display_name}\n")
    bold = set(re.findall(r"\*\*([^*]+)\*\*", page))
    for socket in NODES[name].inputs:
        assert {socket.name, socket.fields.get("display_name")} & bold, f"{socket.name} is not explained"
    for socket in NODES[name].outputs:
        assert socket.name in bold, f"{socket.name} is not explained"


def test_the_folder_of_the_help_pages_is_the_one_the_host_serves():
    root = (ROOT / "__init__.py").read_text()
    (folder,) = re.findall(r'^WEB_DIRECTORY = "(.+)"$', root, re.MULTILINE)
    assert {page.stem for page in (ROOT / folder / "docs").glob("*.md")} == set(NODES)
