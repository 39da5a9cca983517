"""What a weights file holds, from its header alone.

Quoted parameter names such as ``blocks.0.ffn.0.weight`` are Wan's own and canonical here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from .config import RolloutSettings, StudentConfig, from_table
from .errors import CheckpointError, SettingsError
from .tiny_autoencoder import METADATA_KEY as AUTOENCODER_KEY
from .weights_file import Header, read_header

STUDENT_KEY = "sfpp"
"""Metadata: JSON table with ``student``, ``rollout``, ``stage`` and whatever training noted."""

WORDS_KEY = "sfpp_words"
"""Metadata: JSON table with the vocabulary of a word encoder."""

HOST_KEY = "config"
"""Metadata that core ComfyUI reads."""

TEACHER = "teacher"
"""The one stage whose result does not generate chunk by chunk."""

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
"""Put before Wan's names by some tools; one of them at most is removed."""

HEAD_DIM = 128
"""Channels of one attention head in every published Wan; assumed where a file does not say."""

LONGEST_TEXT = 8192
"""Text embeddings a student may ask for; more is a damaged file."""

Kind = Literal["student", "wan", "autoencoder", "words", "unknown"]
"""A transformer with our metadata, any other of Wan, the demo's autoencoder, its words, something else."""

T = TypeVar("T", StudentConfig, RolloutSettings)

_FOREIGN: tuple[tuple[str, str], ...] = (
    ("lora_", "a LoRA, which changes a model and is none by itself"),
    ("condition_embedder.", "a Wan transformer in the naming of diffusers; Wan's own naming is read"),
    ("input_blocks.", "a Stable Diffusion UNet"),
    ("double_blocks.", "a FLUX or HunyuanVideo transformer"),
    ("joint_blocks.", "a Stable Diffusion 3 transformer"),
    ("down_blocks.", "a UNet or an image autoencoder in the naming of diffusers"),
    ("decoder.middle.", "a Wan autoencoder"),
    ("decoder.mid", "an autoencoder"),
    ("text_model.", "a CLIP text encoder"),
    ("encoder.block.", "a T5 text encoder"),
    ("transformer_blocks.", "some other transformer"),
)
"""Parts of tensor names by which models that cannot be used here are recognised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """What a safetensors file holds."""

    path: Path

    kind: Kind

    looks_like: str
    """The kind in words, for people."""

    dtypes: tuple[str, ...]
    """Dtypes of the tensors, the one with most numbers first."""

    tensors: int
    """Tensors in the file."""

    parameters: int
    """Numbers in all tensors together."""

    file_bytes: int
    """Size of the file."""

    prefix: str = ""
    """What stands before Wan's names."""

    config: StudentConfig | None = None
    """Architecture, if the file holds a transformer."""

    settings: RolloutSettings | None = None
    """How the student was trained to be rolled out, if the file says so."""

    stage: str = ""
    """Training stage that made it, if the file says so, e.g. ``ode``."""

    causal: bool = False
    """Whether the file says that it was trained to generate chunk by chunk."""

    notes: Mapping[str, Any] = field(default_factory=dict)
    """What else training wrote down."""


def inspect(path: Path) -> FileInfo:
    """Say what a file holds; no weight is loaded.

    Raises:
        CheckpointError: The file is missing, damaged or no safetensors file, or its metadata is impossible.
    """
    return describe(path, read_header(path))


def describe(path: Path, header: Header) -> FileInfo:
    """Say what the file with this header holds.

    Raises:
        CheckpointError: Its metadata is impossible, or contradicts its tensors.
    """
    counts: dict[str, int] = {}
    for entry in header.tensors.values():
        counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.numbers
    common: dict[str, Any] = {
        "path": path,
        "dtypes": tuple(sorted(counts, key=lambda name: -counts[name])),
        "tensors": len(header.tensors),
        "parameters": sum(counts.values()),
        "file_bytes": header.file_bytes,
    }
    if (prefix := _wan_prefix(header)) is not None:
        return _describe_transformer(path, header, prefix, common)
    if AUTOENCODER_KEY in header.metadata:
        return FileInfo(**common, kind="autoencoder", looks_like="the demo's autoencoder")
    if WORDS_KEY in header.metadata:
        return FileInfo(**common, kind="words", looks_like="the demo's words")
    return FileInfo(**common, kind="unknown", looks_like=_recognise(header))


def listed(names: list[str], *, shown: int = 4) -> str:
    """Return the first few names, and the count of the others."""
    first = ", ".join(name[:80] for name in names[:shown])
    return f"{first} and {len(names) - shown} more" if len(names) > shown else first


