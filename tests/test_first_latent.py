"""What becomes of the first latent frame of a segment, and how a segment is cut into clips."""

import torch
from tiny_runs import autoencoder

from training.first_latent import as_clips
from training.segments import Rolled

CLEAN = torch.randn(1, 16, 6, 8, 8)
BEFORE = torch.randn(1, 16, 6, 8, 8)


def test_a_segment_from_the_start_of_a_video_is_a_clip_already():
    rolled = Rolled(clean=CLEAN, before=CLEAN[:, :, :0])
    for handling in ("keep", "mask", "reencode"):
        clean, mask = as_clips(rolled, handling, autoencoder(), masked=3, length=6)
        assert torch.equal(clean, CLEAN)
        assert mask is None


def test_a_later_segment_is_kept_masked_or_begins_with_a_picture():
    rolled = Rolled(clean=CLEAN.clone().requires_grad_(True), before=BEFORE)
    pictures = autoencoder()
    clean, mask = as_clips(rolled, "keep", pictures, masked=3, length=6)
    assert torch.equal(clean, rolled.clean)
    assert mask is None
    clean, mask = as_clips(rolled, "mask", pictures, masked=3, length=6)
    assert mask.flatten(1).tolist() == [[0, 0, 0, 1, 1, 1]] * len(CLEAN)
    clean, mask = as_clips(rolled, "reencode", pictures, masked=1, length=6)
    assert mask.flatten(1).tolist() == [[0, 1, 1, 1, 1, 1]] * len(CLEAN)
    torch.testing.assert_close(clean[:, :, 1:], CLEAN[:, :, 1:], rtol=0, atol=0)
    frame = pictures.decode(torch.cat((BEFORE, CLEAN[:, :, :1]), dim=2))[:, -1:]
    torch.testing.assert_close(clean[:, :, :1], pictures.encode(frame))
    clean.sum().backward()
    assert rolled.clean.grad[:, :, 0].abs().max() == 0


def test_a_segment_is_cut_into_clips_that_each_begin_with_a_picture():
    rolled, pictures = Rolled(clean=CLEAN, before=BEFORE), autoencoder()
    clips, mask = as_clips(rolled, "reencode", pictures, masked=1, length=3)
    assert clips.shape == (2 * len(CLEAN), *CLEAN.shape[1:2], 3, *CLEAN.shape[3:])
    assert mask.flatten(1).tolist() == [[0, 1, 1]] * len(clips)
    for clip, begin in enumerate((0, 3)):
        cut = Rolled(clean=CLEAN[:, :, begin : begin + 3], before=torch.cat((BEFORE, CLEAN[:, :, :begin]), 2))
        alone, _ = as_clips(cut, "reencode", pictures, masked=1, length=3)
        torch.testing.assert_close(clips[clip::2], alone)


def test_only_the_clip_that_opens_the_video_has_its_picture_already():
    rolled = Rolled(clean=CLEAN, before=CLEAN[:, :, :0])
    clips, mask = as_clips(rolled, "reencode", autoencoder(), masked=1, length=3)
    assert torch.equal(clips[::2], CLEAN[:, :, :3])
    assert mask.flatten(1).tolist() == [[1, 1, 1], [0, 1, 1]] * len(CLEAN)


def test_two_chunks_before_are_enough_to_show_a_latent_frame():
    """The decoder's memory reaches no further back than what is kept before a segment."""
    pictures, video = autoencoder(), torch.randn(1, 16, 13, 8, 8)
    whole = pictures.decode(video)[:, -1]
    pictures.reset()
    short = pictures.decode(video[:, :, -7:])[:, -1]
    torch.testing.assert_close(short, whole, rtol=1e-4, atol=1e-5)
