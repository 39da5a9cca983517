"""The plots of a reproduction, by matplotlib, and its contact sheets."""

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.config import ConfigError
from training.reproduction.stages import Stages
from training.reproduction.summary import (
    OVER_TIME,
    SECONDS,
    Spread,
    Student,
    numbers_of,
    over_time,
    spread_of,
)
from training.reproduction.table import MAIN, Groups

_WIDTH, _HEIGHT = 6.0, 4.0


def check_plots() -> None:
    """Refuse to begin where the plots cannot be drawn at the end.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "the plots need matplotlib, which is not installed: pip install matplotlib, or set plots=false."
        )


def draw(out: Path, groups: Groups, horizons: Sequence[int], world: str) -> None:
    """Write ``drift.png``, ``right.png`` and ``range.png`` of all methods that are no ablations.

    Of a world whose captions leave colour and speed open also ``open.png``.
    """
    methods = [method for method in MAIN if method in groups]
    methods += [method for method, group in groups.items() if method not in MAIN and not group[0].ablates]
    shown = {method: groups[method] for method in methods}
    if not shown:
        return
    told = numbers_of(world)
    _draw_drift(out / "drift.png", shown, [name for name in OVER_TIME if name in told])
    _draw_horizons(out / "right.png", shown, horizons, ("right", "right at the end"))
    _draw_horizons(out / "range.png", shown, horizons, ("out of range", "crushed or blown"))
    if "other colour" in told:
        _draw_horizons(out / "open.png", shown, horizons, ("other colour", "frozen"))


def _draw_drift(path: Path, shown: Groups, names: Sequence[str]) -> None:
    """Draw numbers over time."""
    figure, axes = _figure(len(names))
    for colour, (method, group) in enumerate(shown.items()):
        for axis, name in zip(axes, names, strict=True):
            spreads = over_time(group, name)
            seconds = range(1, len(spreads) + 1)
            means, widths = [s.mean for s in spreads], [_width(s) for s in spreads]
            low = [mean - width for mean, width in zip(means, widths, strict=True)]
            high = [mean + width for mean, width in zip(means, widths, strict=True)]
            axis.plot(seconds, means, color=f"C{colour}", label=_label(method, group))
            axis.fill_between(seconds, low, high, color=f"C{colour}", alpha=0.2, linewidth=0)
            # Limits of its own: an axis with nothing to draw has none.
            width = (0.95, 1.05 * len(spreads))
            axis.set(xlabel="second of the video", ylabel=name, xscale="log", xlim=width)
    _save(figure, axes, path)


def _draw_horizons(path: Path, shown: Groups, horizons: Sequence[int], names: Sequence[str]) -> None:
    """Draw numbers against the horizon."""
    figure, axes = _figure(len(names))
    for axis, name in zip(axes, names, strict=True):
        for colour, (method, group) in enumerate(shown.items()):
            spreads = [spread_of(name, [student.at[h][name] for student in group]) for h in horizons]
            means, widths = [s.mean for s in spreads], [_width(s) for s in spreads]
            places = [h * (1 + 0.02 * colour) for h in horizons]  # beside each other, not on top
            axis.errorbar(
                places, means, widths, color=f"C{colour}", marker="o", capsize=3, label=_label(method, group)
            )
        axis.set(xlabel=f"length, in multiples of {SECONDS} s", ylabel=name, xscale="log", ylim=(-0.02, 1.02))
        axis.set_xlim(0.9 * min(horizons), 1.25 * max(horizons))
        axis.set_xticks(list(horizons), [f"{h}x" for h in horizons], minor=False)
    _save(figure, axes, path)


def _width(spread: Spread) -> float:
    """Return half the width of a band: the deviation between seeds, or for one seed the error over clips."""
    return spread.error if spread.deviation is None else spread.deviation


def _label(method: str, group: Sequence[Student]) -> str:
    """Return what the legend calls a method, with what its band is."""
    if len(group) > 1:
        return f"{method} (± deviation of {len(group)} seeds)"
    return f"{method} (± error over {len(group[0].seconds)} clips)"


def _figure(columns: int) -> tuple[Any, Any]:
    """Return an empty figure of so many plots side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def _save(figure: Any, axes: Any, path: Path) -> None:
    """Write a figure with one legend."""
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def gather_sheets(stages: Stages) -> None:
    """Copy the contact sheet of one student of every method to ``sheets``: that of its first seed."""
    folder, seen = stages.out / "sheets", set()
    folder.mkdir(exist_ok=True)
    for stage in stages.measurings():
        sheet = stages.result(stage.name).with_name("sheet.png")
        if stage.method not in seen and stages.is_complete(stage):
            seen.add(stage.method)
            shutil.copyfile(sheet, folder / f"{stage.inputs['student']}.png")
