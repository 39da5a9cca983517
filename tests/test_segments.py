"""Segments of rollouts, and the losses on them."""

import numpy as np
import pytest
import tiny
import torch

from sfpp_core.kv_cache import CacheShape, RollingKVCache
from sfpp_core.noise import ChunkNoise
from sfpp_core.rollout import rollout
from sfpp_core.schedule import FewStepSchedule
from sfpp_core.student import CausalStudent
from training.losses import dmd_loss, velocity_loss
from training.segments import Segment, draw_segment, roll_segment

LIKE = torch.zeros(2, 16, 3, 4, 6)
SHAPE = CacheShape(
    layers=tiny.CONFIG.layers,
    heads=tiny.CONFIG.heads,
    head_dim=tiny.CONFIG.head_dim,
    tokens_per_chunk=18,
    latent_frames_per_chunk=3,
    window=3,
)
SCHEDULE = FewStepSchedule.uniform(4)


def roll(segment, *, net=None):
    net = net or tiny.network()
    bound = CausalStudent(net, tiny.CONFIG).bind(tiny.text(batch=2))
    return roll_segment(bound, ChunkNoise(5), SCHEDULE, SHAPE, segment, like=LIKE, dtype=torch.float32)


@torch.no_grad()
def whole(chunks):
    bound = tiny.student().bind(tiny.text(batch=2))
    cache = RollingKVCache(SHAPE, batch=2, like=LIKE)
    made = rollout(bound, ChunkNoise(5), SCHEDULE, cache, chunks=chunks, like=LIKE)
    return torch.cat(list(made), dim=2)


@pytest.mark.parametrize("start", [0, 1, 5])
def test_a_segment_is_a_slice_of_the_whole_rollout_and_what_follows_does_not_matter(start):
    segment = Segment(start=start, chunks=3, exit_step=3)
    expected = whole(9)[:, :, 3 * start : 3 * start + 9]
    with torch.no_grad():
        torch.testing.assert_close(roll(segment), expected, rtol=0, atol=0)
    torch.testing.assert_close(roll(segment), expected, rtol=1e-4, atol=1e-5)


def test_a_segment_at_zero_with_a_horizon_of_one_segment_is_self_forcing():
    rng = np.random.default_rng(0)
    options = {"horizon": 7, "chunks": 7, "at_zero": 0.3, "steps": 4, "last_step_only": False}
    drawn = [draw_segment(rng, **options) for _ in range(50)]
    assert {segment.start for segment in drawn} == {0}
    assert {segment.exit_step for segment in drawn} == {0, 1, 2, 3}


def test_longer_horizons_spread_the_segments_over_the_rollout():
    rng = np.random.default_rng(0)
    options = {"horizon": 35, "chunks": 7, "at_zero": 0.3, "steps": 4, "last_step_only": True}
    starts = [draw_segment(rng, **options).start for _ in range(2000)]
    assert (min(starts), max(starts)) == (0, 28)
    assert 0.3 < starts.count(0) / len(starts) < 0.37
    assert draw_segment(rng, **options).exit_step == 3


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_the_gradient_of_a_chunk_is_its_own(chunk):
    """The loss on one chunk moves the weights as if its past were data."""
    net = tiny.network().requires_grad_(True)
    clean = roll(Segment(start=2, chunks=3, exit_step=3), net=net)
    grads = torch.autograd.grad(clean[:, :, 3 * chunk : 3 * chunk + 3].sum(), list(net.parameters()))
    alone = roll(Segment(start=2 + chunk, chunks=1, exit_step=3), net=net)
    expected = torch.autograd.grad(alone.sum(), list(net.parameters()))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_every_weight_gets_a_gradient_under_autocast():
    """Passes without a gradient come first; autocast must not hand on the weights it casted for them."""
    net = tiny.network().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        clean = roll(Segment(start=1, chunks=2, exit_step=3), net=net)
    clean.square().mean().backward()
    missing = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert not missing


def test_the_dmd_gradient_is_the_normalised_score_difference():
    torch.manual_seed(0)
    clean = torch.randn(2, 4, 3, 2, 2, requires_grad=True)
    real, fake = torch.randn(2, 2, 4, 3, 2, 2)
    dmd_loss(clean, real, fake).backward()
    scale = (clean - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(clean.grad, (fake - real) / scale / clean.numel())


def test_a_student_that_agrees_with_its_teacher_gets_no_wild_gradient():
    clean = torch.randn(1, 4, 3, 2, 2, requires_grad=True)
    dmd_loss(clean, clean.detach(), clean.detach()).backward()
    assert clean.grad.abs().max() == 0


def test_the_critic_is_right_when_it_predicts_noise_minus_clean():
    clean, noise = torch.randn(2, 2, 4)
    assert velocity_loss(noise - clean, clean, noise) == 0
    assert velocity_loss(noise, clean, noise) > 0
