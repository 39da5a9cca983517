"""The few-step student as a policy: its actions, their likelihood, and what an update remembers."""

import math
import weakref

import numpy as np
import pytest
import tiny
import torch
from torch.autograd.graph import saved_tensors_hooks

from sfpp_core.kv_cache import CacheShape, GradientKVCache, RollingKVCache
from sfpp_core.noise import ChunkNoise
from sfpp_core.rollout import rollout
from sfpp_core.schedule import FewStepSchedule
from sfpp_core.student import CausalStudent
from training.policy import (
    Mixed,
    VideoNoise,
    choose,
    divergence,
    estimates,
    group_advantages,
    log_ratio,
    record,
    square_means,
    surrogate,
)
from training.precision import region

SCHEDULE = FewStepSchedule.uniform(4)
SHAPE = CacheShape(layers=3, heads=4, head_dim=12, tokens_per_chunk=18, latent_frames_per_chunk=3, window=3)
LIKE = torch.empty(2, 16, 3, 4, 6)
NOISE = VideoNoise((1, 1), (2, 3))
EVERYTHING = {chunk: [0, 1, 2] for chunk in range(5)}


def policy(*, dtype=torch.float32):
    """Return a network that learns and a function that binds it."""
    network = tiny.network().requires_grad_(True)
    student = CausalStudent(network, tiny.CONFIG, dtype=dtype)
    return network, lambda: Mixed(student.bind(tiny.text(batch=2)), dtype, torch.device("cpu"))


def play(bind, schedule=SCHEDULE, *, chunks=5):
    return record(bind(), NOISE, schedule, SHAPE, chunks=chunks, like=LIKE)


def test_a_video_is_a_function_of_its_own_seeds():
    first, second = VideoNoise((1, 4), (2, 3)), VideoNoise((4,), (3,))
    for step, own in ((0, ChunkNoise(4)), (2, ChunkNoise(3))):
        both = first.draw((2, 3, 4), chunk=5, step=step, like=LIKE)
        alone = second.draw((1, 3, 4), chunk=5, step=step, like=LIKE)
        assert torch.equal(both[1:], alone)
        assert torch.equal(alone, own.draw((1, 3, 4), chunk=5, step=step, like=LIKE))
        assert not torch.equal(both[:1], alone)


@pytest.mark.parametrize("mirrored", [False, True])
def test_videos_of_a_group_differ_by_the_chosen_actions_alone(mirrored):
    noise = VideoNoise((1, 1, 1, 1), (2, 3, 4, 5)).apart({1: [2]}, mirrored=mirrored)
    drawn = {
        (chunk, step): noise.draw((4, 16, 3, 4, 6), chunk=chunk, step=step, like=LIKE)
        for chunk in range(3)
        for step in range(4)
    }
    apart = {place for place, rows in drawn.items() if not all(torch.equal(rows[0], row) for row in rows[1:])}
    # The action of step 2 is the noise of step 3.
    assert apart == {(1, 3)}
    rows = drawn[1, 3]
    assert torch.equal(rows[1], -rows[0]) == torch.equal(rows[3], -rows[2]) == mirrored
    assert not torch.equal(rows[0].abs(), rows[2].abs())
    for place, row in drawn.items():
        assert abs(float(row.std()) - 1) < 0.05, place
    parts = [
        noise.part(slice(first, first + 2)).draw((2, 16, 3, 4, 6), chunk=1, step=3, like=LIKE)
        for first in (0, 2)
    ]
    assert torch.equal(torch.cat(parts), rows)


@pytest.mark.parametrize("side", [2, 4, 8])
def test_videos_can_differ_by_the_coarse_part_of_an_action_alone(side):
    noise = VideoNoise((1, 1), (2, 3)).apart({0: [1]}, mirrored=True, coarse=side)
    rows = noise.draw((2, 64, 6, 8, 10), chunk=0, step=2, like=LIKE)
    apart = rows[0] - rows[1]
    torch.testing.assert_close(square_means(apart[None], side)[0], apart)
    assert apart.abs().max() > 0.1
    # Both are plain noise: of unit variance, and independent between neighbours.
    for row in rows:
        assert abs(float(row.std()) - 1) < 0.02
        assert abs(float((row[..., 1:] * row[..., :-1]).mean())) < 0.02


