"""What the nodes do themselves: the lazy latent, and the way from chunks to a file."""

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import layouts
import pack
import pytest
import torch

from sfpp_core.config import WAN_1_3B, WAN_5B, RolloutSettings
from sfpp_core.geometry import VideoGeometry, frames_in
from sfpp_core.kv_cache import CacheShape
from sfpp_core.video import video_info

lazy_latent = pack.module("nodes.lazy_latent")
decoding = pack.module("nodes.decoding")
sampling = pack.module("nodes.sampling")
generation = pack.module("nodes.generation")
conditioning = pack.module("nodes.conditioning")
errors = pack.module("sfpp_core.errors")
LazyLatent = lazy_latent.LazyLatent


class Source:
    """A video of three chunks that counts how often it is read."""

    frames, total_chunks, kept, origin, size, maker = 30, 3, 0, "", (16, 16), None
    space = lazy_latent.SPACES[16]

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
    assert (source.frames, source.total_chunks, source.size) == (25, 3, (48, 32))
    assert torch.equal(torch.cat(pieces, dim=2), samples)
    assert len(pieces) == source.total_chunks


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 16, 3, 8, 8)])
def test_pictures_and_batches_are_refused(shape):
    with pytest.raises(errors.GeometryError, match="one video is decoded at a time"):
        lazy_latent.source_of({"samples": torch.zeros(shape)})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[0, {}], [0, {}]], "holds 2 prompts"),
        ([], "holds 0 prompts"),
        ([[0, {"mask": 1}]], "carries a mask"),
        ([[0, {"concat_latent_image": 1}]], "carries a start image"),
        ([[torch.zeros(2, 3, 8), {}]], "holds a batch of 2; the Long Sampler makes one video"),
        ([[torch.zeros(0, 3, 8), {}]], "holds a batch of 0"),
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


def decoded(source):
    """Return the frames of a source by chunks, decoded by a stand-in."""
    return decoding.decoded(decoding.Turns(source, vae=VAE, open_stream=Stream), source.frames)


def vae_for(channels, **more):
    """Return what the host's loader makes of a VAE, as far as a choice is concerned."""
    facts = {"latent_channels": channels, "latent_dim": 3, "throw_exception_if_invalid": lambda: None}
    return SimpleNamespace(**facts, **more)


def test_the_surplus_of_the_last_chunk_is_left_out():
    parts = list(decoded(Source()))
    assert [len(part) for part in parts] == [9, 12, 9]