def _describe_transformer(path: Path, header: Header, prefix: str, common: dict[str, Any]) -> FileInfo:
    """Say what a Wan transformer is; our own metadata knows more than its shapes and must agree with them."""
    shapes = {name.removeprefix(prefix): entry.shape for name, entry in header.tensors.items()}
    table = header.table(STUDENT_KEY, where=str(path))
    if table is None:
        config = _config_from_shapes(path, shapes)
        common |= {"prefix": prefix, "config": config, "causal": _has_host_mark(header)}
        return FileInfo(**common, kind="wan", looks_like="a Wan transformer without settings of ours")
    where = f"{path}, metadata {STUDENT_KEY!r}"
    config = _read(StudentConfig, table.pop("student", None), where)
    settings = _read(RolloutSettings, table.pop("rollout", None), where)
    _check_agreement(path, config, _config_from_shapes(path, shapes, heads=config.heads))
    stage = str(table.pop("stage", ""))
    return FileInfo(
        **common,
        kind="student",
        looks_like="a teacher" if stage == TEACHER else "a student",
        prefix=prefix,
        config=config,
        settings=settings,
        stage=stage,
        causal=stage != TEACHER,
        notes=table,
    )


def _read(kind: type[T], table: Any, where: str) -> T:
    """Return the dataclass that ``table`` describes."""
    if not isinstance(table, dict):
        raise CheckpointError(f"{where} lacks the {kind.__name__}; save the file again.")
    hints = get_type_hints(kind)
    for entry in fields(kind):
        value, hint = table.get(entry.name), hints[entry.name]
        right = {int: (int,), float: (int, float), tuple[float, ...]: (list,)}.get(hint, (str,))
        if entry.name in table and type(value) not in right:
            raise CheckpointError(f"{where}: {entry.name} is {value!r:.40}; save the file again.")
    try:
        return from_table(kind, table, where=where)
    except SettingsError as error:
        raise CheckpointError(f"{where} is impossible: {error} Save the file again.") from error


def _check_agreement(path: Path, said: StudentConfig, seen: StudentConfig) -> None:
    """Refuse metadata that contradicts the tensors."""
    for name in ("dim", "ffn_dim", "layers", "channels", "text_dim", "freq_dim"):
        if getattr(said, name) != getattr(seen, name):
            raise CheckpointError(
                f"{path}: the metadata says {name} {getattr(said, name)}, its tensors {getattr(seen, name)}; "
                "save the file again."
            )
    if said.text_length > LONGEST_TEXT:
        raise CheckpointError(
            f"{path} asks for {said.text_length} text embeddings; at most {LONGEST_TEXT} make sense."
        )


def _wan_prefix(header: Header) -> str | None:
    """Return what stands before Wan's names, or ``None`` if this is no Wan transformer."""
    for prefix in ("", *PREFIXES):
        if all(prefix + name in header.tensors for name in ("head.modulation", "patch_embedding.weight")):
            return prefix
    return None


def _has_host_mark(header: Header) -> bool:
    """Return whether the file carries core ComfyUI's mark of a student that generates chunk by chunk."""
    try:
        return bool(json.loads(header.metadata[HOST_KEY])["transformer"]["causal_ar"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return False


def _config_from_shapes(
    path: Path, shapes: Mapping[str, tuple[int, ...]], *, heads: int | None = None
) -> StudentConfig:
    """Return the architecture that the shapes of a Wan transformer imply."""
    if empty := [name for name, shape in shapes.items() if not all(shape)]:
        raise CheckpointError(f"{path}: {empty[0]} is empty; the file is damaged, get it again.")
    try:
        dim, channels = shapes["patch_embedding.weight"][:2]
        text_dim = shapes["text_embedding.0.weight"][1]
        freq_dim = shapes["time_embedding.0.weight"][1]
        ffn_dim = shapes["blocks.0.ffn.0.weight"][0]
        outputs = shapes["head.head.weight"][0] // 4
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{path} is an incomplete Wan transformer ({error}); get it again.") from error
    if channels != outputs:
        raise CheckpointError(
            f"{path} takes {channels} latent channels and gives {outputs}: a Wan of another task. "
            "Choose a text-to-video model."
        )
    if heads is None and dim % HEAD_DIM:
        raise CheckpointError(
            f"{path} has width {dim}, no multiple of Wan's head dim, {HEAD_DIM}; is it a Wan?"
        )
    return StudentConfig(
        dim=dim,
        ffn_dim=ffn_dim,
        heads=heads or dim // HEAD_DIM,
        layers=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        channels=channels,
        text_dim=text_dim,
        freq_dim=freq_dim,
    )


def _recognise(header: Header) -> str:
    """Say what a file that is of no use here looks like."""
    for part, what in _FOREIGN:
        if any(part in name for name in header.tensors):
            return what
    return f"a model of an unknown kind (it begins with {listed(list(header.tensors)[:1]) or 'nothing'})"
