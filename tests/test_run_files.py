"""The files of a run: damage is told apart from a run, one process at a time, and a video is gone on with."""

import errno
import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import disks
import pytest
import torch
from small_run import GEOMETRY, chunk, make, wanted
from wan_files import SMALL_2_1, SMALL_2_2, write_tiny, write_wan

from sfpp_core import demo
from sfpp_core.decoder import check_decoder, load_decoder
from sfpp_core.encoder import find_ffmpeg, video_info
from sfpp_core.errors import CheckpointError, OutputError, SettingsError, SFPPError
from sfpp_core.latents_file import load_latents
from sfpp_core.run import growing_video
from sfpp_core.run.agreement import chunks_before
from sfpp_core.run.fingerprint import fingerprint
from sfpp_core.run.folder import open_run
from sfpp_core.run.growing_video import GrowingVideo, cut_video, finish_video
from sfpp_core.run.lock import RunLock, is_locked
from sfpp_core.run.manifest import read_manifest
from sfpp_core.run.warm_up import reach_of, warm_up
from sfpp_core.video import Writer

ROOT = Path(__file__).parent.parent
LOOK = {"width": 32, "height": 32, "fps": 16, "enlarge": 1}


@pytest.fixture
def folder(tmp_path):
    """A run of which all five chunks are made."""
    return make(tmp_path / "run")


def flip(content, seed):
    """Return ``content`` with one bit changed, or cut short."""
    draw = random.Random(seed)
    if draw.random() < 0.3:
        return content[: draw.randrange(len(content))]
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


# --- damage -----------------------------------------------------------------------------------------------


def test_a_damaged_manifest_is_told_or_means_the_same(folder):
    path = folder / "manifest.json"
    content, manifest = path.read_bytes(), read_manifest(folder)
    (folder / ".manifest.copy.json").unlink()
    told = 0
    for seed in range(150):
        path.write_bytes(flip(content, seed))
        try:
            assert read_manifest(folder) == manifest
        except CheckpointError as error:
            told += 1
            assert str(path) in str(error)
    assert told > 100
    for content in (b"", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"format": 2, "checksum": ""}'):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            read_manifest(folder)
        with pytest.raises(SFPPError):
            open_run(folder, wanted())


def test_the_second_copy_takes_the_place_of_a_damaged_manifest(folder, caplog):
    manifest = read_manifest(folder)
    (folder / "manifest.json").write_bytes(b"torn")
    assert read_manifest(folder) == manifest
    assert "second copy is whole" in caplog.text
    with open_run(folder, wanted()) as run:
        assert run.kept == run.chunks


def test_another_programs_manifest_is_refused(folder):
    from sfpp_core.run.manifest import _checksum

    path = folder / "manifest.json"
    (folder / ".manifest.copy.json").unlink()
    table = json.loads(path.read_text())
    for change in (
        {"space": "sd"},
        {"sections": []},
        {"sections": [{"chunk": 4, "decisions": {}, "texts": []}]},
        {"geometry": {"width": 3}},
        {"request": 7},
        {"resumes": [{"chunk": 1}]},
    ):
        changed = {**table, **change}
        del changed["checksum"]
        path.write_text(json.dumps({**changed, "checksum": _checksum(changed)}))
        with pytest.raises(CheckpointError, match="says something impossible"):
            read_manifest(folder)


@pytest.mark.parametrize("damaged", range(3))
def test_damaged_latents_are_put_aside_and_what_comes_before_is_kept(folder, damaged):
    path = folder / "latents" / f"chunk_{damaged:06d}.safetensors"
    content, lost = path.read_bytes(), 0
    for seed in range(40):
        path.write_bytes(flip(content, seed))
        with open_run(folder, wanted()) as run:
            assert run.kept in (damaged, 5)
            kept, lost = run.kept, lost + (run.kept == damaged)
            assert all(torch.equal(run.chunk(number), chunk(number)) for number in range(kept))
            for number in range(kept, 5):
                run.add(number, chunk(number))
    assert lost > 30
    assert len(list((folder / "aside").rglob("*.safetensors"))) >= lost * (5 - damaged)


def test_decoding_says_which_chunk_is_damaged(folder):
    path = folder / "latents" / "chunk_000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    latents = load_latents(folder)
    latents.chunk(0)
    with pytest.raises(CheckpointError, match=r"chunk_000001.safetensors is damaged"):
        latents.chunk(1)


# --- what is kept -----------------------------------------------------------------------------------------


def test_another_text_from_a_chunk_on_keeps_what_comes_before(folder):
    def other(number):
        return "a cat" if number < 3 else "a dog"

    with open_run(folder, wanted(text=other)) as run:
        assert run.kept == 3
        for number in (3, 4):
            run.add(number, chunk(10 + number))
    assert read_manifest(folder).sections[0].texts == ((0, "a cat"), (3, "a dog"))
    assert len(list((folder / "aside").rglob("*.safetensors"))) == 2
    latents = load_latents(folder)
    assert (latents.chunks, latents.info.prompt) == (5, "a dog")
    with open_run(folder, wanted(text=other)) as run:
        assert run.kept == 5
    with pytest.raises(SettingsError, match="the prompt was 'a cat' and is 'a dog'"):
        open_run(folder, wanted(text=lambda _: "a dog"))


