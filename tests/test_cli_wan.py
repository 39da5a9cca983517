"""The command line over files as Wan's users have them: small random weights in the real layouts."""

from dataclasses import replace

import layouts
import pytest
import tiny_umt5
import torch
import wan_files
from PIL import Image
from tiny_demo import refused

from sfpp_core import cli
from sfpp_core.checkpoint import load_student
from sfpp_core.config import RolloutSettings
from sfpp_core.decoder import load_encoder
from sfpp_core.encoder import video_info
from sfpp_core.forecast import forecast
from sfpp_core.geometry import VideoGeometry
from sfpp_core.latent_space import WAN_2_2
from sfpp_core.latents_file import load_latents
from sfpp_core.pictures import read_clip, read_picture

CONFIG = replace(layouts.CONFIG, text_dim=tiny_umt5.SIZES["d_model"])
PROMPT = "A cat surfs a wave at sunset"


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Return a folder with a student, an autoencoder, a tiny decoder and a text encoder."""
    folder = tmp_path_factory.mktemp("wan")
    state = layouts.tensors(CONFIG)
    layouts.write_pickle(folder / "student.pt", {"generator": layouts.prefixed(state, "model.")})
    wan_files.write_wan(folder / "Wan2.1_VAE.pth", wan_files.SMALL_2_1)
    wan_files.write_tiny(folder / "taew2_1.safetensors")
    weights = tiny_umt5.state(tiny_umt5.model())
    tiny_umt5.write_single(folder / "umt5.safetensors", weights, tiny_umt5.sentencepiece_model())
    down, up = torch.randn(4, 128), torch.randn(128, 4)
    name = "diffusion_model.blocks.0.self_attn.q"
    layouts.write(folder / "lora.safetensors", {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
    Image.new("RGB", (80, 60), (200, 40, 40)).save(folder / "start.png")
    return folder


def words(wan, out, *more, seconds="1", size="32", decoder="Wan2.1_VAE.pth"):
    models = ("--student", wan / "student.pt", "--text-encoder", wan / "umt5.safetensors")
    if decoder:
        models += ("--decoder", decoder if decoder == "preview" else wan / decoder)
    shape = ("--seconds", seconds, "--width", size, "--height", size, "--enlarge", "1", "--window", "9")
    return [str(word) for word in ("generate", PROMPT, "--out", out, *models, *shape, *more)]


def frames(path, count):
    return read_clip(path, width=32, height=32, frames=count)


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        ("Wan2.1_VAE.pth", "the autoencoder of wan2.1"),
        ("taew2_1.safetensors", "a tiny decoder for wan2.1"),
        ("preview", "a preview of wan2.1 without weights"),
    ],
)
def test_every_decoder_makes_a_video(wan, tmp_path, capsys, decoder, expected):
    out = tmp_path / "video.mp4"
    assert cli.main(words(wan, out, decoder=decoder)) == 0
    said = capsys.readouterr().err
    assert f"decoder  {expected}" in said
    assert "text     umT5" in said
    info = video_info(out)
    assert (info.frames, info.width, info.height, info.fps) == (16, 32, 32, 16)


@pytest.mark.parametrize("storage", ["fp8", "host", "fp8-host"])
def test_the_cache_may_be_kept_otherwise(wan, tmp_path, capsys, storage):
    out = tmp_path / "video.mp4"
    assert cli.main(words(wan, out, "--cache", storage, decoder="preview")) == 0
    assert f"cache {storage}" in capsys.readouterr().err
    assert video_info(out).frames == 16


@pytest.mark.parametrize(
    "preset", ["longlive", "rolling-forcing", "infinity-rope", "causal-forcing-framewise", "causvid"]
)
def test_every_family_rolls_out(wan, tmp_path, capsys, preset):
    out = tmp_path / "video.mp4"
    command = words(wan, out, "--preset", preset, seconds="6")
    del command[command.index("--window") : command.index("--window") + 2]
    assert cli.main(command) == 0
    assert video_info(out).frames == 96
    assert {"causvid": "overlap 3", "longlive": "window 12, sink 3"}.get(
        preset, ""
    ) in capsys.readouterr().err


def test_a_lora_changes_the_video(wan, tmp_path, capsys):
    outs = [tmp_path / f"{name}.mp4" for name in ("plain", "none", "strong")]
    lora = wan / "lora.safetensors"
    for out, more in zip(outs, ([], ["--lora", f"{lora}:0"], ["--lora", f"{lora}:2"]), strict=True):
        assert cli.main(words(wan, out, *more, decoder="preview")) == 0
    assert "lora.safetensors at 2" in capsys.readouterr().err
    plain, none, strong = (frames(out, 16) for out in outs)
    assert torch.equal(plain, none)
    assert not torch.equal(plain, strong)


def test_a_picture_begins_the_video(wan, tmp_path, capsys):
    out = tmp_path / "video.mp4"
    assert cli.main(words(wan, out, "--start", wan / "start.png", seconds="2")) == 0
    said = capsys.readouterr().err
    assert "start.png, 1 latent frames" in said
    assert "3 chunks" in said  # 33 of the 32 frames: one latent frame of the picture and chunks of three
    assert video_info(out).frames == 32


def test_a_clip_goes_on_and_so_do_kept_latents(wan, tmp_path, capsys):
    first, kept = tmp_path / "first.mp4", tmp_path / "latents"
    assert cli.main(words(wan, first, "--latents", kept, seconds="2")) == 0
    made = load_latents(kept)
    assert (made.chunks, made.frames, made.complete) == (3, 32, True)
    longer = tmp_path / "longer.mp4"
    assert cli.main(words(wan, longer, "--start", kept, seconds="4")) == 0
    assert "latents, 9 latent frames" in capsys.readouterr().err
    whole = tmp_path / "whole.mp4"
    assert cli.main(words(wan, whole, seconds="4")) == 0
    assert torch.equal(frames(longer, 64), frames(whole, 64))  # the same seed: it is the same video
    clip = tmp_path / "clip.mp4"
    assert cli.main(words(wan, clip, "--start", first, seconds="4")) == 0
    assert "first.mp4, 6 latent frames" in capsys.readouterr().err  # what a window of 9 sees
    assert video_info(clip).frames == 64


def test_kept_latents_are_decoded_again(wan, tmp_path, capsys):
    fast, again, kept = tmp_path / "fast.mp4", tmp_path / "again.mp4", tmp_path / "latents"
    assert cli.main(words(wan, fast, "--latents", kept, decoder="preview")) == 0
    good = tmp_path / "good.mp4"
    assert cli.main(words(wan, good)) == 0
    decode = ["decode", kept, "--out", again, "--enlarge", "1"]
    refused(capsys, [str(word) for word in decode], "holds latents of wan2.1; name their decoder")
    decode += ["--decoder", wan / "Wan2.1_VAE.pth"]
    assert cli.main([str(word) for word in decode]) == 0
    assert "3 chunks" in (said := capsys.readouterr().err) or "2 chunks" in said
    assert torch.equal(frames(again, 16), frames(good, 16))
    assert not torch.equal(frames(again, 16), frames(fast, 16))
    (kept / "chunk_000001.safetensors").unlink()
    cut = tmp_path / "cut.mp4"
    assert cli.main([str(word) for word in [*decode[:3], cut, *decode[4:]]]) == 0
    assert "the run that made them did not end" in capsys.readouterr().err
    assert video_info(cut).frames == 9


def test_tiles_are_decoded_one_by_one(wan, tmp_path, capsys):
    whole, tiled = tmp_path / "whole.mp4", tmp_path / "tiled.mp4"
    assert cli.main(words(wan, whole, size="64", decoder="preview")) == 0
    assert cli.main(words(wan, tiled, "--tile", "128", size="64", decoder="preview")) == 0
    assert "in tiles of 128" in capsys.readouterr().err
    assert torch.equal(frames(whole, 16), frames(tiled, 16))


def test_embeddings_are_kept_for_the_next_run(wan, tmp_path, monkeypatch):
    cache = tmp_path / "texts"
    assert cli.main(words(wan, tmp_path / "a.mp4", "--text-cache", cache, decoder="preview")) == 0
    assert any(cache.rglob("*.safetensors"))
    monkeypatch.setattr("sfpp_core.text_encoder.TextEncoder.rows", None)  # nothing is left to encode
    assert cli.main(words(wan, tmp_path / "b.mp4", "--text-cache", cache, decoder="preview")) == 0
    assert torch.equal(frames(tmp_path / "a.mp4", 16), frames(tmp_path / "b.mp4", 16))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--lora", "none.safetensors"], "none.safetensors does not exist"),
        (["--lora", "lora.safetensors:much"], "much"),
        (["--preset", "wan"], "preset is 'wan'; use one of self-forcing"),
        (["--tile", "100"], "100"),
        (["--start", "none.png"], "none.png does not exist"),
        (["--cache", "disk"], "invalid choice: 'disk'"),
        (["--weights", "ema"], "generator"),
        (["--text-encoder", "none.safetensors"], "none.safetensors does not exist"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    wan, tmp_path, capsys, monkeypatch, more, expected
):
    monkeypatch.setattr(cli, "load", None)
    refused(capsys, words(wan, tmp_path / "video.mp4", *more), expected)
    assert not list(tmp_path.iterdir())


def test_a_start_that_fills_the_video_is_refused(wan, tmp_path, capsys, monkeypatch):
    assert cli.main(words(wan, tmp_path / "first.mp4", seconds="2", decoder="preview")) == 0
    monkeypatch.setattr(cli, "load", None)
    start = ["--start", tmp_path / "first.mp4"]
    refused(capsys, words(wan, tmp_path / "video.mp4", *start), "ask for a longer video")
    more = [*start, "--decoder", "preview"]
    refused(
        capsys, words(wan, tmp_path / "video.mp4", *more, seconds="4"), "cannot encode the frames to start"
    )


def test_the_demo_and_wan_do_not_share_decoders(wan, tmp_path, capsys):
    out = tmp_path / "video.mp4"
    demo = ["generate", "a red circle", "--out", str(out), "--decoder", str(wan / "Wan2.1_VAE.pth")]
    refused(capsys, demo, "the student makes latents of demo; choose the decoder made for them")
    refused(capsys, words(wan, out, decoder=None), "name one with --decoder: Wan2.1_VAE for quality")


def test_the_student_of_the_run_is_the_one_in_the_file(wan):
    network, config, settings = load_student(wan / "student.pt")
    assert (config, settings.window) == (CONFIG, 21)
    assert sum(parameter.numel() for parameter in network.parameters()) > 0


FIVE_B = replace(CONFIG, channels=48)


@pytest.fixture(scope="module")
def wan_2_2(wan):
    """Return the folder, with a student of 48 channels and the decoders of Wan 2.2 in it."""
    layouts.write(wan / "five.safetensors", layouts.tensors(FIVE_B))
    wan_files.write_wan(wan / "Wan2.2_VAE.pth", wan_files.SMALL_2_2)
    wan_files.write_tiny(wan / "taew2_2.safetensors", replace(wan_files.TINY, space=WAN_2_2))
    return wan


def of_five_b(wan, out, *more, seconds="1", size="64", decoder="Wan2.2_VAE.pth"):
    """Return the words of a command for the student of 48 channels."""
    more = ("--student", wan / "five.safetensors", *more)
    return words(wan, out, *more, seconds=seconds, size=size, decoder=decoder)


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        ("Wan2.2_VAE.pth", "the autoencoder of wan2.2"),
        ("taew2_2.safetensors", "a tiny decoder for wan2.2"),
        ("preview", "a preview of wan2.2 without weights"),
    ],
)
def test_five_b_makes_24_frames_a_second(wan_2_2, tmp_path, capsys, decoder, expected):
    out = tmp_path / "video.mp4"
    assert cli.main(of_five_b(wan_2_2, out, decoder=decoder)) == 0
    said = capsys.readouterr().err
    assert "1 s, 24 frames, 64x64" in said
    assert f"decoder  {expected}" in said
    info = video_info(out)
    assert (info.frames, info.width, info.height, info.fps) == (24, 64, 64, 24)


def test_five_b_starts_from_a_picture(wan_2_2, tmp_path, capsys):
    kept, out = tmp_path / "latents", tmp_path / "video.mp4"
    assert cli.main(of_five_b(wan_2_2, out, "--start", wan_2_2 / "start.png", "--latents", kept)) == 0
    assert "start.png, 1 latent frames" in capsys.readouterr().err
    assert video_info(out).frames == 24
    encoder = load_encoder(wan_2_2 / "Wan2.2_VAE.pth")
    picture = encoder.encode(read_picture(wan_2_2 / "start.png", width=64, height=64)[None])
    first = load_latents(kept).chunk(0)
    assert first.shape == (1, 48, 4, 4, 4)  # the picture and a chunk of three
    torch.testing.assert_close(first[:, :, :1], picture, rtol=0, atol=1e-5)


def test_latents_of_five_b_are_kept_decoded_again_and_gone_on_from(wan_2_2, tmp_path, capsys):
    fast, good, again, kept = (tmp_path / name for name in ("fast.mp4", "good.mp4", "again.mp4", "latents"))
    assert cli.main(of_five_b(wan_2_2, fast, "--latents", kept, decoder="preview")) == 0
    assert cli.main(of_five_b(wan_2_2, good)) == 0
    decode = ["decode", kept, "--out", again, "--enlarge", "1", "--decoder"]
    refused(capsys, [str(word) for word in [*decode, wan_2_2 / "Wan2.1_VAE.pth"]], "Wan2.2_VAE or taew2_2")
    assert cli.main([str(word) for word in [*decode, wan_2_2 / "Wan2.2_VAE.pth"]]) == 0
    seen, expected = (read_clip(path, width=64, height=64, frames=24, fps=24) for path in (again, good))
    torch.testing.assert_close(seen, expected, rtol=0, atol=0.02)  # a few pixels are rounded otherwise
    assert video_info(again).fps == 24
    longer = tmp_path / "longer.mp4"
    assert cli.main(of_five_b(wan_2_2, longer, "--start", kept, seconds="2", decoder="preview")) == 0
    assert video_info(longer).frames == 48
    clip = tmp_path / "clip.mp4"
    assert cli.main(of_five_b(wan_2_2, clip, "--start", good, seconds="2")) == 0
    assert "good.mp4, 6 latent frames" in capsys.readouterr().err  # 21 of its 24 frames: two chunks
    assert video_info(clip).frames == 48


def test_five_b_is_decoded_in_tiles(wan_2_2, tmp_path, capsys):
    out = tmp_path / "video.mp4"
    tiled = of_five_b(wan_2_2, out, "--tile", "128", seconds="0.5", size="160", decoder="taew2_2.safetensors")
    assert cli.main(tiled) == 0
    assert "in tiles of 128" in capsys.readouterr().err
    assert (video_info(out).frames, video_info(out).width) == (12, 160)


@pytest.mark.parametrize(
    ("command", "more", "expected"),
    [
        (of_five_b, {"size": "80"}, "height is 80; it must be a multiple of 32, e.g. 64"),
        (of_five_b, {"decoder": "Wan2.1_VAE.pth"}, "choose the autoencoder made for Wan 2.2 of 5B"),
        (of_five_b, {"decoder": "taew2_1.safetensors"}, "choose the autoencoder made for Wan 2.2 of 5B"),
        (words, {"decoder": "Wan2.2_VAE.pth"}, "choose the autoencoder made for Wan 2.1"),
        (words, {"decoder": "taew2_2.safetensors"}, "choose the autoencoder made for Wan 2.1"),
    ],
)
def test_wan_2_1_and_2_2_are_told_apart_before_anything_is_loaded(
    wan_2_2, tmp_path, capsys, monkeypatch, command, more, expected
):
    monkeypatch.setattr(cli, "load", None)
    refused(capsys, command(wan_2_2, tmp_path / "video.mp4", **more), expected)
    assert not list(tmp_path.iterdir())


def test_an_encoder_and_latents_of_another_wan_are_refused(wan_2_2, tmp_path, capsys, monkeypatch):
    kept = tmp_path / "latents"
    assert (
        cli.main(words(wan_2_2, tmp_path / "first.mp4", "--latents", kept, size="64", decoder="preview")) == 0
    )
    monkeypatch.setattr(cli, "load", None)
    start = ["--start", wan_2_2 / "start.png", "--encoder", wan_2_2 / "Wan2.1_VAE.pth"]
    refused(
        capsys,
        of_five_b(wan_2_2, tmp_path / "a.mp4", *start),
        "choose the autoencoder made for Wan 2.2 of 5B",
    )
    refused(
        capsys,
        of_five_b(wan_2_2, tmp_path / "a.mp4", "--start", kept, decoder="preview"),
        "holds latents of wan2.1 for 64x64 and this run makes those of wan2.2",
    )


def test_the_memory_of_five_b_is_told(wan_2_2, tmp_path, capsys):
    assert cli.main(["info", str(wan_2_2 / "five.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "48 channels" in said
    geometry = VideoGeometry(height=704, width=1280, frames=1, stride=16, fps=24)
    needed = forecast(FIVE_B, geometry, RolloutSettings(), torch.bfloat16)
    assert f"memory     {needed} to run at 1280x704 in bfloat16" in said
