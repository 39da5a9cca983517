"""Frames, latent frames, chunks and tokens."""

import pytest

from sfpp_core.errors import GeometryError
from sfpp_core.geometry import VideoGeometry, frames_in


def video(**changes):
    return VideoGeometry(**{"height": 480, "width": 832, "frames": 81, **changes})


def test_a_five_second_clip_of_wan_has_the_published_sizes():
    clip = video()
    assert (clip.latent_frames, clip.chunks, clip.tokens_per_latent_frame) == (21, 7, 1560)
    assert clip.chunk_shape == (3, 60, 104)


@pytest.mark.parametrize(
    ("frames", "chunks"), [(1, 1), (9, 1), (10, 2), (21, 2), (22, 3), (81, 7), (82, 8), (960, 81)]
)
def test_chunks_cover_the_frames(frames, chunks):
    clip = video(frames=frames)
    assert clip.chunks == chunks
    assert clip.frames_of(clip.latent_frames) >= frames


@pytest.mark.parametrize("frames", [1, 8, 9, 10, 80, 81, 960])
def test_the_frames_kept_of_all_chunks_are_the_frames_asked_for(frames):
    clip = video(frames=frames)
    kept = [clip.frames_kept(chunk) for chunk in range(clip.chunks)]
    assert sum(kept) == frames
    assert all(count > 0 for count in kept)


def test_seconds_become_frames_at_16_per_second():
    assert (frames_in(60), frames_in(5.0625), frames_in(0.01)) == (960, 81, 1)


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        (0, "seconds is 0; ask for more than 0"),
        (-1, "seconds is -1"),
        (float("nan"), "seconds is nan"),
        (float("inf"), "seconds is inf"),
        (1e9, "seconds is 1e.09; the longest video is a week"),
    ],
)
def test_impossible_lengths_are_refused(seconds, message):
    with pytest.raises(GeometryError, match=message):
        frames_in(seconds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 481}, "height is 481; it must be a multiple of 16, e.g. 480"),
        ({"width": 0}, "width is 0; it must be a multiple of 16, e.g. 16"),
        ({"frames": 0}, "frames is 0; ask for at least 1"),
        ({"chunk": 0}, "chunk is 0 latent frames"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(GeometryError, match=message):
        video(**change)
