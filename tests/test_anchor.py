"""Chunks pulled towards the statistics of the first ones."""

import pytest
import torch

from sfpp_core.anchor import Anchor, LatentStatistics, anchored
from sfpp_core.errors import SettingsError


def drifting(chunks=12, frames=3):
    """Return chunks whose channels grow and wander."""
    return [
        torch.randn(2, 4, frames, 6, 5) * (1 + 0.1 * chunk)
        + 0.2 * chunk
        + torch.arange(4).view(1, 4, 1, 1, 1)
        for chunk in range(chunks)
    ]


def statistics(chunks):
    return LatentStatistics.of(torch.cat(chunks, dim=2))


def test_strength_0_changes_nothing_at_all():
    anchor = Anchor(strength=0, chunks=2)
    for clean in drifting():
        assert anchor(clean) is clean
    clean = torch.randn(1, 4, 3, 2, 2)
    assert anchored(clean, LatentStatistics.of(clean * 2 + 1), 0) is clean


def test_strength_1_gives_the_statistics_of_the_first_chunks():
    anchor, chunks = Anchor(strength=1, chunks=3), drifting()
    out = [anchor(clean) for clean in chunks]
    assert all(made is given for made, given in zip(out[:3], chunks[:3], strict=True))
    target = statistics(chunks[:3])
    for made in out[3:]:
        torch.testing.assert_close(LatentStatistics.of(made).mean, target.mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(LatentStatistics.of(made).std, target.std, atol=1e-5, rtol=0)
        assert made.dtype == torch.float32


def test_half_the_strength_goes_half_the_way():
    clean, target = torch.randn(1, 4, 3, 8, 8) * 3 + 2, LatentStatistics.of(torch.randn(1, 4, 3, 8, 8))
    own, made = LatentStatistics.of(clean), LatentStatistics.of(anchored(clean, target, 0.5))
    torch.testing.assert_close(made.mean, (own.mean + target.mean) / 2, atol=1e-5, rtol=0)
    torch.testing.assert_close(made.std, (own.std + target.std) / 2, atol=1e-5, rtol=0)


def test_samples_of_a_batch_and_channels_do_not_mix():
    clean = torch.randn(2, 4, 3, 4, 4)
    target = LatentStatistics.of(torch.randn(2, 4, 3, 4, 4) * 2)
    changed = clean.clone()
    changed[1, 3] += 5
    before, after = anchored(clean, target, 0.7), anchored(changed, target, 0.7)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1, :3], after[1, :3])
    assert not torch.equal(before[1, 3], after[1, 3])


@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_a_resumed_video_goes_on_bit_for_bit(done):
    chunks = drifting()
    whole = Anchor(strength=0.4, chunks=3)
    expected = [whole(clean) for clean in chunks]
    resumed = Anchor(strength=0.4, chunks=3, past=expected[:done])
    assert all(
        torch.equal(resumed(clean), out) for clean, out in zip(chunks[done:], expected[done:], strict=True)
    )


def test_a_longer_first_chunk_weighs_more():
    """A start image makes it one latent frame longer."""
    chunks = [torch.randn(1, 4, 4, 6, 5) + 3, torch.randn(1, 4, 3, 6, 5)]
    anchor = Anchor(strength=1, chunks=2, past=chunks)
    made = LatentStatistics.of(anchor(torch.randn(1, 4, 3, 6, 5) * 4))
    torch.testing.assert_close(made.mean, statistics(chunks).mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(made.std, statistics(chunks).std, atol=1e-5, rtol=0)


def test_no_more_than_the_first_chunks_are_looked_at():
    def past():
        yield from drifting(2)
        raise AssertionError("read too far")

    Anchor(strength=1, chunks=2, past=past())


def test_a_channel_without_contrast_stays_finite():
    made = anchored(torch.zeros(1, 4, 3, 2, 2), LatentStatistics.of(torch.randn(1, 4, 3, 2, 2)), 1)
    assert made.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 1.5}, "strength of the anchor is 1.5; use 0"),
        ({"strength": float("nan")}, "strength of the anchor is nan"),
        ({"strength": 0.5, "chunks": 0}, "learns from 0 chunks; use at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        Anchor(**settings)
