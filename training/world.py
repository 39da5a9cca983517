"""The demo world: one coloured shape moving over a soft background on a torus, with its caption.

Everything is a function of a seed, so clips are rendered when they are needed and never stored.
The caption names shape, colour, direction and speed. It does not name the background: exposure, tint and
gradation are constant within a clip and can only be carried on by what the model remembers.

Legend: B clips, F frames, H and W pixels. Positions are (x, y) in pixels, y pointing down; both wrap around.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WORLD_VERSION = "1"
"""Changes whenever the same seed would give another clip."""

SIZE = 64
"""Pixels along each side of the standard frame."""

FRAMES = 81
"""Frames in the standard clip: 21 latent frames, five seconds."""

FPS = 16
"""Frames per second."""

GRID = 8
"""Pixels between possible start positions: one latent cell."""

SHAPES = ("circle", "square", "triangle")
"""Names of the shapes, in template order."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.12),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (0.96, 0.88, 0.10),
    "green": (0.12, 0.72, 0.18),
    "cyan": (0.08, 0.84, 0.88),
    "blue": (0.12, 0.24, 0.94),
    "purple": (0.52, 0.14, 0.80),
    "pink": (1.00, 0.42, 0.76),
}
"""RGB of each object colour, in [0, 1]. The background's exposure does not change it."""

DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up left": (-1, -1),
    "up right": (1, -1),
    "down left": (-1, 1),
    "down right": (1, 1),
}
"""Sign of the motion along x and y."""

SPEEDS: dict[str, int] = {"slow": 1, "fast": 2}
"""Pixels per frame along each moving axis."""

LUMA = (0.25, 0.75)
"""Support of the background's mean luma, drawn uniformly."""

TINT = 0.05
"""Largest length of the background's (Cb, Cr) vector, drawn uniformly from the disc."""

GRADATION = (0.04, 0.09)
"""Support of a graded background's amplitude in luma: half of brightest minus darkest."""

GRADATIONS = ("plain", "vertical", "horizontal")
"""Ways in which a background may vary; the two graded ones are one cosine period around the torus."""

EDGE = 2.0
"""Pixels over which an outline fades."""

RADIUS = 11.0
"""Pixels: a circle's radius; the other shapes have about its area."""

LUMA_WEIGHTS = (0.2126, 0.7152, 0.0722)
"""Rec. 709 luma of linear-looking RGB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One clip's contents, from which every frame follows."""

    shape: str
    """One of ``SHAPES``."""

    colour: str
    """One of ``COLOURS``."""

    direction: str
    """One of ``DIRECTIONS``."""

    speed: str
    """One of ``SPEEDS``."""

    start: tuple[int, int]
    """Centre (x, y) in the first frame, in pixels."""

    luma: float
    """Mean luma of the background."""

    tint: tuple[float, float]
    """(Cb, Cr) of the background."""

    gradation: str = "plain"
    """One of ``GRADATIONS``."""

    amplitude: float = 0.0
    """Luma added where a graded background is brightest; negative turns the gradation over."""

    @property
    def velocity(self) -> tuple[int, int]:
        """Motion (x, y) in pixels per frame."""
        x, y = DIRECTIONS[self.direction]
        return x * SPEEDS[self.speed], y * SPEEDS[self.speed]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a caption asks for; ``None`` where it does not say."""

    shape: str | None = None
    """One of ``SHAPES``."""

    colour: str | None = None
    """One of ``COLOURS``."""

    direction: str | None = None
    """One of ``DIRECTIONS``."""

    speed: str | None = None
    """One of ``SPEEDS``."""


def sample_scene(
    seed: int | Sequence[int] | np.random.Generator, *, size: int | tuple[int, int] = SIZE
) -> Scene:
    """Draw one scene. The same seed gives the same scene; a generator is advanced.

    ``size`` is the frame in pixels, (H, W) if not square; it bounds the start position.
    """
    rng = np.random.default_rng(seed)
    height, width = _sides(size)
    angle, radius = rng.uniform(0, 2 * math.pi), TINT * math.sqrt(rng.uniform())
    gradation = _pick(rng, GRADATIONS)
    amplitude = rng.uniform(*GRADATION) * rng.choice((-1, 1))
    return Scene(
        shape=_pick(rng, SHAPES),
        colour=_pick(rng, tuple(COLOURS)),
        direction=_pick(rng, tuple(DIRECTIONS)),
        speed=_pick(rng, tuple(SPEEDS)),
        start=(int(rng.integers(width // GRID)) * GRID, int(rng.integers(height // GRID)) * GRID),
        luma=float(rng.uniform(*LUMA)),
        tint=(radius * math.cos(angle), radius * math.sin(angle)),
        gradation=gradation,
        amplitude=0.0 if gradation == "plain" else float(amplitude),
    )


def render(
    scenes: Sequence[Scene],
    frames: int = FRAMES,
    size: int | tuple[int, int] = SIZE,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the clips ``(B, F, 3, H, W)`` in [0, 1], float32. ``size`` is in pixels, a multiple of 16."""
    sides = _sides(size)
    behind = _backgrounds(scenes, sides).to(device)[:, None]
    colours = torch.tensor([COLOURS[scene.colour] for scene in scenes], device=device)[:, None, :, None, None]
    # Drawn one channel after the other through broadcasting: the mask is made once and shared by all three.
    return torch.lerp(behind, colours, coverage(scenes, frames, sides).to(device)[:, :, None])


