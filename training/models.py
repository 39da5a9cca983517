"""The models a stage works with: of the demo's world, or of Wan, from whatever they are kept in.

Both kinds have ``network``, ``config``, ``words`` (prompts to embeddings) and ``bind``, and are called alike.
The demo learns its words together with its video; Wan's are embeddings that ``encode_prompts`` has kept.

Legend: B clips, C channels, T latent frames, H and W latent height and width.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfpp_core.attention import Attend, matmul, sdpa
from sfpp_core.checkpoint import check_student, load_student
from sfpp_core.config import WAN_1_3B, WAN_5B, WAN_14B, StudentConfig
from sfpp_core.geometry import PATCH, VideoGeometry
from sfpp_core.inspection import HEAD_DIM
from sfpp_core.latent_space import WAN_2_1, WAN_2_2, LatentSpace
from sfpp_core.lora import parse_lora_option, read_adapter
from sfpp_core.network import WanNetwork, initialise
from sfpp_core.student import BoundStudent, CausalStudent
from training.config import ConfigError
from training.state import FILE, newest, read_averaged
from training.teacher import CLIP, DemoModel, load_demo_model
from training.texts import Texts

logger = logging.getLogger(__name__)

ARCHITECTURES = {"wan-1.3b": WAN_1_3B, "wan-14b": WAN_14B, "wan-5b": WAN_5B}
"""Random weights of full size, by the name that stands for a file: they show cost, never quality."""

_ROOT = "network."


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSettings:
    """What is trained on. Without prompts it is the demo's world, which has one size."""

    prompts: str = ""
    """Folder that training.encode_prompts wrote; empty is the demo's world."""

    height: int = 480
    """Pixels of Wan's videos."""

    width: int = 832
    """Pixels of Wan's videos."""

    sample_prompts: int = 2
    """Prompts of the sample videos: the first of the file."""

    teraflops: float = 0.0
    """What one device computes per second, for a dry run's time where no log tells it; 0 is unknown."""

    @property
    def is_wan(self) -> bool:
        """Whether these are videos of Wan."""
        return bool(self.prompts)


class _RMSNorm(nn.RMSNorm):
    """A norm whose result is as narrow as its input, whatever its weights are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` normed, in its own dtype."""
        assert self.weight is not None
        weight = self.weight.to(x.dtype)
        return functional.rms_norm(x, tuple(self.normalized_shape), weight, self.eps).to(x.dtype)


class _LayerNorm(nn.LayerNorm):
    """A norm whose result is as narrow as its input: autocast would widen it."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Return ``input`` normed, in its own dtype."""
        return super().forward(input).to(input.dtype)


class _Layers:
    """Layers of a network in training: keys and values that are kept stay as narrow as what is computed."""

    Linear: Any = nn.Linear
    Conv3d: Any = nn.Conv3d
    LayerNorm: Any = _LayerNorm
    RMSNorm: Any = _RMSNorm


