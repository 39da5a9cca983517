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


def generation_of():
    """Return a video of six chunks over the tiny student, and a weak reference to its network."""
    model = wan()
    model.model.diffusion_model = tiny.network()
    model.load_device = "cpu"
    video = generation.Generation(
        model,
        generation.StudentConfig(**{name: getattr(CONFIG, name) for name in CONFIG.__slots__}),
        embeddings=tiny.text(),
        geometry=pack.module("sfpp_core.geometry").VideoGeometry(width=32, height=32, frames=60),
        settings=generation.RolloutSettings(window=6),
        seed=0,
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

    def chunks(self, embeddings, *, past=()):
        yield from torch.zeros(3, 1, 16, 3, 4, 4)
        raise numerics("chunk 2 came out as numbers that are not finite")

    monkeypatch.setattr(generation.LongSampler, "chunks", chunks)
    video, _ = generation_of()
    with pytest.raises(numerics):
        list(video.chunks())
    assert str(video).endswith("2 of 6 chunks")