def coverage(scenes: Sequence[Scene], frames: int, sides: tuple[int, int]) -> Tensor:
    """Return the share of each pixel that the shape covers, ``(B, F, H, W)`` in [0, 1]."""
    height, width = sides
    start = torch.tensor([scene.start for scene in scenes])[:, None]
    centre = (
        start + torch.arange(frames)[:, None] * torch.tensor([scene.velocity for scene in scenes])[:, None]
    )
    columns = (torch.arange(width) - centre[..., :1]) % width
    rows = (torch.arange(height) - centre[..., 1:]) % height
    masks = torch.stack([template(shape, sides) for shape in SHAPES]).flatten()
    shape = torch.tensor([SHAPES.index(scene.shape) for scene in scenes])[:, None, None]
    return masks[((shape * height + rows) * width)[..., None] + columns[:, :, None]]


def template(shape: str, sides: tuple[int, int] = (SIZE, SIZE)) -> Tensor:
    """Return the coverage ``(H, W)`` of a shape centred on pixel (0, 0) of the torus."""
    height, width = sides
    y = ((torch.arange(height) + height // 2) % height - height // 2).float()[:, None]
    x = ((torch.arange(width) + width // 2) % width - width // 2).float()[None]
    return (0.5 - _distance(shape, x, y) / EDGE).clamp(0, 1)


def _distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Return the signed distance in pixels from (x, y) to the outline, negative inside."""
    if shape == "circle":
        return (x.square() + y.square()).sqrt() - RADIUS
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - RADIUS * math.sqrt(math.pi) / 2
    # A triangle pointing up: its three sides are the lines at the inscribed circle's radius.
    inner = RADIUS * math.sqrt(math.pi / (3 * math.sqrt(3)))
    slant = (math.sqrt(3) * x.abs() - y) / 2
    return torch.maximum(slant, y) - inner


def _backgrounds(scenes: Sequence[Scene], sides: tuple[int, int]) -> Tensor:
    """Return the pictures behind the shapes, ``(B, 3, H, W)``."""
    waves = {
        "plain": torch.zeros(1, 1),
        "vertical": torch.cos(torch.arange(sides[0]) * (2 * math.pi / sides[0]))[:, None],
        "horizontal": torch.cos(torch.arange(sides[1]) * (2 * math.pi / sides[1]))[None],
    }
    luma = torch.stack([s.luma + s.amplitude * waves[s.gradation].expand(sides) for s in scenes])
    return luma[:, None] + torch.tensor([tint_to_rgb(s.tint) for s in scenes])[:, :, None, None]


def tint_to_rgb(tint: tuple[float, float]) -> tuple[float, float, float]:
    """Return the RGB offset of a (Cb, Cr) tint; its luma is zero."""
    cb, cr = tint
    red, blue = 2 * (1 - LUMA_WEIGHTS[0]) * cr, 2 * (1 - LUMA_WEIGHTS[2]) * cb
    return red, -(LUMA_WEIGHTS[0] * red + LUMA_WEIGHTS[2] * blue) / LUMA_WEIGHTS[1], blue


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 32 or width < 32 or height % 16 or width % 16:
        raise ValueError(f"size is {height}x{width} pixels; each side must be a multiple of 16, at least 32.")
    return height, width


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


# --- captions -------------------------------------------------------------------------------------------

_SHAPE_WORDS = {"circle": ("circle", "disc", "ball"), "square": ("square", "box"), "triangle": ("triangle",)}
_COLOUR_WORDS = {name: (name,) for name in COLOURS} | {"purple": ("purple", "violet")}
_SPEED_WORDS = {"slow": ("slowly", "slow", "gently"), "fast": ("fast", "quickly", "rapidly")}
_AXIS_WORDS = {
    "left": ("left", "leftward"),
    "right": ("right", "rightward"),
    "up": ("up", "upward"),
    "down": ("down", "downward"),
}
_VERBS = {
    "moves": "moving",
    "drifts": "drifting",
    "glides": "gliding",
    "travels": "travelling",
}
_FILLERS = ("a", "an", "the", "one", "is", "and", "to", "diagonally", "towards")

_NAMED = (_SHAPE_WORDS, _COLOUR_WORDS, _AXIS_WORDS, _SPEED_WORDS)

VOCABULARY: tuple[str, ...] = (
    *(word for names in _NAMED for group in names.values() for word in group),
    *_VERBS,
    *_VERBS.values(),
    *_FILLERS,
)
"""Every word a caption may contain, in a fixed order."""

WORD_GROUPS: dict[str, tuple[str, ...]] = {
    "shapes": tuple(word for group in _SHAPE_WORDS.values() for word in group),
    "colours": tuple(word for group in _COLOUR_WORDS.values() for word in group),
    "directions": tuple(word for group in _AXIS_WORDS.values() for word in group),
    "speeds": tuple(word for group in _SPEED_WORDS.values() for word in group),
}
"""The words that decide what is shown, by heading."""

CAPTION_WORDS = 16
"""Words that a caption never exceeds."""


def caption(scene: Scene, rng: np.random.Generator | int) -> str:
    """Return one way to say what the scene shows, e.g. ``a blue box drifting down and left, fast``."""
    rng = np.random.default_rng(rng)
    colour, shape = _pick(rng, _COLOUR_WORDS[scene.colour]), _pick(rng, _SHAPE_WORDS[scene.shape])
    article = _pick(rng, ("a", "a", "the", "one"))
    subject = f"{'an' if article == 'a' and colour == 'orange' else article} {colour} {shape}"
    verb = _pick(rng, tuple(_VERBS))
    verb = _pick(rng, (verb, verb, _VERBS[verb], f"is {_VERBS[verb]}"))
    where, adverb = _where(scene.direction, rng), _pick(rng, _SPEED_WORDS[scene.speed])
    return _pick(
        rng,
        (
            f"{subject} {verb} {where} {adverb}",
            f"{subject} {verb} {where}, {adverb}",
            f"{subject} {verb} {adverb} {where}",
            f"{subject} {verb} {adverb} {where}",
        ),
    )


def short_caption(scene: Scene, rng: np.random.Generator | int) -> str:
    """Return one way to say shape and direction alone, e.g. ``a box drifting down and left``."""
    rng = np.random.default_rng(rng)
    article, shape = _pick(rng, ("a", "a", "the", "one")), _pick(rng, _SHAPE_WORDS[scene.shape])
    verb = _pick(rng, tuple(_VERBS))
    verb = _pick(rng, (verb, verb, _VERBS[verb], f"is {_VERBS[verb]}"))
    return f"{article} {shape} {verb} {_where(scene.direction, rng)}"


def _where(direction: str, rng: np.random.Generator) -> str:
    """Return a phrase for one of the eight directions."""
    axes = direction.split()
    if len(axes) == 1:
        plain = _pick(rng, _AXIS_WORDS[direction])
        lead = ("", "", "to the ", "towards the ") if direction in ("left", "right") else ("",)
        return plain if plain != direction else _pick(rng, lead) + plain
    if rng.uniform() < 0.3:
        axes.reverse()
    first, second = (_pick(rng, (axis, axis, _AXIS_WORDS[axis][1])) for axis in axes)
    return _pick(rng, ("", "", "diagonally ")) + first + _pick(rng, (" ", " and ")) + second


def words(text: str) -> list[str]:
    """Split a caption into its lower-case words; punctuation is dropped."""
    return re.findall(r"[a-z]+", text.lower())


def parse_caption(text: str) -> Wanted:
    """Return what a caption asks for. Words outside ``VOCABULARY`` are passed over.

    Raises:
        ValueError: The caption asks for two things at once, e.g. both left and right.
    """
    said = words(text)
    axes = {axis for axis, group in _AXIS_WORDS.items() if set(group) & set(said)}
    if {"left", "right"} <= axes or {"up", "down"} <= axes:
        raise ValueError(f"caption {text!r} names opposite directions; name one.")
    direction = " ".join(axis for axis in ("up", "down", "left", "right") if axis in axes)
    return Wanted(
        shape=_only(said, _SHAPE_WORDS, "shapes", text),
        colour=_only(said, _COLOUR_WORDS, "colours", text),
        direction=direction or None,
        speed=_only(said, _SPEED_WORDS, "speeds", text),
    )


def _only(said: list[str], names: dict[str, tuple[str, ...]], kind: str, text: str) -> str | None:
    found = [name for name, group in names.items() if set(group) & set(said)]
    if len(found) > 1:
        raise ValueError(f"caption {text!r} names two {kind}, {found[0]} and {found[1]}; name one.")
    return found[0] if found else None
