"""The demo's two worlds: the same scenes, told in full, or with the object's colour and speed left open.

What a caption names corrects itself at every chunk; what only the cache carries drifts. In the standard world
the caption names the object, and exposure and tint of the background are left to the cache. In the hard one
so are the object's colour, which is its identity, and its speed: a video whose object turns another colour,
slows down or stands still says nothing against its caption. Scenes and pictures are the same, seed by seed,
and so are the autoencoder and the latents of both.

The colours stay those of the standard world: a teacher of five seconds can tell a colour that is none of
them, but no slow walk through a continuum of right ones. Nothing else is harder: an occluder or a moving
texture would ask for another autoencoder and for metrics that cannot cut the object out by its chroma, and a
speed that varies within a clip leaves no first second to compare with.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sfpp_core.inspection import inspect
from training.config import ConfigError
from training.state import exported, newest, read_notes
from training.world import WORLD_VERSION, Scene, caption, short_caption


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """How scenes are told."""

    name: str
    """What settings call it."""

    version: str
    """What exported files carry; changes whenever the same seed would give another clip or caption."""

    caption: Callable[[Scene, np.random.Generator | int], str]
    """Returns one way to tell a scene; a generator is advanced."""

    prompts: tuple[str, ...]
    """Prompts of the sample sheets."""

    tells_all: bool
    """Whether captions name the object's colour and speed."""


STANDARD = World(
    name="standard",
    version=WORLD_VERSION,
    caption=caption,
    prompts=(
        "a red circle moves right slowly",
        "a blue square moves up fast",
        "a yellow triangle drifts down and left, slowly",
        "a green circle glides left fast",
        "a purple square moves up and right slowly",
        "an orange triangle moves down fast",
    ),
    tells_all=True,
)
"""Captions name shape, colour, direction and speed."""

HARD = World(
    name="hard",
    version=f"hard {WORLD_VERSION}",
    caption=short_caption,
    prompts=(
        "a circle moves right",
        "a square moves up",
        "a triangle drifts down and left",
        "a circle glides left",
        "a square moves up and right",
        "a triangle moves down",
    ),
    tells_all=False,
)
"""Captions name shape and direction."""

WORLDS = {world.name: world for world in (STANDARD, HARD)}
"""Every world by its name."""


def world_called(name: str) -> World:
    """Return the world of a setting.

    Raises:
        ConfigError: There is none of this name.
    """
    if name not in WORLDS:
        raise ConfigError(f"world is {name!r}; use one of {', '.join(WORLDS)}.")
    return WORLDS[name]


def check_world(name: str, *, is_wan: bool) -> None:
    """Refuse an unknown world, and one for videos of Wan.

    Raises:
        ConfigError: Either.
    """
    world = world_called(name)
    if is_wan and world != STANDARD:
        raise ConfigError(
            f"world is {name!r}, and video.prompts says these are videos of Wan; leave world out, or "
            "video.prompts empty."
        )


def world_of(path: str) -> str | None:
    """Return the name of the world that a run or an exported student learned; ``None``: it is not there yet.

    A run that says nothing is older than the other worlds.

    Args:
        path: ``last.pt`` of the run, or the file; empty is the embedded demo.
    """
    if file := exported(Path(path)):
        if not file.exists():
            return None
        version = inspect(file).notes.get("world", STANDARD.version)
        return next((world.name for world in WORLDS.values() if world.version == version), version)
    if newest(Path(path)) is None:
        return None
    return read_notes(Path(path)).get("recipe", {}).get("world", STANDARD.name)


def check_runs(name: str, runs: Mapping[str, str]) -> None:
    """Refuse runs of another world; those that are not there yet are left to whoever reads them.

    Args:
        name: Of the world.
        runs: As ``world_of``, by the setting that names them.

    Raises:
        ConfigError: A run has learned another world.
    """
    for setting, path in runs.items():
        found = world_of(path)
        if found not in (None, name):
            raise ConfigError(
                f"{setting} is {path or 'the embedded demo'}, which learned the {found} world, and this is "
                f"of the {name} world; name a run of the {name} world, or set world={found}."
            )
