"""The demo's short-horizon teacher: a bidirectional model of five-second clips, and how it samples.

Legend: B clips, C channels, T latent frames, H and W latent height and width.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sfpp_core import demo
from sfpp_core.attention import matmul
from sfpp_core.checkpoint import load_student, load_words
from sfpp_core.config import DEMO, RolloutSettings, StudentConfig
from sfpp_core.geometry import VideoGeometry
from sfpp_core.kv_cache import CacheShape, RollingKVCache
from sfpp_core.network import WanNetwork, initialise
from sfpp_core.schedule import warp
from sfpp_core.student import BoundStudent, CausalStudent
from sfpp_core.words import WordEncoder
from training.config import ConfigError
from training.guidance import Guidance
from training.state import exported, read_averaged
from training.world import CAPTION_WORDS, FRAMES, SIZE, VOCABULARY

CLIP = VideoGeometry(height=SIZE, width=SIZE, frames=FRAMES)
"""Size of the clips the teacher knows."""

LATENT_CLIP = (CLIP.latent_frames, *CLIP.chunk_shape[1:])
"""``(T, H, W)`` of their latents."""

QUERY_GAIN = 1.5
"""Initial gain of the query norms: sharper attention, so that motion is found sooner."""


class DemoModel(nn.Module):
    """Transformer and words, trained together: the teacher, and what the student starts from."""

    def __init__(self, config: StudentConfig = DEMO, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        torch.manual_seed(seed)
        self.words = WordEncoder(VOCABULARY, text_dim=config.text_dim, text_length=config.text_length)
        self.network = WanNetwork(config)
        initialise(self.network, seed=seed, query_gain=QUERY_GAIN)

    def bind(self, prompts: Sequence[str], *, dtype: torch.dtype | None = None) -> BoundStudent:
        """Return the velocity model of ``prompts``, one per clip."""
        student = CausalStudent(self.network, self.config, attend=matmul, dtype=dtype)
        return student.bind(self.words(prompts))


class Teacher(Protocol):
    """A model that makes clips of prompts."""

    config: StudentConfig

    def bind(self, prompts: Sequence[str], *, dtype: torch.dtype | None = None) -> BoundStudent:
        """Return its velocity model of ``prompts``, one per clip."""
        ...


@torch.no_grad()
def trajectory(
    teacher: Teacher,
    noise: Tensor,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    shift: float = 5.0,
) -> Iterator[tuple[float, Tensor]]:
    """Yield sigma and state before each Euler step from ``noise``, then 0 and the clean clip."""
    sigmas = [warp(1 - step / steps, shift) for step in range(steps)] + [0.0]
    guided, state = Guidance(guidance), noise
    bound = teacher.bind(guided.captions(prompts))
    for sigma, following in itertools.pairwise(sigmas):
        yield sigma, state
        level = torch.full((guided.copies * len(noise), 1), sigma, device=noise.device)
        state = state + (following - sigma) * guided.of(bound.whole(guided.batch(state), level))
    yield 0.0, state


@torch.no_grad()
def causal_trajectory(
    teacher: Teacher,
    noise: Tensor,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    rollout: RolloutSettings,
    clip: VideoGeometry = CLIP,
) -> Iterator[list[Tensor]]:
    """Yield for each chunk the states before each Euler step and the clean one, ``(B, C, chunk, H, W)``.

    Each chunk is denoised given the clean chunks before it, so its trajectory is one a causal student can
    follow.

    Args:
        teacher: A causal teacher.
        noise: Where the trajectories start, ``(B, C, T, H, W)``.
        prompts: One per clip.
        steps: Euler steps per chunk.
        guidance: Conventional scale: 1 is none.
        rollout: Chunk, window, sink and shift.
        clip: Size of the clips.
    """
    guided = Guidance(guidance)
    bound = teacher.bind(guided.captions(prompts))
    shape = CacheShape.of(teacher.config, replace(clip, chunk=rollout.chunk), rollout)
    cache = RollingKVCache(shape, batch=guided.copies * len(noise), like=noise.to(bound.student.dtype))
    sigmas = [warp(1 - step / steps, rollout.shift) for step in range(steps)] + [0.0]
    for chunk, state in enumerate(noise.split(rollout.chunk, dim=2)):
        cache.open(chunk)
        states = [state]
        for sigma, following in itertools.pairwise(sigmas):
            velocity = guided.of(bound(guided.batch(state), sigma, cache))
            state = state + (following - sigma) * velocity
            states.append(state)
        yield states
        bound.remember(guided.batch(state), cache)
        cache.close()


def load_demo_model(path: Path, *, part: str = "model") -> DemoModel:
    """Read the averaged weights of a part of a run; sizes come from their shapes.

    Args:
        path: ``last.pt`` in the folder of the run, where one process or several wrote its state; or a student
            that ``training.export`` wrote, its words beside it; ``Path()``, an empty setting, is the embedded
            demo's.
        part: Which part of a run, its ``model`` or its ``critic``.

    Raises:
        ConfigError: There is no such run, or it trained adapters.
        CheckpointError: There is no such file, or it is damaged.
    """
    if file := exported(path):
        return _read_exported(file)
    weights = read_averaged(path, name=part)
    if "network.blocks.0.ffn.0.weight" not in weights:
        raise ConfigError(f"{path} holds adapters of a model, not a model; continue from the run they adapt.")
    ffn_dim, dim = weights["network.blocks.0.ffn.0.weight"].shape
    config = StudentConfig(
        dim=dim,
        ffn_dim=ffn_dim,
        heads=dim // DEMO.head_dim,
        layers=1 + max(int(name.split(".")[2]) for name in weights if name.startswith("network.blocks.")),
        text_dim=weights["words.table.weight"].shape[1],
        text_length=CAPTION_WORDS,
    )
    model = DemoModel(config)
    model.load_state_dict(weights)
    return model


def _read_exported(path: Path) -> DemoModel:
    """Return a student of the demo's world that was exported, float32."""
    network, config, _ = load_student(path, device="cpu", dtype=torch.float32)
    words, _ = load_words(path.with_name(demo.WORDS))
    model = DemoModel(config)
    model.network.load_state_dict(network.state_dict())
    model.words.load_state_dict(words.state_dict())
    return model
