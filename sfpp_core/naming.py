"""Names that tensors of a Wan transformer carry in the wild, and Wan's own, which are canonical here.

A stored name is a prefix, then the name in Wan's naming or that of diffusers, with infixes of wrappers
anywhere. Quoted names such as ``blocks.0.ffn.0.weight`` are upstream's.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import CheckpointError

Naming = Literal["wan", "diffusers"]
"""Whose names the tensors of a layer have."""

Choice = Literal["auto", "ema", "live"]
"""Which weights of a training state: averaged ones if there are any, the averaged, or those in training."""

INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What sharding, recomputation and compiling put into names, anywhere."""

GENERATOR = ("generator", "generator_ema")
"""Tables of Self-Forcing and its descendants that hold a causal student."""

EMA = ("generator_ema", "ema", "model_ema")
"""Tables of averaged weights."""

JUDGES = ("critic", "fake_score", "real_score", "teacher", "discriminator")
"""Tables of networks that a student is trained against."""

COMPANIONS = ("vae", "first_stage_model", "text_encoders", "cond_stage_model", "clip_vision")
"""What ComfyUI packs next to a transformer into one file."""

_WRAPPERS = {
    *GENERATOR,
    *EMA,
    "model",
    "diffusion_model",
    "module",
    "net",
    "transformer",
    "state_dict",
    "student",
}

_ANCHOR = "patch_embedding.weight"
_MARKS: dict[Naming, str] = {"wan": "head.modulation", "diffusers": "scale_shift_table"}
_OF_A_LAYER: dict[Naming, re.Pattern[str]] = {
    "wan": re.compile(r"\bblocks\.\d+\.(self_attn|cross_attn)\."),
    "diffusers": re.compile(r"\bblocks\.\d+\.attn[12]\."),
}

_DIFFUSERS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
        (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
        (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
        (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
        (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^proj_out\.", "head.head."),
        (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
        # Wan numbers norms as it adds them, diffusers as it calls them: these two swap.
        (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
        (r"^(blocks\.\d+)\.ffn\.net\.0\.proj\.", r"\1.ffn.0."),
        (r"^(blocks\.\d+)\.ffn\.net\.2\.", r"\1.ffn.2."),
        (r"^(blocks\.\d+)\.attn1\.", r"\1.self_attn."),
        (r"^(blocks\.\d+)\.attn2\.", r"\1.cross_attn."),
        (r"(_attn)\.to_([qkv])\.", r"\1.\2."),
        (r"(_attn)\.to_out\.0\.", r"\1.o."),
        (r"(_attn)\.add_([kv])_proj\.", r"\1.\2_img."),
        (r"(_attn)\.norm_added_k\.", r"\1.norm_k_img."),
    )
)
"""From diffusers to Wan, one after another. Source: diffusers, ``scripts/convert_wan_to_diffusers.py``."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of one Wan transformer are."""

    naming: Naming

    prefix: str
    """What stands before the names, infixes left out, e.g. ``generator_ema.model.``."""

    names: dict[str, str]
    """Stored name by canonical one. Tensors that are no parameters of Wan keep the name they have."""

    choices: tuple[str, ...]
    """Tables of the file that hold a student, the chosen one among them; empty where there is only one."""

    others: tuple[str, ...]
    """What else the file holds, e.g. ``critic``."""

    @property
    def part(self) -> str:
        """Table the transformer is in, e.g. ``generator_ema``; empty where names say of none."""
        root = self.prefix.partition(".")[0]
        return root if root in (*GENERATOR, *EMA) or root in self.choices else ""


def plain(name: str) -> str:
    """Return a stored name without the infixes of wrappers."""
    for infix in INFIXES:
        name = name.replace(infix, "")
    return name


def canonical(name: str, naming: Naming) -> str:
    """Return Wan's name of a tensor, given that in ``naming``; unknown ones are returned as they are."""
    if naming == "diffusers":
        for pattern, replacement in _DIFFUSERS:
            name = pattern.sub(replacement, name)
    return name


def find_layout(
    path: Path, names: Collection[str], *, parts: Collection[str] = (), choice: Choice = "auto"
) -> Layout | None:
    """Find a Wan transformer among tensors, or ``None`` if there is none.

    Args:
        path: File, for messages.
        names: Stored names.
        parts: Tables at the top of a pickle.
        choice: Which weights of a training state.

    Raises:
        CheckpointError: Names of two namings are mixed, two names become one, or the choice is not there.
    """
    stored = {name: plain(name) for name in names}
    prefixes = _prefixes(set(stored.values()))
    if not prefixes:
        return None
    prefix = _chosen(path, list(prefixes), choice)
    naming = prefixes[prefix]
    roots = {_root(other) for other in prefixes}
    apart = ({*roots, *parts, *JUDGES, *COMPANIONS}) - {_root(prefix), ""}
    found: dict[str, str] = {}
    others: dict[str, None] = {}
    for name, bare in stored.items():
        # Beside the tables of a training state there may be anything.
        if not bare.startswith(prefix) and (_root(bare) in apart or _root(prefix) in parts):
            others[_root(bare)] = None
            continue
        wans = canonical(bare.removeprefix(prefix), naming)
        if wans in found:
            raise CheckpointError(f"{path} has {wans[:80]} twice, as {found[wans][:80]} and {name[:80]}.")
        found[wans] = name
    _check_naming(path, (bare for bare in stored.values() if bare.startswith(prefix)))
    choices = tuple(_root(other) for other in prefixes) if len(prefixes) > 1 else ()
    return Layout(naming, prefix, found, choices, tuple(other for other in others if other not in choices))


def _root(name: str) -> str:
    """Return the first part of a dotted name."""
    return name.partition(".")[0]


def _prefixes(names: Collection[str]) -> dict[str, Naming]:
    """Return the prefixes under which a Wan transformer that is no judge lies, and its naming."""
    found: dict[str, Naming] = {}
    for name in names:
        prefix = name.removesuffix(_ANCHOR)
        words = prefix.split(".")[:-1]
        if name.endswith(_ANCHOR) and (not prefix or prefix.endswith(".")) and _WRAPPERS.issuperset(words):
            for naming, mark in _MARKS.items():
                if prefix + mark in names:
                    found.setdefault(prefix, naming)
    return dict(sorted(found.items()))


def _chosen(path: Path, prefixes: list[str], choice: Choice) -> str:
    """Return the prefix of the weights asked for."""
    averaged = [prefix for prefix in prefixes if _root(prefix) in EMA]
    live = [prefix for prefix in prefixes if _root(prefix) not in EMA]
    wanted = {"auto": averaged or live, "ema": averaged, "live": live}[choice]
    if not wanted:
        there = ", ".join(_root(prefix) for prefix in prefixes if prefix) or "one set of weights alone"
        raise CheckpointError(
            f"{path} has no {choice} weights; it has {there}. Leave the choice to the file."
        )
    return wanted[0]


def _check_naming(path: Path, names: Iterable[str]) -> None:
    """Refuse names of two namings in one model."""
    first: dict[Naming, str] = {}
    for name in names:
        for naming, pattern in _OF_A_LAYER.items():
            if pattern.search(name):
                first.setdefault(naming, name)
    if len(first) > 1:
        raise CheckpointError(
            f"{path} mixes the names of Wan ({first['wan'][:80]}) and of diffusers "
            f"({first['diffusers'][:80]}): parts of two files in one. Get it again."
        )