def test_the_video_has_the_frames_asked_for(tmp_path):
    images = []
    frames = decoded(Source())
    decoding.write_video(tmp_path / "a.mp4", frames, Source(), enlarge=2, images=images)
    info = video_info(tmp_path / "a.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (30, 32, 32, 16)
    assert decoding.as_images(images).shape == (30, 16, 16, 3)
    assert pack.SAID[-1] == "30 frames in 0 s"


def test_an_interrupted_video_plays_and_says_where_it_is(tmp_path, caplog):
    def interrupted():
        for part, frames in enumerate(decoded(Source())):
            if part == 2:
                raise KeyboardInterrupt
            yield frames

    with pytest.raises(KeyboardInterrupt):
        stopped = pack.module("nodes._host").shown_now
        decoding.write_video(
            tmp_path / "a.mp4",
            interrupted(),
            Source(),
            enlarge=1,
            images=None,
            stopped=lambda: stopped.append("here"),
        )
    assert stopped.pop() == "here"
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


class Large(Source):
    """A video that is too large to be enlarged much."""

    size = (4096, 16)


def test_an_enlargement_no_player_takes_is_refused_before_anything_is_made():
    source = Large()
    settings = {"filename_prefix": "a", "image_seconds": 0}
    with pytest.raises(ValueError, match="enlarge is 3; at 4096x16 use 1 to 2"):
        decoding.SFPPDecodeToVideo.execute(
            LazyLatent(source), vae=vae_for(16, stream=Stream), enlarge=3, **settings
        )
    assert source.reads == 0


def test_the_widget_allows_what_the_smallest_picture_gets_by_itself():
    enlarge = next(
        socket for socket in pack.schemas()["SFPPDecodeToVideo"].inputs if socket.name == "enlarge"
    )
    assert enlarge.fields["max"] == 512 // 16


def test_the_numbers_in_the_help_pages_are_right():
    geometry = VideoGeometry(width=832, height=480, frames=960)
    cache = CacheShape.of(WAN_1_3B, geometry, RolloutSettings())
    assert round(cache.numbers * 2 / 1e9, 1) == 6.0
    assert round(geometry.frames * geometry.width * geometry.height * 3 * 4 / 1e9, 1) == 4.6
    large = VideoGeometry(width=1280, height=704, frames=1440, stride=16, fps=24)
    cache = CacheShape.of(WAN_5B, large, RolloutSettings())
    assert round(cache.numbers * 2 / 1e9, 1) == 6.8
    assert round(large.chunks * torch.empty(48, *large.chunk_shape).nbytes / 1e6) == 245
    pages = [
        (pack.ROOT / f"nodes/web/docs/SFPP{name}.md").read_text() for name in ("CacheSettings", "LongSampler")
    ]
    assert "Wan 2.2 5B at 1280 x 704 needs 6.8 GB" in pages[0]
    assert "Wan 2.2 5B keeps 245 MB per minute of 1280 x 704" in pages[1]


def test_the_main_memory_of_the_latents_is_as_the_user_is_told():
    minute = VideoGeometry(width=832, height=480, frames=960)
    longest = VideoGeometry(width=832, height=480, frames=frames_in(sampling.LONGEST_SECONDS))
    chunk = torch.empty(16, *minute.chunk_shape).nbytes
    told = f"{chunk / 1e6:.1f} MB", f"{minute.chunks * chunk / 1e6:.0f} MB per minute"
    hour = f"{longest.chunks * chunk / 1e9:.1f} GB"
    assert (chunk, *told, hour) == (1_198_080, "1.2 MB", "97 MB per minute", "5.8 GB")
    page = Path(pack.ROOT / "nodes/web/docs/SFPPLongSampler.md").read_text().replace("\n", " ")
    assert f"{told[0]} per chunk of 832 x 480, which is {told[1]} and {hour} per hour" in page
    seconds = next(socket for socket in pack.schemas()["SFPPLongSampler"].inputs if socket.name == "seconds")
    assert f"{told[1]} of 832x480" in seconds.fields["tooltip"]
    assert seconds.fields["max"] == sampling.LONGEST_SECONDS == 3600


def test_cache_settings_are_checked_against_the_chunk_of_the_student():
    settings = generation.RolloutSettings(chunk=3)
    assert sampling.CacheChoice(12, 3, "relative").over(settings).window_chunks == 4
    with pytest.raises(
        errors.SettingsError, match="window is 20 latent frames; it must be a multiple of the chunk"
    ):
        sampling.CacheChoice(20, 0, "absolute").over(settings)


def test_the_price_of_tiles_is_as_the_help_page_says():
    spans = pack.module("sfpp_core.tiling").spans
    tile, rows, columns = 256 // 8, 480 // 8, 832 // 8
    tiles = len(spans(rows, tile, tile // 4, 8)) * len(spans(columns, tile, tile // 4, 8))
    part = tile * tile / (rows * columns)
    assert (round(1 / part), round(tiles * part)) == (6, 2)
    page = Path(pack.ROOT / "nodes/web/docs/SFPPDecodeToVideo.md").read_text()
    assert "takes about a sixth of the memory of a whole picture, and twice its time" in page


def test_a_latent_of_48_channels_is_of_wan_2_2():
    source = lazy_latent.source_of({"samples": torch.randn(1, 48, 7, 4, 6)})
    assert (source.frames, source.size, source.space.fps) == (25, (96, 64), 24)
    with pytest.raises(errors.GeometryError, match="samples have 4 latent channels"):
        lazy_latent.source_of({"samples": torch.zeros(1, 4, 7, 4, 6)})


@pytest.mark.parametrize(
    ("latent", "vae", "wanted"),
    [(48, 16, "Wan 2.2 VAE"), (16, 48, "Wan 2.1 VAE"), (48, None, "Wan 2.2 VAE"), (16, None, "Wan 2.1 VAE")],
)
def test_a_vae_for_another_wan_is_refused_before_anything_is_made(latent, vae, wanted):
    space = lazy_latent.SPACES[latent]
    chosen = None if vae is None else vae_for(vae, stream=Stream)
    with pytest.raises(errors.SettingsError, match=wanted):
        decoding.chosen_stream(chosen, decoding.VAE, 0, space)


def test_a_preview_of_48_channels_is_written_at_24_frames_a_second(tmp_path):
    source = lazy_latent.source_of({"samples": torch.randn(1, 48, 7, 2, 4)})
    turns = decoding.Turns(
        source, open_stream=lambda: decoding.chosen_stream(None, decoding.PREVIEW, 0, source.space)
    )
    frames = decoding.decoded(turns, source.frames)
    decoding.write_video(tmp_path / "a.mp4", frames, source, enlarge=1, images=None)
    info = video_info(tmp_path / "a.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (25, 64, 32, 24)


class Flat:
    """A decoder of cells of 16 pixels that remembers nothing: each cell becomes its mean."""

    def __init__(self):
        self.first = True

    def decode(self, chunk):
        frames = 4 * chunk.shape[2] - 3 * self.first
        self.first = False
        cells = chunk.mean((0, 1, 2)).repeat_interleave(16, 0).repeat_interleave(16, 1)
        return cells.expand(frames, 3, -1, -1)

    def park(self): ...


def test_tiles_are_as_large_as_asked_for_whatever_the_cells():
    tiles = pack.module("nodes.tiles")
    opened = []

    def opening():
        opened.append(Flat())
        return opened[-1]

    chunk = torch.rand(1, 48, 3, 8, 24)
    frames = tiles.TiledStream(opening, 128, 16).decode(chunk)
    torch.testing.assert_close(frames, Flat().decode(chunk))
    assert (frames.shape, len(opened)) == ((9, 3, 128, 384), 4)  # squares of 8 cells that share 2


def test_a_student_of_48_channels_carries_no_mark_core_cannot_read(tmp_path):
    config = pack.module("sfpp_core.config").StudentConfig(
        dim=128, ffn_dim=64, heads=1, layers=1, text_dim=20, channels=48
    )
    path, file = tmp_path / "five.safetensors", pack.module("nodes.student_file")
    pack.module("sfpp_core.checkpoint").save(
        path, layouts.tensors(config), config, generation.RolloutSettings(), stage="dmd"
    )
    info = pack.module("sfpp_core.inspection").inspect(path)
    metadata = layouts.header(path).metadata
    assert (info.causal, "config" in metadata) == (True, False)
    assert file.core_reads(path, info, metadata)
    assert not file.core_reads(path, info, {"config": "{}"})


def test_tiles_too_small_to_overlap_are_refused():
    decoding = pack.module("nodes.decoding")
    with pytest.raises(
        pack.module("sfpp_core.errors").SettingsError, match="tile is 64 pixels; use at least 128"
    ):
        decoding.chosen_stream(object(), decoding.VAE, 64)
