"""The long sampler and its cache settings, as ComfyUI nodes."""

import logging
from dataclasses import dataclass, replace
from typing import Any, get_args

from ..sfpp_core.cache_shape import StorageKind
from ..sfpp_core.conditioning import fit_text
from ..sfpp_core.config import RolloutSettings, StudentConfig
from ..sfpp_core.geometry import VideoGeometry, frames_in, lead_of
from ..sfpp_core.latent_space import DEMO
from ..sfpp_core.prompts import is_of_the_demo
from ..sfpp_core.timetable import Timetable, timetable
from . import _host
from ._host import io
from .conditioning import spoken_of
from .drift_controls import OFF, Drift, DriftChoice
from .generation import Generation, architecture
from .kept_generation import KeptGeneration, decisions_of
from .lazy_latent import SPACES, LazyLatent
from .memory import memory_needed
from .plain_errors import plain_errors
from .run_folder import RunFolder, folder_of, spoken_texts
from .run_settings import EXACT, RunChoice, RunSettings
from .start import Start, in_words
from .student_settings import causal, settings_of

Cache = io.Custom("SFPP_CACHE")

MULTIPLES = "Pixels, a multiple of 16; of 32 for Wan 2.2 of 5B."
"""What the widgets say of width and height."""

NOT_CAUSAL = (
    "This MODEL does not say that it was trained to generate chunk by chunk. A plain Wan makes poor video "
    "here; use a student distilled with Self-Forcing or one of its kin."
)
"""What the log says of a model, unless its file or its loader knows better."""

RESTARTS = (
    "each window starts anew from the last latents as they are; the command line encodes the frame before "
    "them again, as CausVid does, and so makes another video."
)
"""Warning for students that are rolled out with an overlap."""

NOT_CAUSAL_IN_SHORT = "Warning: not marked as causal; plain Wan makes poor video."
"""What the node says, where there is room for a line or two."""

SETTINGS_WITHOUT_RUN = "Run Settings do nothing without a run: name one."
"""Warning, on the node and in the log."""

LONGEST_SECONDS = 3600.0
"""Longest video: its latents, 5.8 GB at 832x480, are kept in main memory."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CacheChoice:
    """What the user chose to remember, in latent frames."""

    window: int
    sink: int
    sink_positions: str

    storage: StorageKind = "plain"
    """How keys and values are kept."""

    def __str__(self) -> str:
        return f"window {self.window}, sink {self.sink} ({self.sink_positions}), {self.storage}"

    def over(self, settings: RolloutSettings) -> RolloutSettings:
        """Return ``settings`` with these in their place.

        Raises:
            SettingsError: They do not fit the student's chunk.
        """
        return replace(settings, window=self.window, sink=self.sink, sink_positions=self.sink_positions)


class SFPPCacheSettings(io.ComfyNode):
    """Choose how much of the past the Long Sampler attends to."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return _host.schema(
            node_id="SFPPCacheSettings",
            display_name="Cache Settings (Self-Forcing++)",
            category="sampling/self-forcing++",
            description="How much of the past a new chunk sees. Without this node the student's own settings "
            "are used.",
            inputs=[
                io.Int.Input(
                    "window",
                    default=21,
                    min=1,
                    max=600,
                    tooltip="Latent frames a new chunk sees, itself and the sink included; a multiple of the "
                    "chunk, 3. 21 are 5 seconds, as students are trained on. Memory and time grow with it.",
                ),
                io.Int.Input(
                    "sink",
                    default=0,
                    min=0,
                    max=597,
                    tooltip="First latent frames of the video that are never forgotten; a multiple of the "
                    "chunk, 3. Counted in the window. Keeps the look of the start; may pull motion back.",
                ),
                io.Combo.Input(
                    "sink_positions",
                    options=["absolute", "relative"],
                    default="absolute",
                    tooltip="Where attention places the sink: at its true time, or right before the rest of "
                    "the window.",
                ),
                io.Combo.Input(
                    "storage",
                    options=list(get_args(StorageKind)),
                    default="plain",
                    optional=True,
                    tooltip="plain: on the card as computed, 6 GB at 832x480. fp8: half of that, a little "
                    "less exact. host: in main memory, fetched layer by layer; slower. fp8-host: both.",
                ),
            ],
            outputs=[Cache.Output(display_name="CACHE")],
        )

    @classmethod
    @plain_errors
    def execute(
        cls, window: int, sink: int, sink_positions: str, storage: StorageKind = "plain"
    ) -> io.NodeOutput:
        """Hand the choice on; the sampler checks it against the student's chunk."""
        return io.NodeOutput(CacheChoice(window, sink, sink_positions, storage))


