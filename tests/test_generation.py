"""A video being generated on a model of the host: it is made as it is read, can be stopped, and goes on."""

import weakref
from contextlib import closing
from types import SimpleNamespace

import pack
import pytest
import tiny
import torch
from tiny import CONFIG

generation = pack.module("nodes.generation")
starts = pack.module("nodes.start")
lazy_latent = pack.module("nodes.lazy_latent")
geometry = pack.module("sfpp_core.geometry")
host = pack.module("nodes._host")
errors = pack.module("sfpp_core.errors")

ATTENDS = 4 * CONFIG.layers + CONFIG.layers - 1
"""Attention calls per chunk: four denoising steps, and a clean pass that stops before the last."""


def wan(kind="WAN21", **changes):
    """Return what the host's loader makes of a Wan file, as far as its architecture goes."""
    network = SimpleNamespace(
        **{name: getattr(CONFIG, name) for name in ("dim", "ffn_dim", "text_dim", "freq_dim", "eps")},
        num_heads=CONFIG.heads,
        blocks=[None] * CONFIG.layers,
        model_type="t2v",
        img_emb=None,
        ref_conv=None,
        in_dim=16,
        out_dim=16,
    )
    vars(network).update(changes)
    model = type(kind, (), {})()
    model.diffusion_model = network
    return SimpleNamespace(model=model)


def test_the_architecture_is_read_from_the_loaded_model():
    assert generation.architecture(wan(), text_length=7).layers == CONFIG.layers
    assert generation.architecture(wan("WAN21_CausalAR"), text_length=7).text_length == 7
    five_b = generation.architecture(wan("WAN22", in_dim=48, out_dim=48), text_length=7)
    assert five_b.channels == 48


def generation_of(*, start=None, lead=0, frames=60, text=None, **changes):
    """Return a video over the tiny student, six chunks long, and a weak reference to its network."""
    model = wan()
    model.model.diffusion_model = tiny.network()
    model.load_device = "cpu"
    video = generation.Generation(
        model,
        generation.StudentConfig(**{name: getattr(CONFIG, name) for name in CONFIG.__slots__}),
        text=tiny.text() if text is None else text,
        geometry=geometry.VideoGeometry(width=32, height=32, frames=frames, lead=lead),
        settings=generation.RolloutSettings(window=6),
        seed=0,
        start=start,
        **changes,
    )
    return video, weakref.ref(model.model.diffusion_model)


def test_a_video_is_made_as_it_is_read_and_the_model_is_let_go_at_the_end():
    video, network = generation_of()
    assert str(video) == "32x32, 60 frames, 0 of 6 chunks"
    chunks = list(video.chunks())
    assert str(video) == "32x32, 60 frames, 6 of 6 chunks"
    assert network() is None
    again = list(video.chunks())
    assert all(torch.equal(first, second) for first, second in zip(chunks, again, strict=True))
    assert video.samples().shape == (1, 16, 16, 4, 4)  # 61 frames: the fewest latent frames that hold 60


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_reader_that_stops_leaves_its_chunks_and_the_next_goes_on(stop):
    whole = generation_of()[0].samples()
    video, network = generation_of()
    with closing(video.chunks()) as chunks:
        for _ in range(stop):
            next(chunks)
    assert str(video).endswith(f"{stop} of 6 chunks")
    assert network() is not None
    torch.testing.assert_close(video.samples(), whole)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (wan("Flux"), "of the kind Flux"),
        (wan(model_type="i2v"), "expects pictures"),
        (wan(in_dim=36), r"\(36, 16\) latent channels"),
        (wan("WAN22"), r"\(16, 16\) latent channels; the Long Sampler needs \(48, 48\)"),
        (wan(in_dim=48, out_dim=48), r"\(48, 48\) latent channels; the Long Sampler needs \(16, 16\)"),
        (wan("WAN22", in_dim=48, out_dim=48, ref_conv="r"), "expects pictures"),
        (wan("WAN22_S2V"), "of the kind WAN22_S2V"),
    ],
)
def test_other_models_are_refused_by_name(model, message):
    with pytest.raises(errors.CheckpointError, match=message):
        generation.architecture(model, text_length=7)


class CancelError(Exception):
    """The interrupt of the host."""


def cancel_after(monkeypatch, calls):
    """Let the user press Cancel so late that ``calls`` attention calls are still made."""
    left = [calls]

    def stop():
        left[0] -= 1
        if left[0] < 0:
            raise CancelError

    monkeypatch.setattr(host, "stop_if_cancelled", stop)


