"""LoRA files merged into the weights of a student, in float32.

``W += strength * alpha / rank * up @ down``, or plus a whole difference where the file holds one. Every
tensor of the file must be understood and fit a parameter: whatever does not is an error, never left out.
Differences of modulations are added too, which core ComfyUI (0.8 to 0.27) reads but does not apply.

Quoted parameter names such as ``blocks.0.ffn.0.weight`` are Wan's own.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import parameter_shapes
from .config import StudentConfig
from .errors import CheckpointError, SettingsError
from .inspection import listed
from .lora_layouts import Part, Role, Scaling, find_scaling, foreign, has_role, understand
from .weights import Weights, open_weights
from .weights_file import DTYPES

SIZES = {1536: "Wan 2.1 1.3B", 3072: "Wan 2.2 5B", 5120: "Wan 2.1 14B"}
"""Published transformers by their width."""

FOLDER_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
"""What a folder written by PEFT or diffusers calls the weights."""

APPLIED, NOT_APPLIED = "generator_lora.", "critic_lora."
"""What a training checkpoint of LongLive 1.0 puts before the LoRA of the student, and before the critic's."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Change:
    """What a file adds to one parameter."""

    tensors: tuple[str, ...]
    """Names in the file: the up and the down factor, or the difference alone."""

    scale: float
    """``alpha / rank``; 1 for a difference."""


class Adapter:
    """A LoRA of a known strength, checked against a student; its tensors are read where they are merged.

    Use::

        adapters = [read_adapter(path, config, strength=0.8)]
        for adapter in adapters:
            if name in adapter.changed:
                weight = adapter.merged(name, weight)
    """

    def __init__(self, weights: Weights, changes: Mapping[str, _Change], *, strength: float) -> None:
        """Keep what ``read_adapter`` has checked."""
        self.strength = strength
        self._weights = weights
        self._changes = changes if strength else {}

    @property
    def path(self) -> Path:
        """The file."""
        return self._weights.path

    @property
    def changed(self) -> frozenset[str]:
        """Names of the parameters that are changed; none at strength 0."""
        return frozenset(self._changes)

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return ``weight``, the parameter called ``name``, with the LoRA in it.

        Args:
            name: Wan's name, e.g. ``blocks.0.self_attn.q.weight``.
            weight: Float32, on any device; it is not written to.

        Returns:
            Float32 on the same device: a new tensor, or ``weight`` itself if the LoRA leaves it alone.

        Raises:
            CheckpointError: The file has gone or was changed since it was read.
        """
        if name not in self._changes:
            return weight
        change = self._changes[name]
        parts = [self._weights.tensor(part).to(weight.device, torch.float32) for part in change.tensors]
        factor = self.strength * change.scale
        if len(parts) == 1:
            return torch.add(weight, parts[0].view_as(weight), alpha=factor)
        up, down = (part.flatten(1) for part in parts)
        return torch.addmm(weight.flatten(1), up, down, alpha=factor).view_as(weight)


def parse_lora_option(text: str) -> tuple[Path, float]:
    """Return file and strength of ``FILE`` or ``FILE:STRENGTH``, as written on a command line.

    ``C:/x.safetensors`` is a file alone; ``C:/x.safetensors:0.8`` has a strength.

    Raises:
        SettingsError: There is no file, or the strength is no finite number.
    """
    file, colon, said = text.rpartition(":")
    if not colon or "/" in said or "\\" in said or (len(file) == 1 and file.isalpha()):
        file, said = text, "1"
    try:
        strength = float(said)
    except ValueError:
        raise SettingsError(
            f"the strength in {text!r} is {said!r}; it must be a number, e.g. {file or 'FILE'}:0.8. "
            f"If the colon belongs to the name of the file, add a strength: {text}:1"
        ) from None
    _check_strength(strength)
    if not file:
        raise SettingsError(f"{text!r} names no LoRA; write FILE or FILE:STRENGTH, e.g. x.safetensors:0.8.")
    return Path(file), strength


def read_adapter(path: Path, config: StudentConfig, *, strength: float = 1.0) -> Adapter:
    """Check a LoRA against a student; its numbers are read, and read again where they are merged.

    The layout is told by what is in the file: the names of ComfyUI and Wan, of diffusers, of kohya, of PEFT
    (a folder too), of LongLive's ``lora.pt``, and whole differences.

    Args:
        path: File, or a folder that PEFT wrote.
        config: Architecture of the student it is to be merged into.
        strength: Factor of the whole change; a negative one turns it round, 0 changes nothing.

    Raises:
        CheckpointError: No LoRA, of another kind, for another model, incomplete, damaged, or not finite.
        SettingsError: The strength is not finite.
    """
    _check_strength(strength)
    weights = open_weights(_file_in(path))
    names = _applied(weights)
    shapes = parameter_shapes(config)
    modules = _modules(weights, _understood(weights, names, config, shapes))
    scaling = find_scaling(weights, names)
    changes: dict[str, _Change] = {}
    for module, parts in modules.items():
        for parameter, change in _changes(weights, module, parts, scaling):
            if parameter in changes:
                raise CheckpointError(
                    f"{weights.path} changes {parameter} twice: {change.tensors[0]} and "
                    f"{changes[parameter].tensors[0]}; save it again."
                )
            _check_shapes(weights, parameter, change, shapes[parameter])
            changes[parameter] = change
    for change in changes.values():
        _check_numbers(weights, change.tensors)
    return Adapter(weights, changes, strength=strength)


def _check_strength(strength: float) -> None:
    """Refuse a strength that is not finite."""
    if not math.isfinite(strength):
        raise SettingsError(f"the strength of the LoRA is {strength}; it must be a finite number, e.g. 1.")


def _file_in(path: Path) -> Path:
    """Return ``path``, or the LoRA in it if it is a folder of PEFT or diffusers."""
    return next((path / name for name in FOLDER_FILES if (path / name).is_file()), path)


def _applied(weights: Weights) -> dict[str, str]:
    """Return the names in the file by the names to understand: those of the student's LoRA alone."""
    if not any(name.startswith(APPLIED) for name in weights.entries):
        return {name: name for name in weights.entries}
    if critic := [name for name in weights.entries if name.startswith(NOT_APPLIED)]:
        logger.warning(
            "%s: %s (%d tensors) is not applied; it serves nothing but training.",
            weights.path.name,
            NOT_APPLIED[:-1],
            len(critic),
        )
    return {name.removeprefix(APPLIED): name for name in weights.entries if not name.startswith(NOT_APPLIED)}


