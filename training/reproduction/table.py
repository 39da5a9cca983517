"""The tables of a reproduction, readable on their own, and the same numbers as JSON."""

import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sfpp_core.compute import device_named
from training.journal import read_pace
from training.measuring import write_json
from training.precision import computed_in
from training.reproduction.layout import LONGER, ODE, PLAIN, PLUS, REINFORCED, Stage
from training.reproduction.runner import wall_seconds
from training.reproduction.settings import MATCHED
from training.reproduction.stages import Stages
from training.reproduction.summary import (
    DIGITS,
    EXPLAINED,
    LEFT_OPEN,
    Student,
    difference,
    numbers_of,
    read_student,
    spread_of,
)
from training.state import FILE, newest, read_notes
from training.world import FPS, FRAMES
from training.worlds import world_called

MAIN = (ODE, PLAIN, LONGER, PLUS, REINFORCED)
"""Methods of the first table, in its order."""

COMPARED = ("right", "exposure drift", "tint drift", "out of range", *LEFT_OPEN)
"""Numbers whose differences are told, as far as the world has them."""

ABLATED = ("right", "exposure drift", "tint drift", "out of range", "motion", "sharpness", *LEFT_OPEN)
"""Numbers of the table of ablations, as far as the world has them."""

RUNS = (
    "An update of distribution matching is one of the critic; those of the student are told beside it. "
    "Minutes of training are the loop's own; those of a stage's processes also count starting, loading and "
    "the sample sheets, over all starts."
)
"""What is told of the table of stages."""

Groups = dict[str, list[Student]]
"""Students by method, those of all seeds together."""


def read_students(stages: Stages) -> Groups:
    """Return all students whose measurements are done, in the order of the stages."""
    groups: Groups = {}
    for stage in stages.measurings():
        if stages.is_complete(stage):
            student = read_student(
                stages.result(stage.name),
                stages.settings.horizons,
                method=stage.method,
                seed=stage.seed,
                ablates=stage.ablates,
            )
            groups.setdefault(stage.method, []).append(student)
    return groups


def write(stages: Stages, groups: Groups) -> None:
    """Write ``table.md`` and ``results.json``."""
    others = [method for method in groups if method not in MAIN and not groups[method][0].ablates]
    compared = [method for method in (*MAIN, *others) if method in groups]
    parts = ["# Reproduction", *_head(stages, groups), "## 1. Longer rollouts, or more training?"]
    parts += [_by_horizon(stages, groups, compared)]
    if PLUS in groups and len(compared) > 1:
        parts += [_differences(stages, groups, [method for method in compared if method != PLUS])]
    if ablations := [method for method in groups if groups[method][0].ablates]:
        parts += ["## 2. What matters?", _ablations(stages, groups, ablations)]
    parts += [
        "## What the columns say",
        "\n".join(f"- *{name}*: {EXPLAINED[name]}." for name in _told(stages)),
    ]
    parts += ["## What was run", RUNS, _runs(stages)]
    (stages.out / "table.md").write_text("\n\n".join(parts) + "\n")
    write_json(stages.out / "results.json", _results(stages, groups), indent=1)


def _head(stages: Stages, groups: Groups) -> list[str]:
    """Return the paragraphs that say where the numbers come from."""
    settings, place = stages.settings, where()
    seeds = ", ".join(map(str, settings.seeds)) or "none"
    left = sum(not stages.is_complete(stage) for stage in stages.measurings())
    clips = {len(student.seconds) for group in groups.values() for student in group}
    lines = [
        f"{place['date']}, commit {place['commit']}; {place['hardware']}, {settings.jobs} stages at once, "
        f"{settings.threads} thread{'s' if settings.threads > 1 else ''} each.",
        f"Seeds of distribution matching: {seeds}; teacher, trajectories and ODE init are shared by all. "
        f"Every student made the same {', '.join(map(str, sorted(clips)))} videos, each of an unseen "
        f"caption and a noise of its own, computed in {_computed(settings.dtype)}. 1x is the teacher's "
        f"{FRAMES} frames ({FRAMES / FPS:.1f} s); the whole seconds of it are measured.",
        "*mean ± standard deviation between seeds (standard error over clips)*. The error is that of one "
        "seed's clips: binomial for shares. A row without ± has one seed.",
    ]
    if not world_called(settings.world).tells_all:
        lines.append(
            "**The hard world**: captions name shape and direction alone. The object's colour and its speed "
            "are left to what the student remembers; *right* asks that they stay those of the first second."
        )
    if settings.equal_time and settings.time_ratio:
        lines.append(
            f"*{LONGER}* makes {settings.time_ratio:g} times the updates: so much longer was said to be the "
            "time of an update of the other."
        )
    elif settings.equal_time:
        lines.append(f"*{LONGER}* makes the updates that fit into the other's minutes of training.")
    if left:
        lines.append(f"**Not finished**: {left} of {len(stages.measurings())} students are not measured yet.")
    if settings.smoke:
        lines.append("**A smoke run**: tiny models after a few updates. The numbers mean nothing.")
    return lines


def _by_horizon(stages: Stages, groups: Groups, methods: Sequence[str]) -> str:
    """Return the table of all numbers, horizon by horizon."""
    rows = []
    for horizon in stages.settings.horizons:
        for method in methods:
            numbers = [_cell(groups[method], name, horizon) for name in _told(stages)]
            rows.append([f"{horizon}x", method, *numbers])
    return _markdown(["horizon", "method", *_told(stages)], rows)


