"""The command line over Wan 2.2 of 5B: 48 channels, cells of 16 pixels, 24 frames per second."""

from dataclasses import replace

import layouts
import pytest
import torch
import wan_commands
import wan_files
from tiny_demo import refused
from wan_commands import CONFIG, words

from sfpp_core import cli
from sfpp_core.config import RolloutSettings
from sfpp_core.decoder import load_encoder
from sfpp_core.encoder import video_info
from sfpp_core.forecast import forecast
from sfpp_core.geometry import VideoGeometry
from sfpp_core.latent_space import WAN_2_2
from sfpp_core.latents_file import load_latents
from sfpp_core.pictures import read_clip, read_picture


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return wan_commands.write(tmp_path_factory.mktemp("wan"))


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
