"""Where the GPU has no memory left model and decoder take turns; then the user is told what to change."""

from types import SimpleNamespace

import pack
import pytest
import torch
from test_generation import generation_of

decoding = pack.module("nodes.decoding")
turns = pack.module("nodes.turns")
host = pack.module("nodes._host")

CHUNKS = 6
VAE = SimpleNamespace(patcher="the decoder")


class Remembering:
    """Decodes a chunk to frames as bright as the sum of all it has seen of the last 40 latent frames."""

    def __init__(self, fail=()):
        self.fail = list(fail)
        self.seen = []
        self.parked = 0

    def decode(self, chunk):
        first = not self.seen
        self.seen += chunk.mean(dim=(0, 1, 3, 4)).tolist()
        if self.fail:
            left = self.fail.pop(0)
            if left:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return torch.full((4 * chunk.shape[2] - 3 * first, 3, 16, 16), sum(self.seen[-40:]))

    def park(self):
        self.parked += 1


class Source:
    """Chunks that are numbers; some cannot be made the first times."""

    total_chunks, frames, maker, origin, kept = 30, 357, None, "", 0

    def __init__(self, fail=()):
        self.fail = list(fail)
        self.beside = []

    def chunks(self, *, beside=()):
        for number in range(self.total_chunks):
            self.beside.append(list(beside))
            if number in self.fail:
                self.fail.remove(number)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore")
            yield torch.full((1, 16, 3, 2, 2), 2.0**-number)


@pytest.fixture
def rooms(monkeypatch):
    """How often all was taken off the GPU."""
    made = []
    monkeypatch.setattr(host, "make_room", lambda: made.append(1))
    return made


def read(source, *streams):
    """Return the frames of all chunks; further streams are opened one after the other."""
    waiting = iter(streams)
    taking = turns.Turns(source, vae=VAE, open_stream=lambda: next(waiting))
    return torch.cat(list(decoding.decoded(taking, source.frames)))


@pytest.fixture(scope="module")
def undisturbed():
    return read(Source(), Remembering())


def test_with_room_enough_both_stay(undisturbed, rooms):
    source, stream = Source(), Remembering()
    assert torch.equal(read(source, stream), undisturbed)
    assert len(undisturbed) == source.frames
    assert (len(rooms), stream.parked) == (0, 0)
    assert source.beside == [["the decoder"]] * 30


@pytest.mark.parametrize("chunk", [0, 1, 17, 29])
def test_a_model_without_room_goes_on_without_the_decoder(undisturbed, rooms, caplog, chunk):
    source, stream = Source(fail=[chunk]), Remembering()
    assert torch.equal(read(source, stream), undisturbed)
    assert source.beside[chunk] == ["the decoder"]
    assert source.beside[chunk + 1 :] == [[]] * 30  # from the first on: the chunks there are read again
    assert len(rooms) == 1 + 2 * (30 - chunk)
    assert stream.parked == 1 + 30 - chunk
    said = f"The GPU ran out of memory at chunk {chunk + 1} of 30: model and decoder take turns now"
    assert [said in record.message for record in caplog.records] == [True]
    assert pack.SAID[-1] == f"{said}, which is slower."


@pytest.mark.parametrize("chunk", [0, 1, 17, 29])
def test_a_decoder_without_room_goes_on_without_the_model(undisturbed, rooms, chunk):
    """What it remembers may be half of this chunk by then, so another is shown the latest chunks again."""
    source, failing = Source(), Remembering(fail=[False] * chunk + [True])
    another = Remembering()
    assert torch.equal(read(source, failing, another), undisturbed)
    assert source.beside[: chunk + 1] == [["the decoder"]] * (chunk + 1)
    assert source.beside[chunk + 1 :] == [[]] * (29 - chunk)
    assert len(another.seen) == 3 * (30 - chunk) + 3 * min(chunk, 14)  # 42: one more than 40
    assert rooms


def test_a_second_time_the_user_is_told_what_to_change(rooms):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        read(Source(fail=[4, 4]), Remembering())
    said = str(caught.value)
    assert "ran out of memory at chunk 5 of 30, although model and decoder took turns" in said
    assert "chunks made so far are kept" in said
    assert "storage fp8, host or fp8-host in Cache Settings" in said
    assert "Tried to allocate 3 GiB" in said
    with pytest.raises(torch.OutOfMemoryError, match="tile 256 on Decode to Video"):
        read(Source(fail=[4]), Remembering(fail=[False] * 6 + [True]), Remembering())
    with pytest.raises(torch.OutOfMemoryError, match="tile 256 on Decode to Video"):
        read(Source(), Remembering(fail=[True]), Remembering(fail=[True]))


def test_where_no_decoder_is_at_work_none_is_spoken_of(rooms, caplog):
    reading = turns.Turns(Source(fail=[4, 4])).chunks()
    with pytest.raises(torch.OutOfMemoryError, match="at chunk 5 of 30, although the model was alone on it"):
        list(reading)
    assert "at chunk 5 of 30: all else is taken off it now" in caplog.text
    assert "decoder" not in caplog.text
    assert len(rooms) == 1


class CancelError(BaseException):
    """The interrupt of the host."""


@pytest.mark.parametrize("error", [CancelError(), ValueError("another"), MemoryError()])
def test_any_other_error_is_left_alone(rooms, error):
    source = Source()
    source.chunks = lambda **_: (_ for _ in ()).throw(error)
    with pytest.raises(type(error)) as caught:
        read(source, Remembering())
    assert caught.value is error
    assert not rooms


def test_a_real_rollout_that_fails_once_is_the_same_video(monkeypatch, rooms):
    whole = torch.cat(list(generation_of()[0].chunks()), dim=2)
    video, _ = generation_of()
    loads, calls = [], []

    def load(models, memory):
        loads.append(len(models))
        calls.append(memory)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(host, "load", load)
    seen = list(turns.Turns(video, vae=VAE, open_stream=Remembering).chunks())
    assert torch.equal(torch.cat(seen, dim=2), whole)
    assert loads == [2] * 4 + [1] * (1 + CHUNKS - 2)
    assert rooms
    video, _ = generation_of()
    calls.clear()
    assert torch.equal(video.samples(), whole[:, :, : video.samples().shape[2]])
