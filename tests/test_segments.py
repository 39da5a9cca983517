"""Segments of rollouts: which stretch is made, with which gradient, and in how much memory."""

import gc

import numpy as np
import pytest
import tiny
import torch

from sfpp_core.config import RolloutSettings
from sfpp_core.geometry import VideoGeometry
from sfpp_core.kv_cache import RollingKVCache
from sfpp_core.noise import ChunkNoise
from sfpp_core.rollout import rollout
from sfpp_core.sampler import LongSampler
from sfpp_core.schedule import FewStepSchedule, add_noise, clean_from_velocity
from sfpp_core.student import CausalStudent
from training.segments import Segment, draw_segment, roll_segment
from training.streaming import Stream, StreamLaw

LIKE = torch.zeros(2, 16, 3, 4, 6)
SHAPE = tiny.cache_shape(3)
SCHEDULE = FewStepSchedule.uniform(4)


def rolled(segment, *, net=None, checkpointing=False, schedule=SCHEDULE, **options):
    net = net or tiny.network()
    bound = CausalStudent(net, tiny.CONFIG, checkpointing=checkpointing).bind(tiny.text(batch=2))
    settings = {"like": LIKE, "dtype": torch.float32, **options}
    return roll_segment(bound, ChunkNoise(5), schedule, SHAPE, segment, **settings)


def roll(segment, **options):
    return rolled(segment, **options).clean


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


def test_a_beta_law_of_one_and_two_prefers_early_segments():
    rng = np.random.default_rng(0)
    options = {"horizon": 27, "chunks": 7, "at_zero": 0.0, "steps": 4, "last_step_only": True}
    starts = np.array([draw_segment(rng, beta=(1.0, 2.0), **options).start for _ in range(3000)])
    assert (starts.min(), starts.max()) == (0, 20)
    # Beta(1, 2) has its mean at a third of the 21 places, and 1 - (1 - x)^2 of its mass below x.
    assert abs(starts.mean() + 0.5 - 7) < 0.3
    assert abs((starts < 7).mean() - 5 / 9) < 0.03


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


@pytest.mark.parametrize("backward_noise", ["rollout", "finished"])
def test_recomputed_layers_give_the_same_gradient_across_an_eviction(backward_noise):
    """The window is 3 chunks, so by the last of 5 two have left it when backward runs the layers again."""
    grads = []
    for checkpointing in (False, True):
        net = tiny.network().requires_grad_(True)
        segment = Segment(start=1, chunks=5, exit_step=2)
        clean = roll(segment, net=net, checkpointing=checkpointing, backward_noise=backward_noise)
        grads.append(torch.autograd.grad(clean.square().sum(), list(net.parameters())))
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-5)


def test_a_finished_chunk_noised_again_keeps_the_rollout_and_answers_anew():
    """Algorithm 1 by the letter: the past is the finished rollout, the answer one more estimate of it."""
    segment = Segment(start=1, chunks=2, exit_step=3)
    answer = roll(segment, backward_noise="finished")
    finished = whole(3)[:, :, 3:]
    sigma, noise = SCHEDULE.sigmas[3], ChunkNoise(5)
    cache = RollingKVCache(SHAPE, batch=2, like=LIKE)
    bound = tiny.student().bind(tiny.text(batch=2))
    with torch.no_grad():
        past = rollout(bound, noise, SCHEDULE, cache, chunks=1, like=LIKE, keep_last=True)
        assert len(list(past)) == 1
        for chunk, clean in enumerate(finished.split(3, dim=2), start=1):
            cache.open(chunk)
            noisy = add_noise(clean, noise.draw(tuple(LIKE.shape), chunk=chunk, step=4, like=LIKE), sigma)
            expected = clean_from_velocity(noisy, bound(noisy, sigma, cache), sigma)
            torch.testing.assert_close(
                answer[:, :, 3 * chunk - 3 : 3 * chunk], expected, rtol=1e-4, atol=1e-5
            )
            bound.remember(clean, cache)
            cache.close()
    assert (answer - finished).abs().max() > 1e-3


