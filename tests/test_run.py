"""A run on disk: whatever ended it, it goes on to the same video; it grows, branches, is never mixed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_demo
import torch
from run_commands import aside, latents, made_of, manifest, run_words
from tiny_demo import PROMPT, refused

from sfpp_core import cli, video
from sfpp_core.encoder import video_info
from sfpp_core.run import growing_video
from sfpp_core.run.folder import Run

ROOT = Path(__file__).parent.parent


def slow(*row):
    """Return a row of a table that takes its time."""
    return pytest.param(*row, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_demo.write(tmp_path_factory.mktemp("demo"))


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    """Parts of a second, so that a short video has several."""
    monkeypatch.setattr(growing_video, "PART_FRAMES", 16)


@pytest.fixture
def stop_at(monkeypatch):
    """Return what lets the next run be interrupted before it keeps a chunk."""

    def stop(chunk, error=KeyboardInterrupt):
        add = Run.add

        def adding(run, number, clean):
            if number == chunk:
                monkeypatch.setattr(Run, "add", add)
                raise error
            add(run, number, clean)

        monkeypatch.setattr(Run, "add", adding)

    return stop


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """An uninterrupted run of 3 s: 5 chunks, 48 frames. Nobody may change it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growing_video, "PART_FRAMES", 16)
        assert cli.main(run_words(files, run)) == 0
    return run


# --- going on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [("--keep-cache", "1"), slow(("--replay", "all")), slow(("--cache", "fp8-host"))]
)
def test_a_stopped_run_goes_on_to_the_same_bytes(files, whole, tmp_path, stop_at, more):
    run, expected = tmp_path / "run", whole
    if "--cache" in more:
        expected = tmp_path / "expected"
        assert cli.main(run_words(files, expected, *more)) == 0
        more = (*more, "--keep-cache", "2")
    for chunk in (1, 3):
        stop_at(chunk)
        assert cli.main(run_words(files, run, *more)) == 130
        assert len(latents(run)) == chunk
        assert video_info(run / "video.mp4").frames >= 9
    assert cli.main(run_words(files, run, *more)) == 0
    assert made_of(run) == made_of(expected)
    how = "all" if "--replay" in more else "cache"
    assert [(each["chunk"], each["how"], each["exact"]) for each in manifest(run)["resumes"]] == [
        (1, how, True),
        (3, how, True),
    ]


def test_the_folder_alone_is_enough_to_go_on(files, whole, tmp_path, stop_at, capsys):
    run = tmp_path / "run"
    stop_at(2)
    assert cli.main(run_words(files, run)) == 130
    assert cli.main(["info", str(run)]) == 0
    said = capsys.readouterr().out
    assert "stopped at 1.3125 s" in said
    assert f"from 0 s: {PROMPT}" in said
    assert cli.main(["generate", "--run", str(run), "--quiet"]) == 0
    assert made_of(run) == made_of(whole)
    assert cli.main(["info", str(run)]) == 0
    assert "holds      a run, complete" in capsys.readouterr().out


def test_a_complete_run_is_left_as_it_is(files, whole, monkeypatch):
    before = made_of(whole)
    monkeypatch.setattr(growing_video, "cut_video", None)
    assert cli.main(["generate", "--run", str(whole)]) == 0
    assert made_of(whole) == before


@pytest.mark.slow
def test_a_long_past_is_recalled_from_its_last_windows_and_the_manifest_says_so(files, tmp_path, stop_at):
    run, other = tmp_path / "run", tmp_path / "other"
    words = ("--replay", "window")
    assert cli.main(run_words(files, other, seconds="8")) == 0
    stop_at(9)
    assert cli.main(run_words(files, run, *words, seconds="8")) == 130
    assert cli.main(run_words(files, run, *words, seconds="8")) == 0
    (resume,) = manifest(run)["resumes"]
    assert (resume["chunk"], resume["how"], resume["exact"], resume["replayed"]) == (9, "window", False, 5)
    made, expected = latents(run), latents(other)
    assert all(torch.equal(a, b) for a, b in zip(made[:9], expected, strict=False))
    distance = max(float((a - b).abs().max()) for a, b in zip(made[9:], expected[9:], strict=True))
    assert 0 < distance < 0.01


