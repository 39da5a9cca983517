"""What distribution matching costs at a given size: operations and memory of one device, from shapes alone.

Operations are twice the multiplications of the matrices, of self-attention over what is in sight and of
cross-attention over the text. Memory of activations is counted, not measured: the layer inputs that
checkpointing keeps, and all that one layer holds while it is computed again.

Checked against Wan 2.1 of 1.3B at 832x480: 40.5e12 operations for a chunk of 3 latent frames in a window of
21, 283e12 for a clip of 21 in one pass, 6.04 GB of keys and values in that window.
"""

from dataclasses import dataclass

import torch
from torch import nn

from sfpp_core.config import RolloutSettings, StudentConfig
from sfpp_core.geometry import PATCH, VideoGeometry

BFLOAT16 = 2
"""Bytes of a number that is computed with."""

KEPT, KEPT_INSIDE = 16, 3
"""Numbers one layer holds per token in a pass to be differentiated: residual streams, queries, keys, values,
norms and projections, in widths of the stream; and the feed-forward's, in widths of its own."""


COPIES = "float32 weights as they are computed with, in bfloat16"
"""What ``copies_of`` counts, in a dry run."""


def copies_of(module: nn.Module, ranks: int) -> int:
    """Return the bytes of autocast's copies of trained weights; what ranks gather is narrow already."""
    wide = [weight for weight in module.parameters() if weight.dtype == torch.float32]
    return sum(weight.numel() for weight in wide) * BFLOAT16 if ranks == 1 else 0


def forward_operations(config: StudentConfig, tokens: int, visible: int) -> float:
    """Return the operations of one forward of ``tokens``, each attending to ``visible``."""
    dim = config.dim
    matrices = 6 * dim * dim + 2 * dim * config.ffn_dim  # q, k, v, o; q, o of the text; the feed-forward
    attention = 2 * dim * (visible + config.text_length)
    ends = 2 * dim * PATCH**2 * config.channels
    return 2.0 * tokens * (config.layers * (matrices + attention) + ends)


def held(
    config: StudentConfig,
    geometry: VideoGeometry,
    *,
    batch: int,
    ring: int = 0,
    past: int = 0,
    checkpointing: bool,
) -> dict[str, int]:
    """Return the bytes a differentiated clip keeps alive at once, by what they are.

    Args:
        config: Architecture.
        geometry: Of the clip.
        batch: Clips computed at once.
        ring: Latent frames whose keys and values the rollout before it keeps.
        past: Latent frames of that rollout that the clip still sees.
        checkpointing: Whether layers are computed again in backward.
    """
    tokens, frames = geometry.tokens_per_latent_frame, geometry.latent_frames
    per_frame = 2 * config.layers * config.dim * tokens * BFLOAT16
    whole = frames * tokens * BFLOAT16
    inside = KEPT * config.dim + KEPT_INSIDE * config.ffn_dim
    kept = config.layers * (config.dim if checkpointing else inside)
    sizes = {
        f"keys and values of the rollout, {ring} latent frames": ring * per_frame,
        f"keys and values of the gradient part, {past} + {frames}": (past + frames) * per_frame,
        "activations kept for backward": whole * kept,
        "activations of one layer at work": whole * inside,
    }
    return {name: batch * size for name, size in sizes.items() if size}


def regression_operations(
    config: StudentConfig, geometry: VideoGeometry, rollout: RolloutSettings, *, checkpointing: bool
) -> float:
    """Return the operations of an update on one clip: of each chunk a clean pass and a differentiated one."""
    tokens = geometry.tokens_per_latent_frame
    chunk = forward_operations(config, tokens * rollout.chunk, tokens * rollout.window)
    return geometry.chunks * (2 + (3 if checkpointing else 2)) * chunk


