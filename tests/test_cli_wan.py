"""The command line over files as Wan's users have them: small random weights in the real layouts."""

import pytest
import torch
import wan_commands
from tiny_demo import refused
from wan_commands import CONFIG, frames, words

from sfpp_core import cli
from sfpp_core.checkpoint import load_student
from sfpp_core.encoder import video_info
from sfpp_core.errors import OutputError
from sfpp_core.latents_file import load_latents, save_latents


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return wan_commands.write(tmp_path_factory.mktemp("wan"))


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


def test_latents_of_another_run_are_not_mixed_in(wan, tmp_path, capsys):
    kept = tmp_path / "latents"
    assert cli.main(words(wan, tmp_path / "a.mp4", "--latents", kept, decoder="preview")) == 0
    for change in (["--steps", "2"], ["--sink", "3"], ["--lora", wan / "lora.safetensors"]):
        again = words(wan, tmp_path / "b.mp4", "--latents", kept, *change, decoder="preview")
        refused(capsys, again, "holds the latents of another video")
    assert cli.main(words(wan, tmp_path / "c.mp4", "--latents", kept, decoder="preview")) == 0


def test_latents_that_cannot_be_kept_do_not_cost_the_frames(wan, tmp_path, capsys, monkeypatch):
    def fail(folder, chunk, latents, info):
        if chunk == 1:
            raise OutputError("the disk is full.")
        save_latents(folder, chunk, latents, info)

    monkeypatch.setattr("sfpp_core.generate.save_latents", fail)
    out = tmp_path / "video.mp4"
    command = words(wan, out, "--latents", tmp_path / "latents", seconds="3", decoder="preview")
    refused(capsys, command, "the disk is full. The first 21 frames are in", code=1)
    assert video_info(out).frames == 21


def test_a_decoder_that_fails_does_not_cost_the_latents(wan, tmp_path, monkeypatch):
    def fail(self, chunk):
        raise RuntimeError("no more")

    monkeypatch.setattr("sfpp_core.preview_decoder.PreviewDecoder.decode", fail)
    kept = tmp_path / "latents"
    with pytest.raises(RuntimeError, match="no more"):
        cli.main(words(wan, tmp_path / "video.mp4", "--latents", kept, decoder="preview"))
    assert load_latents(kept).chunks == 1


def test_causvid_needs_an_encoder_only_where_a_window_starts_anew(wan, tmp_path, capsys, monkeypatch):
    command = words(wan, tmp_path / "video.mp4", "--preset", "causvid", "--overlap", "3", decoder="preview")
    assert cli.main(command) == 0
    monkeypatch.setattr(cli, "load", None)
    command[command.index("--seconds") + 1] = "8"
    refused(capsys, command, "preview cannot encode")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--encoder", "Wan2.1_VAE.pth"], "--encoder without --start"),
        (["--sink-positions", "relative"], "--sink-positions without a sink"),
    ],
)
def test_options_without_effect_are_named(wan, tmp_path, capsys, more, expected):
    assert cli.main(words(wan, tmp_path / "video.mp4", *more, decoder="preview")) == 0
    assert expected in capsys.readouterr().err


def test_what_the_video_begins_with_is_not_replaced(wan, tmp_path, capsys):
    clip = tmp_path / "clip.mp4"
    assert cli.main(words(wan, clip, seconds="2", decoder="preview")) == 0
    before = clip.read_bytes()
    refused(capsys, words(wan, clip, "--start", clip, seconds="4"), "is what the video begins with")
    assert clip.read_bytes() == before


def test_names_no_file_system_takes_are_no_traceback(wan, tmp_path, capsys):
    long = tmp_path / ("x" * 300)
    for option in ("--student", "--lora", "--start", "--decoder", "--text-encoder", "--latents"):
        refused(capsys, words(wan, tmp_path / "video.mp4", option, long), "error: ")
    refused(capsys, ["info", str(long)], "error: ")


def test_bad_tiles_are_refused_before_a_decoder_is_loaded(wan, tmp_path, capsys, monkeypatch):
    kept = tmp_path / "latents"
    assert cli.main(words(wan, tmp_path / "a.mp4", "--latents", kept, decoder="preview")) == 0
    monkeypatch.setattr("sfpp_core.redecode.load_decoder", None)
    decode = [
        "decode",
        kept,
        "--out",
        tmp_path / "b.mp4",
        "--decoder",
        wan / "Wan2.1_VAE.pth",
        "--tile",
        "72",
    ]
    refused(capsys, [str(word) for word in decode], "use tiles of at least 88")


def test_files_that_change_during_a_run_cost_nothing(wan, tmp_path, monkeypatch):
    start, kept = tmp_path / "start.png", tmp_path / "latents"
    start.write_bytes((wan / "start.png").read_bytes())

    def save_and_remove(*arguments):
        save_latents(*arguments)
        start.unlink(missing_ok=True)

    monkeypatch.setattr("sfpp_core.generate.save_latents", save_and_remove)
    command = words(wan, tmp_path / "a.mp4", "--start", start, "--latents", kept, seconds="2")
    assert cli.main(command) == 0
    assert load_latents(kept).complete


def test_a_user_without_a_home_is_only_missed_where_one_is_needed(wan, tmp_path, capsys, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert cli.main(words(wan, tmp_path / "a.mp4", decoder="preview")) == 0
    refused(capsys, words(wan, tmp_path / "b.mp4", "--text-cache"), "there is no home folder")
