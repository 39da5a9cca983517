"""The node pack without a host: a stand-in takes the place of the one module that talks to ComfyUI."""

import importlib
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

ROOT = Path(__file__).parent.parent
NAME = "pack_without_host"
"""The host imports the pack under the name of a path; any other name does as well."""

WIDGETS = {"INT", "FLOAT", "STRING", "COMBO", "BOOLEAN"}
"""Kinds of input that are a widget unless they are linked."""


class Socket:
    """An input or output as a node describes it."""

    def __init__(self, kind, name=None, **fields):
        self.kind, self.name, self.fields = kind, name or fields.get("display_name"), fields

    @property
    def is_widget(self):
        return self.kind in WIDGETS


class Kind:
    """A type of socket, as ``io.Int`` is in the host."""

    def __init__(self, name):
        self.Input = partial(Socket, name)
        self.Output = partial(Socket, name)


SAID = []
"""What the node at work would have said, oldest first."""

SHOWN = []
"""What any node would have shown: its id, ticks done, of how many, and a preview or ``None``."""


def _io():
    """Return what the nodes use of the host's ``io``."""
    names = [*WIDGETS, "MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "IMAGE", "VIDEO"]
    kinds = {name.capitalize(): Kind(name) for name in names}
    return SimpleNamespace(
        **kinds,
        Custom=Kind,
        ComfyNode=type("ComfyNode", (), {"hidden": None}),
        Schema=SimpleNamespace,
        NodeOutput=lambda *values, **fields: SimpleNamespace(values=values, **fields),
        Hidden=SimpleNamespace(prompt="prompt", extra_pnginfo="extra_pnginfo", unique_id="unique_id"),
    )


def load():
    """Return the ``nodes`` package of the pack, over a stand-in for the host."""
    if f"{NAME}.nodes" not in sys.modules:
        package = ModuleType(NAME)
        package.__path__ = [str(ROOT)]
        host = ModuleType(f"{NAME}.nodes._host")
        host.io, host.ComfyExtension = _io(), object
        host.progress_bar = lambda total: SimpleNamespace(update_absolute=lambda done, total: None)
        host.show_progress = lambda *shown: SHOWN.append(shown if len(shown) > 3 else (*shown, None))
        host.finish_progress, host.previews_wanted = (lambda node: None), (lambda: True)
        host.lacks_memory = lambda error: isinstance(error, torch.OutOfMemoryError)
        host.make_room = lambda: None
        host.schema = SimpleNamespace
        host.model_files = lambda: ["some/file.safetensors"]
        host.load, host.say = (lambda *_: None), SAID.append
        host.to_host_latent = lambda latent: latent * 2 + 1
        host.from_host_latent = lambda latent: (latent - 1) / 2
        host.stop_if_cancelled = lambda: None
        host.running = lambda model: nullcontext()
        host.compute_dtype = lambda model: torch.float32
        host.attention_of = lambda model, heads: None
        host.parameter_reader = lambda model: lambda parameter: parameter
        host.own_weights = lambda model: model.model.diffusion_model.named_parameters()
        host.patches = lambda model: getattr(model, "patches", {})
        host.seal = lambda path, metadata: host.sealed.append((path, metadata))
        host.sealed, host.metadata_of = [], lambda node: {"workflow": "w"}
        host.marked_causal = lambda model: False
        host.additions_without_effect = lambda model: []
        host.attached = lambda model: getattr(model, "settings", None)
        host.blocked = lambda message: ("blocked", message)
        host.video = host.player = lambda *values: values
        host.shown_now = []
        host.show_now = host.shown_now.append
        sys.modules |= {NAME: package, host.__name__: host}
        importlib.import_module(f"{NAME}.nodes")
    return sys.modules[f"{NAME}.nodes"]


def module(name):
    """Return one module of the pack, e.g. ``nodes.pace``."""
    load()
    return importlib.import_module(f"{NAME}.{name}")


def schemas():
    """Return the schema of every node by its id."""
    nodes = load()
    classes = [
        value for name, value in vars(nodes).items() if name.startswith("SFPP") and name != "SFPPExtension"
    ]
    return {schema.node_id: schema for schema in (node.define_schema() for node in classes)}
