"""The host's CONDITIONING as text embeddings, and as the prompts over time that may be attached to it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..sfpp_core.errors import ConditioningError
from ..sfpp_core.scenes import Scene, Script

KEY = "sfpp_scenes"
"""Where a conditioning carries prompts over time."""

UNUSABLE = {
    "area": "an area",
    "mask": "a mask",
    "start_percent": "a timestep range",
    "end_percent": "a timestep range",
    "clip_start_percent": "a schedule of text encoders",
    "hooks": "hooks",
    "control": "a ControlNet",
    "concat_latent_image": "a start image",
    "clip_vision_output": "a CLIP vision output",
    "reference_latents": "reference latents",
    "time_dim_concat": "reference latents",
}
"""What a conditioning may carry that a text-to-video student cannot follow."""


@dataclass(frozen=True, slots=True)
class Spoken:
    """Prompts over time, encoded."""

    script: Script

    embeddings: tuple[Tensor, ...]
    """Of each scene, ``(1, tokens, text_dim)``."""


def spoken_of(conditioning: list[tuple[Tensor, dict[str, Any]]]) -> Spoken:
    """Return what a conditioning says over time; a plain one is one scene.

    Raises:
        ConditioningError: As ``embeddings_of``, or another node has changed the first scene.
    """
    first = embeddings_of(conditioning)
    spoken = conditioning[0][1].get(KEY)
    if spoken is None:
        return Spoken(Script(scenes=(Scene(prompt=""),)), (first,))
    if not torch.equal(spoken.embeddings[0], first):
        raise ConditioningError(
            "another node has changed the conditioning of Prompt Schedule, which would reach its first scene "
            "alone; connect Prompt Schedule directly."
        )
    return spoken


def embeddings_of(conditioning: list[tuple[Tensor, dict[str, Any]]]) -> Tensor:
    """Return the text embeddings ``(B, tokens, text_dim)`` of a conditioning that holds one plain prompt.

    Raises:
        ConditioningError: It holds several prompts, a batch, or something that would be ignored.
    """
    if len(conditioning) != 1:
        raise ConditioningError(
            f"conditioning holds {len(conditioning)} prompts; the Long Sampler follows one. "
            "Connect a CLIP Text Encode node directly, without Combine."
        )
    embeddings, extras = conditioning[0]
    for key, name in UNUSABLE.items():
        if extras.get(key) is not None:
            raise ConditioningError(
                f"conditioning carries {name} ({key}), which the Long Sampler cannot follow; "
                "connect a CLIP Text Encode node directly."
            )
    if len(embeddings) != 1:
        raise ConditioningError(
            f"conditioning holds a batch of {len(embeddings)}; the Long Sampler makes one video. "
            "Connect a CLIP Text Encode node directly."
        )
    return embeddings
