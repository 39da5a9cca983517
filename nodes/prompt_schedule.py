"""Prompts over time, as a ComfyUI node."""

from typing import Any

from ..sfpp_core.cues import DEFAULT_BLEND, Change
from ..sfpp_core.errors import ScriptError
from ..sfpp_core.script import read_script
from ..sfpp_core.timetable import short
from . import _host
from ._host import io
from .conditioning import KEY, Spoken
from .plain_errors import plain_errors

SWITCHES = ["soft", "soft:1", "cut", "cut+sink", *(f"blend:{chunks}" for chunks in (2, DEFAULT_BLEND, 8))]
"""Ways of a change to choose from; the text may name any."""

EXAMPLE = "[0s: a cat sleeps on a sofa] [10s: the cat wakes up and stretches]"


class SFPPPromptSchedule(io.ComfyNode):
    """Encode prompts over time."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return _host.schema(
            node_id="SFPPPromptSchedule",
            display_name="Prompt Schedule (Self-Forcing++)",
            category="sampling/self-forcing++",
            description="Prompts that change over time, for the Long Sampler. Other samplers see the first "
            "scene alone.",
            search_aliases=["prompt travel", "timed prompts", "scenes", "storyboard"],
            inputs=[
                io.Clip.Input("clip", tooltip="The student's text encoder: umT5, or that of Load Demo."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default=EXAMPLE,
                    tooltip="[0s: a cat] [10s: a dog] with the second each scene begins at, a cat [10s] | a "
                    "dog [5s] with its length, a cat | a dog in equal shares, or JSON. Text before the first "
                    "bracket is common to all. Seconds are those of the finished video, a start included.",
                ),
                io.Combo.Input(
                    "switch",
                    options=SWITCHES,
                    default="soft",
                    tooltip="How scenes take over, where the text does not say, as in [10s cut: a dog]. "
                    "soft: the picture goes on under the new prompt. soft:1: it remembers 1 chunk alone and "
                    "so changes more. cut: a new shot. cut+sink: one that keeps the sink. blend:4: prompts "
                    "are mixed over 4 chunks, 3 seconds.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING")],
        )

    @classmethod
    @plain_errors
    def execute(cls, clip: Any, text: str, switch: str) -> io.NodeOutput:
        """Read the scenes, encode each prompt once, and attach all to the conditioning of the first."""
        if clip is None:
            raise ScriptError("clip is empty; connect the text encoder of the student, as a CLIP.")
        script = read_script(text, change=Change.parse(switch))
        encoded: dict[str, Any] = {}
        for number, scene in enumerate(script.scenes, start=1):
            if scene.prompt not in encoded:
                encoded[scene.prompt] = _encode(
                    clip, scene.prompt, number if len(script.scenes) > 1 else None
                )
        (first, extras), *rest = encoded[script.scenes[0].prompt]
        spoken = Spoken(script, tuple(encoded[scene.prompt][0][0] for scene in script.scenes))
        return io.NodeOutput([[first, {**extras, KEY: spoken}], *rest])


def _encode(clip: Any, prompt: str, number: int | None) -> Any:
    """Return the conditioning of one prompt; what is wrong with it is said of its scene."""
    try:
        return _host.encode_text(clip, prompt)
    except ValueError as error:
        if number is None:
            raise
        raise ScriptError(f"scene {number} ({short(prompt)!r}): {error}") from error