def test_the_trace_makes_every_state_again_to_the_bit():
    _, bind = policy()
    seen = []

    class Watched:
        def __init__(self):
            self.student = bind()

        def __call__(self, noisy, sigma, cache):
            seen.append(noisy)
            return self.student(noisy, sigma, cache)

        def remember(self, clean, cache, *, sigma=0.0):
            self.student.remember(clean, cache, sigma=sigma)

    trace = record(Watched(), NOISE, SCHEDULE, SHAPE, chunks=5, like=LIKE)
    again = [trace.noisy(chunk, step) for chunk in range(5) for step in range(4)]
    assert len(seen) == 20
    assert all(torch.equal(a, b) for a, b in zip(again, seen, strict=True))


def test_the_policy_acts_as_the_student_is_rolled_out():
    _, bind = policy()
    trace = play(bind)
    ring = RollingKVCache(SHAPE, batch=2, like=LIKE)
    with torch.no_grad():
        usual = rollout(bind(), NOISE, SCHEDULE, ring, chunks=5, like=LIKE)
        for chunk, clean in enumerate(usual):
            torch.testing.assert_close(trace.clean(chunk), clean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("checkpointing", "context_sigma"), [(False, 0.0), (True, 0.0), (False, 0.1)])
def test_every_ratio_is_1_to_the_bit_before_the_first_update(dtype, checkpointing, context_sigma):
    network, _ = policy()
    student = CausalStudent(network, tiny.CONFIG, dtype=dtype, checkpointing=checkpointing)

    def bind():
        with region(LIKE.device, dtype):
            return Mixed(student.bind(tiny.text(batch=2)), dtype, LIKE.device)

    trace = play(bind, FewStepSchedule(SCHEDULE.sigmas, context_sigma=context_sigma))
    passes = 0
    for chunk, step, estimate in estimates(bind, trace, SHAPE, EVERYTHING):
        assert estimate.requires_grad
        delta = estimate - trace.estimate(chunk, step)
        ratios = log_ratio(trace.fresh(chunk, step), delta, SCHEDULE.sigmas[step + 1], reduction="sum").exp()
        assert ratios.tolist() == [1.0, 1.0]
        passes += 1
    assert passes == 15


def test_an_update_moves_the_ratio_of_good_actions_up():
    network, bind = policy()
    trace, advantages = play(bind), torch.tensor([1.0, -1.0])

    def ratios():
        rows = []
        for chunk, step, estimate in estimates(bind, trace, SHAPE, EVERYTHING):
            delta = estimate - trace.estimate(chunk, step)
            sigma = SCHEDULE.sigmas[step + 1]
            rows.append(log_ratio(trace.fresh(chunk, step), delta, sigma, reduction="sum"))
            surrogate(rows[-1], advantages, clip=0.2).mean().backward()
            rows[-1] = rows[-1].detach()
        return torch.stack(rows).sum(0)

    assert ratios().tolist() == [0.0, 0.0]
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad * 1e-6)
    good, bad = ratios().tolist()
    assert good > 0 > bad


@pytest.mark.parametrize("sigma", SCHEDULE.sigmas[1:])
def test_the_log_ratio_is_the_difference_of_the_log_densities(sigma):
    fresh, delta, clean = torch.randn(3, 2, 16, 3, 4, 6, dtype=torch.float64).unbind()
    action = (1 - sigma) * clean + sigma * fresh

    def density(estimate):
        error = action - (1 - sigma) * estimate
        terms = -error.square() / (2 * sigma**2) - math.log(sigma) - math.log(2 * math.pi) / 2
        return terms.flatten(1).sum(1)

    expected = density(clean + delta) - density(clean)
    torch.testing.assert_close(log_ratio(fresh, delta, sigma, reduction="sum"), expected)
    mean = log_ratio(fresh, delta, sigma, reduction="mean")
    torch.testing.assert_close(mean * delta[0].numel(), expected)


def test_the_gradient_at_the_acting_policy_is_weighted_noise():
    fresh, advantages, sigma = torch.randn(2, 16, 3, 4, 6), torch.tensor([0.7, -1.5]), 0.625
    delta = torch.zeros_like(fresh, requires_grad=True)
    ratios = log_ratio(fresh, delta, sigma, reduction="sum")
    surrogate(ratios, advantages, clip=0.2).sum().backward()
    expected = -advantages[:, None, None, None, None] * 0.6 * fresh
    torch.testing.assert_close(delta.grad, expected)


def test_the_divergence_is_that_of_two_normals():
    delta, sigma = torch.randn(2, 3, 4, dtype=torch.float64), 0.8
    normals = [torch.distributions.Normal((1 - sigma) * mean, sigma) for mean in (delta, 0 * delta)]
    expected = torch.distributions.kl_divergence(*normals).flatten(1)
    torch.testing.assert_close(divergence(delta, sigma, reduction="sum"), expected.sum(1))
    torch.testing.assert_close(divergence(delta, sigma, reduction="mean"), expected.mean(1))


