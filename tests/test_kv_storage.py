"""Keys kept in host memory are those kept plainly, bit for bit; rounded ones are near them."""

import dataclasses
import itertools
from typing import get_args

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sfpp_core import demo, kv_staging
from sfpp_core.cache_shape import CacheShape, StorageKind
from sfpp_core.checkpoint import load_student, load_words
from sfpp_core.config import RolloutSettings
from sfpp_core.errors import SettingsError
from sfpp_core.geometry import VideoGeometry
from sfpp_core.kv_cache import GradientKVCache, RollingKVCache
from sfpp_core.kv_staging import EightBitPacking, HostShelf, NoStream
from sfpp_core.noise import ChunkNoise
from sfpp_core.rollout import rollout
from sfpp_core.schedule import FewStepSchedule

KINDS = get_args(StorageKind)
LAYOUTS = [
    {"window": 1},
    {"window": 3},
    {"window": 4, "lead": 1},
    {"window": 4, "sink": 1},
    {"window": 5, "sink": 2, "sink_positions": "relative"},
    {"window": 4, "sink": 3, "sink_positions": "relative", "lead": 1},
]
LIKE = torch.zeros(1, 16, 3, 4, 6)


def shape(**changes):
    config = tiny.CONFIG
    return CacheShape(
        **{
            "layers": config.layers,
            "heads": config.heads,
            "head_dim": config.head_dim,
            "tokens_per_chunk": 18,
            "latent_frames_per_chunk": 3,
            "window": 3,
            **changes,
        }
    )


@torch.inference_mode()
def made(kind, layout, *, dtype=torch.float32, student=None, batch=1):
    """Return a rollout that wraps three times, its cache kept as ``kind``."""
    bound = (student or tiny.student()).bind(tiny.text(batch=batch))
    like = LIKE.expand(batch, -1, -1, -1, -1)
    cache = started(bound, layout, kind, like.to(dtype))
    chunks = 3 * layout.window + 2
    out = rollout(bound, ChunkNoise(1), FewStepSchedule.uniform(2), cache, chunks=chunks, like=like)
    return torch.cat(list(out), dim=2)


def started(bound, layout, kind, like):
    """Return a cache that remembers the lead, if there is one."""
    cache = RollingKVCache(layout, batch=len(like), like=like, storage=kind)
    if layout.lead:
        cache.open(-1)
        bound.remember(tiny.latents(1, chunk=1, batch=len(like)).to(like.device), cache)
        cache.close()
    return cache


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [*((layout, torch.float32) for layout in LAYOUTS), (LAYOUTS[-1], torch.bfloat16)],
    ids=str,
)
def test_keys_in_host_memory_make_the_same_video_bit_for_bit(layout, dtype):
    student = tiny.CausalStudent(tiny.network(dtype=dtype), tiny.CONFIG)
    plain, host = (made(kind, shape(**layout), dtype=dtype, student=student) for kind in ("plain", "host"))
    assert torch.equal(plain, host)


def test_keys_in_host_memory_are_the_same_for_several_videos_at_once():
    plain, host = (made(kind, shape(window=4, sink=1), batch=2) for kind in ("plain", "host"))
    assert torch.equal(plain, host)


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[-1]], ids=str)
def test_rounded_keys_make_nearly_the_same_video(layout):
    plain, rounded, on_host = (made(kind, shape(**layout)) for kind in ("plain", "fp8", "fp8-host"))
    assert torch.equal(rounded, on_host)
    error = float((rounded - plain).norm() / plain.norm())
    assert error < 0.02
    assert (error > 0) == (layout["window"] > 1)  # alone in the window, a chunk sees only its own keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_rounding_to_eight_bits_moves_keys_by_little_whatever_their_size(dtype, size):
    torch.manual_seed(0)
    tokens = (torch.randn(400, 2, 1, 3, 128) * size).to(dtype)
    error = rounding(tokens)
    assert 0.024 < error < 0.027
    outlier = tokens.clone()
    outlier[..., 5] *= 30
    assert rounding(outlier) < 0.03