def _told(stages: Stages, names: Sequence[str] = ()) -> list[str]:
    """Return what the world of a reproduction has, of ``names`` or of all numbers."""
    told = numbers_of(stages.settings.world)
    return [name for name in names or told if name in told]


def _differences(stages: Stages, groups: Groups, methods: Sequence[str]) -> str:
    """Return the table of what Self-Forcing++ has more, or less, than each of the others."""
    rows = []
    for method in methods:
        for name in _told(stages, COMPARED):
            found = [difference(name, groups[PLUS], groups[method], h) for h in stages.settings.horizons]
            told = ["" if each is None else each.told(3) for each in found]
            rows.append([f"{PLUS} less {method}" if name == COMPARED[0] else "", name, *told])
    head = ["difference", "number", *(f"{horizon}x" for horizon in stages.settings.horizons)]
    return "Differences, clip by clip of the same caption, noise and seed:\n\n" + _markdown(head, rows)


def _ablations(stages: Stages, groups: Groups, methods: Sequence[str]) -> str:
    """Return the table of ablations, each below what it changes, of the same seeds."""
    seeds, rows = set(stages.settings.ablation_seeds), []
    for base in dict.fromkeys(groups[method][0].ablates for method in methods):
        same = [student for student in groups.get(base, []) if student.seed in seeds]
        chosen = {base: same} if same else {}
        chosen |= {method: groups[method] for method in methods if groups[method][0].ablates == base}
        for method, group in chosen.items():
            for name in _told(stages, ABLATED):
                cells = [_cell(group, name, horizon) for horizon in stages.settings.horizons]
                rows.append([method if name == ABLATED[0] else "", name, *cells])
    told = ", ".join(map(str, sorted(seeds)))
    head = ["method", "number", *(f"{horizon}x" for horizon in stages.settings.horizons)]
    return f"Each changes one thing of the method it is named after. Seeds: {told}.\n\n" + _markdown(
        head, rows
    )


def _cell(group: Sequence[Student], name: str, horizon: int) -> str:
    """Return one number of one method at one horizon."""
    return spread_of(name, [student.at[horizon][name] for student in group]).told(DIGITS.get(name, 2))


def _runs(stages: Stages) -> str:
    """Return the table of stages: updates and minutes."""
    rows = []
    for stage in stages.by_name.values():
        numbers = stage_numbers(stages, stage)
        if numbers:
            minutes = ["" if (m := numbers.get(n)) is None else f"{m:.1f}" for n in ("training", "in all")]
            counts = [str(numbers.get(name, "")) for name in ("updates", "of the student")]
            rows.append([stage.name, *counts, *minutes, numbers["how"]])
    head = [
        "stage", "updates", "of the student", "minutes of training", "minutes of its processes", "settings",
    ]  # fmt: skip
    return _markdown(head, rows)


def stage_numbers(stages: Stages, stage: Stage) -> dict[str, Any]:
    """Return how long a stage was, empty for one that was neither run nor given."""
    folder = stages.folder(stage.name)
    if not stages.result(stage.name).exists() or (stage.kind == "pairs" and not folder.is_dir()):
        return {}
    numbers: dict[str, Any] = {}
    if newest(folder / FILE) and stage.kind not in ("pairs", "evaluate"):
        notes, pace = read_notes(folder / FILE), read_pace(folder)
        numbers["updates"] = notes["done"]
        numbers["training"] = None if pace is None else pace * notes["done"] / 60
        recipe = notes.get("recipe", {})
        if stage.kind in MATCHED and "every" in recipe:
            warmup, every = int(recipe["warmup"]), int(recipe["every"])
            numbers["of the student"] = max(0, -(-(notes["done"] - warmup) // every))
    if stages.is_given(stage):
        return {**numbers, "how": f"given: {stages.result(stage.name)}"}
    seconds = wall_seconds(folder)
    numbers["in all"] = None if seconds is None else seconds / 60
    changed = (*stages.settings.overrides.get(stage.kind, ()), *stage.overrides)
    return {**numbers, "how": " ".join([stages.settings.configs[stage.kind], *changed])}


def _results(stages: Stages, groups: Groups) -> dict[str, Any]:
    """Return everything the tables tell, and the numbers of every clip."""
    horizons = stages.settings.horizons
    return {
        "where": where(),
        "settings": asdict(stages.settings),
        "stages": {stage.name: stage_numbers(stages, stage) for stage in stages.by_name.values()},
        "methods": {
            method: {
                "ablates": group[0].ablates,
                "seeds": [student.seed for student in group],
                "horizons": {
                    horizon: {
                        name: asdict(spread_of(name, [student.at[horizon][name] for student in group]))
                        for name in _told(stages)
                    }
                    for horizon in horizons
                },
                "clips": [student.at for student in group],
            }
            for method, group in groups.items()
        },
    }


def where() -> dict[str, str]:
    """Return date, commit and hardware."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        root = Path(__file__).parent
        commit = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "hardware": f"{_processor()}, {os.cpu_count()} cores" + _accelerator(),
        "torch": torch.__version__,
    }


def _computed(name: str) -> str:
    """Return the dtype of a setting as it is here."""
    return str(computed_in(name, device_named("auto"))).removeprefix("torch.")


def _processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _accelerator() -> str:
    """Return the name of the GPU, after a comma; empty without one."""
    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
