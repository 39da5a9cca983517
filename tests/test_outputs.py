"""A path that cannot work is refused before anything is generated, and says why."""

import os

import pytest
import torch

from sfpp_core.errors import GeometryError, OutputError, SettingsError
from sfpp_core.outputs import automatic_enlargement, check_enlargement, check_output, forecast_bytes
from sfpp_core.video import open_writer


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing/a.mp4", r"the folder .*missing does not exist; make it first"),
        ("missing/pictures/", r"the folder .*missing does not exist"),
        ("missing/deeper/x_%03d.png", r"the folder .*missing does not exist"),
        ("folder.mp4", r"folder\.mp4 is a folder; name a file in it, e\.g\. .*folder\.mp4/video\.mp4"),
        ("file/a.mp4", r"file is a file, not a folder"),
        ("file", r"file is a file, not a folder"),
        ("a.avi", r"a\.avi'; it must be a video \(name\.mp4\), a folder"),
        ("a.png", r"a\.png names one picture; .* number it: .*a_%06d\.png"),
        ("a_%d.png", r"names one picture"),
        ("pipe.mp4", r"pipe\.mp4 is not a regular file"),
        ("/proc/a.mp4", r"the folder /proc cannot be written to \(.+\); choose another"),
    ],
)
def test_a_path_that_cannot_work_is_refused_before_anything_is_made(tmp_path, path, message):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(OutputError, match=message):
        check_output(f"{tmp_path}/{path}" if path[0] != "/" else path)


def test_an_empty_path_is_refused():
    with pytest.raises(OutputError, match="the output is ''"):
        check_output("")


def test_too_little_room_is_refused_with_both_numbers(tmp_path):
    with pytest.raises(
        OutputError, match=r"has [\d.]+ MB free and the video needs about 1000000000000\.0 MB"
    ):
        check_output(tmp_path / "a.mp4", expected_bytes=10**18)


@pytest.mark.parametrize("name", ["a.mp4", "pictures/"])
def test_the_forecast_of_room_is_generous_but_not_absurd(tmp_path, name):
    shade = torch.linspace(0.2, 0.8, 64).expand(48, 3, 64, 64) + 0.004 * torch.rand(48, 3, 64, 64)
    path = f"{tmp_path}/{name}"
    with open_writer(path, width=64, height=64, enlarge=8) as writer:
        writer.write(shade)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.*"))
    assert size < forecast_bytes(path, frames=48, width=64, height=64, enlarge=8) < 20 * size


def test_checking_leaves_nothing_behind(tmp_path):
    for name in ("a.mp4", "pictures/", "x_%04d.png"):
        check_output(f"{tmp_path}/{name}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("size", "factor"),
    [((64, 64), 8), ((832, 480), 1), ((16, 16), 32), ((128, 64), 4), ((64, 128), 4), ((9000, 16), 1)],
)
def test_small_videos_are_enlarged_by_their_longer_side(size, factor):
    assert automatic_enlargement(*size) == factor


@pytest.mark.parametrize(
    ("enlarge", "size", "error", "message"),
    [
        (0, (64, 32), SettingsError, "enlarge is 0; at 64x32 use 1 to 128."),
        (129, (64, 32), SettingsError, "enlarge is 129; at 64x32 use 1 to 128."),
        (2, (8192, 16), SettingsError, "enlarge is 2; at 8192x16 use 1 to 1."),
        (1, (8208, 16), GeometryError, "width is 8208; players take at most 8192 pixels"),
        (2, (16, 8208), GeometryError, "height is 8208; players take at most 8192 pixels"),
    ],
)
def test_a_video_no_player_takes_is_refused(enlarge, size, error, message):
    width, height = size
    with pytest.raises(error, match=message):
        check_enlargement(enlarge, width=width, height=height)


def test_the_largest_video_is_accepted():
    check_enlargement(128, width=64, height=32)
    check_enlargement(1, width=8192, height=8192)
