"""What a run must come out of: damage before a change, a death at a bad moment, odd wishes."""

import errno
import gc
import math
import os
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import disks
import numpy as np
import pytest
import tiny_demo
import torch
from run_commands import aside, run_words
from small_run import GEOMETRY, chunk, make, wanted

from sfpp_core import cli
from sfpp_core.errors import CheckpointError, OutputError, SettingsError
from sfpp_core.run import folder as folder_module
from sfpp_core.run import manifest as manifest_module
from sfpp_core.run import video_file
from sfpp_core.run.aside import move_aside
from sfpp_core.run.describe import run_lines
from sfpp_core.run.folder import open_run
from sfpp_core.run.lock import RunLock
from sfpp_core.run.manifest import read_manifest
from sfpp_core.run.video_file import PictureFolder


@pytest.fixture
def folder(tmp_path):
    """A run of which all five chunks are made."""
    return make(tmp_path / "run")


def files_of(folder):
    """Return all that lies in a folder, byte for byte, but for the lock and the log."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in ("lock", "log.txt"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def dying_after(function, times):
    """Return a function that works so many times and then dies."""
    calls = []

    def call(*words):
        calls.append(words)
        if len(calls) > times:
            raise KeyboardInterrupt
        return function(*words)

    return call


# --- chunks of an earlier section -------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"torn"), Path.unlink])
def test_a_chunk_lost_before_a_change_is_not_made_as_the_run_is_now(folder, damage):
    changed = wanted(decisions={"seed": 4}, seconds_kept=2.2)  # from chunk 3 on
    make(folder, changed)
    damage(folder / "latents" / "chunk_000001.safetensors")
    before = files_of(folder)
    with pytest.raises(CheckpointError, match=r"lacks chunk 1.*--from 0\.5625") as error:
        open_run(folder, wanted(decisions={"seed": 4}))
    assert "--restart" in str(error.value)
    assert files_of(folder) == before
    with open_run(folder, wanted(decisions={"seed": 4}, seconds_kept=0.5625)) as run:
        assert (run.kept, len(run.manifest.sections)) == (1, 2)
        assert run.section.chunk == 1


def test_a_chunk_that_cannot_be_read_is_not_taken_for_a_damaged_one(folder, monkeypatch):
    before, opened = files_of(folder), Path.open

    def refuse(path, *words, **options):
        if path.name == "chunk_000002.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *words, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"chunk_000002.*Input/output error"):
        open_run(folder, wanted())
    monkeypatch.undo()
    assert files_of(folder) == before


def test_what_was_asked_for_after_the_end_does_not_come_back_when_a_run_grows(tmp_path):
    long, short = GEOMETRY, replace(GEOMETRY, frames=21)
    first = wanted(lambda number: "a dog" if number > 3 else "a cat", geometry=long)
    with open_run(tmp_path / "run", first) as run:
        run.add(0, chunk(0))
    make(tmp_path / "run", wanted(geometry=short))
    make(tmp_path / "run", wanted(lambda number: "a cow" if number > 3 else "a cat", geometry=long))
    assert read_manifest(tmp_path / "run").sections[0].texts == ((0, "a cat"), (4, "a cow"))


# --- beginning again --------------------------------------------------------------------------------------


def test_a_restart_that_cannot_be_moves_nothing(folder, tmp_path):
    before = files_of(folder)
    other = make(tmp_path / "other")
    for fields in (
        {"seconds_kept": 1.0},
        {"branch": folder, "seconds_kept": 1.0},
        {"branch": other},
        {"branch": other, "seconds_kept": 99.0},
    ):
        with pytest.raises(SettingsError):
            open_run(folder, wanted(anew=True, **fields))
        assert files_of(folder) == before


@pytest.mark.parametrize("moved", range(4))
@pytest.mark.parametrize("again", [True, False])
def test_a_death_in_the_middle_of_a_restart_locks_nobody_out(folder, monkeypatch, moved, again):
    (folder / "video.mp4").write_bytes(b"frames")
    (folder / "cache.safetensors").write_bytes(b"keys")
    before = files_of(folder)
    monkeypatch.setattr(folder_module, "move_aside", dying_after(move_aside, moved))
    with pytest.raises(KeyboardInterrupt):
        open_run(folder, wanted(anew=True))
    monkeypatch.undo()
    make(folder, wanted(anew=again))
    there = {Path(name).name: content for name, content in files_of(folder).items()}
    assert all(there[Path(name).name] == content for name, content in before.items() if "json" not in name)


# --- what is said of it -----------------------------------------------------------------------------------


def test_a_run_of_another_front_end_is_not_sent_to_the_command_line(tmp_path):
    for name, request, expected in (
        ("a", {"front end": "ComfyUI"}, "stopped at 0.5625 s; queue it again"),
        ("b", {"prompt": "a cat", "out": "a.mp4"}, f"generate --run {tmp_path / 'b'}"),
    ):
        with open_run(tmp_path / name, wanted(request=request)) as run:
            run.add(0, chunk(0))
        assert expected in run_lines(tmp_path / name)[1]


def test_a_manifest_that_is_too_large_says_what_can_be_done(folder, monkeypatch):
    monkeypatch.setattr(manifest_module, "LARGEST", 10)
    with pytest.raises(CheckpointError, match=r"which no manifest has.*--restart"):
        open_run(folder, wanted())


# --- seconds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0, 1e300])
def test_seconds_that_cannot_be_are_refused(seconds):
    with pytest.raises(SettingsError, match="--from is"):
        wanted(seconds_kept=seconds)


# --- pictures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dies", range(4))
@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_death_while_pictures_are_moved_leaves_none_that_would_be_taken_for_right(
    tmp_path, monkeypatch, dies, all_of_them
):
    pictures = PictureFolder(folder=tmp_path / "frames", name="frame_%06d.png", enlarge=1)
    sink = pictures.sink(0)
    for _ in range(6):
        sink.put(np.zeros((2, 2, 3), np.uint8))
    monkeypatch.setattr(video_file, "move_aside", dying_after(move_aside, dies))
    right = 0 if all_of_them else 2

    def move():
        return pictures.put_aside(tmp_path / "run") if all_of_them else pictures.cut(2, tmp_path / "run")

    with pytest.raises(KeyboardInterrupt):
        move()
    monkeypatch.undo()
    move()
    assert len(list((tmp_path / "frames").iterdir())) == right
    assert len(aside(tmp_path / "run")) == 6 - right


def test_what_lies_on_another_disk_can_be_put_aside(tmp_path):
    disk = Path("/dev/shm")
    if not os.access(disk, os.W_OK) or disk.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk here")
    path = disk / f"sfpp_{os.getpid()}.mp4"
    path.write_bytes(b"frames")
    try:
        move_aside(path, tmp_path / "aside")
        assert not path.exists()
        assert (tmp_path / "aside" / path.name).read_bytes() == b"frames"
    finally:
        path.unlink(missing_ok=True)


def test_what_finds_no_room_on_another_disk_stays_and_the_remedy_is_said_once(tmp_path):
    path, disk = tmp_path / "video.mp4", tmp_path / "disk"
    path.write_bytes(bytes(100_000))
    disk.mkdir()
    with disks.small_disk(disk, "1m"):
        (disk / "aside").mkdir()
        disks.fill(disk / "filler")
        with pytest.raises(OutputError, match=r"No space left on device; free some room[^;]*\.$"):
            move_aside(path, disk / "aside")
        assert not list((disk / "aside").iterdir())
    assert path.stat().st_size == 100_000


# --- the lock ---------------------------------------------------------------------------------------------


def test_a_lock_of_another_machine_on_a_disk_without_locks_says_how_to_end_it(tmp_path, monkeypatch):
    from sfpp_core.run import lock

    monkeypatch.setattr(lock, "_lock", lambda _: None)
    (tmp_path / "lock").write_text('{"process": 7, "machine": "elsewhere", "began": "1"}')
    with pytest.raises(OutputError, match=rf"process 7 of elsewhere.*remove {tmp_path / 'lock'}"):
        RunLock(tmp_path)
    (tmp_path / "lock").unlink()
    RunLock(tmp_path).release()


def test_whoever_looks_at_a_lock_is_waited_for(tmp_path):
    from sfpp_core.run import lock

    with (tmp_path / "lock").open("a+") as looking:
        assert lock._lock(looking)
        timer = threading.Timer(0.1, looking.close)
        timer.start()
        RunLock(tmp_path).release()
        timer.join()


# --- memory -----------------------------------------------------------------------------------------------


def test_a_decoder_that_found_no_memory_is_gone_before_the_next_decodes(tmp_path, monkeypatch):
    from sfpp_core.tiny_autoencoder import TinyAutoencoder

    files = tiny_demo.write(tmp_path)
    decode, seen = TinyAutoencoder.decode, []

    def decoding(self, piece):
        if not seen:
            seen.append(weakref.ref(self))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        gc.collect()
        seen.append(seen[0]() is None)
        return decode(self, piece)

    monkeypatch.setattr(TinyAutoencoder, "decode", decoding)
    assert cli.main(run_words(files, tmp_path / "run", seconds="1")) == 0
    assert seen[1:]
    assert all(seen[1:])