def test_nothing_is_gained_beyond_the_clip_and_losses_are_not_hidden():
    logs = torch.tensor([0.0, 0.05, 0.5, -0.5, 0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0])
    loss = surrogate(logs, advantages, clip=0.1)
    loss.sum().backward()
    assert (logs.grad != 0).tolist() == [True, True, False, True, True, False]
    assert loss[2].item() == pytest.approx(-1.1)
    assert loss[5].item() == pytest.approx(0.9)


def test_advantages_compare_the_videos_of_one_prompt():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [100.0, 100.0, 103.0], [0.3, 0.3, 0.3], [0.0, 1e-4, 2e-4]])
    advantages = group_advantages(rewards, floor=0.01, limit=1.4)
    torch.testing.assert_close(advantages[0].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert advantages[0].tolist() == pytest.approx([-0.926, -0.463, 1.389], abs=1e-3)
    assert advantages[1].max() == pytest.approx(1.4)  # the limit; it would be the root of 2
    assert advantages[2].tolist() == [0.0, 0.0, 0.0]
    assert advantages[3].tolist() == pytest.approx([-0.01, 0.0, 0.01], abs=1e-4)  # the floor


def test_the_weights_of_the_actions():
    """The numbers in the settings' description of ``last_steps``."""
    fresh, delta = torch.ones(1, 2), torch.full((1, 2), 1e-9, dtype=torch.float64)
    weights = [log_ratio(fresh, delta, sigma, reduction="mean") / 1e-9 for sigma in SCHEDULE.sigmas[1:]]
    assert torch.cat(weights).tolist() == pytest.approx([1 / 15, 0.2, 0.6])


def test_every_action_is_weighed_about_equally_often_and_the_last_step_never():
    rng, counts = np.random.default_rng(0), np.zeros((4, 4))
    for _ in range(300):
        chosen = choose(rng, chunks=4, steps=4, chunk_share=0.5, step_share=0.6)
        assert len(chosen) == 2
        for chunk, steps in chosen.items():
            assert len(steps) == 2 and steps == sorted(steps)
            counts[chunk, steps] += 1
    assert counts[:, 3].max() == 0
    assert np.abs(counts[:, :3] / 100 - 1).max() < 0.25
    last = choose(rng, chunks=4, steps=4, chunk_share=1, step_share=0.6, last_steps=True)
    assert last == {chunk: [1, 2] for chunk in range(4)}
    assert choose(rng, chunks=3, steps=2, chunk_share=0.01, step_share=0.01).popitem()[1] == [0]


class Kept:
    """A tensor autograd keeps, wrapped so that its end can be seen."""

    def __init__(self, tensor):
        self.tensor = tensor


def most_kept(chunks):
    """Return the most bytes autograd keeps at any time of an update over ``chunks`` chunks."""
    _, bind = policy()
    trace = play(bind, chunks=chunks)
    bytes_now, most = 0, 0

    def gone(size):
        nonlocal bytes_now
        bytes_now -= size

    def pack(tensor):
        nonlocal bytes_now, most
        kept, size = Kept(tensor), tensor.numel() * tensor.element_size()
        bytes_now += size
        most = max(most, bytes_now)
        weakref.finalize(kept, gone, size)
        return kept

    with saved_tensors_hooks(pack, lambda kept: kept.tensor):
        everything = {chunk: [0, 1, 2] for chunk in range(chunks)}
        for chunk, step, estimate in estimates(bind, trace, SHAPE, everything):
            (estimate - trace.estimate(chunk, step)).square().mean().backward()
    return most


def test_the_memory_of_an_update_does_not_grow_with_the_horizon():
    short, long = most_kept(4), most_kept(16)
    assert short == long > 1e6


def test_gradient_reaches_the_open_chunk_and_no_past():
    network, bind = policy()
    trace = play(bind, chunks=3)
    alone = {2: [1]}
    for _, _, estimate in estimates(bind, trace, SHAPE, alone):
        estimate.sum().backward()
    expected = [parameter.grad for parameter in network.parameters()]
    # The same pass with the past given as constants.
    network.zero_grad(set_to_none=True)
    cache = GradientKVCache(SHAPE)
    with torch.no_grad():
        for chunk in range(2):
            cache.open(chunk)
            bind().remember(trace.clean(chunk), cache)
            cache.close()
    cache.open(2)
    noisy, sigma = trace.noisy(2, 1), SCHEDULE.sigmas[1]
    (noisy - sigma * bind()(noisy, sigma, cache)).sum().backward()
    for mine, parameter in zip(expected, network.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)
