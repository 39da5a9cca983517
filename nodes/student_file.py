"""Students of every layout as models of the host.

What core can load by itself it loads by itself. Of anything else the tensors are read by this package and
handed to core under Wan's names, so that LoRA, casting and offloading are core's in any case.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..sfpp_core.checkpoint import check_student, parameters
from ..sfpp_core.config import WAN_1_3B
from ..sfpp_core.errors import CheckpointError
from ..sfpp_core.inspection import HOST_KEY, FileInfo
from ..sfpp_core.naming import Choice
from ..sfpp_core.presets import SELF_FORCING, of_family
from ..sfpp_core.weights import Weights, open_weights
from . import _host
from .student_settings import StudentSettings

AUTO = "auto"
"""Choice of weights or preset that leaves it to the file."""

PREFIXES = ("", "model.", "model.diffusion_model.")
"""What core removes before Wan's names."""

DEQUANTISED = torch.bfloat16
"""What quantised weights become that core could not load as they are."""

_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.\w+)")


def without_shards(names: Sequence[str]) -> list[str]:
    """Return the files to choose from: shards are one entry, their index."""
    return list(dict.fromkeys(_SHARD.sub(r"\1\2.index.json", name) for name in names))


def load_student_file(path: Path, *, choice: Choice = AUTO, preset: str = AUTO) -> Any:
    """Return the model of the host in ``path``, with the settings it is rolled out with attached.

    Args:
        path: File or index of shards.
        choice: Which weights of a training state.
        preset: A name of ``presets.FAMILIES``, or ``AUTO``.

    Raises:
        CheckpointError: It is no student of any layout that is read here.
        SettingsError: There is no such preset.
    """
    weights = open_weights(path)
    info = check_student(path, weights, choice=choice)
    settings = settings_in(info, preset)
    if core_reads(path, info, weights.metadata):
        model = _host.load_model(path)
    else:
        model = _host.load_tensors(dict(tensors(weights, info)))
    if model is None:
        raise CheckpointError(f"ComfyUI does not know what kind of Wan {path.name} is; choose another file.")
    return _host.attach(model, settings)


def core_reads(path: Path, info: FileInfo, metadata: Mapping[str, str]) -> bool:
    """Return whether core loads exactly these weights from the file itself.

    It cannot if a student of 48 channels carries its mark of causal ones, which are of 16.
    """
    assert info.config is not None
    if HOST_KEY in metadata and info.config.channels != WAN_1_3B.channels:
        return False
    prefixes = (prefix for prefix in PREFIXES if all(prefix + name == at for name, at in info.names.items()))
    return path.suffix in (".safetensors", ".sft") and not info.choices and next(prefixes, None) is not None


def tensors(weights: Weights, info: FileInfo) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters under Wan's names, one after another, quantised ones as ``DEQUANTISED``."""
    for name, tensor in parameters(weights, info):
        yield name, tensor.to(DEQUANTISED) if name in info.quantisation.scales else tensor


def settings_in(info: FileInfo, preset: str = AUTO) -> StudentSettings:
    """Return how a student is rolled out: as ``preset`` says, or its file, or the family it is seen to be of.

    Raises:
        SettingsError: There is no such preset.
    """
    assert info.config is not None
    chosen = info.settings or of_family(info.family or SELF_FORCING)
    return StudentSettings(
        rollout=chosen if preset == AUTO else of_family(preset),
        text_length=info.config.text_length,
        causal=info.causal or preset != AUTO,
    )