def rounding(tokens):
    """Return the relative error of tokens packed and unpacked."""
    layout = shape(heads=tokens.shape[3], head_dim=tokens.shape[4])
    packing = EightBitPacking(layout, batch=tokens.shape[2], like=tokens)
    parts = [tokens.new_zeros((*tokens.shape[:-1], part.width), dtype=part.dtype) for part in packing.parts]
    packing.pack(tokens, parts)
    back = torch.empty_like(tokens)
    packing.unpack(parts, back)
    assert torch.equal(back, packing.unpacked(parts))
    return float((back.float() - tokens.float()).norm() / tokens.float().norm())


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so():
    assert rounding(torch.randn(4, 2, 1, 3, 8)) < 0.04
    tokens = torch.zeros(3, 2, 1, 3, 8)
    tokens[1, 0, 0, 0, 0], tokens[2, 0, 0, 0, 0] = float("inf"), float("nan")
    packing = EightBitPacking(shape(heads=3, head_dim=8), batch=1, like=tokens)
    parts = [tokens.new_zeros((*tokens.shape[:-1], part.width), dtype=part.dtype) for part in packing.parts]
    packing.pack(tokens, parts)
    back = packing.unpacked(parts)
    assert torch.equal(back[0], tokens[0])
    assert not back[1, 0, 0, 0, 0].isfinite()
    assert not back[2, 0, 0, 0, 0].isfinite()


def test_the_open_chunk_sees_its_own_keys_unrounded():
    cache = RollingKVCache(shape(window=2), batch=1, like=LIKE, storage="fp8")
    k, v = torch.randn(2, 2, 1, 4, 18, 12)
    cache.open(0)
    seen, _ = cache.opened.write(0, k[0], v[0])
    assert torch.equal(seen, k[0])
    cache.close()
    cache.open(1)
    seen_k, seen_v = cache.opened.write(0, k[1], v[1])
    assert torch.equal(seen_k[:, :, 18:], k[1])
    assert torch.equal(seen_v[:, :, 18:], v[1])
    assert not torch.equal(seen_k[:, :, :18], k[0])
    torch.testing.assert_close(seen_k[:, :, :18], k[0], rtol=0.07, atol=0.02)


@torch.inference_mode()
def test_real_keys_are_rounded_as_little_and_the_open_ones_are_worth_sparing(monkeypatch):
    network, config, _ = load_student(demo.file(demo.STUDENT), dtype=torch.float32)
    words, _ = load_words(demo.file(demo.WORDS))
    bound = tiny.CausalStudent(network, config).bind(words(["a red circle moves right slowly"]))
    geometry = VideoGeometry(height=64, width=64, frames=33)
    layout = CacheShape.of(config, geometry, RolloutSettings())
    like = torch.zeros(1, config.channels, *geometry.chunk_shape)

    def video(kind):
        cache = RollingKVCache(layout, batch=1, like=like, storage=kind)
        options = {"chunks": geometry.chunks, "like": like, "keep_last": True}
        out = list(rollout(bound, ChunkNoise(0), FewStepSchedule.uniform(4), cache, **options))
        return torch.cat(out, dim=2), cache.chunk_keys(geometry.chunks - 1)

    (plain, keys), (spared, _) = video("plain"), video("fp8")
    for part in keys:  # (layers, B, N, L, D)
        assert 0.015 < rounding(torch.stack([part[0], part[-1]]).permute(3, 0, 1, 2, 4)) < 0.027
    monkeypatch.setattr(EightBitPacking, "pack", rounds_at_once(EightBitPacking.pack))
    rounded, _ = video("fp8")
    assert 0 < 2 * (spared - plain).norm() < (rounded - plain).norm()
    assert (spared - plain).norm() < 0.06 * plain.norm()


def rounds_at_once(pack):
    """Return a ``pack`` after which the tokens themselves are rounded."""

    def packed(self, tokens, parts):
        pack(self, tokens, parts)
        self.unpack(parts, tokens)

    return packed