class WanModel(nn.Module):
    """A transformer of Wan that hears prompts by their kept embeddings."""

    def __init__(
        self, network: WanNetwork, config: StudentConfig, texts: Texts | None, *, checkpointing: bool = False
    ) -> None:
        """Take what it is made of.

        Args:
            network: The weights.
            config: Their architecture.
            texts: The embeddings; ``None`` for a dry run, in which nothing is said.
            checkpointing: Recompute each layer in backward instead of keeping its activations.
        """
        super().__init__()
        self.network, self.config, self.texts, self.checkpointing = network, config, texts, checkpointing

    def words(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings of ``prompts``, ``(B, tokens, text_dim)``; the empty one is the negative."""
        assert self.texts is not None
        return self.texts(prompts).to(self.network.head.modulation.device)

    def bind(self, prompts: Sequence[str], *, dtype: torch.dtype | None = None) -> BoundStudent:
        """Return the velocity model of ``prompts``, one per clip; under autocast it computes in its dtype."""
        device = self.network.head.modulation.device.type
        if dtype is None and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        student = CausalStudent(
            self.network, self.config, attend=sdpa, dtype=dtype, checkpointing=self.checkpointing
        )
        return student.bind(self.words(prompts))


Model = DemoModel | WanModel
"""What plays a role."""


def attention_of(model: Model) -> Attend:
    """Return the attention a model is trained with: two products for the demo's few tokens, else SDPA."""
    return matmul if isinstance(model, DemoModel) else sdpa


def texts_of(model: Model) -> Texts | None:
    """Return the prompts a model of Wan hears; ``None`` for the demo's, which hears captions."""
    return model.texts if isinstance(model, WanModel) else None


def space_of(config: StudentConfig) -> LatentSpace:
    """Return the latent space of a transformer of Wan."""
    return WAN_2_2 if config.channels == WAN_2_2.channels else WAN_2_1


def geometry_of(
    video: VideoSettings, config: StudentConfig, *, chunk: int, frames: int = CLIP.frames
) -> VideoGeometry:
    """Return the size of the clips that are trained on.

    Args:
        video: Whose videos, and their size.
        config: Architecture of the models.
        chunk: Latent frames generated together.
        frames: Length; by default five seconds, 21 latent frames.

    Raises:
        GeometryError: Wan has no videos of this size.
    """
    if not video.is_wan:
        return replace(CLIP, chunk=chunk, frames=frames)
    space = space_of(config)
    return VideoGeometry(
        height=video.height,
        width=video.width,
        frames=frames,
        chunk=chunk,
        stride=space.spatial_stride,
        fps=space.fps,
    )


def load_role(
    path: str,
    video: VideoSettings,
    texts: Texts | None,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    loras: Sequence[str] = (),
    part: str = "model",
) -> Model:
    """Load a model to train or to ask; all its weights are marked as trained.

    Args:
        path: ``last.pt`` of a run, of the demo's world empty for the embedded student; for Wan also a
            published checkpoint, in any layout that ``sfpp_core.checkpoint.load_student`` reads, or a name
            in ``ARCHITECTURES``.
        video: Whether it is the demo's or Wan's.
        texts: What a Wan hears.
        device: Where it goes; on ``meta`` it has sizes and no numbers.
        dtype: Of its weights.
        checkpointing: Recompute each layer in backward; for Wan.
        loras: Files merged into a published checkpoint, each ``FILE`` or ``FILE:STRENGTH``.
        part: Which part of a run, its ``model`` or its ``critic``.

    Raises:
        ConfigError: There is no such run, it trained adapters, or its prompts are of another width.
        CheckpointError: As ``load_student``.
    """
    if not video.is_wan:
        return load_demo_model(Path(path), part=part).to(device, dtype)
    if device.type == "meta":
        network, config = _sizes_alone(path, dtype)
    elif path in ARCHITECTURES:
        config = ARCHITECTURES[path]
        network = _random(config).to(device, dtype)
    elif Path(path).name == FILE:
        network, config = _of_run(Path(path), loras, part)
        network = network.to(device, dtype)
    else:
        config = check_student(Path(path)).config
        assert config is not None
        adapters = [
            read_adapter(file, config, strength=strength) for file, strength in map(parse_lora_option, loras)
        ]
        with _quiet():
            network, _, _ = load_student(Path(path), device=device, dtype=dtype, adapters=adapters)
    if texts is not None and texts.dim != config.text_dim:
        raise ConfigError(
            f"{path} hears embeddings of width {config.text_dim} and those in {video.prompts} have "
            f"{texts.dim}; encode the prompts with the text encoder of Wan."
        )
    narrow = WanNetwork(config, layers=_Layers(), device="meta")
    narrow.load_state_dict(network.state_dict(), assign=True)
    model = WanModel(narrow, config, texts, checkpointing=checkpointing)
    return model.train().requires_grad_(True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the warning that a model does not generate chunk by chunk: teachers need not."""
    teller = logging.getLogger(load_student.__module__)
    level = teller.level
    teller.setLevel(logging.ERROR)
    try:
        yield
    finally:
        teller.setLevel(level)


def _sizes_alone(path: str, dtype: torch.dtype) -> tuple[WanNetwork, StudentConfig]:
    """Return a network without numbers; of Wan 1.3B where ``path`` is not there yet."""
    config: StudentConfig | None = ARCHITECTURES.get(path)
    if config is None and Path(path).name == FILE and newest(Path(path)):
        config = _config_of(read_averaged(Path(path)))
    elif config is None and Path(path).exists():
        config = check_student(Path(path)).config
    if config is None:
        logger.info("%s is not there: it is taken for a Wan 2.1 of 1.3B", path)
        config = WAN_1_3B
    return WanNetwork(config, device="meta", dtype=dtype), config


def _of_run(path: Path, loras: Sequence[str], part: str) -> tuple[WanNetwork, StudentConfig]:
    """Return the averaged weights of a part of a run of Wan, float32."""
    if loras:
        raise ConfigError(
            f"{path} is a run, and LoRAs are merged into published checkpoints; export it first."
        )
    weights = read_averaged(path, name=part)
    if f"{_ROOT}blocks.0.ffn.0.weight" not in weights:
        raise ConfigError(
            f"{path} holds adapters of a model, not a model; export them, and name the checkpoint they adapt "
            "with the exported file as its LoRA."
        )
    tensors, config = network_of(weights)
    network = WanNetwork(config, device="meta")
    network.load_state_dict({name: value.clone() for name, value in tensors.items()}, assign=True)
    return network, config


def network_of(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], StudentConfig]:
    """Return the averaged weights of a run of Wan by Wan's names, and their architecture."""
    return {name.removeprefix(_ROOT): value for name, value in weights.items()}, _config_of(weights)


def _config_of(weights: Mapping[str, Tensor]) -> StudentConfig:
    """Return the architecture that the shapes in a run of Wan imply."""
    ffn_dim, dim = weights[f"{_ROOT}blocks.0.ffn.0.weight"].shape
    return StudentConfig(
        dim=dim,
        ffn_dim=ffn_dim,
        heads=dim // HEAD_DIM,
        layers=len({name.split(".")[2] for name in weights if name.startswith(f"{_ROOT}blocks.")}),
        channels=weights[f"{_ROOT}patch_embedding.weight"].shape[1],
        text_dim=weights[f"{_ROOT}text_embedding.0.weight"].shape[1],
    )


def _random(config: StudentConfig) -> WanNetwork:
    """Return random weights that make latents of about the right size."""
    logger.warning("weights are random: what is trained from them shows cost, never quality")
    network = WanNetwork(config)
    initialise(network, seed=0)
    nn.init.normal_(network.head.head.weight, std=(config.dim * PATCH**2) ** -0.5)
    return network
