"""How published summary scores follow from their parts: those of the tables of arXiv:2510.02283.

Whoever measures the parts, with VBench's own models, can compare a summary of them with the published ones.
All numbers are percentages, as the tables have them. Source of the weights: VBench, arXiv:2311.17982.
"""

import pytest

DYNAMIC_WEIGHT = 0.5
"""How much the dynamic degree counts against each other part of the temporal quality."""

# Text | overall consistency, CLIP | temporal | subject, background, smoothness, dynamic | frame | aesthetic,
# imaging; at 50, 75 and 100 seconds.
LONG = """
50 NOVA   24.58 20.55 28.61 86.53 92.48 95.21 99.18 31.96 34.45 39.85 29.06
50 MAGI   26.04 21.55 30.53 88.34 98.08 97.50 99.36 28.49 54.20 52.15 56.26
50 SkyR   23.73 18.94 28.53 88.78 96.06 96.43 98.67 39.15 54.13 50.44 57.82
50 CausV  25.25 20.71 29.80 89.34 98.29 97.27 98.45 37.35 61.56 57.91 65.21
50 SF     24.77 20.27 29.27 88.17 96.77 96.24 98.40 34.35 61.06 54.95 67.17
50 SF++   26.37 22.03 30.71 91.03 97.00 95.55 98.39 55.36 60.82 53.76 67.87
75 NOVA   23.37 19.19 27.54 86.32 91.78 95.57 99.14 31.24 31.53 37.34 25.73
75 MAGI   24.95 20.36 29.53 87.89 98.20 97.70 99.29 24.82 52.04 49.38 54.71
75 SkyR   22.70 17.60 27.81 88.99 96.08 96.54 98.88 39.89 51.55 47.55 55.55
75 CausV  24.76 19.99 29.53 89.14 98.32 97.28 98.50 35.82 60.96 56.87 65.06
75 SF     23.39 18.85 27.93 87.79 97.43 96.50 98.77 29.15 60.02 53.28 66.77
75 SF++   26.31 22.09 30.53 91.00 96.93 95.45 98.29 55.62 60.67 53.38 67.97
100 NOVA  22.89 18.63 27.15 86.24 91.66 95.50 99.13 31.09 31.03 36.64 25.42
100 MAGI  23.75 18.94 28.57 87.62 98.35 97.99 99.20 22.21 50.90 47.25 54.55
100 SkyR  22.05 16.84 27.25 88.80 96.05 96.52 98.86 38.75 50.48 46.33 54.62
100 CausV 24.41 19.61 29.22 89.06 98.41 97.46 98.54 34.60 61.01 57.22 64.79
100 SF    22.00 17.16 26.84 87.39 97.39 96.76 98.52 26.41 58.25 51.16 65.35
100 SF++  26.04 21.75 30.34 90.87 97.09 95.53 98.35 54.12 60.66 53.00 68.31
"""

SHORT = """
LTX   80.00 82.30 70.79
Wan   84.67 85.69 80.60
NOVA  80.12 80.39 79.05
Pyr   81.72 84.74 69.62
MAGI  79.18 82.04 67.74
SkyR  82.67 84.70 74.53
CausV 82.46 83.61 77.84
SF    83.00 83.71 80.14
SF++  83.11 83.79 80.37
"""


def temporal(*, subject, background, smoothness, dynamic):
    """Return the temporal quality of long videos: consistency of subject and background, and motion."""
    return (subject + background + smoothness + DYNAMIC_WEIGHT * dynamic) / (3 + DYNAMIC_WEIGHT)


def total(*, quality, semantic):
    """Return the total score of short videos: quality counts four times."""
    return (4 * quality + semantic) / 5


def rows(table, labels):
    return [line.split()[labels:] for line in table.strip().splitlines()]


@pytest.mark.parametrize("row", rows(LONG, 2))
def test_the_scores_of_long_videos_follow_from_their_parts(row):
    text, oc, clip, time, subject, background, smooth, dynamic, frame, aesthetic, imaging = map(float, row)
    near = 0.0151  # every printed number is rounded
    assert (oc + clip) / 2 == pytest.approx(text, abs=near)
    parts = {"subject": subject, "background": background, "smoothness": smooth, "dynamic": dynamic}
    assert temporal(**parts) == pytest.approx(time, abs=near)
    assert (aesthetic + imaging) / 2 == pytest.approx(frame, abs=near)


@pytest.mark.parametrize("row", rows(SHORT, 1))
def test_the_total_of_short_videos_follows_from_quality_and_semantics(row):
    whole, quality, semantic = map(float, row)
    assert total(quality=quality, semantic=semantic) == pytest.approx(whole, abs=0.0151)
