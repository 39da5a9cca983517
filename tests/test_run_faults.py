"""The demo under faults, in processes of its own: killed at random moments, on full and read-only disks."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import disks
import pytest
import torch
from run_commands import latents, made_of, manifest

from sfpp_core.encoder import video_info
from sfpp_core.errors import OutputError

ROOT = Path(__file__).parent.parent
PROMPT = "a red circle moves right slowly"
SECONDS = "45"
KILLS = int(os.environ.get("SFPP_KILLS", "30"))
EXACT_STEP = 1 / 255
"""A step of an 8-bit picture: what a run that was recalled from its last windows may differ by."""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="signals of other systems")]


def line(run, *more):
    words = ("generate", PROMPT, "--run", run, "--seconds", SECONDS, "--quiet", *more)
    return [sys.executable, "-m", "sfpp_core", *(str(word) for word in words)]


def finish(run, *more):
    """Run a command to its end; return its exit code and what it said."""
    done = subprocess.run(line(run, *more), cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


def plays(path):
    """Return the frames of a video that plays; 0 if there is none yet."""
    try:
        return video_info(path).frames
    except OutputError:
        assert not path.exists() or not path.stat().st_size, "there is a video and it does not play"
        return 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert finish(run) == (0, "")
    return run


def kill_until_done(run, *more, seed, least=0):
    """Kill and start a run again and again, from ``least`` chunks on; return the frames seen in between."""
    draw, kills, seen = random.Random(seed), 0, []
    while kills < KILLS:
        process = subprocess.Popen(line(run, *more), cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
        try:
            before = len(list((run / "latents").glob("[!.]*.safetensors"))) if run.exists() else 0
            deadline, lingers = time.monotonic() + 300, draw.random() < 0.7 or before < least
            while process.poll() is None and time.monotonic() < deadline and lingers:
                now = len(list((run / "latents").glob("[!.]*.safetensors"))) if run.exists() else 0
                lingers = now <= before or now < least
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.6) if lingers is False else draw.uniform(0, 8))
            if process.poll() is not None:
                assert process.returncode == 0, process.stderr.read().decode()
                shutil.rmtree(run)  # it was quicker: again, from the beginning
                continue
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)  # the encoder has a session of its own and may finish its fragment
            process.wait()
            process.stderr.close()
        kills += 1
        time.sleep(0.1)
        seen.append(plays(run / "video.mp4"))
    assert finish(run, *more)[0] == 0
    return seen


@pytest.mark.parametrize("more", [("--keep-cache", "4"), ("--replay", "all")], ids=["cache", "all"])
def test_a_run_killed_at_random_moments_ends_as_the_same_bytes(whole, tmp_path, more):
    run = tmp_path / "run"
    seen = kill_until_done(run, *more, seed=1)
    assert max(seen) > 100
    assert all(resume["exact"] for resume in manifest(run)["resumes"])
    assert made_of(run) == made_of(whole)


def test_a_run_killed_and_recalled_from_its_last_windows_is_as_close_as_is_said(whole, tmp_path):
    run = tmp_path / "run"
    kill_until_done(run, "--replay", "window", seed=2, least=20)
    assert any(not resume["exact"] for resume in manifest(run)["resumes"])
    made, expected = latents(run), latents(whole)
    assert len(made) == len(expected)
    assert video_info(run / "video.mp4").frames == video_info(whole / "video.mp4").frames
    from sfpp_core import demo
    from sfpp_core.decoder import load_decoder

    decoder, worst = load_decoder(demo.file(demo.AUTOENCODER)), 0.0
    shown = []
    for pieces in (made, expected):
        decoder.reset()
        shown.append(torch.cat([decoder.decode(piece)[0] for piece in pieces]))
    worst = float((shown[0] - shown[1]).abs().max())
    assert worst < EXACT_STEP


@pytest.fixture
def small_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    with disks.small_disk(tmp_path / "disk", "6m") as disk:
        yield disk


def _has_frames(video):
    """Return whether a growing video holds a fragment already, so that something of it plays."""
    return video.exists() and b"mdat" in video.read_bytes()


def test_a_full_disk_ends_a_run_and_harms_nothing(whole, small_disk):
    run, filler = small_disk / "run", small_disk / "filler"
    code, said = finish(run)
    assert code == 2
    assert "MB free and the run needs about" in said
    process = subprocess.Popen(line(run, "--seconds", "14"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    video = run / "video.mp4"
    while len(list((run / "latents").glob("[!.]*.safetensors"))) < 4 or not _has_frames(video):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    disks.fill(filler)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert "No space left on device" in said
    assert "Traceback" not in said
    kept = latents(run)
    assert len(kept) >= 4
    assert plays(video)
    code, said = finish(run, "--seconds", "14")  # still full
    assert code in (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(latents(run), kept, strict=True))
    filler.unlink()
    assert finish(run, "--seconds", "14")[0] == 0
    assert all(torch.equal(a, b) for a, b in zip(latents(run), latents(whole), strict=False))
    assert video_info(run / "video.mp4").frames == 14 * 16


def test_a_disk_that_becomes_read_only_ends_a_run_and_harms_nothing(whole, small_disk):
    run = small_disk / "run"
    process = subprocess.Popen(line(run, "--seconds", "14"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while len(list((run / "latents").glob("[!.]*.safetensors"))) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    # A mount that is written to does not become read-only; a bind over the folder of the chunks does.
    place = str(run / "latents")
    subprocess.run(["mount", "--bind", place, place], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
    try:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 1, said
        assert "Read-only file system" in said
        assert "Traceback" not in said
        code, said = finish(run, "--seconds", "14")
        assert code in (1, 2)
        assert "Read-only file system" in said
    finally:
        subprocess.run(["umount", place], check=True)
    assert finish(run, "--seconds", "14")[0] == 0
    assert all(torch.equal(a, b) for a, b in zip(latents(run), latents(whole), strict=False))
