"""What the tests and a reference's own Python hand each other: a folder of safetensors and one table.

Imported on both sides, so it needs torch and safetensors and nothing else.
"""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def ask(folder, settings, weights, inputs):
    """Write the question: settings that fit into JSON, and the tensors of the weights and of the inputs."""
    Path(folder, "settings.json").write_text(json.dumps(settings))
    save_file(weights, Path(folder, "weights.safetensors"), metadata=metadata(settings))
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, Path(folder, "in.safetensors"))


def metadata(settings):
    """Return the metadata of the weights: a mark that ComfyUI knows a causal student by."""
    mark = {"transformer": {"causal_ar": True}}
    return {"config": json.dumps(mark)} if settings.get("causal_mark") else None


def receive(folder):
    """Read the question: settings, weights, inputs."""
    settings = json.loads(Path(folder, "settings.json").read_text())
    return settings, load_file(Path(folder, "weights.safetensors")), load_file(Path(folder, "in.safetensors"))


def answer(folder, outputs):
    """Write the answer, as float32."""
    tensors = {name: tensor.detach().float().contiguous().clone() for name, tensor in outputs.items()}
    save_file(tensors, Path(folder, "out.safetensors"))


def read_answer(folder):
    """Read the answer."""
    return load_file(Path(folder, "out.safetensors"))
