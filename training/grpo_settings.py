"""Settings of the reinforcement stage."""

from dataclasses import dataclass, field
from typing import ClassVar, get_args

from sfpp_core.config import RolloutSettings
from training import parallel
from training.config import ConfigError
from training.loop import LoopSettings, OptimiserSettings
from training.models import VideoSettings
from training.policy import Reduction
from training.precision import AUTO, DTYPES
from training.rewards import RewardSettings
from training.segments import check_rolling
from training.worlds import check_world


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoSettings:
    """Settings of the reinforcement stage."""

    SMOKE: ClassVar = (
        "latent_frames=6", "prompts=1", "group=2", "exam_videos=1", "dtype=float32",
        "loop.sample_seconds=[1, 2]",
    )  # fmt: skip

    loop: LoopSettings
    """Length and bookkeeping; an iteration is one batch of rollouts."""

    optimiser: OptimiserSettings
    """How the student is updated."""

    student_run: str = ""
    """``last.pt`` of the stage the student starts from; empty is the embedded demo."""

    autoencoder: str = "sfpp_core/demo/autoencoder.safetensors"
    """Weights of the decoder whose frames are rewarded."""

    latent_frames: int = 21
    """Length of a rollout."""

    prompts: int = 2
    """Prompts per iteration, over all ranks."""

    group: int = 8
    """Videos per prompt; they are compared with each other only."""

    at_once: int = 0
    """Videos of a group computed together; 0 is all. Must divide ``group``."""

    same_start: bool = True
    """Start the videos of a group from the same noise, so that they differ by their actions alone."""

    differ: str = "weighed"
    """``weighed``: the videos of a group share the noise of every action but those that are weighed, so that
    what they are worth differs by these alone; ``all``: they share none. See ``chunk_share``."""

    mirrored: bool = True
    """Give every second video of a group the opposite noise of the one before it: what does not depend on the
    direction of an action then cancels. With ``differ="all"`` no video is mirrored."""

    coarse: int = 1
    """Let them differ by the means over squares of this many latent cells a side alone, above 1 with
    ``differ="weighed"`` only. What moves in a video follows the coarse part of its noise, which has far fewer
    numbers: a reward tells as much more about each of them."""

    updates: int = 1
    """Updates per batch of rollouts. With 1 every ratio is 1 and nothing is ever clipped."""

    chunk_share: float = 1.0
    """Share of the chunks that are weighed, drawn at random for each group. The fewer, the better it is
    known which of them a reward is due to, and the cheaper an update is; each group weighs one at least."""

    step_share: float = 1.0
    """Share of each such chunk's actions that are weighed, drawn at random for each group."""

    last_steps: bool = False
    """Weigh the last actions instead of random ones. They count most: at four steps and shift 5 the noise of
    the three actions enters the gradient with weights 0.067, 0.2 and 0.6."""

    logprob_reduction: str = "mean"
    """``mean``: log-ratios are divided by the numbers of an action; ``sum``: they are the true ones."""

    clip: float = 1e-4
    """Change of a ratio beyond which nothing more is gained; about 0.2 for ``sum``."""

    kl: float = 0.0
    """Weight of the divergence from the student at the start; 0 keeps no copy of it."""

    least_deviation: float = 0.01
    """Least deviation of a group's rewards that advantages are divided by."""

    advantage_limit: float = 5.0
    """Largest advantage."""

    dtype: str = "float32"
    """What the student computes in: ``float32``, ``bfloat16``, or ``auto``, which is bfloat16 where the
    device has it; its weights stay float32."""

    exam_videos: int = 24
    """Videos measured with every sample sheet, always of the same captions and noise."""

    reward: RewardSettings = field(default_factory=RewardSettings)
    """What a video is rewarded for."""

    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """How the student is rolled out."""

    checkpointing: bool = False
    """Recompute each layer in backward instead of keeping its activations."""

    video: VideoSettings = field(default_factory=VideoSettings)
    """Wan's prompts and sizes; without them it is the demo's world, whose exam every sample sits."""

    world: str = "standard"
    """Which of the demo's worlds, see ``worlds``: ``standard``, or ``hard``, whose captions tell less."""

    def __post_init__(self) -> None:
        check_world(self.world, is_wan=self.video.is_wan)
        self._check_choices()
        self._check_ranks()
        if self.latent_frames % self.rollout.chunk:
            raise ConfigError(f"latent_frames is {self.latent_frames}; it must be a multiple of the chunk.")
        check_rolling(self.rollout, self.latent_frames)
        if self.rollout.steps < 2:
            raise ConfigError("rollout.steps is 1, which leaves no action to learn; use at least 2, e.g. 4.")
        if self.group < 2:
            raise ConfigError(f"group is {self.group}; comparing needs at least 2 videos, e.g. 8.")
        if self.group % (self.at_once or self.group):
            raise ConfigError(f"at_once is {self.at_once}; it must divide the group, {self.group}.")
        if self.coarse > 1 and self.differ == "all":
            raise ConfigError(
                f"coarse is {self.coarse}, and differ is 'all'; set differ=weighed or coarse=1."
            )
        for name in (
            "prompts",
            "updates",
            "coarse",
            "clip",
            "least_deviation",
            "advantage_limit",
            "exam_videos",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0.")

    def _check_choices(self) -> None:
        """Refuse unknown words and shares that are none."""
        known = {
            "logprob_reduction": get_args(Reduction),
            "dtype": (AUTO, *DTYPES),
            "differ": ("weighed", "all"),
        }
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; use {' or '.join(map(repr, choices))}."
                )
        if self.video.is_wan and not self.student_run:
            raise ConfigError("student_run is empty, which is the embedded demo; name a student of Wan.")
        for name in ("chunk_share", "step_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0 and at most 1.")

    def _check_ranks(self) -> None:
        """Refuse an effective batch that is not the groups', and groups that cannot be shared out."""
        videos = self.prompts * self.group
        if self.loop.effective_batch not in (0, videos):
            raise ConfigError(
                f"loop.effective_batch is {self.loop.effective_batch}; here it is prompts x group, {videos}: "
                "set those, and leave it 0."
            )
        if self.prompts % parallel.launched():
            raise ConfigError(
                f"prompts is {self.prompts}; the {parallel.launched()} ranks share them, so it must be a "
                f"multiple of {parallel.launched()}."
            )
