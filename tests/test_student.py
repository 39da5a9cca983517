"""The student: against diffusers, against one causal forward, and under a gradient."""

import pytest
import tiny
import torch

from sfpp_core.attention import matmul
from sfpp_core.errors import ConditioningError
from sfpp_core.kv_cache import CacheShape, GradientKVCache, RollingKVCache
from sfpp_core.student import CausalStudent, causal_mask

TOKENS = 6  # per latent frame of tiny.latents


def shape(*, chunk=3, window=3, sink=0, positions="absolute"):
    """Return the cache of the tiny student; sizes in chunks but ``chunk``, in latent frames."""
    return CacheShape(
        layers=tiny.CONFIG.layers,
        heads=tiny.CONFIG.heads,
        head_dim=tiny.CONFIG.head_dim,
        tokens_per_chunk=chunk * TOKENS,
        latent_frames_per_chunk=chunk,
        window=window,
        sink=sink,
        sink_positions=positions,
    )


def velocities(bound, cache, clip, sigma=0.0):
    """Return the velocity of every chunk of ``clip``, each seeing the clip's own past."""
    out = []
    for chunk, noisy in enumerate(clip.split(cache.shape.latent_frames_per_chunk, dim=2)):
        cache.open(chunk)
        bound(torch.randn_like(noisy), 1.0, cache)  # an earlier pass, to be overwritten
        out.append(bound(noisy, sigma, cache))
        bound.remember(noisy, cache)
        cache.close()
    return torch.cat(out, dim=2)


@pytest.mark.parametrize(
    ("chunk", "window", "sink"), [(3, 1, 0), (3, 3, 0), (3, 4, 1), (1, 5, 2), (2, 3, 2), (1, 1, 0), (1, 7, 3)]
)
def test_a_chunked_rollout_equals_one_causal_forward(chunk, window, sink):
    bound = tiny.student().bind(tiny.text())
    chunks = 3 * window + 4
    clip = tiny.latents(chunks, chunk=chunk)
    cache = RollingKVCache(shape(chunk=chunk, window=window, sink=sink), batch=1, like=clip)
    mask = causal_mask(clip.shape[2], TOKENS, chunk=chunk, window=window * chunk, sink=sink * chunk)
    whole = bound.whole(clip, torch.zeros(1, 1), mask=mask)
    # Deep layers carry information past the window in the masked forward and in the cache alike.
    torch.testing.assert_close(velocities(bound, cache, clip), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "sink"), [(3, 0), (4, 1)])
def test_one_masked_forward_with_a_clean_past_and_a_noisy_chunk_equals_the_cached_pass(window, sink):
    bound = tiny.student().bind(tiny.text())
    chunks = 3 * window + 4
    clip, sigma = tiny.latents(chunks), torch.zeros(1, chunks * 3)
    sigma[:, -3:] = 0.625
    mask = causal_mask(clip.shape[2], TOKENS, chunk=3, window=window * 3, sink=sink * 3)
    whole = bound.whole(clip, sigma, mask=mask)[:, :, -3:]
    *past, noisy = clip.split(3, dim=2)
    cache = RollingKVCache(shape(window=window, sink=sink), batch=1, like=clip)
    for chunk, clean in enumerate(past):
        cache.open(chunk)
        bound.remember(clean, cache)
        cache.close()
    cache.open(len(past))
    torch.testing.assert_close(bound(noisy, 0.625, cache), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "sink"), [(1, 0), (3, 0), (4, 1), (4, 3)])
@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_the_gradient_cache_equals_the_ring(window, sink, positions):
    bound = tiny.student().bind(tiny.text())
    clip = tiny.latents(11)
    layout = shape(window=window, sink=sink, positions=positions)
    ring = velocities(bound, RollingKVCache(layout, batch=1, like=clip), clip)
    with torch.no_grad():
        kept = velocities(bound, GradientKVCache(layout), clip)
    torch.testing.assert_close(kept, ring, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("window", "sink", "positions"), [(3, 0, "absolute"), (4, 2, "relative"), (1, 0, "absolute")]
)
@pytest.mark.parametrize("closed", [1, 2, 7])
def test_a_gradient_cache_continues_a_ring(window, sink, positions, closed):
    bound = tiny.student().bind(tiny.text())
    clip = tiny.latents(9)
    ring = RollingKVCache(shape(window=window, sink=sink, positions=positions), batch=1, like=clip)
    velocities(bound, ring, clip[:, :, : closed * 3])
    kept = GradientKVCache.continuing(ring)
    for chunk, noisy in enumerate(clip.split(3, dim=2)):
        if chunk < closed:
            continue
        out = []
        for cache in (ring, kept):
            cache.open(chunk)
            with torch.no_grad():
                out.append(bound(noisy, 0.5, cache))
                bound.remember(noisy, cache)
            cache.close()
        torch.testing.assert_close(out[1], out[0], rtol=1e-5, atol=1e-5)