def _understood(
    weights: Weights, names: Mapping[str, str], config: StudentConfig, shapes: Mapping[str, tuple[int, ...]]
) -> list[Part]:
    """Return what every tensor is; all of them must belong to the student."""
    for name in names:
        if what := foreign(name):
            raise CheckpointError(f"{weights.path} holds {name[:80]}: {what}.")
    if not any(map(has_role, names)):
        raise CheckpointError(
            f"{weights.path} is no LoRA; it holds {listed(list(names)) or 'nothing'}. Choose a LoRA."
        )
    parts = {name: understand(name, stored) for name, stored in names.items()}
    known = [part for part in parts.values() if part is not None]
    _check_width(weights, known, config)
    fitting = [part for part in known if part.role == "alpha" or part.parameter in shapes]
    if len(fitting) < len(names):
        fits = {part.stored for part in fitting}
        lost = [name for name in names.values() if name not in fits]
        raise CheckpointError(
            f"{weights.path} has tensors that belong to no parameter of a Wan 2.1 text-to-video student of "
            f"{config.layers} layers: {listed(lost)}; choose a LoRA for this model."
        )
    return fitting


def _check_width(weights: Weights, parts: Sequence[Part], config: StudentConfig) -> None:
    """Refuse a LoRA for a Wan of another size, by the width of its residual stream."""
    widths: set[int] = set()
    for part in parts:
        shape, leaf = weights.entries[part.stored].shape, part.module.rpartition(".")[2]
        if part.module.startswith("blocks.") and len(shape) >= 2:
            if part.role == "up" and leaf != "0":
                widths.add(shape[0])
            if part.role == "down" and leaf != "2":
                widths.add(shape[1])
    if widths and config.dim not in widths:
        (seen, *_) = sorted(widths)
        raise CheckpointError(
            f"{weights.path} is for a Wan of width {seen}{_size(seen)}, the student has width "
            f"{config.dim}{_size(config.dim)}; choose a LoRA for the student's size."
        )


def _size(width: int) -> str:
    """Return the published model of this width, in brackets, if there is one."""
    return f" ({SIZES[width]})" if width in SIZES else ""


