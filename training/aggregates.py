"""The summary scores that papers print, from the parts they are made of.

All numbers are percentages, as the tables have them. Computing the parts takes VBench's own models; this is
what makes a table of them comparable with a published one.

Source: VBench, arXiv:2311.17982, with the weights of its scripts; Self-Forcing++, arXiv:2510.02283, whose
tables these formulas reproduce.
"""

from collections.abc import Sequence

DYNAMIC_WEIGHT = 0.5
"""How much the dynamic degree counts against each other part of the quality."""


def temporal(*, subject: float, background: float, smoothness: float, dynamic: float) -> float:
    """Return the temporal quality of long videos: consistency of subject and background, and motion."""
    return (subject + background + smoothness + DYNAMIC_WEIGHT * dynamic) / (3 + DYNAMIC_WEIGHT)


def framewise(*, aesthetic: float, imaging: float) -> float:
    """Return the framewise quality of long videos."""
    return (aesthetic + imaging) / 2


def text_alignment(*, overall_consistency: float, clip: float) -> float:
    """Return how well long videos follow their text."""
    return (overall_consistency + clip) / 2


def total(*, quality: float, semantic: float) -> float:
    """Return the total score of short videos: quality counts four times."""
    return (4 * quality + semantic) / 5


def visual_stability(ratings: Sequence[float]) -> float:
    """Return the visual stability of videos whose exposure was rated from 0 to 5."""
    return 20 * sum(ratings) / len(ratings)
