"""Pictures and clips to start from: turned, cut and paced as said; damaged ones are refused."""

import logging
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from sfpp_core.encoder import find_ffmpeg
from sfpp_core.errors import GeometryError, PictureError
from sfpp_core.pictures import is_picture, read_clip, read_picture
from sfpp_core.video import open_writer

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def stripes(*colours, width=30, height=40):
    """Return a picture of equally wide vertical stripes."""
    pixels = np.zeros((height, width * len(colours), 3), np.uint8)
    for index, colour in enumerate(colours):
        pixels[:, index * width : (index + 1) * width] = colour
    return Image.fromarray(pixels)


def colour(frames, y, x):
    return tuple((frames[-1, :, y, x] * 255).round().int().tolist())


def test_a_wide_picture_loses_its_sides_and_a_tall_one_its_ends(tmp_path):
    wide = stripes(RED, GREEN, BLUE)
    wide.save(tmp_path / "wide.png")
    wide.rotate(90, expand=True).save(tmp_path / "tall.png")
    for name in ("wide.png", "tall.png"):
        frame = read_picture(tmp_path / name, width=16, height=16)
        assert frame.shape == (1, 3, 16, 16) and frame.dtype == torch.float32
        assert colour(frame, 8, 8) == GREEN
    assert colour(read_picture(tmp_path / "wide.png", width=16, height=16), 8, 0)[0] > 100
    whole = read_picture(tmp_path / "wide.png", width=90, height=40)
    assert colour(whole, 20, 0) == RED and colour(whole, 20, 89) == BLUE


def test_a_picture_is_turned_as_its_camera_noted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter to the right: what was left comes to the top
    stripes(RED, BLUE).save(tmp_path / "turned.png", exif=exif)
    frame = read_picture(tmp_path / "turned.png", width=40, height=60)
    assert colour(frame, 5, 20) == RED and colour(frame, 55, 20) == BLUE


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 128)), (127, 127, 127)),
        (Image.new("L", (8, 8), 77), (77, 77, 77)),
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (Image.new("P", (8, 8), 0), (0, 0, 0)),
        (Image.fromarray(np.full((8, 8), 0x8000, np.uint16)), (128, 128, 128)),
    ],
    ids=["clear", "half clear", "grey", "black and white", "palette", "16 bits"],
)
def test_every_kind_of_picture_becomes_rgb(tmp_path, picture, expected):
    picture.save(tmp_path / "picture.png")
    assert colour(read_picture(tmp_path / "picture.png", width=8, height=8), 4, 4) == expected


def test_damaged_missing_and_odd_pictures_are_refused(tmp_path, monkeypatch):
    stripes(RED, GREEN).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:100])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("this is no picture at all")
    for name, message in (
        ("cut.png", "is damaged"),
        ("empty.png", "is empty"),
        ("text.png", "is not a picture that can be read"),
        ("missing.png", "does not exist"),
        ("", "is not a file"),
    ):
        with pytest.raises(PictureError, match=message):
            read_picture(tmp_path / name, width=8, height=8)
    with pytest.raises(GeometryError, match="width is 0; use 1 to"):
        read_picture(tmp_path / "whole.png", width=0, height=8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(PictureError, match="is not a picture that can be read"):
        read_picture(tmp_path / "whole.png", width=8, height=8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Return a video of two seconds, 32 frames that grow brighter, its sides blue."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    frames = torch.linspace(0, 1, 32)[:, None, None, None].expand(-1, 3, 32, 64).clone()
    frames[..., :16] = frames[..., 48:] = torch.tensor([0, 0, 1.0])[:, None, None]
    with open_writer(path, width=64, height=32) as writer:
        writer.write(frames)
    return path


def brightness(frames):
    return frames[:, :, 8:24, 8:24].mean((1, 2, 3))


def test_the_last_or_the_first_frames_of_a_clip(clip):
    last = read_clip(clip, width=32, height=32, frames=9)
    first = read_clip(clip, width=32, height=32, frames=9, end="first")
    assert last.shape == first.shape == (9, 3, 32, 32)
    steps = torch.linspace(0, 1, 32)
    assert torch.allclose(brightness(last), steps[-9:], atol=0.02)
    assert torch.allclose(brightness(first), steps[:9], atol=0.02)
    assert last[:, :, 16, 0].std(0).max() > 0.05  # the blue sides are cut away
    whole = read_clip(clip, width=64, height=32, frames=1)
    assert colour(whole, 16, 2)[2] > 200 > 60 > colour(whole, 16, 2)[0]


def test_another_pace_is_resampled(clip):
    slow = read_clip(clip, width=32, height=32, frames=16, fps=8)
    assert torch.allclose(brightness(slow), torch.linspace(0, 1, 32)[::2], atol=0.05)
    with pytest.raises(PictureError, match="has 16 frames at 8 per second and 17 are needed"):
        read_clip(clip, width=32, height=32, frames=17, fps=8)


def test_a_turned_phone_clip_stands_upright(tmp_path, clip):
    turned = tmp_path / "turned.mp4"
    command = [find_ffmpeg(), "-v", "error", "-display_rotation", "90", "-i", clip, "-c", "copy", turned]
    subprocess.run(command, check=True)
    frame = read_clip(turned, width=32, height=64, frames=1)
    assert colour(frame, 4, 16)[2] > 200 and min(colour(frame, 32, 16)) > 200


def test_damaged_clips_and_other_files_are_refused(tmp_path, clip, caplog):
    content = clip.read_bytes()
    (tmp_path / "head.mp4").write_bytes(content[:600])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://localhost:9/secret.ts\n#EXT-X-ENDLIST\n")
    for name in ("head.mp4", "text.mp4", "list.m3u8"):
        with pytest.raises(PictureError, match="holds no frame that plays"):
            read_clip(tmp_path / name, width=32, height=32, frames=1)
    with pytest.raises(PictureError, match="does not exist"):
        read_clip(tmp_path / "missing.mp4", width=32, height=32, frames=1)
    with pytest.raises(GeometryError, match="frames is 0"):
        read_clip(clip, width=32, height=32, frames=0)
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        assert len(read_clip(tmp_path / "cut.mp4", width=32, height=32, frames=2, end="first")) == 2


def test_pictures_are_told_from_clips(tmp_path, clip):
    stripes(RED).save(tmp_path / "one.gif")
    stripes(RED).save(tmp_path / "two.gif", save_all=True, append_images=[stripes(BLUE)])
    assert is_picture(tmp_path / "one.gif")
    assert not is_picture(tmp_path / "two.gif")
    assert not is_picture(clip)
    assert not is_picture(tmp_path / "missing.png")
