"""Frames, latent frames, chunks and tokens."""

import itertools

import pytest

from sfpp_core.errors import GeometryError
from sfpp_core.geometry import VideoGeometry, frames_in, lead_of


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


@pytest.mark.parametrize(
    ("frames", "chunks"), [(1, 0), (2, 1), (13, 1), (14, 2), (25, 2), (26, 3), (85, 7), (86, 8)]
)
def test_chunks_after_an_image_cover_the_rest(frames, chunks):
    clip = video(frames=frames, lead=1)
    assert (clip.chunks, clip.latent_frames) == (chunks, 1 + 3 * chunks)
    assert clip.frames_of(clip.latent_frames) >= frames


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("frames", [2, 8, 9, 10, 13, 14, 80, 81, 960])
def test_the_frames_kept_of_all_chunks_are_the_frames_asked_for(frames, lead):
    clip = video(frames=frames, lead=lead)
    kept = [clip.frames_kept(chunk) for chunk in range(clip.chunks)]
    assert sum(kept) == frames
    assert all(count > 0 for count in kept)
    assert [clip.frames_until(chunk) for chunk in range(clip.chunks)] == list(itertools.accumulate(kept))


@pytest.mark.parametrize(
    ("latent_frames", "chunk", "lead"),
    [(1, 3, 1), (3, 3, 0), (4, 3, 1), (21, 3, 0), (1, 1, 0), (5, 1, 0), (3, 2, 1)],
)
def test_a_start_is_whole_chunks_or_one_latent_frame_more(latent_frames, chunk, lead):
    assert lead_of(latent_frames, chunk=chunk) == lead


@pytest.mark.parametrize(
    ("latent_frames", "remedy"),
    [
        (0, r"holds 0 latent frames; .* encode 1 frames \(1 latent frames\) or 9 frames \(3 latent frames\)"),
        (2, r"holds 2 latent frames; .* encode 1 frames \(1 latent frames\) or 9 frames \(3 latent frames\)"),
        (5, r"with chunks of 3 .* encode 13 frames \(4 latent frames\) or 21 frames \(6 latent frames\)"),
    ],
)
def test_a_start_that_leaves_a_chunk_half_empty_is_refused(latent_frames, remedy):
    with pytest.raises(GeometryError, match=remedy):
        lead_of(latent_frames, chunk=3)


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
        ({"lead": 3}, "lead is 3 latent frames; it must be 0, or 1 for an image"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(GeometryError, match=message):
        video(**change)


def test_another_family_has_another_stride_and_pace():
    geometry = VideoGeometry(height=704, width=1280, frames=frames_in(5, fps=24), stride=16, fps=24)
    assert (geometry.frames, geometry.seconds) == (120, 5)
    assert geometry.chunk_shape == (3, 44, 80)
    assert geometry.tokens_per_latent_frame == 880
    with pytest.raises(GeometryError, match="height is 720; it must be a multiple of 32"):
        VideoGeometry(height=720, width=1280, frames=1, stride=16)