class LateStream(NoStream):
    """A side stream that works as late as it may: only when something waits for its mark."""

    class Waiting(TorchDispatchMode):
        def __init__(self, copies):
            super().__init__()
            self.copies = copies

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default:
                self.copies.append(args[:2])
                return args[0]
            return func(*args, **(kwargs or {}))

    def __init__(self):
        self.copies, self.marked = [], 0

    def working(self):
        return self.Waiting(self.copies)

    def arrive(self):
        self.marked = len(self.copies)

    def wait(self):
        for to, what in self.copies[: self.marked]:
            to.copy_(what)
        del self.copies[: self.marked]
        self.marked = 0


@pytest.mark.parametrize("kind", ["host", "fp8-host"])
@pytest.mark.parametrize("layout", LAYOUTS[-1:], ids=str)
def test_copies_may_be_made_as_late_as_their_marks_allow(monkeypatch, kind, layout):
    at_once = made(kind, shape(**layout))
    monkeypatch.setattr(kv_staging, "NoStream", LateStream)
    assert torch.equal(made(kind, shape(**layout)), at_once)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_memory_is_exactly_what_was_said(kind, dtype, layout):
    cache = RollingKVCache(shape(**layout), batch=1, like=LIKE.to(dtype), storage=kind)
    said = cache.shape.bytes(kind, dtype)
    assert said.device + said.host == sum(part.nbytes for part in cache.storage.tensors())
    shelf = getattr(cache.storage, "_shelf", None)
    on_host = sum(part.nbytes for part in shelf._host) if isinstance(shelf, HostShelf) else 0
    assert said.host == on_host


def test_a_window_of_wan_takes_what_its_storage_promises():
    wan = CacheShape(
        layers=30, heads=12, head_dim=128, tokens_per_chunk=4680, latent_frames_per_chunk=3, window=7
    )
    sizes = {kind: wan.bytes(kind, torch.bfloat16) for kind in KINDS}
    in_gb = {kind: (round(size.device / 1e9, 2), round(size.host / 1e9, 2)) for kind, size in sizes.items()}
    assert in_gb == {"plain": (6.04, 0), "fp8": (3.27, 0), "host": (0.4, 6.04), "fp8-host": (0.41, 3.07)}


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize(("window", "sink", "lead"), [(3, 0, 0), (4, 2, 1), (4, 0, 1)])
@pytest.mark.parametrize("closed", [0, 1, 2, 7])
def test_a_gradient_cache_continues_any_storage(kind, window, sink, lead, closed):
    layout = shape(window=window, sink=sink, lead=lead, sink_positions="relative")
    cache = RollingKVCache(layout, batch=1, like=LIKE, storage=kind)
    for chunk in range(-lead, closed):
        write_all(cache, chunk, torch.Generator().manual_seed(chunk + 9))
        cache.close()
    kept = GradientKVCache.continuing(cache)
    # Later chunks are rounded by the one and kept exactly by the other.
    for chunk in range(closed, closed + (4 if kind == "host" else 1)):
        seen = [
            write_all(memory, chunk, torch.Generator().manual_seed(chunk + 9)) for memory in (cache, kept)
        ]
        for ring, listed in zip(*seen, strict=True):
            assert ring.shape == listed.shape
            # The ring's tokens come in another order.
            torch.testing.assert_close(ring.sum(2), listed.sum(2), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ring.amax(2), listed.amax(2), rtol=1e-4, atol=1e-4)
        cache.close()
        kept.close()


@torch.no_grad()
def write_all(cache, chunk, generator):
    """Open ``chunk``, write random keys to every layer and return what the last one sees."""
    cache.open(chunk)
    tokens = cache.shape.place(chunk)
    for layer in range(cache.shape.layers):
        k, v = torch.randn(2, 1, 4, tokens.stop - tokens.start, 12, generator=generator)
        seen = cache.opened.write(layer, k, v)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_layers_may_be_written_in_any_order_and_again(kind):
    exact = kind in ("plain", "host")
    layout = shape(window=3, sink=1, sink_positions="relative")
    cache, oracle = (RollingKVCache(layout, batch=1, like=LIKE, storage=name) for name in (kind, "plain"))
    torch.manual_seed(0)
    for chunk in range(9):
        cache.open(chunk)
        oracle.open(chunk)
        for layer in (0, 2, 1, 1, 0, 2, 0, 1, 2):
            k, v = torch.randn(2, 1, 4, 18, 12)
            seen, expected = cache.opened.write(layer, k, v), oracle.opened.write(layer, k, v)
            for ours, theirs in zip(seen, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if exact else 0.2)
        cache.close()
        oracle.close()


