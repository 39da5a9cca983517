"""What a run tells while it runs: a log of JSON lines, TensorBoard, and Weights & Biases if it is wanted."""

import importlib
import importlib.util
import json
import logging
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from training import parallel

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
"""Name of the log in the folder of a run."""

_WANDB_ID = "wandb_id"


class Means:
    """Means of numbers over some iterations; what is not a number does not count."""

    def __init__(self) -> None:
        """Begin with none."""
        self._seen: dict[str, list[float]] = {}

    def add(self, numbers: Mapping[str, float]) -> None:
        """Take the numbers of one iteration, which has the same ones as the others."""
        for name, number in numbers.items():
            self._seen.setdefault(name, []).extend([] if math.isnan(number) else [number])

    def take(self) -> dict[str, float]:
        """Return the means, NaN where there were none, and begin anew."""
        means = {name: fmean(seen) if seen else math.nan for name, seen in self._seen.items()}
        self._seen = {}
        return means


class Journal:
    """Writes the numbers of a run to all places, on the first rank only."""

    def __init__(
        self, out: Path, done: int, *, tensorboard: bool, wandb: str, recipe: Mapping[str, str]
    ) -> None:
        """Open the journal of a run that has ``done`` updates behind it.

        Args:
            out: Folder of the run.
            done: What was logged after this was lost with a kill, and is made again.
            tensorboard: Write for TensorBoard too, if it is installed.
            wandb: Project of Weights & Biases to write to; empty is none.
            recipe: Settings of the run, but for those that may change.
        """
        self._path = out / LOG
        self._board: Any = None
        self._wandb: Any = None
        if parallel.rank():
            return
        self._cut(done)
        if tensorboard:
            self._board = _open_board(out, done)
        if wandb:
            self._wandb = _open_wandb(out, wandb, recipe)

    def write(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers after one iteration."""
        if parallel.rank():
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"iteration": iteration, **numbers}) + "\n")
        if self._board is not None:
            for name, number in numbers.items():
                self._board.add_scalar(name, number, iteration)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(dict(numbers), step=iteration)

    def close(self) -> None:
        """Finish what is open."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _cut(self, done: int) -> None:
        """Drop the lines of iterations after ``done``."""
        if self._path.exists():
            lines = self._path.read_text().splitlines()
            kept = [line for line in lines if _iteration(line) <= done]
            self._path.write_text("".join(line + "\n" for line in kept))


def _iteration(line: str) -> float:
    """Return the iteration of a line; a line cut short by a kill is after every other."""
    try:
        return json.loads(line)["iteration"]
    except json.JSONDecodeError:
        return float("inf")


def read_pace(out: Path) -> float | None:
    """Return the seconds per update in the log of an earlier run in ``out``; ``None`` if there is none."""
    path = out / LOG
    lines = path.read_text().splitlines() if path.exists() else []
    timed = [json.loads(line) for line in lines if '"seconds"' in line and _iteration(line) < float("inf")]
    return timed[-1]["seconds"] / timed[-1]["iteration"] if timed else None


def _open_board(out: Path, done: int) -> Any:
    """Return TensorBoard's writer, or ``None`` where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        logger.info(
            "TensorBoard is not installed (pip install tensorboard): numbers are in %s only", out / LOG
        )
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out), purge_step=done + 1)


def _open_wandb(out: Path, project: str, recipe: Mapping[str, str]) -> Any:
    """Return a run of Weights & Biases: the same one if the folder has one already."""
    wandb: Any = importlib.import_module("wandb")  # by choice: it need not be installed
    path = out / _WANDB_ID
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return wandb.init(
        project=project, dir=str(out), id=path.read_text(), name=out.name, resume="allow", config=dict(recipe)
    )
