"""Settings of distribution matching: Self-Forcing, Self-Forcing++ and the streaming mode."""

from dataclasses import dataclass, field
from typing import ClassVar, get_args

from sfpp_core.config import RolloutSettings
from training.config import ConfigError
from training.first_latent import FirstLatent
from training.loop import LoopSettings, OptimiserSettings
from training.models import VideoSettings
from training.segments import BackwardNoise, check_rolling
from training.teacher import LATENT_CLIP
from training.worlds import check_world


@dataclass(frozen=True, slots=True, kw_only=True)
class DmdSettings:
    """Settings of the distribution-matching stage."""

    SMOKE: ClassVar = (
        "batch=2", "warmup=1", "every=2", "segment=6", "clips=[6, 3]", "horizon=9", "masked=1",
        "loop.sample_seconds=[1, 2]",
    )  # fmt: skip

    loop: LoopSettings
    """Length and bookkeeping; an iteration is one rollout."""

    student: OptimiserSettings
    """How the student is updated."""

    critic: OptimiserSettings
    """How the critic is updated."""

    teacher_run: str
    """``last.pt`` of the teacher, which the critic starts from too; for Wan also a published checkpoint."""

    student_run: str
    """``last.pt`` of the stage the student starts from; for Wan also a published checkpoint; empty is the
    demo's embedded student."""

    critic_run: str = ""
    """What the critic starts from where it is not the teacher: ``last.pt`` of an earlier run of this stage,
    whose critic goes on; for Wan also a published checkpoint, as small as the student for a large teacher."""

    autoencoder: str
    """Weights of the autoencoder: for the sample sheets, and to encode a first latent frame again. For Wan
    also a tiny decoder or ``preview``, which only show, or nothing."""

    scores: str = "causal"
    """``causal``: teacher and critic judge each chunk given the segment's chunks before it.
    ``bidirectional``: they judge the segment as a whole."""

    opening: float = 1.0
    """How much a segment's first chunk counts against each other, for causal scores: it alone is judged
    without a past, so it alone tells a drifted exposure from a right one."""

    horizon: int = 21
    """Longest rollout, in latent frames."""

    segment: int = 21
    """Latent frames the teacher scores: its own horizon."""

    clips: tuple[int, ...] = ()
    """Latent frames of the clips a segment is cut into for the teacher, one of these drawn for each batch;
    empty is the whole segment. A causal teacher judges only the first chunk of a clip without a past: in
    short clips it tells more chunks' exposure."""

    overall: float = 0.0
    """Extra weight, in the student's gradient, of what the score difference has in common over place and
    time, in a clip, or in each chunk of one for causal scores: exposure and tint, a few numbers among
    thousands. 0 is the method as published."""

    critic_overall: float = 0.0
    """Extra weight, in the critic's loss, of the error of the mean over place and time, of the same clips or
    chunks. It has the same minimum as the loss itself, and lets the critic know the student's exposures
    sooner."""

    past: str = "own"
    """What a segment from the middle of a video goes on from: the student's ``own`` rollout, or ``data``,
    true clips that fill the window but for a chunk, remembered as if the student had made them. Its cache
    rolls then, and it never sees its own errors. For the demo's world."""

    latents: str = ""
    """File of encoded clips, made by the teacher's stage; for a past of ``data``."""

    streaming: bool = False
    """Go on with one rollout from update to update, instead of beginning another in each."""

    overlap: int = 3
    """Latent frames a streamed segment shares with the one before; the others are new."""

    at_zero: float = 0.3
    """Share of segments that start at the first latent frame, of a longer horizon or a past of ``data``; not
    for streaming."""

    beta: tuple[float, ...] = (1.0, 1.0)
    """Beta law of where the other segments start: (1, 1) is uniform, (1, 2) prefers early; not for
    streaming or a past of ``data``."""

    last_step_only: bool = False
    """Keep the gradient at the last denoising step only, as Self-Forcing++ does, instead of a random one."""

    backward_noise: str = "rollout"
    """What the differentiated step starts from: the ``rollout``'s own noisy chunk, or the ``finished`` chunk
    noised again."""

    first_latent: str = "keep"
    """A segment from the middle of a video has no picture as its first latent frame: ``keep`` it as it is,
    ``mask`` its loss, or ``reencode`` the frame as a picture and mask."""

    masked: int = 3
    """Latent frames at the start of such a segment, or of each such clip of it, that have no loss, unless
    they are kept."""

    batch: int = 16
    """Rollouts per update."""

    every: int = 5
    """Iterations per update of the student; the critic moves in each."""

    warmup: int = 40
    """Iterations before the first update of the student."""

    critic_updates: int = 1
    """Updates of the critic per iteration: each noises the same segment anew. The longer the horizon, the
    less they cost beside the rollout."""

    guidance: float = 1.5
    """Guidance of the teacher, conventional scale: 1 is none."""

    level_shift: float = 5.0
    """Shift of the noise levels at which the teacher compares; a lower one looks more at what is nearly
    clean."""

    least_sigma: float = 0.43
    """Least noise at which the teacher compares; lower ones over-sharpen."""

    largest_sigma: float = 0.98
    """Largest noise at which the teacher compares."""

    checkpointing: bool = False
    """Recompute each layer in backward instead of keeping its activations."""

    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """How the student is rolled out."""

    student_loras: tuple[str, ...] = ()
    """LoRAs merged into a published checkpoint the student starts from, each ``FILE`` or
    ``FILE:STRENGTH``."""

    video: VideoSettings = field(default_factory=VideoSettings)
    """Wan's prompts and sizes; without them it is the demo's world."""

    world: str = "standard"
    """Which of the demo's worlds, see ``worlds``: ``standard``, or ``hard``, whose captions tell less."""

    def __post_init__(self) -> None:
        kinds = {
            "scores": ("causal", "bidirectional"),
            "past": ("own", "data"),
            "backward_noise": get_args(BackwardNoise),
            "first_latent": get_args(FirstLatent),
        }
        for name, known in kinds.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(known)}.")
        self._check_lengths()
        self._check_past()
        self._check_weights()
        self._check_video()
        if len(self.beta) != 2 or min(self.beta) <= 0:
            raise ConfigError(f"beta is {list(self.beta)}; it must be two numbers above 0, e.g. [1, 1].")

    def _check_lengths(self) -> None:
        """Refuse lengths that do not fit into each other."""
        for name in ("horizon", "segment", "overlap"):
            if getattr(self, name) % self.rollout.chunk:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be a multiple of the chunk.")
        if self.horizon < self.segment:
            raise ConfigError(f"horizon is {self.horizon}, shorter than the segment, {self.segment}.")
        check_rolling(self.rollout, self.horizon + self.given * self.rollout.chunk)
        if not 0 <= self.overlap < self.segment:
            raise ConfigError(f"overlap is {self.overlap}; it must be below the segment, {self.segment}.")
        for clip in self.clips:
            if clip < 1 or clip % self.rollout.chunk or self.segment % clip:
                raise ConfigError(
                    f"clips is {list(self.clips)}; {clip} must be a multiple of the chunk, "
                    f"{self.rollout.chunk}, and go into the segment, {self.segment}, without a rest."
                )

    def _check_past(self) -> None:
        """Refuse true clips where they cannot be the past, or where nobody reads them."""
        if self.past == "own":
            if self.latents:
                raise ConfigError(
                    f"latents is {self.latents}, and past is 'own', which reads no clips; set past to "
                    "'data', or leave latents out."
                )
            return
        if self.video.is_wan:
            raise ConfigError("past is 'data', which is clips of the demo's world; for Wan leave it 'own'.")
        if self.streaming or self.horizon != self.segment:
            raise ConfigError(
                "past is 'data', so nothing is rolled out before a segment: set horizon to the segment, "
                f"{self.segment}, and streaming to false."
            )
        if not self.latents:
            raise ConfigError(
                "past is 'data', and latents is empty; name the file of clips that training.train_teacher "
                "made."
            )
        size, longest = self.rollout.chunk, LATENT_CLIP[0] // self.rollout.chunk
        if not 1 <= self.given <= longest:
            raise ConfigError(
                f"rollout.window is {self.rollout.window}; a past of true clips, {LATENT_CLIP[0]} latent "
                f"frames long, fills a window from {2 * size} to {(longest + 1) * size}."
            )

    @property
    def given(self) -> int:
        """Chunks of a true clip that a segment from the middle of a video goes on from."""
        return self.rollout.window_chunks - 1 if self.past == "data" else 0

    def _check_weights(self) -> None:
        """Refuse a loss that leaves nothing of a clip, weights below 0, and one that nobody asks for."""
        shortest = min(self.clips, default=self.segment)
        if self.first_latent != "keep" and not 0 <= self.masked < shortest:
            raise ConfigError(
                f"masked is {self.masked}; it must be 0 or more and below the shortest clip, {shortest}, of "
                "which nothing would count, e.g. 1."
            )
        for name in ("opening", "overall", "critic_overall"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        if self.scores != "causal" and self.opening != 1:
            raise ConfigError(
                f"opening is {self.opening}, and bidirectional scores judge a segment as a whole; leave it 1."
            )

    def _check_video(self) -> None:
        """Refuse what Wan or the demo cannot do."""
        check_world(self.world, is_wan=self.video.is_wan)
        if self.video.is_wan and self.first_latent == "reencode" and not self.autoencoder:
            raise ConfigError(
                "first_latent is 'reencode', which needs an autoencoder, and autoencoder is empty; name "
                "Wan2.1_VAE, or set first_latent to 'mask' or 'keep'."
            )
        if not self.video.is_wan and (self.student_loras or not self.autoencoder):
            raise ConfigError(
                "video.prompts is empty, so this is the demo's world: it takes no student_loras and needs "
                "its autoencoder. For Wan, set video.prompts to the folder of training.encode_prompts."
            )
