"""LoRA: low-rank adapters trained in place of a model's weights, by PEFT, and written for inference.

Source: LoRA, arXiv:2106.09685.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from training.config import ConfigError

_PREFIX = "diffusion_model."
"""Before every name in a file of adapters, as ComfyUI and the trainers for it write them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Which adapters are trained; none by default."""

    rank: int = 0
    """Rank of every adapter; 0 trains all weights instead."""

    alpha: float = 0.0
    """Adapters count ``alpha / rank`` times; 0 is the rank, a factor of 1."""

    targets: tuple[str, ...] = ("q", "k", "v", "o", "ffn.0", "ffn.2")
    """Ends of the names of the matrices that get one."""

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha < 0:
            raise ConfigError(f"lora has rank {self.rank} and alpha {self.alpha:g}; neither may be negative.")
        if self.rank and importlib.util.find_spec("peft") is None:
            raise ConfigError("lora.rank needs the package peft: pip install peft, or set lora.rank=0.")


def add_adapters(module: nn.Module, settings: LoraSettings) -> None:
    """Freeze ``module`` and add adapters to its layers, in place; they change nothing until they are trained.

    Raises:
        ConfigError: No matrix has such a name.
    """
    from peft import LoraConfig, inject_adapter_in_model

    matrices = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    inside = [name for name in matrices if "blocks." in name]
    chosen = [name for name in inside if name.endswith(tuple("." + end for end in settings.targets))]
    if not chosen:
        ends = ", ".join(settings.targets)
        raise ConfigError(f"lora.targets is {ends}; no matrix of a layer ends in one of them.")
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha or settings.rank, target_modules=chosen)  # type: ignore[arg-type]
    module.requires_grad_(False)
    inject_adapter_in_model(config, module)
    for parameter in module.parameters():
        if parameter.requires_grad:  # PEFT makes them as narrow as the weights, too narrow for small steps
            parameter.data = parameter.data.float()


def export_adapters(
    tensors: Mapping[str, Tensor], path: Path, settings: LoraSettings, *, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write trained adapters as a LoRA file that this package and ComfyUI read.

    Args:
        tensors: Adapters by PEFT's names, as a run saves them.
        path: A .safetensors file.
        settings: What they were trained with.
        dtype: Of the file.

    Raises:
        ConfigError: There are no adapters.
    """
    written: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for inner, outer in ((".lora_A.default.weight", "lora_down"), (".lora_B.default.weight", "lora_up")):
            if name.endswith(inner):
                target = _PREFIX + name.removesuffix(inner).removeprefix("network.")
                written[f"{target}.{outer}.weight"] = tensor.to(dtype).contiguous()
                written[f"{target}.alpha"] = torch.tensor(settings.alpha or float(settings.rank))
    if not written:
        raise ConfigError(f"nothing to write to {path}: the run trained no adapters.")
    save_file(written, path, metadata={"modelspec.architecture": "wan2.1/lora"})
