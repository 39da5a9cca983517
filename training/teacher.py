"""The demo's short-horizon teacher: a bidirectional model of five-second clips, and how it samples.

Legend: B clips, C channels, T latent frames, H and W latent height and width.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sfpp_core.attention import matmul
from sfpp_core.config import DEMO, StudentConfig
from sfpp_core.network import WanNetwork, initialise
from sfpp_core.schedule import warp
from sfpp_core.student import BoundStudent, CausalStudent
from sfpp_core.words import WordEncoder
from training.world import VOCABULARY

QUERY_GAIN = 1.5
"""Initial gain of the query norms: sharper attention, so that motion is found sooner."""

SAMPLE_PROMPTS = (
    "a red circle moves right slowly",
    "a blue square moves up fast",
    "a yellow triangle drifts down and left, slowly",
    "a green circle glides left fast",
    "a purple square moves up and right slowly",
    "an orange triangle moves down fast",
)
"""Prompts of the sample sheets."""


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


def velocity(
    teacher: DemoModel, noisy: Tensor, sigma: Tensor, prompts: Sequence[str], *, guidance: float
) -> Tensor:
    """Return the teacher's velocity, with classifier-free guidance of the conventional scale (1 is none).

    Args:
        teacher: The model.
        noisy: Clips, ``(B, C, T, H, W)``.
        sigma: Share of noise, ``(B, 1)``.
        prompts: One per clip.
        guidance: ``unconditional + guidance * (conditional - unconditional)``.
    """
    if guidance == 1:
        return teacher.bind(prompts).whole(noisy, sigma)
    both = teacher.bind([*prompts, *[""] * len(prompts)]).whole(
        noisy.repeat(2, 1, 1, 1, 1), sigma.repeat(2, 1)
    )
    conditional, unconditional = both.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def trajectory(
    teacher: DemoModel,
    noise: Tensor,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    shift: float = 5.0,
) -> Iterator[tuple[float, Tensor]]:
    """Yield sigma and state before each Euler step from ``noise``, then 0 and the clean clip."""
    sigmas = [warp(1 - step / steps, shift) for step in range(steps)] + [0.0]
    state = noise
    for sigma, following in itertools.pairwise(sigmas):
        yield sigma, state
        level = torch.full((len(noise), 1), sigma, device=noise.device)
        state = state + (following - sigma) * velocity(teacher, state, level, prompts, guidance=guidance)
    yield 0.0, state


def load_demo_model(path: Path) -> DemoModel:
    """Read the averaged weights of a run from its ``last.pt``."""
    state = torch.load(path, map_location="cpu", weights_only=True)["model"]["averaged"]
    weights = {name.removeprefix("module."): value for name, value in state.items() if name != "n_averaged"}
    model = DemoModel()
    model.load_state_dict(weights)
    return model
