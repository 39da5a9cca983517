"""Frames become a video that survives its writer, and every way to fail has its own message."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import disks
import numpy as np
import pytest
import torch
from PIL import Image

from sfpp_core.encoder import find_ffmpeg
from sfpp_core.errors import GeometryError, OutputError, SettingsError
from sfpp_core.video import check_output, open_writer, video_info

ROOT = Path(__file__).parent.parent
FRAGMENT = 4  # frames in a quarter of a second
PATCHES = [
    (1, 0, 0),
    (0, 1, 0),
    (0, 0, 1),
    (0.5, 0.5, 0.5),
    (1, 1, 1),
    (0, 0, 0),
    (1, 0.6, 0.1),
    (0.6, 0.1, 0.7),
]
WRITE_FOREVER = """
import os, sys, time, torch
from sfpp_core.video import open_writer
torch.set_num_threads(1)
with open_writer(sys.argv[1], width=64, height=64, enlarge=2) as writer:
    for chunk in range(1, 10000):
        writer.write(torch.rand(12, 3, 64, 64))
        while writer.frames_written < 12 * chunk:
            time.sleep(0.01)
        print(writer.frames_written, writer._sink._process.pid, flush=True)
        time.sleep(0.1)
"""


def noise(frames, size=64):
    return torch.rand(frames, 3, size, size, generator=torch.Generator().manual_seed(frames))


def encoder_pid(writer):
    return writer._sink._process.pid


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def frames_in(path):
    try:
        return video_info(path).frames
    except OutputError:
        return 0


def decoded(path):
    """Return all frames as a player shows them, ``(F, H, W, 3)``."""
    info = video_info(path)
    # Chroma as it is stored, not interpolated between neighbours: a smooth player would soften the edges.
    shown = [
        "-vf",
        "scale=flags=neighbor+full_chroma_inp+accurate_rnd",
        "-pix_fmt",
        "rgb24",
        "-f",
        "rawvideo",
        "-",
    ]
    command = [find_ffmpeg(), "-loglevel", "error", "-threads", "1", "-i", str(path), *shown]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(info.frames, info.height, info.width, 3)


@pytest.fixture
def child(tmp_path):
    """A process that writes 12 frames every 0.1 s and says so; its session is its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITE_FOREVER, str(tmp_path / "a.mp4")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    yield process
    process.kill()
    process.wait()


def let_run(child):
    """Let the child write for a moment; return the frames it has reported and its encoder."""
    for _ in range(random.randint(2, 6)):
        line = child.stdout.readline()
    time.sleep(random.uniform(0, 0.2))
    assert line, child.stderr.read()
    return [int(number) for number in line.split()]


