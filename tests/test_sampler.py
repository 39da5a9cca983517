"""A whole run: its beginning does not depend on its end, and it can be taken up again."""

import itertools

import pytest
import tiny
import torch

from sfpp_core.config import RolloutSettings
from sfpp_core.errors import NumericsError, SettingsError
from sfpp_core.geometry import VideoGeometry, frames_in
from sfpp_core.sampler import LongSampler
from sfpp_core.student import CausalStudent


def sampler(seconds=5.0, *, seed=0, student=None, **settings):
    settings = RolloutSettings(**{"window": 9, **settings})
    geometry = VideoGeometry(height=32, width=48, frames=frames_in(seconds), chunk=settings.chunk)
    return LongSampler(student=student or tiny.student(), geometry=geometry, settings=settings, seed=seed)


def test_the_first_five_seconds_of_a_minute_are_those_of_a_five_second_run():
    short = list(sampler(5).chunks(tiny.text()))
    long = sampler(60).chunks(tiny.text())
    assert len(short) == 7
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=False))


def test_a_minute_is_made_of_normalised_float32_chunks():
    made = list(sampler(60).chunks(tiny.text()))
    assert len(made) == sampler(60).geometry.chunks == 81
    assert {tuple(clean.shape) for clean in made} == {(1, 16, 3, 4, 6)}
    assert {clean.dtype for clean in made} == {torch.float32}


@pytest.mark.parametrize("sink", [0, 3])
@pytest.mark.parametrize("positions", ["absolute", "relative"])
@pytest.mark.parametrize("done", [1, 4, 9])
def test_a_run_goes_on_from_its_past_as_if_never_stopped(sink, positions, done):
    settings = {"sink": sink, "sink_positions": positions}
    whole = list(sampler(8, **settings).chunks(tiny.text()))
    rest = list(sampler(8, **settings).chunks(tiny.text(), past=whole[:done]))
    assert len(rest) == len(whole) - done
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[done:], strict=True))


def test_the_seed_and_the_prompt_decide_the_video():
    first = next(sampler().chunks(tiny.text()))
    assert torch.equal(first, next(sampler().chunks(tiny.text())))
    assert not torch.equal(first, next(sampler(seed=1).chunks(tiny.text())))
    assert not torch.equal(first, next(sampler().chunks(tiny.text(seed=4))))


def test_large_seeds_are_seeds_of_their_own():
    a, b = (next(sampler(seed=seed).chunks(tiny.text())) for seed in (5, 5 + 2**32))
    assert not torch.equal(a, b)


def test_nothing_is_made_before_it_is_asked_for():
    calls = []

    def attend(q, k, v):
        calls.append(k.shape)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    chunks = sampler(student=tiny.student(attend=attend)).chunks(tiny.text())
    assert not calls
    next(chunks)
    assert len(calls) == 4 * tiny.CONFIG.layers
    assert next(chunks) is not None
    # The clean pass of the first chunk stops before the attention of the last layer.
    assert len(calls) == (4 + 4) * tiny.CONFIG.layers + tiny.CONFIG.layers - 1


def test_attention_never_sees_more_than_the_window():
    seen = []

    def attend(q, k, v):
        seen.append(k.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    list(sampler(student=tiny.student(attend=attend)).chunks(tiny.text()))
    assert max(seen) == 9 * 2 * 3
    # No change of shape once the window is full.
    assert len(set(seen[-3 * tiny.CONFIG.layers :])) == 1


def test_weights_that_are_not_numbers_end_the_run_before_a_frame_is_shown():
    network = tiny.network()
    network.blocks[1].ffn[0].weight[0, 0] = float("nan")
    chunks = sampler(student=CausalStudent(network, tiny.CONFIG)).chunks(tiny.text())
    with pytest.raises(NumericsError, match="chunk 0 came out as numbers that are not finite"):
        next(chunks)


def test_bfloat16_stays_near_float32():
    full = next(sampler().chunks(tiny.text()))
    half = CausalStudent(tiny.network(dtype=torch.bfloat16), tiny.CONFIG)
    near = next(sampler(student=half).chunks(tiny.text()))
    assert near.dtype == torch.float32
    assert (near - full).std() < 0.1 * full.std()


def test_sizes_that_contradict_each_other_are_refused():
    geometry = VideoGeometry(height=32, width=48, frames=20, chunk=2)
    with pytest.raises(SettingsError, match="chunks of 2 latent frames and the settings of 3"):
        LongSampler(student=tiny.student(), geometry=geometry, settings=RolloutSettings())


def test_a_sink_changes_what_a_long_run_remembers():
    plain, kept = (list(itertools.islice(sampler(sink=sink).chunks(tiny.text()), 5)) for sink in (0, 3))
    same = [torch.equal(a, b) for a, b in zip(plain, kept, strict=True)]
    assert same == [True, True, True, False, False]
