"""What weights on disk hold, from names, shapes and metadata alone.

Quoted parameter names such as ``blocks.0.ffn.0.weight`` are Wan's own and canonical here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from . import adapter_signs
from .config import WAN_14B, RolloutSettings, StudentConfig, from_table
from .errors import CheckpointError, SettingsError
from .naming import GENERATOR, Choice, Layout, find_layout
from .presets import SELF_FORCING
from .quantised import Quantisation, separate
from .tiny_autoencoder import METADATA_KEY as AUTOENCODER_KEY
from .weights import Contents, open_weights

STUDENT_KEY = "sfpp"
"""Metadata: JSON table with ``student``, ``rollout``, ``stage`` and whatever training noted."""

WORDS_KEY = "sfpp_words"
"""Metadata: JSON table with the vocabulary of a word encoder."""

HOST_KEY = "config"
"""Metadata that core ComfyUI reads."""

TEACHER = "teacher"
"""The one stage whose result does not generate chunk by chunk."""

HEAD_DIM = 128
"""Channels of one attention head in every published Wan; assumed where a file does not say."""

LONGEST_TEXT = 8192
"""Text embeddings a student may ask for; more is a damaged file."""

Kind = Literal["student", "wan", "adapter", "autoencoder", "words", "unknown"]
"""A transformer with our metadata, any other of Wan, a LoRA, the demo's autoencoder or words, or none."""

T = TypeVar("T", StudentConfig, RolloutSettings)

_PART = "a part of a Wan transformer, perhaps one of its shards; name their folder"

