"""Sizes of one video in its four units: frames, latent frames, chunks, tokens.

The only module that knows the compression factors of the Wan 2.1 autoencoder. Wan 2.2 of 5B differs in two of
them, its stride and its frames per second.
"""

import math
from dataclasses import dataclass

from .errors import GeometryError

TEMPORAL_STRIDE = 4
"""Frames per latent frame, except the first latent frame, which holds one frame."""

SPATIAL_STRIDE = 8
"""Pixels per latent cell of Wan 2.1, along height and along width; Wan 2.2 of 5B has 16."""

PATCH = 2
"""Latent cells per token, along height and along width. One latent frame per token in time."""

FPS = 16
"""Frames per second of Wan 2.1."""

LONGEST_SECONDS = 7 * 24 * 3600
"""Longest video accepted, one week: a larger number is a slip of the finger."""


def frames_in(seconds: float, *, fps: int = FPS) -> int:
    """Return the frames of a video of ``seconds`` at ``fps``, rounded, at least 1.

    Raises:
        GeometryError: ``seconds`` is not a number above 0, or longer than a week.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise GeometryError(f"seconds is {seconds:g}; ask for more than 0, e.g. 60.")
    if seconds > LONGEST_SECONDS:
        raise GeometryError(
            f"seconds is {seconds:g}; the longest video is a week, {LONGEST_SECONDS} seconds."
        )
    return max(1, round(seconds * fps))


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoGeometry:
    """Size of the video to generate and of the chunks it is generated in."""

    height: int
    """Pixels. A multiple of 16, twice the stride."""

    width: int
    """Pixels. A multiple of 16, twice the stride."""

    frames: int
    """Frames the user asked for. The rollout may produce more; the surplus is trimmed."""

    chunk: int = 3
    """Latent frames generated together."""

    lead: int = 0
    """Latent frames before chunk 0: 1 for a video that starts from an image, else 0. See ``lead_of``."""

    stride: int = SPATIAL_STRIDE
    """Pixels per latent cell, along height and along width."""

    fps: int = FPS
    """Frames per second."""

    def __post_init__(self) -> None:
        step = self.stride * PATCH
        for name in ("height", "width"):
            size = getattr(self, name)
            if size <= 0 or size % step:
                nearest = max(step, round(size / step) * step)
                raise GeometryError(f"{name} is {size}; it must be a multiple of {step}, e.g. {nearest}.")
        if self.frames < 1:
            raise GeometryError(f"frames is {self.frames}; ask for at least 1.")
        if self.chunk < 1:
            raise GeometryError(f"chunk is {self.chunk} latent frames; it must be at least 1.")
        if self.lead not in (0, 1):
            raise GeometryError(f"lead is {self.lead} latent frames; it must be 0, or 1 for an image.")

    @property
    def chunks(self) -> int:
        """Chunks needed to cover ``frames``, after the lead."""
        latent_frames = -(-(self.frames - 1) // TEMPORAL_STRIDE) + 1
        return -(-(latent_frames - self.lead) // self.chunk)

    @property
    def latent_frames(self) -> int:
        """Latent frames of the whole rollout: the lead and a whole number of chunks."""
        return self.lead + self.chunks * self.chunk

    @property
    def seconds(self) -> float:
        """Length of the video."""
        return self.frames / self.fps

    @property
    def tokens_per_latent_frame(self) -> int:
        """Transformer tokens in one latent frame. 1560 at 832x480."""
        return (self.height // self.stride // PATCH) * (self.width // self.stride // PATCH)

    @property
    def tokens_per_chunk(self) -> int:
        """Transformer tokens in one chunk: what one cache slot holds."""
        return self.chunk * self.tokens_per_latent_frame

    @property
    def chunk_shape(self) -> tuple[int, int, int]:
        """``(T, H, W)`` of one chunk in latent space."""
        return self.chunk, self.height // self.stride, self.width // self.stride

    @staticmethod
    def frames_of(latent_frames: int) -> int:
        """Return the frames decoded from the first ``latent_frames`` of a video."""
        return max(0, 1 + (latent_frames - 1) * TEMPORAL_STRIDE)

    def frames_kept(self, chunk: int) -> int:
        """Return how many of the frames decoded from ``chunk`` belong to the video: all but in the last.

        The lead is decoded with chunk 0.
        """
        return self.frames_until(chunk) - self.frames_until(chunk - 1)

    def frames_until(self, chunk: int) -> int:
        """Return the frames of the video once ``chunk`` is decoded; before chunk 0, at -1, there is none."""
        return min(self.frames, self.frames_decoded(chunk + 1))

    def frames_decoded(self, chunks: int) -> int:
        """Return the frames decoded from the first ``chunks``, those beyond the video among them."""
        return self.frames_of(self.lead + chunks * self.chunk) if chunks else 0


def lead_of(latent_frames: int, *, chunk: int) -> int:
    """Return the lead of a video that starts with ``latent_frames`` given ones: 0, or 1 for an image.

    Whole chunks are a clip and have no lead. One more is an image, or a clip whose first latent frame stands
    alone; with chunks of 1 an image is a chunk.

    Raises:
        GeometryError: That many latent frames cannot start a video.
    """
    over = latent_frames % chunk
    if latent_frames > 0 and over < 2:
        return over
    after = max(latent_frames - over, 0) + chunk
    fitting = [count for count in (after - chunk + 1, after) if count > 0]
    sizes = " or ".join(
        f"{VideoGeometry.frames_of(count)} frames ({count} latent frames)" for count in fitting
    )
    raise GeometryError(
        f"the start holds {latent_frames} latent frames; with chunks of {chunk} a start is whole chunks, or "
        f"one latent frame and whole chunks: encode {sizes}."
    )