def test_positions_shifted_by_a_hundred_thousand_change_nothing():
    bound = tiny.student().bind(tiny.text())
    clip = tiny.latents(7)

    def outputs(start):
        cache = RollingKVCache(shape(window=3), batch=1, like=clip)
        out = []
        for chunk, noisy in enumerate(clip.split(3, dim=2)):
            cache.open(chunk)
            cache.opened.first += start
            out.append(bound(noisy, 0.7, cache))
            bound.remember(noisy, cache)
            cache.close()
        return torch.cat(out, dim=2)

    torch.testing.assert_close(outputs(100_000), outputs(0), rtol=1e-4, atol=1e-4)


def test_a_relative_sink_sees_the_same_picture_at_any_time():
    """A constant video: chunk 39 gets what chunk 30 got; with absolute positions it drifts."""
    bound = tiny.student().bind(tiny.text())
    clip = tiny.latents(1).repeat(1, 1, 40, 1, 1)

    def outputs(positions):
        cache = RollingKVCache(shape(window=4, sink=1, positions=positions), batch=1, like=clip)
        return velocities(bound, cache, clip, sigma=0.4).split(3, dim=2)

    relative, absolute = outputs("relative"), outputs("absolute")
    assert (relative[39] - relative[30]).abs().max() < 1e-4
    assert (absolute[39] - absolute[30]).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_the_open_chunk_and_no_closed_one(checkpointing):
    grads, inputs = gradients(checkpointing=checkpointing)
    assert [x.grad is None for x in inputs] == [True, True, True, False]
    assert all(grad is not None for grad in grads.values())


def test_checkpointed_gradient_equals_plain_gradient():
    """Also after the rollout has moved on and evicted what the recomputed pass must see."""
    plain, _ = gradients(checkpointing=False)
    again, _ = gradients(checkpointing=True)
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def gradients(*, checkpointing):
    """Return parameter gradients and chunk inputs of a loss on chunk 3 of 6, in a window of 3 chunks."""
    net = tiny.network().requires_grad_(True)
    bound = CausalStudent(net, tiny.CONFIG, checkpointing=checkpointing).bind(tiny.text())
    inputs = [x.clone().requires_grad_() for x in tiny.latents(6).split(3, dim=2)]
    cache = GradientKVCache(shape(window=3))
    loss = torch.zeros(())
    for chunk, noisy in enumerate(inputs):
        cache.open(chunk)
        velocity = bound(noisy, 0.625, cache)
        if chunk == 3:
            loss = velocity.square().sum()
        bound.remember(noisy.detach() * 0.9, cache)
        cache.close()
    loss.backward()
    return {name: p.grad for name, p in net.named_parameters()}, inputs[:4]


def test_matmul_attention_agrees_with_sdpa():
    clip = tiny.latents(6)
    layout = shape(window=3)
    out = [
        velocities(
            tiny.student(attend=attend).bind(tiny.text()), RollingKVCache(layout, batch=1, like=clip), clip
        )
        for attend in (matmul, torch.nn.functional.scaled_dot_product_attention)
    ]
    torch.testing.assert_close(out[0], out[1], rtol=1e-5, atol=1e-5)


def test_modulation_is_computed_once_per_sigma(monkeypatch):
    student = tiny.student()
    calls = []
    original = student.modulation
    monkeypatch.setattr(student, "modulation", lambda sigma: calls.append(float(sigma)) or original(sigma))
    bound, clip = student.bind(tiny.text()), tiny.latents(5)
    with torch.no_grad():
        velocities(bound, RollingKVCache(shape(), batch=1, like=clip), clip, sigma=0.5)
    assert sorted(calls) == [0.0, 0.5, 1.0]
    calls.clear()
    cache = GradientKVCache(shape())
    cache.open(0)
    bound(clip[:, :, :3], 0.5, cache)
    assert calls == [0.5]  # under a gradient: anew for each pass, once


def test_text_of_another_model_is_refused():
    with pytest.raises(
        ConditioningError, match=r"shape \(1, 5, 21\); this student needs \(batch, tokens, 20\)"
    ):
        tiny.student().bind(torch.zeros(1, 5, 21))


def test_short_text_is_padded_with_zeros():
    student, short = tiny.student(), tiny.text()[:, :4]
    full = torch.cat((short, torch.zeros(1, 3, 20)), dim=1)
    clip = tiny.latents(1)
    torch.testing.assert_close(
        student.bind(short).whole(clip, torch.ones(1, 1)), student.bind(full).whole(clip, torch.ones(1, 1))
    )


DIFFUSERS_NAMES = (
    ("self_attn", "attn1"),
    ("cross_attn", "attn2"),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".o.", ".to_out.0."),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
    ("modulation", "scale_shift_table"),
    ("norm3", "norm2"),
)


def test_bidirectional_mode_equals_diffusers():
    transformer = tiny.transformer_of_diffusers()
    weights = {}
    for name, tensor in tiny.network().state_dict().items():
        for ours, theirs in DIFFUSERS_NAMES:
            name = name.replace(ours, theirs)
        weights[name] = tensor
    transformer.load_state_dict(weights)
    clip, sigma = tiny.latents(4, batch=2), torch.tensor([[0.9375], [0.31]])
    with torch.no_grad():
        theirs = transformer(clip, (1000 * sigma).flatten(), tiny.text(batch=2), return_dict=False)[0]
    ours = tiny.student().bind(tiny.text(batch=2)).whole(clip, sigma)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