@pytest.mark.parametrize(("kind", "tolerance"), [("host", 1e-4), ("fp8", 0.3)])
def test_positions_shifted_by_a_hundred_thousand_change_nothing(kind, tolerance):
    bound, clip = tiny.student().bind(tiny.text()), tiny.latents(7)

    def outputs(start):
        cache = RollingKVCache(shape(), batch=1, like=clip, storage=kind)
        for chunk, noisy in enumerate(clip.split(3, dim=2)):
            cache.open(chunk)
            cache.opened.first += start
            yield bound(noisy, 0.7, cache)
            bound.remember(noisy, cache)
            cache.close()

    for far, near in zip(outputs(100_000), outputs(0), strict=True):
        torch.testing.assert_close(far, near, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_the_window_is_one_static_slice_once_full(kind):
    cache, views = RollingKVCache(shape(window=3), batch=1, like=LIKE, storage=kind), set()
    for chunk in range(9):
        seen = write_all(cache, chunk, torch.Generator().manual_seed(0))
        cache.close()
        if chunk >= 2:
            views |= {(part.data_ptr(), tuple(part.shape), part.stride()) for part in seen}
    buffers = 2 if kind == "host" else 1
    assert len(views) <= 2 * buffers
    assert len({view[1:] for view in views}) == 1


def test_unknown_storages_and_devices_without_eight_bits_are_refused():
    with pytest.raises(SettingsError, match="storage is 'disk'; use one of plain, fp8, host, fp8-host"):
        RollingKVCache(shape(), batch=1, like=LIKE, storage="disk")

    class Metal:
        device = torch.device("mps")

    with pytest.raises(SettingsError, match="mps has no 8-bit floats; use 'plain'"):
        RollingKVCache(shape(), batch=1, like=Metal(), storage="fp8")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_gpu_makes_the_same_from_host_memory(layout):
    student = tiny.CausalStudent(tiny.network().cuda(), tiny.CONFIG)
    bound = student.bind(tiny.text().cuda())
    like, layout = LIKE.cuda(), shape(**layout)

    def chunks(kind):
        cache = started(bound, layout, kind, like)
        return rollout(bound, ChunkNoise(1), FewStepSchedule.uniform(2), cache, chunks=20, like=like)

    with torch.inference_mode():
        plain, host = list(chunks("plain")), list(chunks("host"))
        for a, b in zip(plain, host, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        rounded, on_host = list(chunks("fp8")), list(chunks("fp8-host"))
        for a, b in zip(rounded, on_host, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        # Twice the same: a copy that came too early or too late would show.
        assert all(torch.equal(a, b) for a, b in zip(host, chunks("host"), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp8", "host", "fp8-host"])
def test_a_gpu_is_never_waited_for(kind):
    layout = shape(window=3, sink=1, sink_positions="relative")
    like = LIKE.cuda()
    cache = RollingKVCache(layout, batch=1, like=like, storage=kind)
    with torch.inference_mode():
        bound = tiny.CausalStudent(tiny.network().cuda(), tiny.CONFIG).bind(tiny.text().cuda())
        made = rollout(bound, ChunkNoise(1), FewStepSchedule.uniform(2), cache, chunks=12, like=like)
        first = list(itertools.islice(made, 4))
        torch.cuda.set_sync_debug_mode("error")
        try:
            rest = list(made)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(first) + len(rest) == 12


def test_a_shape_counts_its_lead():
    layout = dataclasses.replace(shape(window=4), lead=1)
    assert (layout.lead_tokens, layout.tokens) == (6, 6 + 4 * 18)
    assert [layout.first(chunk) for chunk in (-1, 0, 1, 5)] == [0, 1, 4, 16]
    assert layout.past(-1) == layout.past(0)[1:] == []
    assert layout.past(2) == [-1, 0, 1]
    assert layout.past(3) == [0, 1, 2]