MOMENTS = {
    "the first call": (0, 0),
    "a later step of the first chunk": (7, 0),
    "the clean pass of the first chunk": (4 * CONFIG.layers, 1),
    "a step of the third chunk": (2 * ATTENDS + 5, 2),
    "the last call": (6 * ATTENDS - CONFIG.layers, 5),
}


@pytest.mark.parametrize(("calls", "finished"), MOMENTS.values(), ids=MOMENTS)
def test_cancel_ends_a_run_in_the_middle_of_a_chunk_and_the_next_goes_on(monkeypatch, calls, finished):
    whole = generation_of()[0].samples()
    video, _ = generation_of()
    cancel_after(monkeypatch, calls)
    seen = []
    with closing(video.chunks()) as chunks, pytest.raises(CancelError):
        for chunk in chunks:
            seen.append(chunk)
    assert len(seen) == finished
    assert str(video).endswith(f"{finished} of 6 chunks")
    monkeypatch.undo()
    again = list(video.chunks())
    assert all(torch.equal(kept, chunk) for kept, chunk in zip(seen, again, strict=False))
    torch.testing.assert_close(video.samples(), whole)


def test_cancel_ends_the_passes_over_the_chunks_of_an_earlier_run(monkeypatch):
    whole = generation_of()[0].samples()
    video, _ = generation_of()
    cancel_after(monkeypatch, 3 * ATTENDS)
    with pytest.raises(CancelError):
        video.samples()
    cancel_after(monkeypatch, CONFIG.layers)  # in the second of three clean passes
    with closing(video.chunks()) as chunks, pytest.raises(CancelError):
        list(chunks)
    assert str(video).endswith("3 of 6 chunks")
    monkeypatch.undo()
    torch.testing.assert_close(video.samples(), whole)


def test_a_chunk_refused_late_is_not_kept(monkeypatch):
    """On a GPU the answer that a chunk is not finite comes with the next one, when it has been handed out."""
    numerics = generation.NumericsError

    def chunks(self, embeddings, *, start=None, past=()):
        yield from torch.zeros(3, 1, 16, 3, 4, 4)
        raise numerics("chunk 2 came out as numbers that are not finite")

    monkeypatch.setattr(generation.LongSampler, "chunks", chunks)
    video, _ = generation_of()
    with pytest.raises(numerics):
        list(video.chunks())
    assert str(video).endswith("2 of 6 chunks")


def clip_of(latent_frames, *, chunk=3):
    """Return the start that the first latent frames of the plain video are."""
    whole = torch.cat(list(generation_of()[0].chunks()), dim=2)
    return starts.Start(lazy_latent.Finished(whole[:, :, :latent_frames]), chunk=chunk)


@pytest.mark.parametrize("latent_frames", [3, 9, 15])
def test_a_video_that_starts_from_its_own_beginning_goes_on_as_it_did(latent_frames):
    video, _ = generation_of(start=clip_of(latent_frames))
    torch.testing.assert_close(video.samples(), generation_of()[0].samples())
    assert str(video).endswith("6 of 6 chunks")


def test_a_sampler_after_a_sampler_streams_and_gives_one_video():
    first, _ = generation_of(frames=33)
    video, network = generation_of(
        start=starts.Start.of(
            lazy_latent.LazyLatent(first), width=32, height=32, chunk=3, space=lazy_latent.SPACES[16]
        )
    )
    with closing(video.chunks()) as chunks:
        next(chunks)
        assert str(first).endswith("1 of 3 chunks")  # the first is read while it is made
        assert str(video).endswith("1 of 6 chunks")
    torch.testing.assert_close(video.samples(), generation_of()[0].samples())
    assert network() is None


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_started_video_that_is_stopped_goes_on(stop):
    for start, lead in ((clip_of(6), 0), (clip_of(1), 1), (clip_of(7), 1)):
        whole = generation_of(start=start, lead=lead)[0].samples()
        video, _ = generation_of(start=start, lead=lead)
        with closing(video.chunks()) as chunks:
            for _ in range(stop):
                next(chunks)
        torch.testing.assert_close(video.samples(), whole)


