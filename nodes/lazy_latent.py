"""A LATENT whose samples are computed when somebody reads them.

The host runs one node at a time, so a sampler that returned a finished latent could not overlap with
decoding. This one is a promise: whoever reads ``samples`` waits for the whole video, as with any latent;
a reader that knows better takes it chunk by chunk and works on each before the next is made.
"""

from collections.abc import Generator, ItemsView, Iterator, Mapping, Sequence, ValuesView
from typing import Any, Protocol

from torch import Tensor

from ..sfpp_core.errors import GeometryError
from ..sfpp_core.geometry import VideoGeometry
from ..sfpp_core.latent_space import WAN_2_1, WAN_2_2, LatentSpace

SAMPLES = "samples"
"""Key of the latent itself, as everywhere in the host."""

SPACES = {space.channels: space for space in (WAN_2_1, WAN_2_2)}
"""Where the host's latents live, by their channels. Those of the demo are scaled as Wan 2.1's."""


class ChunkSource(Protocol):
    """Where the chunks of one video come from. Latents are the host's: not normalised, on the CPU."""

    maker: str | None
    """Id of the node that made it, for the preview."""

    @property
    def space(self) -> LatentSpace:
        """Where its latents live, once they are normalised."""
        ...

    @property
    def frames(self) -> int:
        """Frames the video has once decoded; its last chunk may decode to more."""
        ...

    @property
    def latent_frames(self) -> int:
        """Latent frames of all chunks together."""
        ...

    @property
    def total_chunks(self) -> int:
        """Chunks of the whole video."""
        ...

    @property
    def kept(self) -> int:
        """Chunks that need not be made any more, from the first."""
        ...

    @property
    def origin(self) -> str:
        """Where such chunks come from, for people; empty where they are in memory."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        ...

    def chunks(self, *, beside: Sequence[Any] = ()) -> Generator[Tensor]:
        """Yield every chunk ``(1, C, T, h, w)`` from the first on, generating those that are not there yet.

        Args:
            beside: Other models that are needed between the chunks, for example that of a decoder. Looked at
                before every chunk.
        """
        ...

    def samples(self) -> Tensor:
        """Return the whole latent ``(1, C, T, h, w)``, generating what is missing."""
        ...


class Finished:
    """A latent that is simply there, from a file or another sampler, read in pieces like any other."""

    LATENT_FRAMES = 3
    """Latent frames handed out at a time."""

    def __init__(self, samples: Tensor) -> None:
        """Take one video, ``(1, C, T, h, w)``.

        Raises:
            GeometryError: The latent is of pictures, of several videos, or of another kind of model.
        """
        if samples.ndim != 5 or samples.shape[0] != 1:
            raise GeometryError(
                f"samples have shape {tuple(samples.shape)}; one video is decoded at a time, "
                "(1, channels, latent frames, height, width)."
            )
        if samples.shape[1] not in SPACES:
            raise GeometryError(
                f"samples have {samples.shape[1]} latent channels; those of Wan have 16, or 48 for Wan 2.2 "
                "of 5B."
            )
        self.maker: str | None = None
        self._samples = samples
        self.space = SPACES[samples.shape[1]]
        self.latent_frames = samples.shape[2]
        self.frames = VideoGeometry.frames_of(self.latent_frames)
        self.total_chunks = -(-samples.shape[2] // self.LATENT_FRAMES)
        self.origin = ""
        self.kept = 0  # nothing is made here: the pace is the decoder's
        stride = self.space.spatial_stride
        self.size = (samples.shape[4] * stride, samples.shape[3] * stride)

    def chunks(self, *, beside: Sequence[Any] = ()) -> Generator[Tensor]:  # noqa: ARG002 - nothing is loaded here
        """Yield the latent in pieces."""
        yield from self._samples.split(self.LATENT_FRAMES, dim=2)

    def samples(self) -> Tensor:
        """Return the latent."""
        return self._samples


def source_of(latent: dict[str, Any]) -> ChunkSource:
    """Return where the chunks of any LATENT come from.

    Raises:
        GeometryError: The latent is of pictures, of several videos, or of another kind of model.
    """
    if isinstance(latent, LazyLatent) and latent.waiting:
        return latent.source
    return Finished(latent[SAMPLES])


class LazyLatent(dict[str, Any]):
    """A dict like any other LATENT, except that reading its samples may take a while.

    Every way of reading a dict leads to the same place: indexing, ``get``, ``items``, ``values``, ``copy``,
    ``dict(latent)``, ``{**latent}``, ``latent | other``, ``copy.deepcopy`` and pickling. What comes out of a
    copy is an ordinary dict with an ordinary tensor. Asking for the keys, the length or the text of the dict
    costs nothing.
    """

    def __init__(self, source: ChunkSource) -> None:
        super().__init__({SAMPLES: None})
        self.source = source

    @property
    def waiting(self) -> bool:
        """Whether the samples are still the source's: a node may have put its own in their place."""
        return super().__getitem__(SAMPLES) is None

    def _plain(self) -> dict[str, Any]:
        """Return an ordinary dict with the finished samples."""
        return {key: self[key] for key in self.keys()}

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return self.source.samples() if key == SAMPLES and value is None else value

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of ``key``, or ``default``."""
        if key not in self:
            return default
        return self[key]

    def pop(self, key: str, *default: Any) -> Any:
        """Remove ``key`` and return its value, or ``default``."""
        if key in self:
            value = self[key]
            super().pop(key)
            return value
        return super().pop(key, *default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return the value of ``key``, set to ``default`` where it was missing."""
        if key not in self:
            self[key] = default
        return self[key]

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        """Return keys and values."""
        return self._plain().items()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        """Return the values."""
        return self._plain().values()

    def __iter__(self) -> Iterator[str]:
        # Overridden so that dict(latent) and {**latent} ask for each value instead of copying the storage.
        return super().__iter__()

    def copy(self) -> dict[str, Any]:
        """Return an ordinary dict with the finished samples."""
        return self._plain()

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        return {**self._plain(), **other}

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        return {**other, **self._plain()}

    def __reduce__(self) -> tuple[type[dict], tuple[dict[str, Any]]]:
        return dict, (self._plain(),)

    def __reduce_ex__(self, protocol: Any) -> tuple[type[dict], tuple[dict[str, Any]]]:
        return self.__reduce__()

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None

    def __repr__(self) -> str:
        return f"LazyLatent({self.source})"
