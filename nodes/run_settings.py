"""How a run on disk is gone on with, as a ComfyUI node."""

from dataclasses import dataclass
from typing import get_args

from ..sfpp_core.run.going_on import Replay
from . import _host
from ._host import io
from .plain_errors import plain_errors

RunSettings = io.Custom("SFPP_RUN_SETTINGS")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunChoice:
    """How the user wants a run to be gone on with; see ``going_on.go_on``."""

    replay: Replay = "all"
    """How the past is recalled where no keys and values were kept."""

    keep_cache: int = 0
    """Keys and values are kept after every so many chunks, and at the end; 0 never does."""

    def __str__(self) -> str:
        return f"replay {self.replay}, keep_cache {self.keep_cache}"


EXACT = RunChoice()
"""How a run is gone on with unless somebody chooses otherwise."""


class SFPPRunSettings(io.ComfyNode):
    """Choose how a run of the Long Sampler is gone on with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return _host.schema(
            node_id="SFPPRunSettings",
            display_name="Run Settings (Self-Forcing++)",
            category="sampling/self-forcing++",
            description="How a Long Sampler with a run goes on with it after Cancel, a crash or a restart. "
            "Without this node the whole past is replayed: exact, and a fifth of the time it took to make.",
            inputs=[
                io.Combo.Input(
                    "replay",
                    options=list(get_args(Replay)),
                    default="all",
                    tooltip="What of the past is run again before the video goes on. all: everything; the "
                    "same video, bit for bit, for a fifth of the time it took. window: the last two windows; "
                    "seconds at any length, but close, not the same. auto: all of up to 8 windows, else "
                    "window.",
                ),
                io.Int.Input(
                    "keep_cache",
                    default=0,
                    min=0,
                    max=10_000,
                    tooltip="Chunks; 0: never. Keys and values are kept on disk too, after every so many "
                    "chunks and at the end: the video then goes on bit for bit and at once. Takes as much "
                    "disk as the window takes memory, 6 GB at 832x480, twice that while it is written.",
                ),
            ],
            outputs=[RunSettings.Output(display_name="RUN SETTINGS", tooltip="For the Long Sampler.")],
        )

    @classmethod
    @plain_errors
    def execute(cls, replay: Replay, keep_cache: int) -> io.NodeOutput:
        """Hand the choice on."""
        return io.NodeOutput(RunChoice(replay=replay, keep_cache=keep_cache))
