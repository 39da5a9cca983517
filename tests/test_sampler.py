"""A whole run: its beginning does not depend on its end, and it can be taken up again."""

import itertools
from dataclasses import replace
from typing import get_args

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sfpp_core.cache_shape import CacheShape, StorageKind
from sfpp_core.config import RolloutSettings
from sfpp_core.errors import NumericsError, SettingsError
from sfpp_core.geometry import VideoGeometry, frames_in
from sfpp_core.kv_cache import RollingKVCache
from sfpp_core.noise import ChunkNoise
from sfpp_core.rollout import rollout
from sfpp_core.sampler import LongSampler, _FiniteCheck
from sfpp_core.schedule import FewStepSchedule
from sfpp_core.student import CausalStudent

aten = torch.ops.aten


def sampler(seconds=5.0, *, seed=0, student=None, storage="plain", **settings):
    settings = RolloutSettings(**{"window": 9, **settings})
    geometry = VideoGeometry(height=32, width=48, frames=frames_in(seconds), chunk=settings.chunk)
    student = student or tiny.student()
    return LongSampler(student=student, geometry=geometry, settings=settings, seed=seed, storage=storage)


@pytest.mark.parametrize("storage", get_args(StorageKind))
def test_the_first_five_seconds_of_a_minute_are_those_of_a_five_second_run(storage):
    short = list(sampler(5, storage=storage).chunks(tiny.text()))
    long = sampler(60, storage=storage).chunks(tiny.text())
    assert len(short) == 7
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=False))


def test_a_minute_is_made_of_normalised_float32_chunks():
    made = list(sampler(60).chunks(tiny.text()))
    assert len(made) == sampler(60).geometry.chunks == 81
    assert {tuple(clean.shape) for clean in made} == {(1, 16, 3, 4, 6)}
    assert {clean.dtype for clean in made} == {torch.float32}


@pytest.mark.parametrize("sink", [0, 3])
@pytest.mark.parametrize("positions", ["absolute", "relative"])
@pytest.mark.parametrize(("done", "storage"), [(1, "plain"), (4, "plain"), (9, "plain"), (9, "fp8-host")])
def test_a_run_goes_on_from_its_past_as_if_never_stopped(sink, positions, done, storage):
    settings = {"sink": sink, "sink_positions": positions, "storage": storage}
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


def broken():
    """Return a network one of whose weights is not a number."""
    network = tiny.network()
    network.blocks[1].ffn[0].weight[0, 0] = float("nan")
    return network


def test_weights_that_are_not_numbers_end_the_run_before_a_frame_is_shown():
    chunks = sampler(student=CausalStudent(broken(), tiny.CONFIG)).chunks(tiny.text())
    with pytest.raises(NumericsError, match="chunk 0 came out as numbers that are not finite"):
        next(chunks)


NAN = torch.full((1, 2), float("nan"))


def test_a_late_check_tells_of_a_chunk_when_the_next_is_made():
    check = _FiniteCheck(torch.float16, late=True)
    check.add(0, torch.zeros(1, 2))
    check.add(1, NAN)
    with pytest.raises(NumericsError, match=r"chunk 1 came out .* torch\.float16 is too narrow"):
        check.add(2, torch.zeros(1, 2))


def test_a_late_check_tells_of_the_last_chunk_at_the_end():
    check = _FiniteCheck(torch.float32, late=True)
    check.add(0, NAN)
    with pytest.raises(NumericsError, match="chunk 0 came out"):
        check.settle()
    check.settle()


def test_a_check_that_is_not_late_tells_at_once():
    check = _FiniteCheck(torch.float32, late=False)
    check.add(0, torch.zeros(1, 2))
    with pytest.raises(NumericsError, match="chunk 1 came out"):
        check.add(1, NAN)


@pytest.mark.parametrize(("seconds", "shown"), [(0.5, 0), (1, 1), (5, 1)])
def test_a_late_check_lets_one_bad_chunk_through_at_most_and_never_the_last(monkeypatch, seconds, shown):
    run = sampler(seconds, student=CausalStudent(broken(), tiny.CONFIG))
    monkeypatch.setattr(
        "sfpp_core.sampler._FiniteCheck", lambda dtype, late: _FiniteCheck(dtype, late=not late)
    )
    seen = []
    with pytest.raises(NumericsError, match="chunk 0 came out"):
        for clean in run.chunks(tiny.text()):
            seen.append(clean)
    assert len(seen) == shown


class Waits(TorchDispatchMode):
    """Counts what makes a caller wait for the device: numbers read from a tensor."""

    READS = (aten._local_scalar_dense, aten.is_nonzero, aten.item)

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in self.READS
        return func(*args, **(kwargs or {}))


def waits_per_chunk(chunks):
    """Return how often each chunk made the caller wait, once the window is full."""
    with Waits() as waits:
        before, each = 0, []
        for _ in chunks:
            each.append(waits.count - before)
            before = waits.count
    return each[4:]


def test_reading_a_number_counts_as_a_wait():
    with Waits() as waits:
        bool(torch.ones(()))
        torch.ones(()).item()
        float(torch.ones(()))
    assert waits.count == 3


@pytest.mark.parametrize(
    "settings",
    [{}, *({"storage": kind, "sink": 3, "sink_positions": "relative"} for kind in get_args(StorageKind))],
)
def test_a_rollout_never_waits_for_the_device(settings):
    run = sampler(8, **settings)
    like = torch.empty(1, 16, *run.geometry.chunk_shape)
    shape = CacheShape.of(tiny.CONFIG, run.geometry, run.settings)
    cache = RollingKVCache(shape, batch=1, like=like, storage=run.storage)
    schedule = FewStepSchedule.uniform(4)
    with torch.inference_mode():
        bound = run.student.bind(tiny.text())
        made = rollout(bound, ChunkNoise(0), schedule, cache, chunks=run.geometry.chunks, like=like)
        each = waits_per_chunk(made)
    assert each == [0] * (run.geometry.chunks - 4)


def test_a_run_on_a_cpu_reads_one_number_per_chunk():
    assert set(waits_per_chunk(sampler(8).chunks(tiny.text()))) == {1}


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"sink": 3, "sink_positions": "relative"}])
def test_a_run_on_a_gpu_never_waits_for_it(settings):
    student = CausalStudent(tiny.network().cuda(), tiny.CONFIG)
    run = replace(sampler(8, student=student, **settings), device="cuda")
    chunks = run.chunks(tiny.text())
    made = list(itertools.islice(chunks, 4))  # the window is full, and every table is in memory
    torch.cuda.set_sync_debug_mode("error")
    try:
        made += chunks
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(made) == run.geometry.chunks
    assert all(clean.isfinite().all() for clean in made)


@pytest.mark.gpu
def test_a_gpu_yields_one_bad_chunk_at_most():
    run = replace(sampler(student=CausalStudent(broken().cuda(), tiny.CONFIG)), device="cuda")
    seen = []
    with pytest.raises(NumericsError, match="chunk 0 came out"):
        for clean in run.chunks(tiny.text()):
            seen.append(clean)
    assert len(seen) == 1


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