_FOREIGN: tuple[tuple[str, str], ...] = (
    ("self_attn.norm_q.", _PART),
    ("attn1.norm_q.", _PART),
    ("condition_embedder.", _PART),
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
    """What weights hold."""

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

    format: str = ""
    """Naming and container, for people, e.g. ``diffusers, 3 shards``."""

    quantisation: Quantisation = field(default_factory=Quantisation)
    """How the weights are kept."""

    names: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Where each parameter of a transformer is: stored name by Wan's name."""

    choices: tuple[str, ...] = ()
    """Sets of weights that can be chosen from, e.g. ``generator`` and ``generator_ema``."""

    part: str = ""
    """The one chosen."""

    others: tuple[str, ...] = ()
    """What else is in the file and not used, e.g. ``critic``."""

    config: StudentConfig | None = None
    """Architecture, if the file holds a transformer."""

    settings: RolloutSettings | None = None
    """How the student was trained to be rolled out, if the file says so."""

    stage: str = ""
    """Training stage that made it, if the file says so, e.g. ``ode``."""

    family: str = ""
    """Whose way of rolling out fits, a name of ``presets``, as far as the file shows; else empty."""

    causal: bool = False
    """Whether the file says that it was trained to generate chunk by chunk."""

    notes: Mapping[str, Any] = field(default_factory=dict)
    """What else training wrote down."""


def inspect(path: Path) -> FileInfo:
    """Say what a file, an index of shards or a folder holds; no weight of a safetensors file is read.

    Raises:
        CheckpointError: It is missing, damaged or no weights, or its metadata is impossible.
    """
    return describe(path, open_weights(path))


def describe(path: Path, contents: Contents, *, choice: Choice = "auto") -> FileInfo:
    """Say what these weights are.

    Args:
        path: Where they are.
        contents: What was opened there.
        choice: Which weights of a training state.

    Raises:
        CheckpointError: Metadata is impossible or contradicts the tensors, tensors are kept in a way that is
            not read, or their names are those of two files.
    """
    counts: dict[str, int] = {}
    for entry in contents.entries.values():
        counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.numbers
    common: dict[str, Any] = {
        "path": path,
        "dtypes": tuple(sorted(counts, key=lambda name: -counts[name])),
        "tensors": len(contents.entries),
        "parameters": sum(counts.values()),
        "file_bytes": contents.file_bytes,
        "format": contents.container,
    }
    layout = find_layout(path, contents.entries, parts=contents.parts, choice=choice)
    if layout is not None:
        return _describe_transformer(path, contents, layout, common)
    if AUTOENCODER_KEY in contents.metadata:
        return FileInfo(**common, kind="autoencoder", looks_like="the demo's autoencoder")
    if WORDS_KEY in contents.metadata:
        return FileInfo(**common, kind="words", looks_like="the demo's words")
    if adapter := adapter_signs.recognise(contents.entries):
        return FileInfo(**common, kind="adapter", looks_like=adapter)
    return FileInfo(**common, kind="unknown", looks_like=_recognise(contents))


def listed(names: list[str], *, shown: int = 4) -> str:
    """Return the first few names, and the count of the others."""
    first = ", ".join(name[:80] for name in names[:shown])
    return f"{first} and {len(names) - shown} more" if len(names) > shown else first


def _describe_transformer(path: Path, contents: Contents, layout: Layout, common: dict[str, Any]) -> FileInfo:
    """Say what a Wan transformer is; our own metadata knows more than its shapes and must agree with them."""
    names, quantisation = separate(path, layout.names, contents.entries)
    shapes = {name: contents.entries[stored].shape for name, stored in names.items()}
    common |= {
        "names": names,
        "quantisation": quantisation,
        "choices": layout.choices,
        "part": layout.part,
        "others": layout.others,
    }
    table = contents.table(STUDENT_KEY, where=str(path))
    if table is None:
        config = _config_from_shapes(path, shapes)
        family = _family(layout, contents, config)
        common["format"] = _format(layout, contents.container, family)
        return FileInfo(
            **common,
            kind="wan",
            looks_like="a Wan transformer without settings of ours",
            config=config,
            family=family,
            causal=bool(family) or _has_host_mark(contents),
        )
    where = f"{path}, metadata {STUDENT_KEY!r}"
    config = _read(StudentConfig, table.pop("student", None), where)
    settings = _read(RolloutSettings, table.pop("rollout", None), where)
    _check_agreement(path, config, _config_from_shapes(path, shapes, heads=config.heads))
    stage = str(table.pop("stage", ""))
    return FileInfo(
        **common,
        kind="student",
        looks_like="a teacher" if stage == TEACHER else "a student",
        config=config,
        settings=settings,
        stage=stage,
        causal=stage != TEACHER,
        notes=table,
    )


def _family(layout: Layout, contents: Contents, config: StudentConfig) -> str:
    """Return whose student a transformer without metadata of ours is, or nothing if that cannot be seen."""
    if layout.part in GENERATOR:
        return SELF_FORCING
    # Krea's is the only 14B published as the bare state dict of Self-Forcing's wrapper.
    same_size = replace(config, text_dim=WAN_14B.text_dim, freq_dim=WAN_14B.freq_dim) == WAN_14B
    return "krea" if layout.prefix == "model." and not contents.parts and same_size else ""


def _format(layout: Layout, container: str, family: str) -> str:
    """Return naming and container in words."""
    if layout.part in GENERATOR:
        return f"Self-Forcing, {container}, {layout.part}"
    whose = "Krea" if family == "krea" else {"wan": "Wan", "diffusers": "diffusers"}[layout.naming]
    under = f" under {layout.prefix}" if layout.prefix else ""
    return f"{whose}{under}, {container}"


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


def _has_host_mark(contents: Contents) -> bool:
    """Return whether the file carries core ComfyUI's mark of a student that generates chunk by chunk."""
    try:
        return bool(json.loads(contents.metadata[HOST_KEY])["transformer"]["causal_ar"])
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


def _recognise(contents: Contents) -> str:
    """Say what a file that is of no use here looks like."""
    for part, what in _FOREIGN:
        if any(part in name for name in contents.entries):
            return what
    return f"a model of an unknown kind (it begins with {listed(list(contents.entries)[:1]) or 'nothing'})"