@pytest.mark.slow
def test_a_kill_loses_no_chunk_that_was_kept(files, whole, tmp_path):
    run = tmp_path / "run"
    line = [sys.executable, "-m", "sfpp_core", *run_words(files, run, "--keep-cache", "1", seconds="3000")]
    with subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 300
            while not (run / "latents" / "chunk_000002.safetensors").exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            refused(capsys=_Nothing(), words=run_words(files, run), code=2)
        finally:
            process.send_signal(signal.SIGKILL)
    kept = latents(run)
    assert len(kept) >= 3
    assert all(torch.equal(a, b) for a, b in zip(kept, latents(whole), strict=False))
    seconds = str(round(len(kept) * 12 / 16 + 2))
    assert cli.main(run_words(files, run, seconds=seconds)) == 0
    assert video_info(run / "video.mp4").frames == 16 * int(seconds)


class _Nothing:
    """Captures no output."""

    def readouterr(self):
        return self

    err = ""


# --- longer, other, from a second on ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "more"),
    [
        ("0.5", ("1", "1.5")),
        slow("1.3", ("1.7",)),
        slow("0.1", ("2.9",)),
        slow("2.9", ("0.1",)),
        slow("0.6", ("0.8", "0.7", "0.9")),
    ],
)
def test_an_extended_run_is_the_long_one(files, whole, tmp_path, first, more):
    run = tmp_path / "run"
    assert cli.main(run_words(files, run, seconds=first)) == 0
    for seconds in more:
        assert cli.main(["generate", "--run", str(run), "--extend", seconds, "--quiet"]) == 0
    assert all(torch.equal(a, b) for a, b in zip(latents(run), latents(whole), strict=True))
    assert (run / "video.mp4").read_bytes() == (whole / "video.mp4").read_bytes()


@pytest.mark.parametrize(
    ("second", "chunk"), [slow("0", 0), slow("0.6", 1), ("1.5", 2), slow("2.1", 3), slow("3", 4)]
)
def test_a_branch_shares_what_comes_before_and_is_what_a_change_in_place_makes(
    files, whole, tmp_path, second, chunk
):
    before, run, place = made_of(whole), tmp_path / "branch", tmp_path / "place"
    words = ["generate", "a blue circle", "--from", second, "--seed", "5", "--quiet"]
    assert cli.main([*words, "--run", str(run), "--branch", str(whole)]) == 0
    assert made_of(whole) == before
    shared = [file.samefile(whole / "latents" / file.name) for file in sorted((run / "latents").iterdir())]
    assert shared == [number < chunk for number in range(5)]
    assert cli.main(run_words(files, place)) == 0
    assert cli.main([*words, "--run", str(place)]) == 0
    assert made_of(place) == made_of(run)
    assert cli.main([*words, "--run", str(place)]) == 0  # said again, it changes nothing
    assert made_of(place) == made_of(run)
    assert [name for name in aside(place) if name.startswith("chunk")] == [
        f"chunk_{number:06d}.safetensors" for number in range(chunk, 5)
    ]
    others = zip(latents(run)[chunk:], latents(whole)[chunk:], strict=True)
    assert not any(torch.equal(a, b) for a, b in others)


def test_what_was_made_otherwise_is_explained_and_refused(files, whole, tmp_path, capsys):
    before = made_of(whole)
    for more, expected in (
        (("--seed", "1"), "seed was 0 and is 1"),
        (("--window", "12"), "settings.window was 9 and is 12"),
        (("--width", "64"), "width was 32 and is 64"),
        (("--seconds", "1"), "holds 3 s and 1 s are asked for"),
        (("--from", "9", "--seed", "1"), "holds 3.5625 s and --from is 9"),
        (("--branch", str(tmp_path), "--from", "1"), "is another run already"),
    ):
        refused(capsys, run_words(files, whole, *more), expected)
    refused(capsys, run_words(files, whole, prompt="a blue circle"), "the prompt was", "--restart")
    other = files.replace(student=tmp_path / "other.safetensors")
    other.student.write_bytes(files.student.read_bytes()[:-1] + b"\1")
    refused(capsys, run_words(other, whole), "student was")
    assert made_of(whole) == before


