"""A path that cannot work is refused before anything is generated, and says why."""

import os

import pytest
import torch

from sfpp_core.errors import OutputError
from sfpp_core.outputs import check_output, forecast_bytes
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
