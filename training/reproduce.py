"""The reproduction: from nothing to the table that compares Self-Forcing++ with what came before.

Run ``python -m training.reproduce training/configs/reproduce_cpu.toml [key=value ...]``. Every stage is one
of the ordinary commands, run as a process of its own with a folder of its own; what is complete is left as it
is, and what was killed goes on. Writes ``table.md``, ``results.json`` and contact sheets whenever a student
has been measured, and plots at the end. ``--dry-run`` tells what would be run, ``--smoke`` runs all of it at
toy size.
"""

import logging
import shlex
import sys
from collections.abc import Sequence
from functools import partial

from training.config import ConfigError, load
from training.journal import read_pace
from training.reproduction import plots, runner, table
from training.reproduction.layout import Stage
from training.reproduction.settings import ReproduceSettings
from training.reproduction.stages import Stages

logger = logging.getLogger(__name__)

DRY_RUN = "--dry-run"


def plan(stages: Stages) -> list[str]:
    """Return what a dry run tells: every stage, whether it is done, and its command."""
    wanted = {stage.name for stage in stages.wanted()}
    return [line for stage in stages.by_name.values() for line in _told(stages, stage, stage.name in wanted)]


def _told(stages: Stages, stage: Stage, wanted: bool) -> list[str]:
    """Return the lines on one stage."""
    if stages.is_given(stage):
        return [f"{stage.name}: given, {stages.result(stage.name)}"]
    if not wanted:
        return [f"{stage.name}: {'complete' if stages.is_complete(stage) else 'not needed'}"]
    pace = read_pace(stages.folder(stage.name))
    begun = "" if pace is None else f", {pace:.3g} s per update so far"
    try:
        words = stages.arguments(stage)
    except ConfigError:
        length = f"(for as long as {stage.clock[0]} took)" if stage.clock else ""
        return [f"{stage.name}: to do {length}"]
    return [f"{stage.name}: to do{begun}", f"  python -m {stage.module} {shlex.join(words)}"]


def report(stages: Stages, *, draw: bool = False) -> None:
    """Write the tables and the contact sheets of what has been measured, and draw the plots."""
    groups = table.read_students(stages)
    if not groups:
        return
    table.write(stages, groups)
    plots.gather_sheets(stages)
    if draw:
        plots.draw(stages.out, groups, stages.settings.horizons, stages.settings.world)


def main(settings: ReproduceSettings, *, launch: runner.Launch | None = None) -> None:
    """Run what is missing, and report; ``launch`` starts a process, as ``runner.launch`` does."""
    if settings.plots:
        plots.check_plots()
    stages = Stages(settings)
    with runner.alone(stages.out) as held:
        wanted = stages.wanted()
        logger.info("%d of %d stages to run", len(wanted), len(stages.by_name))
        try:
            chosen = launch or partial(runner.launch, held=held)
            runner.run(stages, wanted, lambda: report(stages), launch=chosen)
        finally:
            report(stages, draw=settings.plots)
    logger.info("%s", stages.out / "table.md")


def command(arguments: Sequence[str]) -> None:
    """Do what the command line says."""
    dry = DRY_RUN in arguments
    words = [argument for argument in arguments if argument != DRY_RUN]
    settings = load(ReproduceSettings, words, stage="reproduce")
    if dry:
        logger.info("%s", "\n".join(plan(Stages(settings))))
    else:
        main(settings)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command(sys.argv[1:])
