"""What the nodes do themselves: the lazy latent, progress in words, and the way from chunks to a file."""

import copy
import pickle
import weakref
from contextlib import closing
from types import SimpleNamespace

import pack
import pytest
import tiny
import torch
from tiny import CONFIG

from sfpp_core.config import WAN_1_3B, RolloutSettings
from sfpp_core.geometry import VideoGeometry
from sfpp_core.kv_cache import CacheShape
from sfpp_core.video import video_info

lazy_latent = pack.module("nodes.lazy_latent")
decoding = pack.module("nodes.decoding")
sampling = pack.module("nodes.sampling")
generation = pack.module("nodes.generation")
conditioning = pack.module("nodes.conditioning")
demo_decoder = pack.module("nodes.demo_decoder")
pace = pack.module("nodes.pace")
errors = pack.module("sfpp_core.errors")
LazyLatent = lazy_latent.LazyLatent


class Source:
    """A video of three chunks that counts how often it is read."""

    frames, chunk_count, size, maker = 30, 3, (16, 16), None

    def __init__(self):
        self.reads = 0

    def chunks(self, *, beside=()):
        for chunk in range(3):
            self.reads += 1
            yield torch.full((1, 16, 3, 2, 2), float(chunk))

    def samples(self):
        return torch.cat(list(self.chunks()), dim=2)

    def __str__(self):
        return "three chunks"


READINGS = {
    "index": lambda latent: latent["samples"],
    "get": lambda latent: latent.get("samples"),
    "items": lambda latent: dict(latent.items())["samples"],
    "values": lambda latent: next(iter(latent.values())),
    "copy": lambda latent: latent.copy()["samples"],
    "dict": lambda latent: dict(latent)["samples"],
    "unpack": lambda latent: {**latent}["samples"],
    "or": lambda latent: (latent | {"other": 1})["samples"],
    "ror": lambda latent: ({"other": 1} | latent)["samples"],
    "update": lambda latent: updated(latent)["samples"],
    "pop": lambda latent: latent.pop("samples"),
    "setdefault": lambda latent: latent.setdefault("samples"),
    "loop": lambda latent: next(latent[key] for key in latent),
    "shallow": lambda latent: copy.copy(latent)["samples"],
    "deep": lambda latent: copy.deepcopy(latent)["samples"],
    "pickle": lambda latent: pickle.loads(pickle.dumps(latent))["samples"],
    "match": lambda latent: matched(latent),
}


def updated(latent):
    other = {}
    other.update(latent)
    return other


def matched(latent):
    match latent:
        case {"samples": samples}:
            return samples


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
def test_every_way_of_reading_a_dict_finds_the_samples(read):
    assert torch.equal(read(LazyLatent(Source())), Source().samples())


def test_looking_at_a_lazy_latent_does_not_start_it():
    latent = LazyLatent(Source())
    assert (list(latent), list(latent.keys()), len(latent)) == (["samples"], ["samples"], 1)
    assert "samples" in latent
    assert "noise_mask" not in latent
    assert latent.get("noise_mask") is None
    assert isinstance(latent, dict)
    assert latent == latent
    assert latent != {}
    assert str(latent) == "LazyLatent(three chunks)"
    assert latent.source.reads == 0


def test_a_node_may_put_its_own_samples_in_their_place():
    latent = LazyLatent(Source())
    assert lazy_latent.source_of(latent) is latent.source
    latent["samples"] = torch.zeros(1, 16, 4, 2, 2)
    assert lazy_latent.source_of(latent).frames == 13
    assert latent.source.reads == 0


def test_a_missing_key_is_missing_as_in_any_dict():
    latent = LazyLatent(Source())
    with pytest.raises(KeyError):
        latent["noise_mask"]
    assert latent.pop("noise_mask", 7) == 7
    assert latent.setdefault("noise_mask", 8) == latent["noise_mask"] == 8


def test_a_finished_latent_is_read_in_pieces():
    samples = torch.randn(1, 16, 7, 4, 6)
    source = lazy_latent.source_of({"samples": samples})
    pieces = list(source.chunks())
    assert (source.frames, source.chunk_count, source.size) == (25, 3, (48, 32))
    assert torch.equal(torch.cat(pieces, dim=2), samples)
    assert len(pieces) == source.chunk_count


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 16, 3, 8, 8)])
def test_pictures_and_batches_are_refused(shape):
    with pytest.raises(errors.GeometryError, match="one video is decoded at a time"):
        lazy_latent.source_of({"samples": torch.zeros(shape)})


def test_the_pace_is_that_of_the_latest_chunks():
    now = [0.0]
    watch = pace.Pace(81, clock=lambda: now[0])
    assert watch.text() == "chunk 0 of 81"
    for _ in range(20):  # chunks that were there already
        watch.tick(12)
    for _ in range(20):
        now[0] += 0.5
        text = watch.tick(12)
    assert text == "chunk 40 of 81, 24 fps, 20 s left"
    for _ in range(41):
        now[0] += 1
        text = watch.tick(12)
    assert text == "972 frames in 51 s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (40, "40 s"), (75, "1 min 15 s"), (3599.7, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations_are_said_as_people_do(seconds, text):
    assert pace.duration(seconds) == text


