"""The demo world: the same seed gives the same clip, and a caption says what the clip shows."""

import numpy as np
import pytest
import torch

from training import world
from training.world import Scene, Wanted, caption, parse_caption, render, sample_scene

SCENES = [sample_scene((3, clip)) for clip in range(200)]


def named(scene):
    return Wanted(shape=scene.shape, colour=scene.colour, direction=scene.direction, speed=scene.speed)


def test_a_seed_decides_everything():
    assert sample_scene(5) == sample_scene(5) != sample_scene(6)
    assert torch.equal(render([sample_scene(5)], 9), render([sample_scene(5)], 9))
    assert caption(SCENES[0], 7) == caption(SCENES[0], 7)


def test_a_clip_does_not_depend_on_its_neighbours_or_its_length():
    together = render(SCENES[:4], 13)
    assert torch.equal(together[2], render([SCENES[2]], 13)[0])
    assert torch.equal(together[:, :5], render(SCENES[:4], 5))


def test_clips_stay_between_black_and_white():
    clips = render(SCENES[:64], 1)
    assert clips.dtype == torch.float32 and clips.shape == (64, 1, 3, 64, 64)
    assert clips.min() > 0.02 and clips.max() <= 1


def test_scenes_stay_inside_the_documented_support():
    for scene in SCENES:
        assert world.LUMA[0] <= scene.luma <= world.LUMA[1]
        assert np.hypot(*scene.tint) <= world.TINT
        assert scene.start[0] % world.GRID == 0 and scene.start[1] % world.GRID == 0
        least, largest = world.GRADATION
        assert (
            scene.amplitude == 0 if scene.gradation == "plain" else least <= abs(scene.amplitude) <= largest
        )
    for name in ("shape", "colour", "direction", "speed", "gradation"):
        assert len({getattr(scene, name) for scene in SCENES}) == len(options(name))


def options(name):
    kinds = {"shape": world.SHAPES, "colour": world.COLOURS, "direction": world.DIRECTIONS}
    return (kinds | {"speed": world.SPEEDS, "gradation": world.GRADATIONS})[name]


@pytest.mark.parametrize("size", [64, 128, (48, 80)])
def test_the_world_is_a_torus_at_any_size(size):
    scene = sample_scene(11, size=size)
    height, width = (size, size) if isinstance(size, int) else size
    drawn = world.coverage([scene], 6, (height, width))[0]
    assert render([scene], 6, size).shape == (1, 6, 3, height, width)
    x, y = scene.velocity
    for frame in range(1, 6):
        assert torch.equal(drawn[frame], drawn[0].roll((y * frame, x * frame), (0, 1)))


def test_every_motion_returns_to_its_start():
    clip = render(SCENES[:8], 65)
    assert torch.equal(clip[:, 0], clip[:, 64])


def test_exposure_does_not_change_the_object():
    look = {"shape": "square", "colour": "blue", "direction": "up", "speed": "slow", "start": (32, 32)}
    dark, bright = (Scene(**look, luma=luma, tint=(0.0, 0.0)) for luma in (0.25, 0.75))
    clips = render([dark, bright], 1)
    assert torch.equal(clips[0, 0, :, 32, 32], clips[1, 0, :, 32, 32])
    assert clips[0, 0, :, 32, 32].tolist() == pytest.approx(world.COLOURS["blue"])
    assert clips[1, 0, :, 0, 0].tolist() == pytest.approx([0.75] * 3)


def test_shapes_have_equal_areas_and_two_pixel_edges():
    for shape in world.SHAPES:
        drawn = world.template(shape)
        assert drawn.sum() == pytest.approx(np.pi * world.RADIUS**2, rel=0.01)
    # Across the circle's rim on its axis: inside until 10, outside from 12.
    assert world.template("circle")[0, 9:14].tolist() == pytest.approx([1, 1, 0.5, 0, 0], abs=1e-5)


def test_a_tint_has_no_luma():
    offset = world.tint_to_rgb((0.03, -0.04))
    assert np.dot(offset, world.LUMA_WEIGHTS) == pytest.approx(0, abs=1e-9)


def test_captions_say_what_is_shown_in_words_of_the_vocabulary():
    spoken = set()
    for number, scene in enumerate(SCENES):
        text = caption(scene, number)
        assert parse_caption(text) == named(scene), text
        assert len(world.words(text)) <= world.CAPTION_WORDS
        spoken |= set(world.words(text))
    assert spoken == set(world.VOCABULARY) and len(world.VOCABULARY) == len(set(world.VOCABULARY))


def test_a_users_own_words_are_understood():
    wanted = parse_caption("Please: an ORANGE ball, going left and up!")
    assert wanted == Wanted(shape="circle", colour="orange", direction="up left")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red circle moves left and right", "names opposite directions; name one"),
        ("a red blue circle", "names two colours, red and blue; name one"),
    ],
)
def test_a_contradiction_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_caption(text)


def test_an_impossible_size_is_refused():
    with pytest.raises(ValueError, match="size is 60x64 pixels; each side must be a multiple of 16"):
        render(SCENES[:1], 1, (60, 64))
