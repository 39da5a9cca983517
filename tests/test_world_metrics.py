"""The ground-truth metrics: they pass the truth and catch each way in which a video goes wrong."""

from dataclasses import replace

import pytest
import torch

from training.world import COLOURS, DIRECTIONS, SHAPES, Wanted, caption, render, sample_scene
from training.world_metrics import clip_ok, failures, mean_seconds, measure, steady

SCENES = [sample_scene((4, clip)) for clip in range(24)]
FRAMES = 32


def wanted(scene):
    return Wanted(shape=scene.shape, colour=scene.colour, direction=scene.direction, speed=scene.speed)


def noise(like, amount):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1)) * amount


def other(names, name):
    names = tuple(names)
    return names[(names.index(name) + 1) % len(names)]


def blurred(clip, width):
    picture = torch.nn.functional.pad(clip, (width // 2,) * 4, mode="circular")
    return torch.nn.functional.avg_pool2d(picture, width, stride=1)


def with_scene(**changes):
    return lambda clip, scene: render(
        [replace(scene, **{k: f(scene) for k, f in changes.items()})], len(clip)
    )[0]


def vanished(clip, scene):
    return torch.where(torch.arange(len(clip))[:, None, None, None] < 16, clip, empty(scene))


def empty(scene):
    return render([scene], 1)[0].flatten(2).median(-1).values[:, :, None, None].expand(-1, -1, 64, 64)


BROKEN = {
    "frozen": (lambda clip, scene: clip[:1].expand_as(clip), "motion"),
    "half as fast": (lambda clip, scene: clip[torch.arange(len(clip)) // 2], "motion"),
    "backwards": (lambda clip, scene: clip.flip(0), "motion"),
    "another way": (with_scene(direction=lambda scene: other(DIRECTIONS, scene.direction)), "motion"),
    "another shape": (with_scene(shape=lambda scene: other(SHAPES, scene.shape)), "shape"),
    "another colour": (with_scene(colour=lambda scene: other(COLOURS, scene.colour)), "colour"),
    "gone half way": (vanished, "present"),
    "two objects": (lambda clip, scene: torch.where(differs(clip, scene), clip, clip.roll(32, 3)), "present"),
    "too dark": (with_scene(luma=lambda scene: 0.12), "support"),
    "too bright": (with_scene(luma=lambda scene: 0.88), "support"),
    "tinted": (with_scene(tint=lambda scene: (-0.1, 0.06)), "support"),
    "crushed": (lambda clip, scene: (clip - 0.8).clamp(0, 1), "clipped"),
    "blown": (lambda clip, scene: (clip + 0.8).clamp(0, 1), "clipped"),
    "faded": (lambda clip, scene: torch.lerp(clip, empty(scene), 0.6), "contrast"),
    "soft": (lambda clip, scene: blurred(blurred(clip, 9), 9), "sharpness"),
    "noisy": (lambda clip, scene: (clip + noise(clip, 0.08)).clamp(0, 1), "roughness"),
    "jumping": (lambda clip, scene: torch.cat([clip[:20], clip[20:].roll((16, 16), (2, 3))]), "jump"),
}


def differs(clip, scene):
    return ((clip - empty(scene)).abs().sum(1, keepdim=True) > 0.4).expand_as(clip)


def test_the_truth_passes():
    right = kept = 0
    for number, scene in enumerate(sample_scene((5, clip)) for clip in range(100)):
        text = caption(scene, number)
        seconds = measure(render([scene], 16)[0], text)
        right, kept = right + clip_ok(seconds, text), kept + steady(seconds)
    assert right >= 99 and kept >= 99


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_clip_fails(kind):
    damage, reason = BROKEN[kind]
    caught = named = 0
    for scene in SCENES[:8]:
        seconds = measure(damage(render([scene], FRAMES)[0], scene), wanted(scene))
        broken = {name for second in seconds for name in failures(second, wanted(scene))}
        caught += not clip_ok(seconds, wanted(scene))
        named += reason in broken
    assert caught == 8 and named >= 7


def test_numbers_of_the_truth_are_the_truth():
    scene = replace(SCENES[0], direction="down left", speed="fast", gradation="plain", amplitude=0.0)
    seconds = measure(render([scene], 48)[0], wanted(scene))
    assert len(seconds) == 3
    for second in seconds:
        assert second.velocity == pytest.approx((-2, 2), abs=1e-3)
        assert (second.present, second.shape, second.colour) == (1.0, scene.shape, scene.colour)
        for name in ("motion", "iou", "contrast", "sharpness"):
            assert getattr(second, name) == pytest.approx(1, abs=0.03)
        assert second.luma == pytest.approx(scene.luma, abs=1e-3)
        assert second.tint == pytest.approx(scene.tint, abs=1e-3)
        assert second.jump < 1e-3 and second.flicker < 1e-3 and second.colour_error < 0.01


def test_a_smooth_backdrop_is_not_rough():
    scene = replace(SCENES[0], gradation="vertical", amplitude=0.09)
    assert all(second.roughness < 0.002 for second in measure(render([scene], 32)[0], wanted(scene)))


def test_slow_drift_inside_the_support_is_seen_by_steady_alone():
    scene = replace(SCENES[0], luma=0.35, gradation="plain", amplitude=0.0)
    clip = render([scene], 80)[0]
    brighter = render([replace(scene, luma=0.65)], 80)[0]
    drifting = torch.lerp(clip, brighter, torch.linspace(0, 1, 80)[:, None, None, None])
    seconds = measure(drifting, wanted(scene))
    assert clip_ok(seconds, wanted(scene)) and not steady(seconds)
    assert seconds[-1].luma_drift == pytest.approx(0.24, abs=0.02)


def test_what_the_caption_does_not_say_is_not_asked_for():
    scene = SCENES[1]
    assert clip_ok(
        measure(render([scene], 32)[0].flip(0), f"a {scene.colour} thing"), f"a {scene.colour} thing"
    )


def test_a_white_video_is_measured_and_fails():
    seconds = measure(torch.ones(20, 3, 64, 64), wanted(SCENES[0]))
    assert len(seconds) == 1 and seconds[0].present == 0
    assert {"present", "clipped", "support"} <= set(failures(seconds[0], wanted(SCENES[0])))


def test_means_leave_out_what_was_not_measured():
    scene = SCENES[2]
    means = mean_seconds(measure(render([scene], 32)[0], f"a {scene.shape}"))
    assert "motion" not in means and means["present"] == 1
