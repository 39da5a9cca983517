"""Signs of a LoRA: how one is told from a model, and which Wan it was made for.

Only for saying what a file is; reading one is another module's work.
"""

from collections.abc import Mapping

from .config import WAN_1_3B, WAN_5B, WAN_14B, StudentConfig
from .lora_layouts import has_role
from .weights import Described

MODELS: dict[str, StudentConfig] = {
    "Wan2.1-T2V-1.3B": WAN_1_3B,
    "Wan2.1-T2V-14B": WAN_14B,
    "Wan2.2-TI2V-5B": WAN_5B,
}
"""Published models, by name."""

_DOWN = ("lora_A", "lora_down", "lora.down")


def recognise(entries: Mapping[str, Described]) -> str:
    """Say in words what LoRA these tensors are; empty if they are none."""
    if not any(has_role(name) for name in entries if not name.endswith(".alpha")):
        return ""
    down = [
        entry.shape
        for name, entry in entries.items()
        if len(entry.shape) == 2 and any(sign in name for sign in _DOWN)
    ]
    ranks = sorted({shape[0] for shape in down})
    rank = f" of rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else ""
    return f"a LoRA{rank}{_target({shape[1] for shape in down})}, which changes a model and is none by itself"


def _target(widths: set[int]) -> str:
    """Return the model in which layers of these input widths occur."""
    for name, model in MODELS.items():
        if model.dim in widths and widths <= {model.dim, model.ffn_dim, model.text_dim, model.freq_dim}:
            return f" for {name}"
    return ""