def test_a_process_that_dies_before_the_chunks_are_moved_finds_the_same_again(folder, monkeypatch):
    from sfpp_core.run import folder as module

    monkeypatch.setattr(module, "_clear", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    changed = wanted(decisions={"seed": 4}, seconds_kept=2.0)
    with pytest.raises(KeyboardInterrupt):
        open_run(folder, changed)
    monkeypatch.undo()
    with open_run(folder, wanted(decisions={"seed": 4})) as run:
        assert run.kept == 2
        assert run.manifest.shown == 21


def test_what_a_kill_left_half_written_takes_no_room_for_ever(folder):
    names = ".part.abc.cache.safetensors", "latents/.part.abc.chunk_000001.safetensors"
    parts = [folder / name for name in names]
    for part in parts:
        part.write_bytes(b"half")
    with open_run(folder, wanted()) as run:
        assert run.kept == run.chunks
    assert not any(part.exists() for part in parts)


@pytest.mark.parametrize(
    ("seconds", "chunks"), [(0, 0), (0.5, 0), (0.5625, 1), (1.25, 1), (1.3125, 2), (9, 12)]
)
def test_a_second_falls_to_the_chunk_border_before_it(seconds, chunks):
    assert chunks_before(seconds, GEOMETRY) == chunks


def test_files_are_known_by_what_they_hold(tmp_path):
    content = os.urandom(9 << 20)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b").write_bytes(bytes(byte ^ 1 for byte in content[:5000]) + content[5000:])
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    with pytest.raises(CheckpointError, match="cannot be read"):
        fingerprint(tmp_path / "c")


# --- one process at a time --------------------------------------------------------------------------------


def test_a_run_is_one_processs_own(folder):
    with open_run(folder, wanted()):
        assert is_locked(folder)
        with pytest.raises(OutputError, match=f"being worked on by process {os.getpid()}"):
            open_run(folder, wanted())
    assert not is_locked(folder)
    with open_run(folder, wanted()):
        pass


def test_the_lock_of_a_dead_process_holds_nothing(tmp_path, monkeypatch):
    from sfpp_core.run import lock

    program = "import os\nfrom pathlib import Path\nfrom sfpp_core.run.lock import RunLock\n"
    program += f"RunLock(Path({str(tmp_path)!r}))\nos.kill(os.getpid(), 9)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert json.loads((tmp_path / "lock").read_text())["process"]
    assert not is_locked(tmp_path)
    RunLock(tmp_path).release()
    monkeypatch.setattr(lock, "_lock", lambda _: None)  # a disk that knows no locks
    mine = {"process": os.getpid(), "machine": lock.socket.gethostname()}
    for began, held in ((lock.process_start(os.getpid()), True), ("another time", False)):
        (tmp_path / "lock").write_text(json.dumps({**mine, "began": began}))
        assert is_locked(tmp_path) == held
    (tmp_path / "lock").write_text(json.dumps({**mine, "process": 2**30, "began": "1"}))
    RunLock(tmp_path).release()


# --- the video --------------------------------------------------------------------------------------------


def write(path, frames, *, first=0, chunk=7):
    """Write the frames from ``first`` on as a run does."""
    pictures = torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with Writer(GrowingVideo(path, frames=first, **LOOK), width=32, height=32, waiting=8) as writer:
        for piece in pictures[first:frames].split(chunk):
            writer.write(piece)


def test_a_video_gone_on_with_is_byte_for_byte_the_whole_one(tmp_path, monkeypatch):
    monkeypatch.setattr(growing_video, "PART_FRAMES", 20)
    whole, path = tmp_path / "whole.mp4", tmp_path / "part.mp4"
    write(whole, 70)
    expected = whole.read_bytes()
    finish_video(whole)
    write(path, 33)
    kept = cut_video(path, frames=33, **LOOK)
    assert kept == 20
    assert video_info(path).frames == 33  # nothing that is right goes away
    write(path, 50, first=kept)
    content = path.read_bytes()
    path.write_bytes(content[:-1000])  # torn
    assert cut_video(path, frames=50, **LOOK) == 40
    write(path, 70, first=40)
    assert path.read_bytes() == expected
    finish_video(path)
    assert path.read_bytes() == whole.read_bytes()
    assert video_info(path).frames == 70
    assert cut_video(path, frames=70, **LOOK) == 60  # a finished one is taken apart again
    write(path, 70, first=60)
    finish_video(path)
    assert path.read_bytes() == whole.read_bytes()


def test_frames_that_are_not_right_any_more_go(tmp_path, monkeypatch):
    monkeypatch.setattr(growing_video, "PART_FRAMES", 20)
    path = tmp_path / "a.mp4"
    write(path, 70)
    assert cut_video(path, frames=45, **LOOK) == 40
    assert 40 <= video_info(path).frames <= 45
    assert cut_video(path, frames=45, **{**LOOK, "enlarge": 2}) == 0  # of another size: it cannot be joined
    assert cut_video(tmp_path / "none.mp4", frames=45, **LOOK) == 0


@pytest.mark.parametrize("place", [0, 5, 40, 700])
def test_a_damaged_video_is_cut_and_never_an_error(tmp_path, monkeypatch, place):
    monkeypatch.setattr(growing_video, "PART_FRAMES", 20)
    path = tmp_path / "a.mp4"
    write(path, 45)
    content = path.read_bytes()
    for seed in range(4):
        path.write_bytes(content[:place] + flip(content[place:], seed))
        kept = cut_video(path, frames=45, **LOOK)
        assert kept in (0, 20, 40)
        write(path, 45, first=kept)
        assert video_info(path).frames == 45


@pytest.fixture
def small_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    with disks.small_disk(tmp_path / "disk", "1m") as disk:
        yield disk


def test_a_finished_video_survives_a_full_disk_and_is_taken_apart_later(small_disk, monkeypatch):
    monkeypatch.setattr(growing_video, "PART_FRAMES", 20)
    path, filler = small_disk / "a.mp4", small_disk / "filler"
    write(path, 45)
    growing = path.read_bytes()
    finish_video(path)
    finished = path.read_bytes()
    disks.fill(filler)
    with pytest.raises(OutputError, match=r"a\.mp4.*No space left on device; free some room"):
        cut_video(path, frames=45, **LOOK)
    assert path.read_bytes() == finished
    assert sorted(entry.name for entry in small_disk.iterdir()) == ["a.mp4", "filler"]
    filler.unlink()
    assert cut_video(path, frames=45, **LOOK) == 40
    assert path.read_bytes() == growing


def test_a_finished_video_that_cannot_be_taken_apart_stays(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write(path, 9)
    finish_video(path)
    finished = path.read_bytes()

    def refuse(_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OutputError, match="Read-only file system; choose another folder"):
        cut_video(path, frames=9, **LOOK)
    with pytest.raises(OutputError, match="Read-only file system"):
        finish_video(path)
    assert path.read_bytes() == finished
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_video_of_another_encoder_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(growing_video, "PART_FRAMES", 20)
    path, other = tmp_path / "a.mp4", tmp_path / "other.mp4"
    write(path, 45)
    finish_video(path)
    command = [find_ffmpeg(), "-i", str(path), "-c:v", "libx264", "-preset", "medium", str(other)]
    subprocess.run(command, capture_output=True, check=True)
    content = other.read_bytes()
    assert cut_video(other, frames=45, **LOOK) == 0
    assert other.read_bytes() == content


def test_a_stream_that_makes_no_sense_is_no_video_and_is_not_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"of another kind")
    endless = "import os, signal; signal.alarm(20)\nwhile True: os.write(1, bytes(1 << 16))"
    monkeypatch.setattr(growing_video, "_copying", lambda _: [sys.executable, "-c", endless])
    assert cut_video(path, frames=45, **LOOK) == 0
    assert path.read_bytes() == b"of another kind"


# --- decoders that begin in the middle --------------------------------------------------------------------


def decoded_from(decoder, info, latents, first):
    """Return the frames from chunk ``first`` on of a decoder that was shown no more than it needs."""
    warm_up(decoder, latents.__getitem__, chunk=first, reach=reach_of(info), per_chunk=3)
    return [decoder.decode(latents[number]) for number in range(first, len(latents))]


def wan_file(folder, sizes=SMALL_2_1):
    write_wan(folder / "wan.safetensors", sizes)
    return folder / "wan.safetensors"


def tiny_file(folder):
    write_tiny(folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


@pytest.mark.parametrize(
    ("place", "chunks"),
    [
        (lambda _: demo.file(demo.AUTOENCODER), 9),
        (tiny_file, 9),
        (lambda _: "preview", 5),
        (wan_file, 18),
        (partial(wan_file, sizes=SMALL_2_2), 18),
    ],
)
def test_a_decoder_begins_in_the_middle_bit_for_bit(tmp_path, place, chunks):
    choice = place(tmp_path)
    decoder, info = load_decoder(choice), check_decoder(choice)
    latents = [torch.randn(1, decoder.channels, 3, 1, 2) for _ in range(chunks)]
    decoder.reset()
    whole = [decoder.decode(piece) for piece in latents]
    for first in (4, chunks - 1) if chunks < 10 else (chunks - 1,):
        made = decoded_from(decoder, info, latents, first)
        assert all(torch.equal(a, b) for a, b in zip(made, whole[first:], strict=True))