class SFPPLongSampler(io.ComfyNode):
    """Generate a video of any length, chunk by chunk."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return _host.schema(
            node_id="SFPPLongSampler",
            display_name="Long Sampler (Self-Forcing++)",
            category="sampling/self-forcing++",
            description="Rolls a causal student out chunk by chunk; video memory does not grow with length. "
            "Checks its settings at once and returns at once: chunks are made when the next node asks for "
            "them.",
            search_aliases=[
                "self forcing",
                "long video",
                "causal wan",
                "autoregressive video",
                "minute video",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A text-to-video model of Wan 2.1, or Wan 2.2 of 5B, distilled with "
                    "Self-Forcing; LoRAs included.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="One prompt from CLIP Text Encode, or several from Prompt Schedule.",
                ),
                io.Int.Input("width", default=832, min=16, max=4096, step=16, tooltip=MULTIPLES),
                io.Int.Input("height", default=480, min=16, max=4096, step=16, tooltip=MULTIPLES),
                io.Float.Input(
                    "seconds",
                    default=60.0,
                    min=0.1,
                    max=LONGEST_SECONDS,
                    step=1.0,
                    round=0.01,
                    tooltip="Length at 16 frames per second, 24 of Wan 2.2 of 5B; after a start, what is "
                    "added to it. Video memory does not grow with it; finished latents stay in main memory, "
                    "97 MB per minute of 832x480.",
                ),
                io.Int.Input(
                    "video_seed",
                    display_name="seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="The same seed gives the same video, and a longer one begins with the shorter. "
                    "It stays as it is after a run, so that a cancelled video can be continued.",
                ),
                Cache.Input(
                    "cache",
                    optional=True,
                    tooltip="From Cache Settings. Left open: the student's own, usually window 21, sink 0.",
                ),
                io.Latent.Input(
                    "start",
                    optional=True,
                    tooltip="What the video begins with, from VAE Encode (an image, or a clip to go on from) "
                    "or from another Long Sampler. Of the same width and height. The video contains it.",
                ),
                io.String.Input(
                    "run",
                    default="",
                    optional=True,
                    tooltip="A folder in the output folder, e.g. runs/my_video. Chunks are kept there: the "
                    "video goes on after Cancel, a crash or a restart, and can be made longer. Empty: they "
                    "are kept in memory.",
                ),
                Drift.Input(
                    "drift",
                    optional=True,
                    tooltip="From Drift Controls. Left open: nothing is done against drift.",
                ),
                RunSettings.Input(
                    "run_settings",
                    optional=True,
                    tooltip="From Run Settings: how a run is gone on with. Left open: its whole past is "
                    "replayed, which is exact.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="LATENT", tooltip="Made chunk by chunk as it is read. Works with any node."
                ),
                io.String.Output(
                    display_name="RUN", tooltip="Name of the run, for another Long Sampler; empty without."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @plain_errors
    def execute(
        cls,
        model: Any,
        conditioning: Any,
        width: int,
        height: int,
        seconds: float,
        video_seed: int,
        cache: CacheChoice | None = None,
        start: dict[str, Any] | None = None,
        run: str = "",
        drift: DriftChoice = OFF,
        run_settings: RunChoice | None = None,
    ) -> io.NodeOutput:
        """Check everything and return a latent that is generated as it is read."""
        student = settings_of(model)
        settings = student.rollout if cache is None else cache.over(student.rollout)
        config = architecture(model, text_length=student.text_length)
        spoken = spoken_of(conditioning)
        embeddings = [fit_text(rows, config) for rows in spoken.embeddings]
        space = SPACES[config.channels]
        opening, frames, lead = None, frames_in(seconds, fps=space.fps), 0
        if start is not None:
            opening = Start.of(start, width=width, height=height, chunk=settings.chunk, space=space)
            frames, lead = frames + opening.frames, lead_of(opening.latent_frames, chunk=settings.chunk)
        geometry = VideoGeometry(
            width=width,
            height=height,
            frames=frames,
            chunk=settings.chunk,
            lead=lead,
            stride=space.spatial_stride,
            fps=space.fps,
        )
        table = timetable(spoken.script, geometry)
        recipe: dict[str, Any] = {
            "text": table.cues([embeddings[entry.number - 1] for entry in table.entries]),
            "geometry": geometry,
            "settings": settings,
            "seed": video_seed,
            "start": opening,
            "storage": "plain" if cache is None else cache.storage,
            "drift": drift,
            "maker": cls.hidden.unique_id,
        }
        if name := run.strip():
            folder = RunFolder(
                name=name,
                folder=folder_of(name),
                space=DEMO if is_of_the_demo(config) else space,
                geometry=geometry,
                decisions=decisions_of(model, config, recipe),
                texts=spoken_texts(table, embeddings),
            )
            video = KeptGeneration(model, config, run=folder, going_on=run_settings or EXACT, **recipe)
        else:
            video = Generation(model, config, **recipe)
        said = scene_remarks(table, settings) + remarks(video, model, config)
        if run_settings is not None and not name:
            logger.warning("%s", SETTINGS_WITHOUT_RUN)
            said.insert(0, SETTINGS_WITHOUT_RUN)
        _host.say("\n".join(said))
        return io.NodeOutput(LazyLatent(video), name)


def scene_remarks(table: Timetable, settings: RolloutSettings) -> list[str]:
    """Return what is not shown as written, and when the scenes begin; the log has the whole table."""
    warnings = [*table.warnings, *table.without_effect(settings)]
    for warning in warnings:
        logger.warning("%s", warning)
    if len(table.entries) == 1:
        return warnings
    logger.info("%s", "\n".join(["scenes", *table.lines()]))
    times = ", ".join(f"{entry.actual:.1f} s" for entry in table.entries)
    return [*warnings, f"{len(table.entries)} scenes, at {times}"]


def remarks(video: Generation, model: Any, config: StudentConfig) -> list[str]:
    """Return what the user should know before the run, most important first; the log has it in full."""
    found = []
    if not causal(model):
        logger.warning("%s", NOT_CAUSAL)
        found.append(NOT_CAUSAL_IN_SHORT)
    if ignored := ", ".join(_host.additions_without_effect(model)):
        logger.warning("Without effect in the Long Sampler: %s on the MODEL.", ignored)
        found.append(f"Without effect: {ignored}.")
    if video.settings.overlap:
        logger.warning("%s", RESTARTS)
        found.append("Windows restart from plain latents.")
    needed = memory_needed(model, config, video)
    facts = [] if video.start is None else [in_words(video.start)]
    if video.origin:
        facts.append(f"{video.origin}: {video.kept} of {video.total_chunks} chunks are there")
    facts.append(f"needs {needed}")
    logger.info("%s: %s", video, "; ".join(facts))
    return found + facts
