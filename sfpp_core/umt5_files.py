"""umT5 encoders on disk: whether a file is one, its sizes, and its weights one by one.

Names such as ``encoder.block.0.layer.0.layer_norm.weight`` are those of transformers and canonical here;
``blocks.0.norm1.weight`` and its like are Wan's own.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError
from .inspection import listed
from .weights import Weights, open_weights

TOKENIZER_TENSOR = "spiece_model"
"""Tensor in which ComfyUI's single file carries its tokenizer, as bytes."""

FLOATS: dict[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""Bytes of the numbers that can be computed with, by their name in the file."""

SMALL_TENSOR = 2**16
"""Numbers up to which a tensor is part of the fingerprint."""

WEIGHTS_SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".bin")
"""How files of weights are called, among which the encoder of a folder is looked for."""

REMEDY = (
    "Choose umT5-XXL: models_t5_umt5-xxl-enc-bf16.pth of Wan, umt5_xxl_fp16 or umt5_xxl_fp8_e4m3fn_scaled of "
    "ComfyUI, or a folder of diffusers with text_encoder and tokenizer."
)
"""What to tell whoever chose something else."""

HF, WAN = "transformers", "Wan"
"""Whose names the tensors have."""

Shape = tuple[int, ...]

_FIRST = {HF: "encoder.block.0.layer.0.SelfAttention.q.weight", WAN: "blocks.0.ffn.gate.0.weight"}
"""A name by which each naming is recognised."""

_LAYERS = {HF: "encoder.block.", WAN: "blocks."}
"""What stands before the number of a layer."""

_WAN_NAMES = {
    "shared.weight": "token_embedding.weight",
    "encoder.final_layer_norm.weight": "norm.weight",
    "layer.0.SelfAttention.q.weight": "attn.q.weight",
    "layer.0.SelfAttention.k.weight": "attn.k.weight",
    "layer.0.SelfAttention.v.weight": "attn.v.weight",
    "layer.0.SelfAttention.o.weight": "attn.o.weight",
    "layer.0.SelfAttention.relative_attention_bias.weight": "pos_embedding.embedding.weight",
    "layer.0.layer_norm.weight": "norm1.weight",
    "layer.1.DenseReluDense.wi_0.weight": "ffn.gate.0.weight",
    "layer.1.DenseReluDense.wi_1.weight": "ffn.fc1.weight",
    "layer.1.DenseReluDense.wo.weight": "ffn.fc2.weight",
    "layer.1.layer_norm.weight": "norm2.weight",
}
"""Wan's names by the canonical ones, of a layer without what stands before them."""

_SCALES = ("weight_scale", "scale_weight")
"""What the scale of a weight is called, in newer and in older files."""

_BESIDE_A_WEIGHT = ("scale_input", "input_scale", "comfy_quant")
"""What quantised files hold beside a weight and its scale; of use only where they are multiplied in fp8."""

_NOT_NEEDED = (TOKENIZER_TENSOR, "scaled_fp8", "encoder.embed_tokens.weight", "lm_head.weight")
"""Besides the weights: the tokenizer, a mark, a copy, and the head of an encoder with decoder."""

_FOREIGN: tuple[tuple[str, str], ...] = (
    ("patch_embedding", "a Wan transformer"),
    ("text_model.", "a CLIP text encoder"),
    ("transformer.resblocks.", "a CLIP text encoder"),
    ("lora_", "a LoRA"),
    ("decoder.middle.", "a Wan autoencoder"),
    ("decoder.mid", "an autoencoder"),
    ("self_attn.q_proj", "a language model"),
)
"""Parts of tensor names by which models that are no T5 are recognised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UMT5Sizes:
    """Architecture of a umT5 encoder."""

    vocabulary: int
    """Rows of the token embedding."""

    dim: int
    """Width of the embeddings it makes."""

    ffn_dim: int
    """Width of the feed-forward layer."""

    heads: int
    """Attention heads."""

    head_dim: int
    """Channels of one head."""

    layers: int
    """Transformer layers."""

    buckets: int
    """Distances between tokens that are told apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UMT5File:
    """A umT5 encoder on disk that is known to be whole, by its header."""

    path: Path

    weights: Weights

    sizes: UMT5Sizes

    naming: str
    """Whose names the tensors have."""

    prefix: str
    """What stands before each of them."""

    names: Mapping[str, str]
    """Names in the file by the canonical ones."""

    scales: Mapping[str, str]
    """Names of the scales of quantised weights, by the canonical name of the weight."""

    def dtypes(self) -> tuple[str, ...]:
        """Return the dtypes of the weights, the one with most numbers first."""
        counts: dict[str, int] = {}
        for name in self.names.values():
            entry = self.weights.entries[name]
            counts[entry.dtype] = counts.get(entry.dtype, 0) + math.prod(entry.shape)
        return tuple(sorted(counts, key=lambda name: -counts[name]))

    def tensor(self, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Return the weight of a canonical name, dequantised.

        Raises:
            CheckpointError: It holds numbers that are not finite.
        """
        weight = self.weights.tensor(self.names[name])
        if name in self.scales:
            scale = self.weights.tensor(self.scales[name]).to(device, torch.float32)
            weight = weight.to(device).float().mul_(scale)
        return self._finite(name, weight.to(device, dtype))

    def rows(self, name: str, rows: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Return some rows of a table of embeddings, ``(rows, dim)``; the others are never converted."""
        table = self.weights.tensor(self.names[name])
        # Not every dtype can be indexed; bytes can.
        chosen = table.view(torch.uint8)[rows].view(table.dtype)
        return self._finite(name, chosen.to(device, torch.float32).to(dtype))

    def layer(self, layer: int) -> list[str]:
        """Return the canonical names of the weights of one layer, without what stands before them."""
        start = f"encoder.block.{layer}."
        return [name.removeprefix(start) for name in self.names if name.startswith(start)]

    def tokenizer(self) -> bytes | None:
        """Return the sentencepiece model that the file carries, or ``None``."""
        if TOKENIZER_TENSOR not in self.weights.entries:
            return None
        return self.weights.tensor(TOKENIZER_TENSOR).numpy().tobytes()

    def fingerprint(self) -> str:
        """Return a digest of names, shapes and of the numbers of all small tensors: norms, biases, scales.

        It tells encoders apart without reading their weights, and survives copying and renaming.
        """
        digest = hashlib.sha256(str(self.weights.file_bytes).encode())
        for name, entry in sorted(self.weights.entries.items()):
            digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
            if math.prod(entry.shape) <= SMALL_TENSOR:
                content = self.weights.tensor(name).contiguous().flatten()
                digest.update(content.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _finite(self, name: str, weight: Tensor) -> Tensor:
        """Return ``weight`` once it is known to hold only finite numbers."""
        # A part at a time, since the test takes twice the room of what it tests.
        if not all(bool(torch.isfinite(part).all()) for part in weight.flatten().split(2**20)):
            raise CheckpointError(
                f"{self.path}: {self.names[name]} holds numbers that are not finite; the file is damaged, "
                "get it again."
            )
        return weight


def open_umt5(path: Path) -> UMT5File:
    """Recognise a umT5 encoder by its tensors; no weight is loaded.

    Args:
        path: A file, or a folder: diffusers' with ``text_encoder`` in it, that one itself, or Wan's own.

    Raises:
        CheckpointError: There is no such thing, it is something else, or tensors are missing, unexpected or
            of another shape.
    """
    path = _weights_path(path)
    weights = open_weights(path)
    shapes = {name: tuple(entry.shape) for name, entry in weights.entries.items()}
    naming, prefix = _naming(path, shapes)
    sizes = _sizes(path, shapes, naming, prefix)
    names = {name: prefix + _spelled(name, naming) for name in umt5_shapes(sizes)}
    file = UMT5File(
        path=path,
        weights=weights,
        sizes=sizes,
        naming=naming,
        prefix=prefix,
        names=names,
        scales=_scales(names, shapes),
    )
    _check_shapes(file, shapes)
    _check_dtypes(file)
    return file


def umt5_shapes(sizes: UMT5Sizes) -> dict[str, Shape]:
    """Return the shapes of the weights of an encoder of these sizes, by canonical name."""
    inner = sizes.heads * sizes.head_dim
    layer = {
        "layer.0.SelfAttention.q.weight": (inner, sizes.dim),
        "layer.0.SelfAttention.k.weight": (inner, sizes.dim),
        "layer.0.SelfAttention.v.weight": (inner, sizes.dim),
        "layer.0.SelfAttention.o.weight": (sizes.dim, inner),
        "layer.0.SelfAttention.relative_attention_bias.weight": (sizes.buckets, sizes.heads),
        "layer.0.layer_norm.weight": (sizes.dim,),
        "layer.1.DenseReluDense.wi_0.weight": (sizes.ffn_dim, sizes.dim),
        "layer.1.DenseReluDense.wi_1.weight": (sizes.ffn_dim, sizes.dim),
        "layer.1.DenseReluDense.wo.weight": (sizes.dim, sizes.ffn_dim),
        "layer.1.layer_norm.weight": (sizes.dim,),
    }
    shapes: dict[str, Shape] = {"shared.weight": (sizes.vocabulary, sizes.dim)}
    for number in range(sizes.layers):
        shapes |= {f"encoder.block.{number}.{name}": shape for name, shape in layer.items()}
    return shapes | {"encoder.final_layer_norm.weight": (sizes.dim,)}


def _weights_path(path: Path) -> Path:
    """Return the file or the folder of shards that is meant by ``path``."""
    if not path.is_dir():
        return path
    if (path / "text_encoder").is_dir():
        return path / "text_encoder"
    candidates = sorted(file for file in path.iterdir() if file.suffix in WEIGHTS_SUFFIXES)
    if any(path.glob("*.index.json")) or len(candidates) < 2:
        return path
    found = [file for file in candidates if _is_t5(file)]
    if len(found) == 1:
        return found[0]
    names = listed([file.name for file in found or candidates])
    raise CheckpointError(
        f"{path} holds {'several' if found else 'no'} umT5 encoders among {names}; name the file to load."
    )


def _is_t5(path: Path) -> bool:
    """Return whether a file can be read and looks like a T5."""
    try:
        names = open_weights(path).entries
    except CheckpointError:
        return False
    return any(name.endswith(tuple(_FIRST.values())) for name in names)


def _naming(path: Path, shapes: Mapping[str, Shape]) -> tuple[str, str]:
    """Return whose names the tensors have, and what stands before each of them."""
    for naming, first in _FIRST.items():
        for name in shapes:
            prefix = name.removesuffix(first)
            if prefix != name and prefix[-1:] in ("", "."):
                return naming, prefix
    unknown = f"a model of an unknown kind (it begins with {listed(list(shapes)[:1]) or 'nothing'})"
    told = (what for part, what in _FOREIGN if any(part in name for name in shapes))
    what = next(told, unknown)
    raise CheckpointError(f"{path} is not a umT5 text encoder; it looks like {what}. {REMEDY}")


def _sizes(path: Path, shapes: Mapping[str, Shape], naming: str, prefix: str) -> UMT5Sizes:
    """Return the sizes that the shapes imply."""

    def shape(name: str) -> Shape:
        return shapes[prefix + _spelled(name, naming)]

    start = prefix + _LAYERS[naming]
    layers = len({name.removeprefix(start).split(".")[0] for name in shapes if name.startswith(start)})
    _check_variant(path, shapes, naming, prefix, layers)
    try:
        vocabulary, dim = shape("shared.weight")
        buckets, heads = shape("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        inner, _ = shape("encoder.block.0.layer.0.SelfAttention.q.weight")
        ffn_dim, _ = shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is an incomplete umT5 ({error}); get it again.") from error
    if not all((vocabulary, dim, buckets, heads, inner, ffn_dim)) or inner % heads:
        raise CheckpointError(
            f"{path} has {heads} heads, {inner} channels for them and width {dim}; the file is damaged, "
            "get it again."
        )
    return UMT5Sizes(
        vocabulary=vocabulary,
        dim=dim,
        ffn_dim=ffn_dim,
        heads=heads,
        head_dim=inner // heads,
        layers=layers,
        buckets=buckets,
    )


def _check_variant(path: Path, shapes: Mapping[str, Shape], naming: str, prefix: str, layers: int) -> None:
    """Refuse the other members of the T5 family."""
    if any("DenseReluDense.wi.weight" in name for name in shapes):
        raise CheckpointError(f"{path} is a T5 without gates, not a umT5. {REMEDY}")
    biases = sum("relative_attention_bias" in name and "decoder." not in name for name in shapes)
    shared = prefix + "pos_embedding.embedding.weight" in shapes
    if shared or (naming == HF and biases == 1 and layers > 1):
        raise CheckpointError(
            f"{path} is a T5 v1.1, as FLUX and Stable Diffusion 3 use it: only its first layer knows "
            f"positions. {REMEDY}"
        )


def _spelled(name: str, naming: str) -> str:
    """Return a canonical name as ``naming`` has it."""
    if naming == HF:
        return name
    if not name.startswith(_LAYERS[HF]):
        return _WAN_NAMES[name]
    layer, _, rest = name.removeprefix(_LAYERS[HF]).partition(".")
    return f"{_LAYERS[WAN]}{layer}.{_WAN_NAMES[rest]}"


def _scales(names: Mapping[str, str], shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Return the names of the scales in the file by the canonical name of what they scale."""
    found = {}
    for name, stored in names.items():
        for scale in (stored.removesuffix("weight") + kind for kind in _SCALES):
            if scale in shapes:
                found[name] = scale
    return found


def _check_shapes(file: UMT5File, shapes: Mapping[str, Shape]) -> None:
    """Refuse tensors that are not exactly those of a umT5 of these sizes."""
    wanted = {file.names[name]: shape for name, shape in umt5_shapes(file.sizes).items()}
    if missing := [name for name in wanted if name not in shapes]:
        raise CheckpointError(f"{file.path} lacks {listed(missing)}; is it complete? Get it again.")
    aside = {name.removesuffix("weight") + kind for name in wanted for kind in _BESIDE_A_WEIGHT}
    aside |= {file.prefix + name for name in _NOT_NEEDED} | {*_NOT_NEEDED, *file.scales.values()}
    foreign = [name for name in shapes if name not in wanted and name not in aside]
    if foreign := [name for name in foreign if not name.startswith(file.prefix + "decoder.")]:
        raise CheckpointError(f"{file.path} has tensors that umT5 has not: {listed(foreign)}. {REMEDY}")
    wanted |= dict.fromkeys(file.scales.values(), ())
    named = [
        f"{name} {shapes[name]} instead of {wanted[name]}"
        for name in wanted
        if shapes[name] != wanted[name] and (wanted[name] or math.prod(shapes[name]) != 1)
    ]
    if named:
        raise CheckpointError(f"{file.path} has tensors of the wrong shape: {listed(named)}; get it again.")


def _check_dtypes(file: UMT5File) -> None:
    """Refuse weights that cannot be computed with, and scaled files that lack a scale."""
    for name, stored in file.names.items():
        dtype = file.weights.entries[stored].dtype
        if dtype not in FLOATS:
            raise CheckpointError(
                f"{file.path}: {stored} is {dtype}; of quantised encoders only fp8 is read. {REMEDY}"
            )
        if file.scales and FLOATS[dtype] == 1 and name not in file.scales:
            raise CheckpointError(f"{file.path}: {stored} is {dtype} and lacks its scale; get it again.")