@pytest.mark.parametrize(("start", "kept"), [(0, 0), (1, 1), (5, 2)])
def test_what_lies_right_before_a_segment_comes_along(start, kept):
    before = rolled(Segment(start=start, chunks=2, exit_step=3)).before
    expected = whole(start)[:, :, 3 * (start - kept) :] if kept else LIKE[:, :, :0]
    torch.testing.assert_close(before, expected, rtol=0, atol=0)


@torch.no_grad()
def test_a_past_remembered_under_noise_is_the_same_in_training_and_at_inference():
    settings = RolloutSettings(window=9, context_sigma=0.2)
    geometry = VideoGeometry(height=32, width=48, frames=1 + 4 * 17, chunk=3)
    sampler = LongSampler(student=tiny.student(), geometry=geometry, settings=settings, seed=5)
    wanted = torch.cat(list(sampler.chunks(tiny.text(batch=2))), dim=2)
    assert torch.equal(wanted[:, :, :3], whole(1))
    assert (wanted - whole(6)).abs().max() > 1e-2
    for start in (0, 2):
        segment = Segment(start=start, chunks=4, exit_step=3)
        seen, expected = roll(segment, schedule=settings.schedule()), wanted[:, :, 3 * start : 3 * start + 12]
        torch.testing.assert_close(seen, expected, rtol=0, atol=0)
        with torch.enable_grad():
            seen = roll(segment, schedule=settings.schedule())
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    stream = Stream(StreamLaw(horizon=6, chunks=3, overlap=0), SHAPE)
    stream.turn(["", ""], 5)
    bound = tiny.student().bind(tiny.text(batch=2))
    made = [stream.roll(bound, settings.schedule(), exit_step=3, like=LIKE).clean for _ in range(2)]
    torch.testing.assert_close(torch.cat(made, dim=2), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.0, 0.2])
def test_a_segment_goes_on_from_a_given_past_as_from_its_own(sigma):
    """The window holds three chunks: the first of four has left it when the segment begins."""
    past, schedule = whole(4), FewStepSchedule(SCHEDULE.sigmas, context_sigma=sigma)
    segment = Segment(start=4, chunks=2, exit_step=3)
    given = rolled(segment, past=past, schedule=schedule)
    torch.testing.assert_close(given.before, past[:, :, 6:], rtol=0, atol=0)
    own, other = rolled(segment, schedule=schedule), rolled(segment, past=past + 1, schedule=schedule)
    assert torch.equal(given.clean, own.clean) == (sigma == 0)
    assert (given.clean - other.clean).abs().max() > 1e-2


def test_segments_with_a_given_past_begin_at_zero_or_right_after_it():
    rng = np.random.default_rng(0)
    options = {"horizon": 7, "chunks": 7, "at_zero": 0.3, "steps": 4, "last_step_only": False, "given": 6}
    starts = [draw_segment(rng, **options).start for _ in range(1000)]
    assert set(starts) == {0, 6}
    assert starts.count(0) / len(starts) == pytest.approx(0.3, abs=0.05)


def saved_for_backward(horizon):
    """Return bytes kept for backward and tensors alive, for a segment at the end of ``horizon`` chunks."""
    net = tiny.network().requires_grad_(True)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    gc.collect()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        clean = roll(Segment(start=horizon - 2, chunks=2, exit_step=3), net=net, checkpointing=True)
    gc.collect()
    alive = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    clean.sum().backward()
    return sum(saved.values()), alive


def test_the_gradient_part_keeps_as_much_at_fifty_times_the_horizon():
    """Twice, ten and fifty times a horizon of two chunks; the window holds three, so it is full in all."""
    first, *longer = [saved_for_backward(horizon) for horizon in (2 * 2, 10 * 2, 50 * 2)]
    assert all(measured == first for measured in longer)


def test_every_weight_gets_a_gradient_under_autocast():
    """Passes without a gradient come first; autocast must not hand on the weights it casted for them."""
    net = tiny.network().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        clean = roll(Segment(start=1, chunks=2, exit_step=3), net=net)
    clean.square().mean().backward()
    missing = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert not missing