def reinforcement_operations(
    config: StudentConfig,
    geometry: VideoGeometry,
    rollout: RolloutSettings,
    *,
    videos: int,
    chunks: int,
    weighed: int,
    updates: int,
    near: bool,
    checkpointing: bool,
) -> dict[str, float]:
    """Return the operations of an iteration of reinforcement, decoding and optical flow left out.

    Args:
        config: Architecture.
        geometry: Of one chunk.
        rollout: How the student is rolled out.
        videos: Rollouts of one rank.
        chunks: Of each.
        weighed: Actions of each that an update looks at.
        updates: On these rollouts.
        near: Whether the student at the start is asked as well.
        checkpointing: Whether layers are computed again in backward.
    """
    tokens = geometry.tokens_per_latent_frame
    chunk = forward_operations(config, tokens * rollout.chunk, tokens * rollout.window)
    remembered = chunks - 1  # at most: up to the last chunk an update looks at
    learnt = remembered + weighed * (4 if checkpointing else 3)
    asked = remembered + weighed if near else 0
    return {
        "rollouts": videos * chunks * (rollout.steps + 1) * chunk,
        "learning": updates * videos * (learnt + asked) * chunk,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchingCost:
    """One rollout of distribution matching and what is learnt from it."""

    config: StudentConfig

    geometry: VideoGeometry
    """Of the segment."""

    rollout: RolloutSettings

    batch: int = 1
    """Rollouts computed at once."""

    horizon: int
    """Longest rollout, in latent frames."""

    streaming: bool
    """Whether a rollout goes on from update to update."""

    overlap: int
    """Latent frames of a streamed segment that are not made again."""

    at_zero: float
    """Share of segments at the start of a video."""

    place: float
    """Mean place of the others in the rollout, from 0 to 1."""

    last_step_only: bool
    """Whether every step of a differentiated chunk is run, or half of them on average."""

    guided: bool
    """Whether the teacher is asked twice."""

    every: int
    """Iterations per update of the student."""

    critic_updates: int
    """Updates of the critic per iteration."""

    given: int = 0
    """Chunks before the others that are given, and only remembered."""

    checkpointing: bool
    """Whether layers are computed again in backward."""

    @property
    def _chunk(self) -> float:
        """Operations of one pass of one chunk in a full window."""
        tokens = self.geometry.tokens_per_latent_frame
        return forward_operations(self.config, tokens * self.rollout.chunk, tokens * self.rollout.window)

    @property
    def _whole(self) -> float:
        """Operations of one pass of the segment as a clip."""
        tokens = self.geometry.tokens_per_latent_frame * self.geometry.latent_frames
        return forward_operations(self.config, tokens, tokens)

    @property
    def made(self) -> float:
        """Chunks before the segment that an iteration makes, on average."""
        if self.streaming:
            return 0.0
        latest = self.horizon - self.geometry.latent_frames
        return (1 - self.at_zero) * self.place * latest / self.rollout.chunk

    def parts(self) -> dict[str, float]:
        """Return the operations of one iteration of one batch, by what they are for."""
        steps = self.rollout.steps
        new = self.geometry.chunks
        if self.streaming and self.horizon > self.geometry.latent_frames:
            new -= self.overlap // self.rollout.chunk
        passes = (steps if self.last_step_only else (steps + 1) / 2) + 1
        again = 3 if self.checkpointing else 2
        remembered = (1 - self.at_zero) * self.given
        asked = (2 if self.guided else 1) + 1
        found = {
            "rollout": (remembered + self.made * (steps + 1) + new * passes) * self._chunk,
            "student": (new * again * self._chunk + asked * self._whole) / self.every,
            "critic": self.critic_updates * (1 + again) * self._whole,
        }
        return {name: self.batch * operations for name, operations in found.items()}

    def held(self) -> dict[str, int]:
        """Return the bytes that are alive at once beside weights and optimisers, by what they are."""
        return held(
            self.config,
            self.geometry,
            batch=self.batch,
            ring=0 if self.streaming else self.rollout.window,
            past=self.rollout.window - self.rollout.chunk,
            checkpointing=self.checkpointing,
        )