def test_an_image_is_the_first_frame_and_its_video_is_the_sampler_s():
    start = clip_of(1)
    video, _ = generation_of(start=start, lead=1, frames=49)
    parts = list(video.chunks())
    assert [part.shape[2] for part in parts] == [1, 3, 3, 3, 3]
    image = start.source.samples()
    assert torch.equal(parts[0], image)
    sampler = pack.module("sfpp_core.sampler").LongSampler(
        student=pack.module("sfpp_core.student").CausalStudent(tiny.network(), CONFIG),
        geometry=geometry.VideoGeometry(width=32, height=32, frames=49, lead=1),
        settings=generation.RolloutSettings(window=6),
    )
    expected = torch.cat(list(sampler.chunks(tiny.text(), start=host.from_host_latent(image))), dim=2)
    torch.testing.assert_close(host.from_host_latent(torch.cat(parts, dim=2)), expected)


@pytest.mark.parametrize(
    ("latent_frames", "chunk", "kept"),
    [(1, 3, 1), (2, 3, 1), (3, 3, 3), (4, 3, 4), (20, 3, 19), (21, 3, 21), (5, 1, 5), (7, 4, 5)],
)
def test_a_clip_of_any_length_starts_a_video(latent_frames, chunk, kept):
    start = starts.Start(lazy_latent.Finished(torch.randn(1, 16, latent_frames, 4, 4)), chunk=chunk)
    assert (start.latent_frames, start.dropped) == (kept, latent_frames - kept)
    assert geometry.lead_of(start.latent_frames, chunk=chunk) in (0, 1)
    parts = list(start.chunks())
    assert len(parts) == start.pieces
    assert torch.equal(torch.cat(parts, dim=2), start.source.samples()[:, :, :kept])
    assert ("left out" in starts.in_words(start)) == bool(start.dropped)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 16, 1, 4, 6), "start is 48x32 and the video 32x32"), ((1, 48, 1, 4, 4), "has 48 latent channels")],
)
def test_a_start_that_does_not_fit_is_refused(shape, message):
    with pytest.raises(errors.GeometryError, match=message):
        starts.Start.of(
            {"samples": torch.zeros(shape)}, width=32, height=32, chunk=3, space=lazy_latent.SPACES[16]
        )


def test_keys_in_main_memory_change_nothing():
    kept_there = generation_of(storage="host")[0].samples()
    torch.testing.assert_close(kept_there, generation_of()[0].samples())


FIVE_B = generation.StudentConfig(
    **{name: getattr(CONFIG, name) for name in CONFIG.__slots__} | {"channels": 48}
)


def five_b(*, start=None, lead=0, frames=60):
    """Return a video over the tiny student with 48 channels, and its network."""
    model = wan("WAN22")
    model.model.diffusion_model = network = tiny.network(FIVE_B)
    model.load_device = "cpu"
    shape = geometry.VideoGeometry(width=64, height=64, frames=frames, lead=lead, stride=16, fps=24)
    video = generation.Generation(
        model,
        FIVE_B,
        text=tiny.text(),
        geometry=shape,
        settings=generation.RolloutSettings(window=6),
        seed=0,
        start=start,
    )
    return video, network, shape


@pytest.mark.parametrize("lead", [0, 1])
def test_48_channels_are_made_as_the_sampler_makes_them(lead):
    image = torch.randn(1, 48, 1, 4, 4)
    start = {"samples": host.to_host_latent(image)}
    place = {"width": 64, "height": 64, "chunk": 3, "space": lazy_latent.SPACES[48]}
    video, network, shape = five_b(start=starts.Start.of(start, **place) if lead else None, lead=lead)
    assert (video.size, video.space.fps, video.frames) == ((64, 64), 24, 60)
    sampler = pack.module("sfpp_core.sampler").LongSampler(
        student=pack.module("sfpp_core.student").CausalStudent(network, FIVE_B),
        geometry=shape,
        settings=generation.RolloutSettings(window=6),
    )
    expected = torch.cat(list(sampler.chunks(tiny.text(), start=image if lead else None)), dim=2)
    made = host.from_host_latent(torch.cat(list(video.chunks()), dim=2))
    torch.testing.assert_close(made, expected)
    memory = pack.module("nodes.memory").memory_needed(None, FIVE_B, video)
    assert memory.main == 4 * expected.numel()


def test_a_latent_that_leaves_frames_open_is_no_start(caplog):
    place = {"width": 64, "height": 64, "chunk": 3, "space": lazy_latent.SPACES[48]}
    mask = torch.ones(1, 1, 4, 4, 4)
    mask[:, :, :1] = 0
    latent = {"samples": torch.zeros(1, 48, 4, 4, 4), "noise_mask": mask}
    with pytest.raises(errors.GeometryError, match="connect VAE Encode with the image itself"):
        starts.Start.of(latent, **place)
    starts.Start.of(latent | {"noise_mask": mask * 0}, **place)
    assert "start has a mask" in caplog.text
