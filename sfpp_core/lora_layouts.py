"""Layouts of LoRA files: which parameter of Wan each tensor changes, how, and by what factor.

Quoted parameter names such as ``blocks.0.ffn.0.weight`` are Wan's own and canonical here. The same parameter
has other names in other files: with dots or with underscores, under a prefix or none, in the naming of Wan or
of diffusers. All of them are understood at once, so no file has to be told its layout.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import CheckpointError
from .naming import INFIXES
from .weights import Weights

Role = Literal["down", "up", "up_bias", "alpha", "weight", "bias", "modulation"]
"""What a tensor is to its module: a factor, the bias or the alpha that goes with the factors, or the whole
change of the weight, of the bias, or of the modulation."""

PEFT_PREFIX = "base_model.model."
"""Put before every name by PEFT."""

PEFT_CONFIG = "adapter_config.json"
"""What PEFT writes beside its weights."""

DIFFUSERS_KEY = "lora_adapter_metadata"
"""Metadata under which diffusers keeps what PEFT writes beside the weights."""

logger = logging.getLogger(__name__)

_PREFIX = re.compile(
    r"^(?:(?:base_model\.model|diffusion_model|transformer|model|unet|pipe\.dit|dit)\.)+"
    r"|^(?:lora_unet__?|lora_transformer_|lycoris_)"
)

_ROLES: tuple[tuple[re.Pattern[str], Role], ...] = (
    # The word before ``weight`` is PEFT's name of the adapter.
    (re.compile(r"\.(?:lora_down|lora_A|lora\.down)(?:\.[^.]+)?\.weight$"), "down"),
    (re.compile(r"\.(?:lora_up|lora_B|lora\.up)(?:\.[^.]+)?\.weight$"), "up"),
    (re.compile(r"\.(?:lora_up|lora_B|lora\.up)(?:\.[^.]+)?\.bias$"), "up_bias"),
    (re.compile(r"\.alpha$"), "alpha"),
    (re.compile(r"\.diff$"), "weight"),
    (re.compile(r"\.diff_b$"), "bias"),
    (re.compile(r"\.diff_m$"), "modulation"),
)

_FOREIGN: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (
            r"\.dora_scale$|lora_magnitude_vector",
            "a DoRA, and programs differ about what it does to a weight; use a plain LoRA, "
            "or merge it with the program that trained it",
        ),
        (r"\.hada_", "a LoHa; use a plain LoRA"),
        (r"\.lokr_", "a LoKr; use a plain LoRA"),
        (r"\.oft_|\.boft_", "an OFT; use a plain LoRA"),
        (r"\.lora_mid\.|\.lora_E\b", "a LoRA of three factors; use a plain one"),
        (r"\.set_weight$|\.reshape_weight$", "weights to be replaced or enlarged; use a plain LoRA"),
        (
            r"[._](?:k_img|v_img|norm_k_img|img_emb|add_[kv]_proj|norm_added_k|image_embedder)(?:[._]|$)",
            "a LoRA for an image-to-video Wan, which has layers that a text-to-video Wan has not; "
            "choose the LoRA's text-to-video version",
        ),
        (r"(?:^|\.)vace_", "a LoRA for VACE; choose one for a plain text-to-video Wan"),
        (
            r"^lora_te|^text_encoders?\.|^conditioner\.",
            "a LoRA of a text encoder, which would be lost; choose one of the transformer alone",
        ),
    )
)
"""Parts of names by which what cannot be merged is recognised, and what to tell whoever chose it."""


def _in_a_layer() -> dict[str, str]:
    """Return Wan's names of the modules of one layer, by every name they have, dots as underscores."""
    names = {
        "norm3": "norm3",
        "norm2": "norm3",  # Wan's own norm2 has no weights
        "ffn_0": "ffn.0",
        "ffn_2": "ffn.2",
        "ffn_net_0_proj": "ffn.0",
        "ffn_net_2": "ffn.2",
        "modulation": "modulation",
        "scale_shift_table": "modulation",
    }
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for leaf in ("q", "k", "v"):
            names |= dict.fromkeys((f"{ours}_{leaf}", f"{theirs}_to_{leaf}"), f"{ours}.{leaf}")
        names |= dict.fromkeys((f"{ours}_o", f"{theirs}_to_out_0", f"{theirs}_to_out"), f"{ours}.o")
        for leaf in ("norm_q", "norm_k"):
            names |= dict.fromkeys((f"{ours}_{leaf}", f"{theirs}_{leaf}"), f"{ours}.{leaf}")
    return names


_LAYER = re.compile(r"blocks_([0-9]{1,4})(?:_(.+))?")
_IN_A_LAYER = _in_a_layer()

