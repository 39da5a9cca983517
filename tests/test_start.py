"""Videos that start from an image, from a clip, or from what an earlier run has made."""

from typing import get_args

import pytest
import tiny
import torch

from sfpp_core.cache_shape import CacheShape, StorageKind
from sfpp_core.config import RolloutSettings
from sfpp_core.errors import GeometryError, NumericsError, SettingsError
from sfpp_core.geometry import VideoGeometry, lead_of
from sfpp_core.kv_cache import GradientKVCache, RollingKVCache
from sfpp_core.sampler import LongSampler
from sfpp_core.tiny_autoencoder import AutoencoderConfig, TinyAutoencoder

TOKENS = 6  # per latent frame of tiny.latents
IMAGE = tiny.latents(1, chunk=1, seed=8)
TEXT = tiny.text()


def sampler(*, lead=0, frames=100, storage="plain", student=None, **settings):
    settings = RolloutSettings(**{"window": 9, **settings})
    geometry = VideoGeometry(height=32, width=48, frames=frames, chunk=settings.chunk, lead=lead)
    return LongSampler(
        student=student or tiny.student(), geometry=geometry, settings=settings, storage=storage
    )


def shape(*, lead, window=3, sink=0, positions="absolute"):
    geometry = VideoGeometry(height=32, width=48, frames=9, lead=lead)
    settings = RolloutSettings(window=3 * window, sink=3 * sink, sink_positions=positions)
    return CacheShape.of(tiny.CONFIG, geometry, settings)


class SelfForcingCache:
    """The plain meaning of Self-Forcing's cache, one layer's tokens in a list of latent frames.

    Room for ``window`` latent frames. What is new is appended; if there is no room, as many of the oldest
    latent frames as are needed go, but never the first ``sink`` ones.
    """

    def __init__(self, *, window, sink, layers):
        self.window, self.sink = window, sink
        self.rows = [([], []) for _ in range(layers)]
        self.first = self.seen = 0

    @property
    def opened(self):
        return self

    def open(self, latent_frames):
        self.first, self.seen = self.seen, self.seen + latent_frames
        for row in self.rows:
            for frames in row:
                while len(frames) + latent_frames > self.window:
                    del frames[self.sink]
                frames.extend([None] * latent_frames)

    def write(self, layer, k, v):
        out = []
        for frames, new in zip(self.rows[layer], (k, v), strict=True):
            pieces = new.split(TOKENS, dim=2)
            frames[-len(pieces) :] = pieces
            out.append(torch.cat(frames, dim=2))
        return out


@torch.no_grad()
def velocities(bound, cache, opening, clip, *, lead):
    """Return the velocity of every chunk of ``clip``; ``opening`` yields what to open for each piece."""
    out = []
    for opened, piece in zip(
        opening, clip.split([1] * lead + [3] * (clip.shape[2] // 3), dim=2), strict=True
    ):
        cache.open(opened)
        if piece.shape[2] == 3:
            out.append(bound(piece, 0.625, cache))
        bound.remember(piece, cache)
        if not isinstance(cache, SelfForcingCache):
            cache.close()
    return torch.cat(out, dim=2)


@pytest.mark.parametrize(("lead", "sink"), [(0, 0), (1, 0), (0, 3)])
def test_the_cache_means_what_self_forcing_means(lead, sink):
    """Window 21 in latent frames, rolled when it overflows; three times around."""
    bound, chunks = tiny.student().bind(TEXT), 3 * 7 + 2
    clip = torch.cat((IMAGE[:, :, :lead], tiny.latents(chunks)), dim=2)
    layout = shape(lead=lead, window=7, sink=sink // 3)
    ours = velocities(
        bound, RollingKVCache(layout, batch=1, like=clip), range(-lead, chunks), clip, lead=lead
    )
    plain = SelfForcingCache(window=21, sink=sink, layers=tiny.CONFIG.layers)
    theirs = velocities(bound, plain, [1] * lead + [3] * chunks, clip, lead=lead)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "sink"), [(1, 0), (3, 0), (4, 1), (4, 3)])
@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_the_gradient_cache_equals_the_ring_after_an_image(window, sink, positions):
    bound = tiny.student().bind(TEXT)
    clip = torch.cat((IMAGE, tiny.latents(10)), dim=2)
    layout = shape(lead=1, window=window, sink=sink, positions=positions)
    rings = [RollingKVCache(layout, batch=1, like=clip, storage=kind) for kind in ("plain", "host")]
    seen = [
        velocities(bound, cache, range(-1, 10), clip, lead=1) for cache in (*rings, GradientKVCache(layout))
    ]
    assert torch.equal(seen[0], seen[1])
    torch.testing.assert_close(seen[2], seen[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("storage", get_args(StorageKind))
@pytest.mark.parametrize("sink", [0, 3])
def test_a_clip_of_a_run_goes_on_as_the_run_did(storage, sink):
    run = sampler(storage=storage, sink=sink)
    whole = list(run.chunks(TEXT))
    start = torch.cat(whole[:5], dim=2)
    again = list(run.chunks(TEXT, start=start))
    assert len(again) == len(whole) == run.geometry.chunks
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))


@pytest.mark.parametrize(
    ("sink", "positions", "storage"),
    [(0, "absolute", "plain"), (3, "absolute", "plain"), (3, "relative", "fp8-host")],
)
def test_a_video_starts_with_its_image(sink, positions, storage):
    run = sampler(lead=1, storage=storage, sink=sink, sink_positions=positions)
    whole = list(run.chunks(TEXT, start=IMAGE))
    assert [piece.shape[2] for piece in whole] == [4, *[3] * (run.geometry.chunks - 1)]
    assert sum(piece.shape[2] for piece in whole) == run.geometry.latent_frames
    assert torch.equal(whole[0][:, :, :1], IMAGE)
    assert all(piece.isfinite().all() for piece in whole)
    other = next(run.chunks(TEXT, start=IMAGE + 1))
    assert not torch.equal(other[:, :, 1:], whole[0][:, :, 1:])
    # Stopped and taken up again, or given longer starts: the same video.
    for done in (1, 5):
        rest = list(run.chunks(TEXT, start=IMAGE, past=whole[:done]))
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[done:], strict=True))
        longer = list(run.chunks(TEXT, start=torch.cat(whole[:done], dim=2)))
        assert all(torch.equal(a, b) for a, b in zip(longer, whole, strict=True))
    rest = list(run.chunks(TEXT, start=torch.cat(whole[:4], dim=2), past=whole[:2]))
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[2:], strict=True))