def test_every_frame_written_is_in_the_video(tmp_path):
    with open_writer(tmp_path / "a.mp4", width=64, height=48, enlarge=4, fps=16) as writer:
        for _ in range(3):
            writer.write(torch.rand(9, 3, 48, 64))
    assert writer.frames_written == 27
    info = video_info(tmp_path / "a.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (27, 256, 192, 16.0)


def test_a_single_frame_is_a_video(tmp_path):
    with open_writer(tmp_path / "a.mp4", width=16, height=16) as writer:
        writer.write(noise(1, 16).half())
    assert video_info(tmp_path / "a.mp4").frames == 1


@pytest.mark.parametrize("enlarge", [1, 3, 8])
def test_colours_survive_the_round_trip(tmp_path, enlarge):
    frames = torch.tensor(PATCHES).T.reshape(1, 3, 2, 4).repeat_interleave(32, 2).repeat_interleave(16, 3)
    with open_writer(tmp_path / "a.mp4", width=64, height=64, enlarge=enlarge) as writer:
        writer.write(frames.expand(4, 3, 64, 64))
    seen = decoded(tmp_path / "a.mp4")[2].astype(float) / 255
    rows, columns = [16 * enlarge, 48 * enlarge], [(16 * x + 8) * enlarge for x in range(4)]
    np.testing.assert_allclose(seen[np.ix_(rows, columns)].reshape(8, 3), PATCHES, atol=0.015)


def test_the_file_says_that_it_is_bt709_in_limited_range(tmp_path):
    with open_writer(tmp_path / "a.mp4", width=64, height=64, enlarge=2) as writer:
        writer.write(noise(4))
    said = subprocess.run([find_ffmpeg(), "-i", tmp_path / "a.mp4"], capture_output=True, text=True).stderr
    assert re.search(r"Video: h264.*yuv420p\(tv, bt709[,)]", said)


@pytest.mark.parametrize("enlarge", [2, 3, 8])
def test_enlarged_pixels_have_sharp_edges(tmp_path, enlarge):
    grey = (noise(1)[:, :1] > 0.5).float().expand(2, 3, 64, 64) * 0.6 + 0.2
    with open_writer(tmp_path / "a.mp4", width=64, height=64, enlarge=enlarge) as writer:
        writer.write(grey)
    expected = grey[0, 0].numpy().repeat(enlarge, 0).repeat(enlarge, 1) * 255
    error = np.abs(decoded(tmp_path / "a.mp4")[0].mean(-1) - expected)
    assert np.percentile(error, 99) < 0.06 * 255  # a soft scaler blurs a sixth of all pixels and more


def test_coloured_edges_are_sharp_at_an_even_enlargement(tmp_path):
    colours = torch.tensor(PATCHES).T[
        :, torch.randint(8, (64, 64), generator=torch.Generator().manual_seed(0))
    ]
    with open_writer(tmp_path / "a.mp4", width=64, height=64, enlarge=8) as writer:
        writer.write(colours[None])
    expected = colours.permute(1, 2, 0).numpy().repeat(8, 0).repeat(8, 1) * 255
    error = np.abs(decoded(tmp_path / "a.mp4")[0] - expected)
    assert error.mean() < 3
    assert np.percentile(error, 99.9) < 0.12 * 255


def test_frames_reach_the_file_while_more_are_due(tmp_path):
    with open_writer(tmp_path / "a.mp4", width=64, height=64) as writer:
        writer.write(noise(1).expand(12, 3, 64, 64))  # still, so that no cut of a scene starts a fragment
        wait_until(lambda: frames_in(tmp_path / "a.mp4") >= 12 - FRAGMENT)


def test_a_killed_run_leaves_every_frame_it_had_handed_over(tmp_path, child):
    written, _ = let_run(child)
    child.kill()
    wait_until(lambda: frames_in(tmp_path / "a.mp4") >= written)


def test_an_encoder_killed_with_its_run_leaves_all_but_the_last_fragment(tmp_path, child):
    written, encoder = let_run(child)
    os.kill(encoder, signal.SIGKILL)
    child.kill()
    child.wait()
    # The latest 12 frames may still have been inside the encoder.
    assert frames_in(tmp_path / "a.mp4") >= written - 12 - FRAGMENT


def test_ctrl_c_finishes_the_file(tmp_path, child):
    written, _ = let_run(child)
    os.killpg(child.pid, signal.SIGINT)
    _, said = child.communicate(timeout=20)
    assert "KeyboardInterrupt" in said
    assert "the encoder" not in said
    assert frames_in(tmp_path / "a.mp4") >= written


def test_a_dead_encoder_is_reported_and_its_frames_still_play(tmp_path):
    writer = open_writer(tmp_path / "a.mp4", width=64, height=64)
    writer.write(noise(40))
    wait_until(lambda: frames_in(tmp_path / "a.mp4") >= 40 - FRAGMENT)
    os.kill(encoder_pid(writer), signal.SIGKILL)
    with pytest.raises(OutputError, match=r"a\.mp4: the encoder was killed by signal 9 after \d+ frames"):
        for _ in range(1000):
            writer.write(noise(12))
    with pytest.raises(OutputError, match="killed by signal 9"):
        writer.close()
    writer.close()
    assert frames_in(tmp_path / "a.mp4") >= 40 - FRAGMENT


@pytest.fixture
def small_disk(tmp_path):
    with disks.small_disk(tmp_path, "200k") as disk:
        yield disk


@pytest.mark.parametrize("name", ["a.mp4", "frame_%03d.png"])
def test_a_full_disk_is_reported_and_what_fitted_plays(small_disk, name):
    with (
        pytest.raises(
            OutputError, match=r"No space left.*[Ff]ree some room or write to another disk"
        ) as failure,
        open_writer(small_disk / name, width=64, height=64) as writer,
    ):
        for _ in range(50):
            writer.write(noise(12))
    assert str(small_disk) in str(failure.value)
    if name == "a.mp4":
        assert frames_in(small_disk / name) >= 40
    else:
        pictures = sorted(small_disk.iterdir())
        assert len(pictures) == writer.frames_written >= 10
        assert {Image.open(picture).getpixel((63, 63)) is not None for picture in pictures} == {True}


def test_a_disk_that_fills_up_in_the_last_fragment_is_reported_too(small_disk):
    writer = open_writer(small_disk / "a.mp4", width=64, height=64)
    disks.fill(small_disk / "other")
    writer.write(noise(3))
    with pytest.raises(OutputError, match="No space left"):
        writer.close()


def test_pictures_are_numbered_and_exact(tmp_path):
    values = torch.tensor([-1.0, 0.0, 0.49 / 255, 0.51 / 255, 127.5 / 255 + 1e-6, 254.6 / 255, 1.0, 7.0])
    with open_writer(tmp_path / "pictures/", width=8, height=8, enlarge=2) as writer:
        writer.write(values.expand(2, 3, 8, 8))
    names = sorted(picture.name for picture in (tmp_path / "pictures").iterdir())
    assert names == ["frame_000000.png", "frame_000001.png"]
    row = np.asarray(Image.open(tmp_path / "pictures" / names[1]))[15, :, 0]
    assert row.tolist() == [x for value in (0, 0, 0, 1, 128, 255, 255, 255) for x in (value, value)]


def test_a_pattern_names_the_pictures(tmp_path):
    with open_writer(tmp_path / "take 2_%03d.png", width=16, height=16) as writer:
        writer.write(noise(3, 16))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "take 2_000.png",
        "take 2_001.png",
        "take 2_002.png",
    ]
    with pytest.raises(OutputError, match=r"already holds pictures named take 2_%03d\.png"):
        check_output(tmp_path / "take 2_%03d.png")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"enlarge": 0}, SettingsError, "enlarge is 0"),
        ({"waiting": 0}, SettingsError, "waiting is 0"),
        ({"fps": 0}, SettingsError, "fps is 0; it must be above 0"),
        ({"width": 33}, GeometryError, "33x64 enlarged by 1; both sides must be even"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        open_writer(tmp_path / "a.mp4", **({"width": 64, "height": 64} | changes))


@pytest.mark.parametrize(
    "frames", [torch.rand(2, 3, 64, 32), torch.rand(3, 64, 64), torch.zeros(2, 3, 64, 64).byte()]
)
def test_frames_of_another_kind_are_refused(tmp_path, frames):
    writer = open_writer(tmp_path / "a.mp4", width=64, height=64)
    with pytest.raises(GeometryError, match=r"this writer takes \(F, 3, 64, 64\) of floats in \[0, 1\]"):
        writer.write(frames)
    writer.close()


def test_an_error_in_between_leaves_a_whole_file_and_is_not_hidden(tmp_path):
    with pytest.raises(ZeroDivisionError), open_writer(tmp_path / "a.mp4", width=64, height=64) as writer:
        writer.write(noise(30))
        raise ZeroDivisionError
    assert frames_in(tmp_path / "a.mp4") == 30


def test_an_error_in_between_is_not_hidden_by_a_dead_encoder(tmp_path, caplog):
    with pytest.raises(ZeroDivisionError), open_writer(tmp_path / "a.mp4", width=64, height=64) as writer:
        writer.write(noise(2))
        wait_until(lambda: writer.frames_written == 2)
        os.kill(encoder_pid(writer), signal.SIGKILL)
        raise ZeroDivisionError
    assert "killed by signal 9" in caplog.text


def test_closing_twice_is_harmless_and_writing_after_it_is_not(tmp_path):
    writer = open_writer(tmp_path / "a.mp4", width=64, height=64)
    writer.write(noise(2))
    writer.close()
    writer.close()
    with pytest.raises(OutputError, match=r"write\(\) after close\(\)"):
        writer.write(noise(2))
    assert frames_in(tmp_path / "a.mp4") == 2


def test_an_earlier_file_stays_until_the_first_frame(tmp_path):
    (tmp_path / "a.mp4").write_text("precious")
    with open_writer(tmp_path / "a.mp4", width=64, height=64):
        pass
    assert (tmp_path / "a.mp4").read_text() == "precious"
    with open_writer(tmp_path / "a.mp4", width=64, height=64) as writer:
        writer.write(noise(2))
    assert frames_in(tmp_path / "a.mp4") == 2


@pytest.mark.parametrize("content", [b"", b"no video at all"])
def test_a_file_that_is_no_video_says_so(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(OutputError, match=r"a\.mp4 holds no frame that plays"):
        video_info(tmp_path / "a.mp4")
    with pytest.raises(OutputError, match="is not a file"):
        video_info(tmp_path / "b.mp4")


def test_a_slow_encoder_makes_the_caller_wait_and_the_queue_stays_short(tmp_path):
    writer = open_writer(tmp_path / "a.mp4", width=64, height=64, waiting=4)
    writer.write(noise(2))
    wait_until(lambda: writer.frames_written == 2)
    os.kill(encoder_pid(writer), signal.SIGSTOP)
    caller = threading.Thread(target=writer.write, args=(noise(200),))
    caller.start()
    caller.join(0.5)
    waits, queued = caller.is_alive(), writer._queue.qsize()
    os.kill(encoder_pid(writer), signal.SIGCONT)
    caller.join()
    assert waits
    assert queued <= 4
    writer.close()
    assert frames_in(tmp_path / "a.mp4") == 202


def resident(pid):
    """Return the memory of a process, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_video(tmp_path):
    with open_writer(tmp_path / "a.mp4", width=64, height=64) as writer:
        for _ in range(50):
            writer.write(noise(12))
        pids = os.getpid(), encoder_pid(writer)
        before = [resident(pid) for pid in pids]
        for _ in range(300):
            writer.write(noise(12))
        growth = [resident(pid) - earlier for pid, earlier in zip(pids, before, strict=True)]
    assert max(growth) < 4e6


@pytest.mark.gpu
def test_frames_on_a_gpu_are_fetched_without_making_the_caller_wait(tmp_path):
    ramp = torch.arange(256, device="cuda").reshape(1, 1, 16, 16).expand(8, 3, 16, 16) / 255
    with open_writer(tmp_path / "pictures/", width=16, height=16) as writer:
        writer.write(ramp)  # the first call sets up pinned memory
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000)  # about a second of work ahead of the copy
        start = time.monotonic()
        writer.write(ramp)
        assert time.monotonic() - start < 0.3
    for picture in (tmp_path / "pictures").iterdir():
        assert np.asarray(Image.open(picture))[..., 1].flatten().tolist() == list(range(256))
