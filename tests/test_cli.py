"""The command line: what it makes, what it says, and how it ends."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import tiny_demo
import torch
from tiny_demo import PROMPT, command, refused

from sfpp_core import cli, demo, plan, video, weights_file
from sfpp_core.encoder import video_info
from sfpp_core.errors import NumericsError
from sfpp_core.sampler import LongSampler

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_demo.write(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "video.mp4"


# --- what it makes ----------------------------------------------------------------------------------------


def test_a_prompt_becomes_a_video_and_the_user_is_told_how(files, out, capsys):
    assert cli.main(command(files, out, seconds="1.5", enlarge="2")) == 0
    info = video_info(out)
    assert (info.frames, info.width, info.height, info.fps) == (24, 64, 64, 16)
    said = capsys.readouterr().err
    for part in (
        "1.5 s, 24 frames, 32x32 shown as 64x64",
        "stage ode, seed 0",
        "3 chunks of 3 latent frames, 4 steps, shift 5, window 9, sink 0",
        "memory   ",
        "chunk 3/3, 1.5 of 1.5 s",
        "24 frames; made in",
        "peak memory",
    ):
        assert part in said


def test_the_forecast_comes_before_anything_is_loaded(files, out, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", stop)
    assert cli.main(command(files, out)) == 130
    said = capsys.readouterr().err
    assert said.index("memory   ") < said.index("stopped before anything was made")


def test_quiet_says_nothing(files, out, capsys):
    assert cli.main(command(files, out, "--quiet")) == 0
    assert capsys.readouterr() == ("", "")
    assert out.exists()


def test_a_folder_takes_pictures(files, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    assert cli.main(command(files, f"{folder}/", "--quiet", seconds="0.5")) == 0
    assert len(list(folder.glob("*.png"))) == 8


@pytest.mark.parametrize(
    ("size", "enlarge"), [((None, None), 8), ((1024, 64), 1), ((128, 64), 4), ((64, 128), 4), ((832, 480), 1)]
)
def test_small_videos_are_enlarged_to_about_512_pixels(files, out, size, enlarge):
    width, height = size
    models = {"student": files.student, "words": files.words, "decoder": files.decoder}
    planned = plan.plan(
        plan.Request(prompt=PROMPT, out=str(out), settings={}, width=width, height=height, **models)
    )
    assert (planned.geometry.width, planned.geometry.height) == (width or 64, height or 64)
    assert planned.enlarge == enlarge
    assert planned.geometry.seconds == 60
    assert planned.threads == 1 or width


def test_options_reach_the_rollout(files, out, monkeypatch):
    plans = []
    monkeypatch.setattr(cli, "load", lambda planned: plans.append(planned) or sys.exit(0))
    options = [
        "--window",
        "12",
        "--sink",
        "3",
        "--sink-positions",
        "relative",
        "--steps",
        "2",
        "--shift",
        "8",
    ]
    with pytest.raises(SystemExit):
        cli.main(
            command(files, out, *options, "--dtype", "bfloat16", "--attention", "sdpa", "--seed", str(2**40))
        )
    (planned,) = plans
    settings = planned.settings
    assert (settings.window, settings.sink, settings.sink_positions) == (12, 3, "relative")
    assert (settings.steps, settings.shift) == (2, 8.0)
    assert planned.dtype == torch.bfloat16
    assert planned.request.seed == 2**40


def test_the_embedded_demo_is_the_default(files, out, monkeypatch):
    monkeypatch.setattr(demo, "FOLDER", files.student.parent)
    assert cli.main(["generate", PROMPT, "--out", str(out), "--seconds", "0.5", "--quiet"]) == 0
    assert (video_info(out).width, video_info(out).frames) == (512, 8)


def test_the_frames_of_a_short_video_begin_a_long_one(files, tmp_path):
    videos = []
    for seconds in ("0.6", "2"):
        folder = tmp_path / seconds
        assert cli.main(command(files, f"{folder}/", "--quiet", seconds=seconds)) == 0
        videos.append([picture.read_bytes() for picture in sorted(folder.glob("*.png"))])
    short, long = videos
    assert (len(short), len(long)) == (10, 32)
    assert long[:10] == short


def test_known_words_that_no_longer_count_are_named(files, out, capsys):
    assert cli.main(command(files, out, "--quiet", prompt=f"{PROMPT} red circle right a blue circle")) == 0
    said = capsys.readouterr().err
    assert "WARNING: only the first 7 known words count; left out: right, a, blue, circle." in said


def test_unknown_words_are_named_with_those_that_are_known(files, out, capsys):
    assert cli.main(command(files, out, "--quiet", prompt="a red dog moves")) == 0
    said = capsys.readouterr().err
    assert "WARNING: the demo does not know: dog." in said
    assert "\n  colours: red, blue\n  shapes: circle" in said


# --- how it ends ------------------------------------------------------------------------------------------


@pytest.fixture
def fail(monkeypatch):
    """Return a function that lets every run end with an error after two chunks."""
    original = LongSampler.chunks

    def fail_with(error):
        def chunks(self, embeddings, **more):
            yield from itertools.islice(original(self, embeddings, **more), 2)
            raise error

        monkeypatch.setattr(LongSampler, "chunks", chunks)

    return fail_with


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NumericsError("chunk 2 came out as numbers"), "error: chunk 2 came out as numbers"),
        (MemoryError(), "error: the memory ran out; use a smaller window"),
        (torch.OutOfMemoryError("CUDA out of memory"), "error: the memory ran out; use a smaller window"),
    ],
)
def test_a_run_that_fails_exits_with_1_and_says_what_it_made(files, out, capsys, fail, error, message):
    fail(error)
    words = command(files, out, seconds="5")
    refused(capsys, words, message, f" The first 21 frames are in {out}.", code=1)
    assert video_info(out).frames == 9 + 12


def test_an_error_nobody_expected_says_in_its_traceback_what_was_made(files, out, fail):
    fail(ZeroDivisionError("unexpected"))
    with pytest.raises(ZeroDivisionError) as caught:
        cli.main(command(files, out, seconds="5"))
    assert caught.value.__notes__ == [f"The first 21 frames are in {out}."]
    assert video_info(out).frames == 9 + 12


def test_memory_that_runs_out_is_no_traceback(files, out, capsys, monkeypatch):
    def greedy(_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(cli, "load", greedy)
    refused(capsys, command(files, out), "the memory ran out", code=1)


def test_debug_shows_where_an_error_comes_from(files, out):
    with pytest.raises(ValueError, match="height is 481"):
        cli.main(command(files, out, "--height", "481", "--debug"))


def test_an_error_nobody_expected_keeps_its_traceback(files, out, monkeypatch):
    monkeypatch.setattr(cli, "load", lambda _: [][0])
    with pytest.raises(IndexError):
        cli.main(command(files, out))


def wait_until(happened):
    """Wait for something that takes seconds, on a busy machine a minute."""
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended_by(number, files, out):
    """Start a long run, end it by a signal once frames are in its file, and return it with what it said."""
    line = [sys.executable, "-m", "sfpp_core", *command(files, out, seconds="3000")]
    with subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: process.poll() is not None or (out.exists() and out.stat().st_size > 20_000))
            assert process.poll() is None
            frames = video_info(out).frames
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    return process, said, frames


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.skipif(os.name == "nt", reason="signals of other systems")
def test_a_signal_ends_the_run_and_leaves_a_video_that_plays(files, out, number):
    process, said, _ = ended_by(number, files, out)
    assert process.returncode == 128 + number
    frames = video_info(out).frames
    assert f"stopped; {out}: {frames / 16:.1f} s, {frames} frames of 3000 s are there and play" in said
    assert "Traceback" not in said


@pytest.mark.skipif(os.name == "nt", reason="signals of other systems")
def test_a_kill_leaves_a_video_that_plays(files, out):
    process, _, frames = ended_by(signal.SIGKILL, files, out)
    assert process.returncode == -signal.SIGKILL
    assert frames >= 16
    assert video_info(out).frames >= frames


def test_an_interrupt_before_the_first_frame_is_no_traceback(files, out, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(LongSampler, "chunks", interrupted)
    assert cli.main(command(files, out)) == 130
    assert "stopped before the first frame; nothing was written" in capsys.readouterr().err
    assert not out.exists()


def test_a_second_interrupt_while_the_file_is_closed_is_no_traceback(files, out, capsys, fail, monkeypatch):
    writers, close = [], video.Writer.close

    def interrupted(writer):
        writers.append(writer)
        wait_until(lambda: writer.frames_written == 21)
        raise KeyboardInterrupt

    fail(KeyboardInterrupt())
    monkeypatch.setattr(video.Writer, "close", interrupted)
    assert cli.main(command(files, out, seconds="5")) == 130
    (writer,) = writers
    close(writer)
    said = capsys.readouterr().err
    assert f"stopped; {out}: 1.3 s, 21 frames of 5 s are there and play" in said
    assert "Traceback" not in said
    assert video_info(out).frames == 21


# --- the rest ---------------------------------------------------------------------------------------------


def test_info_explains_a_student(files, capsys):
    assert cli.main(["info", str(files.student)]) == 0
    said = capsys.readouterr().out
    for part in (
        "a student, stage ode",
        "dim 48, 4 heads of 12, 3 layers",
        "window 9",
        "causal     yes",
        "world      7",
    ):
        assert part in said


def test_info_explains_a_plain_wan(tmp_path, capsys):
    config = tiny.StudentConfig(dim=128, ffn_dim=64, heads=1, layers=1, text_dim=20)
    path = tmp_path / "wan.safetensors"
    weights_file.write(path, tiny.network(config).state_dict(), {})
    assert cli.main(["info", str(path)]) == 0
    said = capsys.readouterr().out
    assert "a Wan transformer" in said
    assert "not as far as it says" in said
    assert "832x480" in said


def test_info_explains_the_other_files_of_the_demo(files, capsys):
    for file, expected in ((files.words, "the demo's words"), (files.decoder, "the demo's autoencoder")):
        assert cli.main(["info", str(file)]) == 0
        assert expected in capsys.readouterr().out


def test_info_says_what_an_unknown_file_looks_like(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    weights_file.write(path, {"double_blocks.0.weight": torch.zeros(2)}, {})
    assert cli.main(["info", str(path)]) == 0
    assert "a FLUX or HunyuanVideo transformer" in capsys.readouterr().out
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    refused(capsys, ["info", str(path)], "it looks like a PNG picture")


def test_help_and_version_answer_at_once(capsys):
    for words, expected in (
        (["--help"], "generate"),
        (["generate", "--help"], "--seconds 60 --out video.mp4"),
        (["--version"], "0.1"),
    ):
        with pytest.raises(SystemExit) as leaving:
            cli.main(words)
        assert leaving.value.code == 0
        assert expected in capsys.readouterr().out
    refused(capsys, [], "the following arguments are required: command")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(files, tmp_path):
    peaks = []
    for seconds in ("30", "240"):
        line = [sys.executable, "-m", "sfpp_core", *command(files, tmp_path / "video.mp4", seconds=seconds)]
        said = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stderr
        peaks.append(float(said.rsplit("peak memory ", 1)[1].split()[0]))
    assert peaks[1] < 1.03 * peaks[0]