def test_a_longer_video_of_an_image_begins_with_the_shorter_one():
    short, long = (sampler(lead=1, frames=frames).chunks(TEXT, start=IMAGE) for frames in (60, 200))
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=False))


def test_with_chunks_of_one_an_image_is_the_first_chunk():
    run = sampler(chunk=1, window=5, frames=40)
    made = list(run.chunks(TEXT, start=IMAGE))
    assert lead_of(1, chunk=1) == run.geometry.lead == 0
    assert torch.equal(made[0], IMAGE)
    assert len(made) == run.geometry.chunks == 11


def test_given_chunks_cost_one_pass_each():
    calls = []

    def attend(q, k, v):
        calls.append(k.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    chunks = sampler(lead=1, student=tiny.student(attend=attend)).chunks(TEXT, start=tiny.latents(7, chunk=1))
    layers, sizes = tiny.CONFIG.layers, [TOKENS, 4 * TOKENS, 7 * TOKENS]
    assert [next(chunks).shape[2], next(chunks).shape[2]] == [4, 3]
    assert not calls  # given chunks are shown before anything is computed
    next(chunks)
    passes = [size for size in sizes for _ in range(layers - 1)]
    assert calls == [*passes, *[9 * TOKENS] * (4 * layers)]


def test_attention_sees_no_more_than_the_window_and_the_image_leaves_it():
    seen = []

    def attend(q, k, v):
        seen.append(k.shape[2] // TOKENS)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    student = tiny.student(attend=attend)
    for sink, expected in ((0, [1, 4, 7, *[9] * 6]), (3, [1, 4, 7, *[10] * 6])):
        seen.clear()
        list(sampler(lead=1, student=student, sink=sink).chunks(TEXT, start=IMAGE))
        assert list(dict.fromkeys(seen)) == list(dict.fromkeys(expected))
        assert sorted(seen) == seen


def test_a_stream_decoder_sees_the_whole_video_in_order():
    decoder = TinyAutoencoder(AutoencoderConfig(coarse=16, fine=16, mask=8, units=1))
    run = sampler(lead=1)
    with torch.no_grad():
        pieces = list(run.chunks(TEXT, start=IMAGE))
        lengths = [decoder.decode(piece).shape[1] for piece in pieces]
    assert lengths == [13, *[12] * (run.geometry.chunks - 1)]
    kept = [run.geometry.frames_kept(chunk) for chunk in range(len(pieces))]
    assert sum(kept) == 100
    assert kept[:-1] == lengths[:-1]


def refuse(error, match, start, **options):
    with pytest.raises(error, match=match):
        next(sampler(**options).chunks(TEXT, start=start))


def test_starts_that_do_not_fit_are_refused():
    shapes = r"shape \(1, 16, 3, 8, 6\); .* \(1, 16, latent frames, 4, 6\): encode pictures of 48x32"
    refuse(GeometryError, shapes, tiny.latents(1, size=(8, 6)))
    refuse(GeometryError, "the start has shape", tiny.latents(1, batch=2))
    refuse(GeometryError, "the start has shape", tiny.latents(1)[0])
    refuse(GeometryError, r"holds 5 latent frames; .* encode 13 frames", tiny.latents(5, chunk=1))
    refuse(SettingsError, "lead 0 and a start of 1 latent frames has lead 1; build", IMAGE)
    refuse(SettingsError, "lead 1 and a start of 3 latent frames has lead 0", tiny.latents(1), lead=1)
    refuse(SettingsError, "has a lead of 1 latent frame; pass the image's latents", None, lead=1)
    refuse(NumericsError, "the start holds numbers that are not finite", IMAGE * float("nan"), lead=1)
    too_long = r"start is 5\.0625 s long and the whole video 5 s, .* longer video"
    refuse(GeometryError, too_long, tiny.latents(7), frames=80)
    refuse(GeometryError, "ask for a longer video", IMAGE, lead=1, frames=1)


def test_a_start_may_be_of_any_dtype_and_is_not_changed():
    start = tiny.latents(2).to(torch.bfloat16)
    kept = start.clone()
    first = next(sampler().chunks(TEXT, start=start))
    assert first.dtype == torch.float32
    assert torch.equal(start, kept)


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("storage", ["plain", "host"])
def test_windows_that_start_anew_go_on_from_a_start(lead, storage):
    """The image is part of the first window alone; clips of a run go on as the run did."""
    run = sampler(lead=lead, overlap=3, storage=storage)
    whole = list(run.chunks(TEXT, start=IMAGE if lead else None))
    assert len(whole) == run.geometry.chunks
    for done in (1, 4):
        again = list(run.chunks(TEXT, start=torch.cat(whole[:done], dim=2)))
        assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
        rest = list(run.chunks(TEXT, start=IMAGE if lead else None, past=whole[:done]))
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[done:], strict=True))
