"""The drift report as a picture: one panel per measure, faults shaded where they were found."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import drift_faults as limits
from .drift_faults import Fault, steadiness
from .errors import OutputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .drift_report import DriftReport

REMEDY = "the plot needs matplotlib, which is not installed; run `pip install matplotlib`."
"""Said where it is missing."""

ENDINGS = (".png", ".svg", ".pdf")
"""Kinds of file a plot can be."""

PANELS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("mean luma", ("luma",), ("darkening", "over-exposure")),
    ("clipped share", ("crushed", "blown"), ("darkening", "over-exposure")),
    ("contrast", ("contrast",), ("contrast",)),
    ("saturation", ("saturation",), ("saturation",)),
    ("tint (Cb, Cr)", ("blue", "red"), ("tint",)),
    ("sharpness", ("sharpness",), ("sharpness",)),
    ("motion (shorter sides per second)", ("motion",), ("freeze",)),
    ("flicker", ("flicker",), ("flicker",)),
    ("seams (change at borders / inside)", ("seam",), ("seams",)),
    ("repetition", ("repetition",), ("repetition",)),
)
"""Panels: title, columns of the table, faults shaded in it."""

_BANDS = {"mean luma": limits.LUMA_STEP, "saturation": limits.SATURATION_STEP}
_LINES = {
    "flicker": limits.FLASH,
    "repetition": limits.REPEATED,
    "seams (change at borders / inside)": limits.SEAM,
}
_LEAST_SPAN = {
    "mean luma": 0.2,
    "contrast": 0.05,
    "saturation": 0.2,
    "tint (Cb, Cr)": 0.08,
    "clipped share": 0.12,
}
_FROM_ZERO = ("clipped share", "motion (shorter sides per second)", "flicker", "repetition")
_FACTORS = {"contrast": limits.RATIO, "sharpness": limits.RATIO}
_COLOURS = ("#0072b2", "#d55e00")  # told apart by everybody
_FAULT_COLOUR = "#cc3311"


def missing() -> str:
    """Return what to say where matplotlib is missing, else nothing."""
    try:
        import matplotlib.figure  # noqa: F401 - asked for, not used
    except ImportError:
        return REMEDY
    return ""


def check_plot(path: Path) -> None:
    """Refuse a plot that cannot be made.

    Raises:
        OutputError: matplotlib is missing, or the ending names no picture.
    """
    if path.suffix.lower() not in ENDINGS:
        raise OutputError(f"the plot is {path}; its name must end in one of {', '.join(ENDINGS)}.")
    if why := missing():
        raise OutputError(why)


def save_plot(report: "DriftReport", path: Path) -> None:
    """Write the plot; the ending of ``path`` says of which kind."""
    figure_of(report).savefig(path)


def plot_picture(report: "DriftReport") -> Tensor:
    """Return the plot as one picture ``(1, H, W, 3)`` in [0, 1].

    Raises:
        OutputError: matplotlib is missing.
    """
    if why := missing():
        raise OutputError(why)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure_of(report))
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[None, ..., :3].copy()).float() / 255


def figure_of(report: "DriftReport") -> "Figure":
    """Return the plot. No window is opened and no state of matplotlib is changed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 11), dpi=100, layout="constrained")
    grid = figure.subplots(5, 2, sharex=True).flatten()
    for axes, (title, columns, faults) in zip(grid, PANELS, strict=True):
        _draw(axes, report, title, columns)
        _shade(axes, [fault for fault in report.findings if fault.name in faults])
    for axes in grid[-2:]:
        axes.set_xlabel("second")
    said = [f"{fault.name} {fault.score:.1f}" for fault in report.findings[:6]] or ["no fault"]
    length = f"{report.frames / report.fps:.1f} s at {report.fps:g} frames per second"
    figure.suptitle(f"{length}: {', '.join(said)}", fontsize=13, x=0.01, ha="left")
    return figure


def _draw(axes: "Axes", report: "DriftReport", title: str, columns: tuple[str, ...]) -> None:
    """Draw one panel, with where its threshold lies."""
    seconds = report.seconds
    style: dict[str, Any] = {"linewidth": 1.5, "marker": "o" if len(seconds) <= 60 else None, "markersize": 3}
    for column, colour in zip(columns, _COLOURS, strict=False):
        values = [getattr(second, column) for second in seconds]
        shown = [float("nan") if value is None else value for value in values]
        axes.plot([second.second for second in seconds], shown, color=colour, label=column, **style)
    if seconds and (title in _BANDS or title in _FACTORS):
        low, high = _band(title, [getattr(second, columns[0]) for second in seconds])
        axes.axhspan(low, high, color="#009e73", alpha=0.12, linewidth=0)
    if title in _LINES:
        axes.axhline(_LINES[title], color="#666666", linewidth=0.8, linestyle="--")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(columns) > 1:
        axes.legend(loc="upper left", fontsize=8, frameon=False)
    _widen(axes, _LEAST_SPAN.get(title, 0.0))
    if title in _FROM_ZERO:
        axes.set_ylim(bottom=0, top=1 if title == "repetition" else None)
    axes.locator_params(axis="x", integer=True)


def _band(title: str, values: list[float]) -> tuple[float, float]:
    """Return between what a series is steady."""
    if title in _BANDS:
        start, scale = steadiness(values, _BANDS[title])
        return start - scale, start + scale
    start, scale = steadiness([math.log(max(value, 1e-3)) for value in values], math.log(_FACTORS[title]))
    return math.exp(start - scale), math.exp(start + scale)


def _widen(axes: "Axes", span: float) -> None:
    """Show at least ``span``, so that a steady line looks steady."""
    low, high = axes.get_ylim()
    if high - low < span:
        middle = (low + high) / 2
        axes.set_ylim(middle - span / 2, middle + span / 2)


def _shade(axes: "Axes", faults: list[Fault]) -> None:
    """Mark where faults were found."""
    for fault in faults:
        axes.axvspan(fault.first - 0.5, fault.last + 0.5, color=_FAULT_COLOUR, alpha=0.1, linewidth=0)
        axes.set_title(f"{fault.name} {fault.score:.1f}", loc="right", fontsize=10, color=_FAULT_COLOUR)