def _modules(weights: Weights, parts: Sequence[Part]) -> dict[str, dict[Role, Part]]:
    """Return the parts by module and role; each may be there once."""
    modules: dict[str, dict[Role, Part]] = {}
    for part in parts:
        others = modules.setdefault(part.module, {})
        if part.role in others:
            raise CheckpointError(
                f"{weights.path} has {others[part.role].stored} and {part.stored}, the same thing twice: "
                "perhaps two LoRAs. Save each in a file of its own."
            )
        others[part.role] = part
    return modules


def _changes(
    weights: Weights, module: str, parts: Mapping[Role, Part], scaling: Scaling
) -> Iterator[tuple[str, _Change]]:
    """Yield what the parts of one module change, by parameter."""
    pair = [parts[role] for role in ("up", "down") if role in parts]
    if len(pair) == 1 or (not pair and ("alpha" in parts or "up_bias" in parts)):
        raise CheckpointError(
            f"{weights.path} is incomplete: of {module} it has {listed([p.stored for p in parts.values()])} "
            f"but not {'the other factor' if pair else 'the factors'}; get it again."
        )
    if pair:
        up, down = pair
        scale = _scale(weights, parts, scaling)
        yield up.parameter, _Change((up.stored, down.stored), scale)
        if bias := parts.get("up_bias"):
            yield bias.parameter, _Change((bias.stored,), scale)
    for role in ("weight", "bias", "modulation"):
        if part := parts.get(role):
            yield part.parameter, _Change((part.stored,), 1.0)


def _scale(weights: Weights, parts: Mapping[Role, Part], scaling: Scaling) -> float:
    """Return the factor of ``up @ down``: that of the file, or of its description, or 1."""
    down = parts["down"]
    rank = weights.entries[down.stored].shape[0] if weights.entries[down.stored].shape else 0
    if rank == 0:
        raise CheckpointError(f"{weights.path}: {down.stored} is empty; get the file again.")
    if "alpha" not in parts:
        return scaling.of(down.said, rank)
    name = parts["alpha"].stored
    if weights.entries[name].numbers != 1:
        shape = weights.entries[name].shape
        raise CheckpointError(f"{weights.path}: {name} has shape {shape}; it must be one number.")
    alpha = float(weights.tensor(name))
    if not math.isfinite(alpha):
        raise CheckpointError(f"{weights.path}: {name} is {alpha}; the file is damaged, get it again.")
    return alpha / rank


def _check_shapes(weights: Weights, parameter: str, change: _Change, wanted: tuple[int, ...]) -> None:
    """Refuse tensors that do not make a change of the shape ``wanted``."""
    shapes = [weights.entries[name].shape for name in change.tensors]
    if len(shapes) == 1:
        fits = shapes == [wanted]
    else:
        up, down = shapes
        if len(up) >= 2 and math.prod(up[1:]) != down[0]:
            raise CheckpointError(
                f"{weights.path}: {change.tensors[0]} {up} has rank {math.prod(up[1:])}, "
                f"{change.tensors[1]} {down} has rank {down[0]}; they must be equal: get the file again."
            )
        # A factor may be flat or keep the shape of a convolution; the numbers are the same.
        flat = len(wanted) >= 2 and (wanted[0], math.prod(wanted[1:]))
        whole = (math.prod(up[:1]), *down[1:])
        fits = len(up) >= 2 and len(down) >= 2 and (_trimmed(whole) == _trimmed(wanted) or whole == flat)
    if not fits:
        named = " and ".join(f"{name} {shape}" for name, shape in zip(change.tensors, shapes, strict=True))
        raise CheckpointError(
            f"{weights.path}: {named} cannot change {parameter} {wanted}; choose a LoRA for this model."
        )


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return ``shape`` without ones at its end, beyond the second dimension."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _check_numbers(weights: Weights, names: Sequence[str]) -> None:
    """Refuse numbers that cannot be computed with."""
    for name in names:
        dtype = weights.entries[name].dtype
        if dtype not in DTYPES:
            raise CheckpointError(f"{weights.path}: {name} is {dtype}; a LoRA must be {', '.join(DTYPES)}.")
        if not bool(torch.isfinite(weights.tensor(name)).all()):
            raise CheckpointError(
                f"{weights.path}: {name} holds numbers that are not finite; the file is damaged, get it "
                "again."
            )