_AROUND_THE_LAYERS = {
    "patch_embedding": "patch_embedding",
    "text_embedding_0": "text_embedding.0",
    "text_embedding_2": "text_embedding.2",
    "time_embedding_0": "time_embedding.0",
    "time_embedding_2": "time_embedding.2",
    "time_projection_1": "time_projection.1",
    "head": "head",
    "head_head": "head.head",
    "head_modulation": "head.modulation",
    "condition_embedder_text_embedder_linear_1": "text_embedding.0",
    "condition_embedder_text_embedder_linear_2": "text_embedding.2",
    "condition_embedder_time_embedder_linear_1": "time_embedding.0",
    "condition_embedder_time_embedder_linear_2": "time_embedding.2",
    "condition_embedder_time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
"""Wan's names of the other modules, by every name they have, dots as underscores."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a LoRA file, understood."""

    stored: str
    """Name in the file."""

    said: str
    """Module, as the file names it, without prefix."""

    module: str
    """Module, as Wan names it, e.g. ``blocks.0.self_attn.q``."""

    role: Role

    @property
    def parameter(self) -> str:
        """Name of the parameter that the part changes, e.g. ``blocks.0.self_attn.q.weight``."""
        if self.role == "modulation":
            return f"{self.module}.modulation"
        if self.role == "weight" and self.module.endswith("modulation"):
            return self.module  # a parameter itself
        return f"{self.module}.bias" if self.role in ("bias", "up_bias") else f"{self.module}.weight"


def _plain(name: str) -> str:
    """Return ``name`` without what wrappers of the model left in it."""
    for wrapper in INFIXES:
        name = name.replace(wrapper, "")
    return name


def understand(name: str, stored: str) -> Part | None:
    """Return what a tensor is, or ``None`` if it is no part of a LoRA for a Wan of any size.

    Args:
        name: What the LoRA calls it.
        stored: What the file calls it; the same, but for LoRAs that are one of several in a file.
    """
    plain = _plain(name)
    for pattern, role in _ROLES:
        if match := pattern.search(plain):
            said = _PREFIX.sub("", plain[: match.start()])
            module = _wan_name(said.replace(".", "_"))
            return None if module is None else Part(stored, said, module, role)
    return None


def has_role(name: str) -> bool:
    """Return whether the tensor called ``name`` is part of a LoRA, for whatever model."""
    return any(pattern.search(_plain(name)) for pattern, _ in _ROLES)


def foreign(name: str) -> str | None:
    """Return what the tensor called ``name`` belongs to and what to do, if that can never be merged."""
    return next((what for pattern, what in _FOREIGN if pattern.search(name)), None)


def _wan_name(flat: str) -> str | None:
    """Return Wan's name of the module called ``flat``, with underscores for dots."""
    if match := _LAYER.fullmatch(flat):
        layer, rest = f"blocks.{int(match[1])}", match[2]
        if rest is None:
            return layer
        return f"{layer}.{_IN_A_LAYER[rest]}" if rest in _IN_A_LAYER else None
    return _AROUND_THE_LAYERS.get(flat)


@dataclass(frozen=True, slots=True)
class Scaling:
    """How pairs without an alpha of their own are scaled: as PEFT noted beside the weights, or not at all."""

    where: str
    """Where the table was found, for messages."""

    table: Mapping[str, Any]
    """PEFT's settings; empty if there are none."""

    def of(self, module: str, rank: int) -> float:
        """Return the factor of a pair of this rank; ``module`` is called as the file calls it."""
        if not self.table:
            return 1.0
        said = self._number("r", "rank_pattern", module)
        if said != rank:
            raise CheckpointError(
                f"{self.where} says that {module} has rank {said:g}, its tensors have {rank}; the two do not "
                "belong together: get both again."
            )
        alpha = self._number("lora_alpha", "alpha_pattern", module)
        return alpha / (math.sqrt(rank) if self.table.get("use_rslora") else rank)

    def _number(self, key: str, patterns: str, module: str) -> float:
        """Return what the table says for ``module``, under ``patterns`` or else under ``key``."""
        value: Any = self.table.get(key)
        for name, own in (self.table.get(patterns) or {}).items():
            if not re.fullmatch(r"\^?[\w.]+", name):
                raise CheckpointError(
                    f"{self.where}: {patterns} has {name[:80]!r}; only plain names are understood."
                )
            if module == name.removeprefix("^") or module.endswith(f".{name}"):
                value = own
                break
        if type(value) not in (int, float) or not math.isfinite(value):
            raise CheckpointError(f"{self.where}: {key} is {value!r:.40}, not a number; save it again.")
        return float(value)


def find_scaling(weights: Weights, names: Mapping[str, str]) -> Scaling:
    """Return what PEFT or diffusers noted about the factor of each pair."""
    if table := weights.table(DIFFUSERS_KEY, where=str(weights.path)):
        plain = {key.removeprefix("transformer."): value for key, value in table.items()}
        return _checked(Scaling(f"{weights.path}, metadata {DIFFUSERS_KEY!r}", plain))
    if not any(name.startswith(PEFT_PREFIX) for name in names):
        return Scaling("", {})
    path = weights.path.parent / PEFT_CONFIG
    if path.is_file():
        return _checked(Scaling(str(path), _read_table(path)))
    # LongLive's LoRAs, one of several in their file, have alpha = rank.
    if names.keys() == set(names.values()) and not any(name.endswith(".alpha") for name in names):
        logger.warning(
            "%s lies beside no %s, so its alpha is not known: alpha = rank is assumed.",
            weights.path.name,
            PEFT_CONFIG,
        )
    return Scaling("", {})


def _read_table(path: Path) -> dict[str, Any]:
    """Return the JSON table in ``path``."""
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!s:.80}); get it again.") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} is not a JSON table; get it again.")
    return table


def _checked(scaling: Scaling) -> Scaling:
    """Refuse settings of PEFT that describe something else than a plain LoRA."""
    kind = scaling.table.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(f"{scaling.where}: peft_type is {kind!r:.40}; only LORA can be merged.")
    if scaling.table.get("use_dora"):
        raise CheckpointError(f"{scaling.where}: use_dora is set; a DoRA cannot be merged, use a plain LoRA.")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(scaling.table.get(key) or {}, dict):
            raise CheckpointError(f"{scaling.where}: {key} is not a table; get it again.")
    return scaling