def test_options_of_runs_need_a_run(files, tmp_path, capsys):
    refused(capsys, ["generate", PROMPT], "--out, the video to write, or --run")
    refused(capsys, ["generate", "--run", str(tmp_path / "new")], "say what the video shows: either a prompt")
    refused(capsys, ["generate", PROMPT, "--out", "a.mp4", "--extend", "3"], "--extend is for runs")
    refused(capsys, ["generate", PROMPT, "--run", str(tmp_path / "new"), "--extend", "3"], "is none")
    refused(capsys, run_words(files, tmp_path / "new", "--from", "3"), "holds no run to go on from")
    refused(capsys, run_words(files, tmp_path / "a" / "b"), "does not exist; make it first")
    (tmp_path / "photo.jpg").touch()
    refused(capsys, run_words(files, tmp_path), "holds photo.jpg and no run")


@pytest.mark.slow
def test_a_restart_moves_what_is_there_aside(files, tmp_path):
    run = tmp_path / "run"
    assert cli.main(run_words(files, run, seconds="1")) == 0
    before = made_of(run)
    assert cli.main(run_words(files, run, "--restart", "--seed", "1", seconds="1")) == 0
    assert made_of(run) != before
    (kept,) = (run / "aside").iterdir()
    assert made_of(kept) == before


# --- what is shown ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_lost_or_foreign_video_is_made_again_from_the_latents(files, whole, tmp_path, stop_at):
    run = tmp_path / "run"
    for damage in (
        Path.unlink,
        lambda path: path.write_bytes(b"no video"),
        lambda path: os.truncate(path, 3000),
    ):
        stop_at(4)
        assert cli.main(run_words(files, run, "--restart")) == 130
        damage(run / "video.mp4")
        assert cli.main(run_words(files, run)) == 0
        assert made_of(run) == made_of(whole)


