"""Weights kept in eight bits, and what they were.

A weight of a layer is a fp8 tensor times one scale, kept beside it: ``X.scale_weight`` in older files,
``X.weight_scale`` in newer ones. Scales of a layer's input serve fp8 arithmetic and are of no use here.
Source: ComfyUI, ``comfy/utils.py`` ``convert_old_quants`` and ``comfy/quant_ops.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .errors import CheckpointError
from .weights import Described
from .weights_file import DTYPES

FP8 = ("F8_E4M3", "F8_E5M2")
"""Eight-bit dtypes that can be read, by their name in a file."""

SCALES = (".scale_weight", ".weight_scale")
"""What the scale of a weight is called, after the name of its layer."""

MARKER = "scaled_fp8"
"""An empty tensor that marks older files."""

_UNUSED = (".scale_input", ".input_scale", ".comfy_quant")
_INSTEAD = "Choose the same model in bf16, fp16 or fp8, or load it with ComfyUI's own loader."


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How the weights of a file are kept."""

    scheme: str = ""
    """For people, e.g. ``fp8 with scales``; empty for weights that can be used as they are."""

    scales: Mapping[str, str] = field(default_factory=dict)
    """Stored name of the scale, by the name of its weight."""


def separate(
    path: Path, names: Mapping[str, str], entries: Mapping[str, Described]
) -> tuple[dict[str, str], Quantisation]:
    """Tell the parameters of a model from what belongs to their quantisation.

    Args:
        path: File, for messages.
        names: Stored name by canonical one.
        entries: Dtype and shape by stored name.

    Returns:
        ``names`` of the parameters alone, and how they are kept.

    Raises:
        CheckpointError: They are kept in a way that is not read here, or a scale is missing, alone, or of a
            shape that fits no weight.
    """
    kept, scales = _split(names)
    fp8 = {name: entries[stored].dtype for name, stored in kept.items() if entries[stored].dtype in FP8}
    for name, stored in kept.items():
        if entries[stored].dtype not in (*DTYPES, *FP8):
            raise CheckpointError(
                f"{path}: {name} is {_scheme(name, kept, entries)}, which is not read. {_INSTEAD}"
            )
    _check_scales(path, kept, scales, entries)
    if not fp8:
        return kept, Quantisation()
    kinds = " and ".join(sorted({dtype[3:].lower() for dtype in fp8.values()}))
    if not scales:
        return kept, Quantisation(f"fp8 {kinds} without scales")
    if bare := sorted(fp8.keys() - scales.keys()):
        raise CheckpointError(f"{path}: {bare[0]} is {fp8[bare[0]]} and lacks its scale; get the file again.")
    return kept, Quantisation(f"fp8 {kinds} with scales", scales)


def dequantised(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the weight that was quantised, float32.

    Args:
        weight: Eight-bit numbers, rows first.
        scale: One number, or one per row.
    """
    rows = (-1, *[1] * (weight.ndim - 1)) if scale.numel() > 1 else ()
    return weight.float() * scale.float().reshape(rows)


def _split(names: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the stored names of parameters, and those of scales by the name of their weight."""
    kept: dict[str, str] = {}
    scales: dict[str, str] = {}
    for name, stored in names.items():
        layer, dot, last = name.rpartition(".")
        if dot + last in SCALES:
            scales[f"{layer}.weight"] = stored
        elif last != MARKER and not (dot + last in _UNUSED and f"{layer}.weight" in names):
            kept[name] = stored
    return kept, scales


def _check_scales(
    path: Path, names: Mapping[str, str], scales: Mapping[str, str], entries: Mapping[str, Described]
) -> None:
    """Refuse scales that belong to no eight-bit weight, or do not fit it."""
    for name, stored in scales.items():
        if name not in names:
            raise CheckpointError(f"{path} has {stored[:80]} but lacks {name[:80]}; get it again.")
        weight, scale = entries[names[name]], entries[stored]
        if weight.dtype not in FP8:
            raise CheckpointError(f"{path}: {name} has a scale but is {weight.dtype}, not fp8. {_INSTEAD}")
        if scale.numbers not in (1, weight.shape[0] if weight.shape else 1) or scale.dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: {stored[:80]} is {scale.dtype} {scale.shape}; one scale for all rows, or one for "
                f"each, is read. {_INSTEAD}"
            )


def _scheme(name: str, names: Mapping[str, str], entries: Mapping[str, Described]) -> str:
    """Say how a weight is kept that cannot be read."""
    layer = name.rpartition(".")[0]
    dtype = entries[names[name]].dtype
    return f"nvfp4 ({dtype})" if f"{layer}.weight_scale_2" in names else dtype
