"""The ring agrees with the obvious cache that keeps everything and slices."""

import dataclasses

import pytest
import torch

from sfpp_core.attention import sdpa
from sfpp_core.errors import RolloutOrderError, SettingsError
from sfpp_core.kv_cache import CacheShape, GradientKVCache, RollingKVCache
from sfpp_core.rope import rotate, rotation

TOKENS, HEADS, DIM = 4, 2, 8
SHAPE = CacheShape(
    layers=2, heads=HEADS, head_dim=DIM, tokens_per_chunk=TOKENS, latent_frames_per_chunk=1, window=2
)


def shape(**changes):
    return dataclasses.replace(SHAPE, **changes)


def ring(storage="plain", **changes):
    return RollingKVCache(shape(**changes), batch=1, like=torch.zeros(()), storage=storage)


class KeepEverything:
    """Oracle: keep all chunks, show the sink and the latest, up to ``window`` in all.

    The lead goes with the sink; without one it is shown as long as it and all chunks fit in the window.
    """

    def __init__(self, layout):
        self.layout, self.lead, self.chunks = layout, [], []

    def append(self, chunk, tokens):
        (self.chunks if chunk >= 0 else self.lead).append(tokens)

    def visible(self):
        layout = self.layout
        latent_frames = layout.lead + len(self.chunks) * layout.latent_frames_per_chunk
        fits = latent_frames <= layout.window * layout.latent_frames_per_chunk
        recent = self.chunks[layout.sink :][-(layout.window - layout.sink) :]
        lead = self.lead if fits or layout.sink else []
        return torch.cat(lead + self.chunks[: layout.sink] + recent, dim=2)


@pytest.mark.parametrize(("sink", "window"), [(0, 1), (0, 3), (1, 3), (2, 5), (2, 3), (4, 5)])
@pytest.mark.parametrize("storage", ["plain", "host"])
@pytest.mark.parametrize("lead", [0, 1])
def test_the_ring_equals_concatenate_and_slice(sink, window, storage, lead):
    torch.manual_seed(0)
    cache = ring(storage, sink=sink, window=window, lead=lead, latent_frames_per_chunk=2)
    oracle_k, oracle_v = KeepEverything(cache.shape), KeepEverything(cache.shape)
    for chunk in range(-lead, 3 * window + sink + 2):
        cache.open(chunk)
        for _ in range(3):  # several denoising passes overwrite the same slot
            q, k, v = torch.randn(3, 1, HEADS, TOKENS if chunk >= 0 else TOKENS // 2, DIM)
            seen_k, seen_v = cache.opened.write(1, k, v)
        cache.close()
        oracle_k.append(chunk, k)
        oracle_v.append(chunk, v)
        expected = sdpa(q, oracle_k.visible(), oracle_v.visible())
        torch.testing.assert_close(sdpa(q, seen_k, seen_v), expected, rtol=1e-5, atol=1e-6)


def test_a_relative_sink_stands_right_before_the_rest_of_the_window():
    torch.manual_seed(0)
    cache = ring(sink=1, window=3, sink_positions="relative")
    raw = torch.randn(8, 1, HEADS, TOKENS, DIM)

    def at(chunk, time):
        return rotate(raw[chunk], rotation(DIM, time, (1, 2, 2), like=raw))

    for chunk in range(8):
        cache.open(chunk)
        seen, _ = cache.opened.write(0, at(chunk, chunk), raw[chunk])
        if chunk >= 3:
            torch.testing.assert_close(seen[:, :, :TOKENS], at(0, chunk - 2), rtol=1e-5, atol=1e-5)
        cache.close()


def test_memory_does_not_grow():
    cache = ring(window=2)
    before = sum(part.numel() for part in cache.storage.tensors())
    for chunk in range(50):
        cache.open(chunk)
        value = torch.full((1, HEADS, TOKENS, DIM), float(chunk))
        seen, _ = cache.opened.write(0, value, value)
        cache.close()
    assert seen.shape[2] == 2 * TOKENS
    assert sorted(seen[0, 0, ::TOKENS, 0].tolist()) == [48.0, 49.0]
    assert seen.data_ptr() == cache.storage.tensors()[0].data_ptr()
    assert before == cache.shape.numbers


def test_the_window_is_a_static_view_once_full():
    cache, pointers = ring(window=3), set()
    for chunk in range(9):
        cache.open(chunk)
        value = torch.zeros(1, HEADS, TOKENS, DIM)
        seen, _ = cache.opened.write(0, value, value)
        cache.close()
        if chunk >= 2:
            pointers.add((seen.data_ptr(), tuple(seen.shape), seen.stride()))
    assert len(pointers) == 1


def test_the_ring_refuses_a_gradient():
    cache = ring()
    cache.open(0)
    k = torch.zeros(1, HEADS, TOKENS, DIM, requires_grad=True)
    with pytest.raises(RolloutOrderError, match="use GradientKVCache under a gradient"):
        cache.opened.write(0, k, k)


def test_gradient_reaches_the_open_chunk_and_survives_the_clean_pass():
    cache = GradientKVCache(shape(layers=1, window=3))
    past, now, q = (torch.randn(1, HEADS, TOKENS, DIM, requires_grad=True) for _ in range(3))
    cache.open(0)
    with torch.no_grad():
        cache.opened.write(0, past, past)
    cache.close()
    cache.open(1)
    loss = sdpa(q, *cache.opened.write(0, now, now)).square().sum()
    with torch.no_grad():
        cache.opened.write(0, now + 1, now + 1)
    cache.close()
    loss.backward()
    assert now.grad.abs().sum() > 0
    assert past.grad is None


@pytest.mark.parametrize("make", [ring, lambda: GradientKVCache(SHAPE)])
def test_chunks_out_of_order_are_refused(make):
    cache = make()
    with pytest.raises(
        RolloutOrderError,
        match=r"chunk 1 opened, but 0 comes next; another video starts with an empty cache\.$",
    ):
        cache.open(1)
    with pytest.raises(RolloutOrderError, match="no chunk is open"):
        _ = cache.opened
    with pytest.raises(RolloutOrderError, match=r"open\(chunk\) first"):
        cache.close()
    cache.open(0)
    with pytest.raises(RolloutOrderError, match="chunk 0 is still open; close it before opening 1"):
        cache.open(1)


def test_a_gradient_cache_closes_only_a_chunk_with_a_clean_pass():
    cache = GradientKVCache(SHAPE)
    cache.open(0)
    k = torch.zeros(1, HEADS, TOKENS, DIM)
    cache.opened.write(0, k, k)
    with pytest.raises(RolloutOrderError, match="chunk 0 has no clean pass"):
        cache.close()


def test_reset_starts_again_at_chunk_0():
    cache = ring()
    cache.open(0)
    cache.reset()
    cache.open(0)
    cache.close()


@pytest.mark.parametrize(("sink", "window"), [(2, 2), (-1, 3), (0, 0)])
def test_a_sink_that_fills_the_window_is_refused(sink, window):
    with pytest.raises(SettingsError, match="need 0 <= sink < window"):
        shape(sink=sink, window=window)
