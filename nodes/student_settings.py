"""What a loaded MODEL says about how it wants to be rolled out."""

from dataclasses import dataclass, field
from typing import Any

from ..sfpp_core.config import RolloutSettings
from . import _host


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentSettings:
    """What a student's file knows about itself beyond its weights. The defaults are those of Self-Forcing."""

    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """Steps, shift, chunk and cache."""

    text_length: int = 512
    """Text embeddings the student attends to."""

    causal: bool = False
    """Whether the file says that it was trained to generate chunk by chunk."""


def settings_of(model: Any) -> StudentSettings:
    """Return the settings a model was loaded with; a model from another loader gets the defaults."""
    return _host.attached(model) or StudentSettings()


def causal(model: Any) -> bool:
    """Return whether ``model`` is known to have been trained to generate chunk by chunk."""
    return settings_of(model).causal or _host.marked_causal(model)
