"""Every workflow names only nodes, inputs and values that exist, and every node is explained."""

import json
import re
from pathlib import Path

import pytest
from pack import ROOT, Socket, schemas

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
NODES = schemas()
SURFACE = {
    "SFPPLoadStudent": (["student"], ["MODEL"]),
    "SFPPLoadDemo": ([], ["CLIP", "VAE"]),
    "SFPPCacheSettings": (["window", "sink", "sink_positions", "storage"], ["SFPP_CACHE"]),
    "SFPPLongSampler": (
        ["model", "conditioning", "width", "height", "seconds", "video_seed", "cache", "start"],
        ["LATENT"],
    ),
    "SFPPDecodeToVideo": (
        ["samples", "filename_prefix", "enlarge", "image_seconds", "vae", "decoder", "tile"],
        ["VIDEO", "IMAGE"],
    ),
}
"""Saved workflows refer to nodes by these names; they never change."""

CORE = {
    "CLIPTextEncode": ([Socket("CLIP", "clip"), Socket("STRING", "text")], ["CONDITIONING"]),
    "MarkdownNote": ([Socket("STRING", "text")], []),
}
"""What the workflows use of the host: inputs and kinds of output."""


def name_of(path):
    return path.stem


def described(kind):
    """Return the inputs and the kinds of output of a node type."""
    if kind in CORE:
        return CORE[kind]
    assert kind in NODES, f"no node is called {kind}"
    return NODES[kind].inputs, [output.kind for output in NODES[kind].outputs]


def problem(socket: Socket, value):
    """Return what is wrong with the value of a widget, or an empty text."""
    limits = socket.fields
    if socket.kind == "COMBO" and value not in limits["options"]:
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
        assert len(values) == len(widgets), (
            f"{node['type']} has widgets {[socket.name for socket in widgets]}"
        )
        problems = [problem(socket, value) for socket, value in zip(widgets, values, strict=True)]
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
def test_a_note_explains_the_workflow(path):
    assert "MarkdownNote" in {node["type"] for node in json.loads(path.read_text())["nodes"]}


@pytest.mark.parametrize("name", NODES)
def test_a_node_is_explained_where_the_user_meets_it(name):
    node = NODES[name]
    assert node.description
    assert node.display_name
    assert len(node.inputs) <= 8
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
