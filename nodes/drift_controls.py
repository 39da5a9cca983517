"""What acts against slow drift, as a ComfyUI node."""

from dataclasses import dataclass

from ..sfpp_core.anchor import Anchor
from ..sfpp_core.schedule import check_context_sigma
from . import _host
from ._host import io
from .plain_errors import plain_errors

Drift = io.Custom("SFPP_DRIFT")


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftChoice:
    """What the user chose to do against drift; nothing, unless said otherwise."""

    anchor: float = 0.0
    """Strength with which chunks are pulled towards the statistics of the first ones."""

    context_sigma: float = 0.0
    """Share of noise under which the past is remembered; 0 leaves it to the student."""

    def __post_init__(self) -> None:
        Anchor(strength=self.anchor)
        check_context_sigma(self.context_sigma)

    def __str__(self) -> str:
        return f"anchor {self.anchor:g}, context sigma {self.context_sigma:g}"

    def table(self) -> dict[str, float]:
        """Return what of it decides the chunks of a run, as the command line names it."""
        chosen = {"anchor": self.anchor, "context sigma": self.context_sigma}
        return {name: value for name, value in chosen.items() if value}


OFF = DriftChoice()
"""What a video is made with unless somebody chooses otherwise."""


class SFPPDriftControls(io.ComfyNode):
    """Choose what the Long Sampler does against slow drift of the picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return _host.schema(
            node_id="SFPPDriftControls",
            display_name="Drift Controls (Self-Forcing++)",
            category="sampling/self-forcing++",
            description="What to do where colour, contrast or sharpness of a long video slowly drift away. "
            "At 0 both change nothing, as without this node; another value makes another video. Drift Report "
            "measures what it did.",
            inputs=[
                io.Float.Input(
                    "anchor",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="0 is off. Pulls brightness, colour and contrast of each chunk this share of the "
                    "way towards those of the first seconds, e.g. 0.3. Costs no time. With a high value a "
                    "scene that should change its colours cannot.",
                ),
                io.Float.Input(
                    "context_sigma",
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    round=0.001,
                    tooltip="0 is as the student was trained, mostly none. Share of noise under which the "
                    "past is remembered, e.g. 0.1: small errors are not passed on, fine detail neither. It "
                    "costs no time.",
                ),
            ],
            outputs=[Drift.Output(display_name="DRIFT", tooltip="For the Long Sampler.")],
        )

    @classmethod
    @plain_errors
    def execute(cls, anchor: float, context_sigma: float) -> io.NodeOutput:
        """Hand the choice on."""
        return io.NodeOutput(DriftChoice(anchor=anchor, context_sigma=context_sigma))