def test_slow_speeds_keep_two_figures():
    assert [pace.rate(fps) for fps in (0.256, 3.14, 21.4)] == ["0.26", "3.1", "21"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[0, {}], [0, {}]], "holds 2 prompts"),
        ([], "holds 0 prompts"),
        ([[0, {"mask": 1}]], "carries a mask"),
        ([[0, {"concat_latent_image": 1}]], "carries a start image"),
    ],
)
def test_conditioning_that_would_be_ignored_is_refused(value, message):
    with pytest.raises(errors.ConditioningError, match=message):
        conditioning.embeddings_of(value)


def test_plain_conditioning_gives_its_embeddings():
    embeddings = torch.zeros(1, 3, 8)
    assert conditioning.embeddings_of([[embeddings, {"pooled_output": None}]]) is embeddings


class Stream:
    """Decodes a chunk to frames as bright as its number."""

    def __init__(self):
        self.first = True

    def decode(self, chunk):
        frames = 4 * chunk.shape[2] - 3 * self.first
        self.first = False
        return torch.full((frames, 3, 16, 16), chunk.mean() / 4)


VAE = SimpleNamespace(patcher=None)


def test_the_surplus_of_the_last_chunk_is_left_out():
    parts = list(decoding.decoded(Source(), Stream(), VAE))
    assert [len(part) for part in parts] == [9, 12, 9]


def test_the_video_has_the_frames_asked_for(tmp_path):
    images = []
    frames = decoding.decoded(Source(), Stream(), VAE)
    decoding.write_video(tmp_path / "a.mp4", frames, Source(), enlarge=2, images=images)
    info = video_info(tmp_path / "a.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (30, 32, 32, 16)
    assert decoding.as_images(images).shape == (30, 16, 16, 3)
    assert pack.Progress.shown[-1][:3] == (3, 3, "30 frames in 0 s")


def test_an_interrupted_video_plays_and_says_where_it_is(tmp_path, caplog):
    def interrupted():
        for part, frames in enumerate(decoding.decoded(Source(), Stream(), VAE)):
            if part == 2:
                raise KeyboardInterrupt
            yield frames

    with pytest.raises(KeyboardInterrupt):
        decoding.write_video(tmp_path / "a.mp4", interrupted(), Source(), enlarge=1, images=None)
    assert video_info(tmp_path / "a.mp4").frames == 21
    assert f"1.3 s of 1.9 s are in {tmp_path / 'a.mp4'}" in caplog.text


def test_our_errors_reach_the_host_without_the_folder_in_their_name():
    @pack.module("nodes.plain_errors").plain_errors
    def refuse(name):
        raise errors.SettingsError(f"{name} is 5; it must be 6.")

    with pytest.raises(ValueError, match=r"window is 5; it must be 6\.") as caught:
        refuse("window")
    assert type(caught.value) is ValueError


def test_pictures_of_a_long_video_are_refused_with_a_way_out():
    message = decoding.too_long(frames=960, limit=5)
    assert "up to 5 s and this one has 60 s; connect VIDEO instead, or raise image_seconds" in message


@pytest.mark.parametrize(
    ("size", "factor"), [((64, 64), 8), ((832, 480), 1), ((16, 16), 16), ((128, 64), 4), ((300, 20), 1)]
)
def test_small_pictures_are_enlarged_by_themselves(size, factor):
    assert decoding.automatic(*size) == factor


def test_the_numbers_in_the_help_pages_are_right():
    geometry = VideoGeometry(width=832, height=480, frames=960)
    cache = CacheShape.of(WAN_1_3B, geometry, RolloutSettings())
    assert round(cache.numbers * 2 / 1e9, 1) == 6.0
    assert round(geometry.frames * geometry.width * geometry.height * 3 * 4 / 1e9, 1) == 4.6


def test_cache_settings_are_checked_against_the_chunk_of_the_student():
    settings = generation.RolloutSettings(chunk=3)
    assert sampling.CacheChoice(12, 3, "relative").over(settings).window_chunks == 4
    with pytest.raises(
        errors.SettingsError, match="window is 20 latent frames; it must be a multiple of the chunk"
    ):
        sampling.CacheChoice(20, 0, "absolute").over(settings)


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


def test_the_demo_decodes_the_same_whole_and_streamed():
    autoencoder = demo_decoder.TinyAutoencoder(demo_decoder_config())
    host = pack.module("nodes._host")
    host.own_patcher = lambda module: SimpleNamespace(load_device="cpu")
    vae = demo_decoder.DemoVAE(autoencoder)
    latent = torch.randn(1, 16, 7, 4, 4)
    stream = vae.stream()
    streamed = torch.cat([stream.decode(part) for part in latent.split(3, dim=2)])
    whole = vae.decode(latent)
    assert whole.shape == (1, 25, 32, 32, 3)
    torch.testing.assert_close(whole[0].movedim(-1, 1), streamed)
    assert vae.encode(torch.rand(27, 32, 32, 3)).shape == (1, 16, 7, 4, 4)


def demo_decoder_config():
    return pack.module("sfpp_core.tiny_autoencoder").AutoencoderConfig(coarse=16, fine=8, mask=8, units=1)