@pytest.mark.slow
def test_another_look_is_made_from_the_latents_and_the_earlier_video_kept(files, whole, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(run_words(files, run)) == 0
    assert cli.main(["generate", "--run", str(run), "--enlarge", "2", "--quiet"]) == 0
    assert "the video is made again" in capsys.readouterr().err
    assert (video_info(run / "video.mp4").width, video_info(run / "video.mp4").frames) == (64, 48)
    assert aside(run) == ["video.mp4"]
    assert (
        cli.main(["decode", str(run), "--out", str(tmp_path / "again.mp4"), "--decoder", str(files.decoder)])
        == 0
    )
    assert video_info(tmp_path / "again.mp4").frames == 48


@pytest.mark.slow
def test_pictures_go_on_at_the_right_number(files, tmp_path, stop_at):
    run, folder, whole = tmp_path / "run", tmp_path / "pictures", tmp_path / "whole"
    assert cli.main(tiny_demo.command(files, f"{whole}/", "--quiet", seconds="3")) == 0
    words = run_words(files, run, "--out", f"{folder}/")
    stop_at(2)
    assert cli.main(words) == 130
    assert len(list(folder.iterdir())) == 21
    (folder / "frame_000020.png").unlink()
    assert cli.main(words) == 0
    read = [{file.name: file.read_bytes() for file in each.iterdir()} for each in (folder, whole)]
    assert read[0] == read[1]


@pytest.mark.parametrize("out", ["new/frame_%04d.png", "new.d/"])
def test_pictures_of_a_run_get_a_folder_of_their_own(files, tmp_path, out):
    assert cli.main(run_words(files, tmp_path / "run", "--out", f"{tmp_path}/{out}", seconds="1")) == 0
    assert len(list(tmp_path.glob("new*/frame_*.png"))) == 16


# --- faults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, slow(7), slow(300)])
def test_a_damaged_chunk_and_what_follows_are_put_aside_and_made_again(files, whole, tmp_path, cut, capsys):
    run = tmp_path / "run"
    assert cli.main(run_words(files, run)) == 0
    path = run / "latents" / "chunk_000002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content[:cut] if cut else content)
    assert cli.main(run_words(files, run)) == 0
    assert "3 chunks from 2 on were moved to" in capsys.readouterr().err
    assert aside(run) == [f"chunk_{number:06d}.safetensors" for number in (2, 3, 4)]
    assert made_of(run) == made_of(whole)


def test_latents_that_are_not_finite_are_neither_kept_nor_shown(files, tmp_path, monkeypatch, capsys):
    run, add = tmp_path / "run", Run.add
    monkeypatch.setattr(
        Run, "add", lambda self, chunk, clean: add(self, chunk, clean / 0 if chunk == 2 else clean)
    )
    refused(capsys, run_words(files, run), "chunk 2 came out as numbers that are not finite", code=1)
    assert len(latents(run)) == 2
    assert video_info(run / "video.mp4").frames == 21
    assert "ended by an error with 2 chunks kept" in (run / "log.txt").read_text()


@pytest.mark.parametrize("times", [1, slow(2)])
def test_without_memory_the_decoder_goes_on_elsewhere_once(
    files, whole, tmp_path, monkeypatch, capsys, times
):
    from sfpp_core.tiny_autoencoder import TinyAutoencoder

    run, decode, calls = tmp_path / "run", TinyAutoencoder.decode, []

    def decoding(self, chunk):
        calls.append(chunk)
        if len(calls) in (3, 5)[:times]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB")
        return decode(self, chunk)

    monkeypatch.setattr(TinyAutoencoder, "decode", decoding)
    if times == 1:
        assert cli.main(run_words(files, run)) == 0
        assert "the GPU ran out of memory at chunk 3" in capsys.readouterr().err
        assert made_of(run) == made_of(whole)
    else:
        refused(capsys, run_words(files, run), "the memory ran out", "--branch", code=1)
        assert all(torch.equal(a, b) for a, b in zip(latents(run), latents(whole), strict=False))


def test_a_dead_encoder_is_named_and_the_run_goes_on_after_it(files, whole, tmp_path, monkeypatch, capsys):
    run, put = tmp_path / "run", growing_video.GrowingVideo.put

    def putting(self, picture):
        put(self, picture)
        if self._frames == 20:
            os.kill(self._part._process.pid, signal.SIGKILL)

    monkeypatch.setattr(growing_video.GrowingVideo, "put", putting)
    refused(capsys, run_words(files, run), "the encoder was killed by signal 9", code=1)
    monkeypatch.setattr(growing_video.GrowingVideo, "put", put)
    assert latents(run)
    assert video_info(run / "video.mp4").frames >= 16
    assert cli.main(run_words(files, run)) == 0
    assert made_of(run) == made_of(whole)


def test_a_disk_that_is_too_small_is_found_before_anything_is_made(files, tmp_path, monkeypatch, capsys):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(capsys, run_words(files, tmp_path / "run"), "MB free and the run needs about")
    assert not latents(tmp_path / "run")


@pytest.mark.slow
def test_a_second_interrupt_while_the_video_is_closed_loses_no_chunk(
    files, whole, tmp_path, stop_at, monkeypatch
):
    run, close = tmp_path / "run", video.Writer.close
    stop_at(3)

    def interrupted(writer):
        monkeypatch.setattr(video.Writer, "close", close)
        raise KeyboardInterrupt

    monkeypatch.setattr(video.Writer, "close", interrupted)
    assert cli.main(run_words(files, run)) == 130
    assert cli.main(run_words(files, run)) == 0
    assert made_of(run) == made_of(whole)
