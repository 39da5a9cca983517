"""The training loop: step, log, sample, save. Knows no loss.

A batch is a function of the seed and the iteration, so a run that was killed and resumed makes the same
weights as one that was not.
"""

import importlib.util
import logging
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sfpp_core.machine import peak_memory
from training import parallel
from training.config import ConfigError, defaults, flatten
from training.dry_run import Plan, report
from training.journal import Journal, Means, read_pace
from training.parallel import Pieces
from training.state import Saver
from training.trained import NotFiniteError, OptimiserSettings, Trained

__all__ = [
    "LoopSettings",
    "Loss",
    "OptimiserSettings",
    "Pieces",
    "Plan",
    "Trained",
    "descend",
    "run",
    "stop_signals",
]

logger = logging.getLogger(__name__)

Step = Callable[[int], Mapping[str, float]]
"""Makes the update of one iteration and returns the numbers worth logging."""

Sample = Callable[[Path], Mapping[str, float] | None]
"""Writes a sample sheet to a path, and videos beside it; may return numbers measured on them, which are
logged. Called by every rank alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """Length and bookkeeping of one stage."""

    out: str
    """Folder of the run: log, samples, saved state."""

    iterations: int
    """Updates in the whole stage."""

    seed: int = 0
    """Of the initial weights and of every batch."""

    effective_batch: int = 0
    """Clips per update over all ranks, by accumulation where they do not fit; 0 is one batch."""

    save_seconds: float = 60.0
    """Seconds between saves; each replaces the one before."""

    keep_every: int = 0
    """Iterations between saves that stay, as ``kept_000500`` in the folder, to go back to: each is a run of
    its own for ``export`` and for later stages. 0 keeps the newest alone."""

    log_every: int = 20
    """Iterations between lines of the log: the mean of each number since the line before."""

    sample_every: int = 500
    """Updates between sample sheets."""

    sample_seconds: tuple[float, ...] = (5.0, 60.0)
    """Lengths of the sample videos, where a stage makes some; drift is measured on each."""

    threads: int = 1
    """CPU threads of torch."""

    device: str = "auto"
    """``auto`` is the GPU if there is one."""

    tensorboard: bool = True
    """Write for TensorBoard too, if it is installed."""

    wandb: str = ""
    """Project of Weights & Biases to write to; empty is none."""

    dry_run: bool = False
    """Tell what the run would take, and train nothing; the same as ``--dry-run``."""

    seconds_per_update: float = 0.0
    """For a dry run's forecast of the time; 0 takes it from the log of an earlier run in ``out``."""

    def __post_init__(self) -> None:
        for name, least in (("keep_every", 0), ("log_every", 1), ("sample_every", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"loop.{name} is {getattr(self, name)}; it must be {least} or more.")
        if not self.sample_seconds or min(self.sample_seconds) <= 0:
            raise ConfigError(
                f"loop.sample_seconds is {list(self.sample_seconds)}; give lengths above 0, e.g. [5, 60]."
            )
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                f"loop.wandb is {self.wandb!r}, and the package is not installed: pip install wandb, or "
                "leave loop.wandb empty; TensorBoard and the log do not need it."
            )

    def pick_device(self) -> torch.device:
        """Return the device to train on, with torch's threads set and the other ranks joined.

        A dry run gets the device ``meta``, on which models have sizes and no numbers.
        """
        torch.set_num_threads(self.threads)
        if self.dry_run:
            return torch.device("meta")
        name = self.device if self.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        return parallel.join(name)

    def pieces(self, batch: int) -> Pieces:
        """Return how an update of ``batch`` clips at once is cut and shared.

        Raises:
            ConfigError: The effective batch is not a multiple of what all ranks compute at once.
        """
        return Pieces(batch=batch, effective=self.effective_batch or batch)


@dataclass(frozen=True, slots=True)
class Loss:
    """One loss of an update."""

    value: Tensor
    """What is differentiated, a scalar."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    """What is worth logging beside it."""

    batch: Any = None
    """What it was computed from, kept if it is not finite."""


def descend(trained: Trained[Any], losses: Iterable[Loss], iteration: int, *, count: int) -> dict[str, float]:
    """Follow the mean of ``losses``, each made when the one before is done with.

    Args:
        trained: What is moved.
        losses: Those of this rank.
        iteration: Which update this is.
        count: How many there are.

    Returns:
        ``loss`` and all other numbers, as means, and ``norm``, that of the gradient.
    """
    sums: dict[str, float] = {}
    norm = 0.0
    for index, loss in enumerate(losses, start=1):
        for name, number in {"loss": loss.value.item(), **loss.numbers}.items():
            sums[name] = sums.get(name, 0.0) + number
        if index < count:
            trained.accumulate(loss.value / count, iteration, batch=loss.batch)
        else:
            norm = trained.update(loss.value / count, iteration, batch=loss.batch)
    return {name: total / count for name, total in sums.items()} | {"norm": norm}


def run(
    settings: LoopSettings,
    parts: Mapping[str, Trained[Any]],
    step: Step,
    sample: Sample,
    *,
    recipe: Any,
    plan: Callable[[], Plan] = Plan,
) -> None:
    """Run the iterations of one stage.

    Continues from the saved state in the output folder if there is one. SIGTERM and Ctrl-C save and stop, all
    ranks at the same update.

    Args:
        settings: Length and bookkeeping.
        parts: Everything that is trained, by the name it is saved under.
        step: Makes the update of one iteration; draws its batch from the iteration.
        sample: Writes a sample sheet.
        recipe: The dataclass of all settings of the stage; a run is continued only with the same ones.
        plan: Works out what a dry run tells of the stage beside its parts; other runs do not ask.

    Raises:
        ConfigError: The folder holds a run with other settings.
        NotFiniteError: A loss or a gradient is not finite; what led there is written to the folder.
        SystemExit: The run was stopped, or another rank ended.
    """
    if settings.dry_run:
        pace = settings.seconds_per_update or read_pace(Path(settings.out))
        ranks = parallel.launched()
        lines = report(parts, plan(), ranks=ranks, iterations=settings.iterations, pace=pace)
        logger.info("%s", "\n".join(lines))
        return
    _Run(settings, parts, sample, recipe).go(step)


class _Run:
    """One run under way."""

    def __init__(
        self, settings: LoopSettings, parts: Mapping[str, Trained[Any]], sample: Sample, recipe: Any
    ) -> None:
        self._settings, self._parts, self._sample = settings, parts, sample
        self._out = Path(settings.out)
        self._out.mkdir(parents=True, exist_ok=True)
        self._recipe = kept(flatten(asdict(recipe)))
        self._saver = Saver(self._out, parts)
        self._start, seconds = self._saver.resume(self._recipe, kept(defaults(type(recipe))))
        self._began = time.monotonic() - seconds
        self._saved = time.monotonic()
        self._means = Means()

    def go(self, step: Step) -> None:
        """Run from the saved update to the last."""
        settings = self._settings
        journal = Journal(
            self._out,
            self._start,
            tensorboard=settings.tensorboard,
            wandb=settings.wandb,
            recipe=self._recipe,
        )
        bar = tqdm(
            total=settings.iterations,
            initial=self._start,
            desc=self._out.name,
            disable=parallel.rank() > 0,
        )
        with stop_signals() as stopped, bar:
            for iteration in range(self._start, settings.iterations):
                with self._watched(iteration):
                    numbers = step(iteration)
                    bar.update()
                    stop = self._after(iteration + 1, numbers, bar, journal, bool(stopped))
                if stop:
                    journal.close()
                    done = f"iteration {iteration + 1} of {settings.iterations}"
                    raise SystemExit(f"stopped at {done}; run again to continue.")
        journal.close()

    def _after(
        self, done: int, numbers: Mapping[str, float], bar: Any, journal: Journal, stopped: bool
    ) -> bool:
        """Log, save and sample what is due after ``done`` updates; return whether to stop."""
        settings, last = self._settings, done == self._settings.iterations
        keep = bool(settings.keep_every) and done % settings.keep_every == 0
        due = time.monotonic() - self._saved > settings.save_seconds
        stop, due = parallel.agree(stopped, due)
        self._means.add(numbers)
        if done % settings.log_every == 0 or last:
            numbers = parallel.mean({**self._means.take(), "peak_gigabytes": self._peak() / 1e9})
            bar.set_postfix({name: f"{number:.4f}" for name, number in numbers.items()})
            journal.write(done, {"seconds": time.monotonic() - self._began, **numbers})
        self._saver.poll()
        if due or keep or stop or last:
            seconds = time.monotonic() - self._began
            self._saver.save({"done": done, "seconds": seconds, "recipe": self._recipe})
            self._saved = time.monotonic()
        if keep or stop or last:
            self._saver.finish()
        if keep and parallel.rank() == 0:
            self._saver.keep()
        if done % settings.sample_every == 0 or last:
            measured = self._make_sample(f"sample_{done:06d}.png")
            if measured:
                journal.write(done, measured)
        return stop and not last

    def _peak(self) -> int:
        """Return the most bytes held so far: by the GPU's allocator, else by the process."""
        device = next(next(iter(self._parts.values())).module.parameters()).device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory() or 0

    def _make_sample(self, name: str) -> Mapping[str, float] | None:
        """Make a sample with the averaged weights whole; all ranks do, and the first keeps it."""
        with ExitStack() as until:
            for part in self._parts.values():
                until.enter_context(part.averaged_whole())
            if parallel.rank() == 0:
                return self._sample(self._out / name)
            return self._sample(Path(until.enter_context(tempfile.TemporaryDirectory())) / name)

    @contextmanager
    def _watched(self, iteration: int) -> Iterator[None]:
        """Say what is left of the run when an iteration fails."""
        saved = self._saver.saved
        kept = f"the last save, of update {saved[0]}, is {saved[1]}" if saved else "nothing was saved yet"
        try:
            yield
        except NotFiniteError as error:
            path = self._out / f"not_finite_{iteration:06d}_rank{parallel.rank()}.pt"
            state = {"done": saved[0], "path": str(saved[1])} if saved else {}
            told = {"what": str(error), "iteration": iteration, "rank": parallel.rank(), "state": state}
            torch.save({**told, "batch": error.batch}, path)
            where = f"iteration {iteration}, rank {parallel.rank()}"
            raise NotFiniteError(f"{error} ({where}); what led there is in {path}; {kept}.") from error
        except RuntimeError as error:
            if not parallel.lost_contact(error):
                raise
            raise SystemExit(
                f"rank {parallel.rank()} lost another rank in iteration {iteration}: that process ended, or "
                f"its machine did. {kept}. Start the same command again to continue, on any number of ranks."
            ) from error


_MAY_CHANGE = {
    f"loop.{name}"
    for name in (
        "iterations", "threads", "device", "save_seconds", "keep_every", "log_every", "sample_every",
        "sample_seconds", "out", "tensorboard", "wandb", "dry_run", "seconds_per_update",
    )
} | {"video.teraflops", "video.sample_prompts"}  # fmt: skip
"""Settings that may differ when a run is continued."""


def kept(table: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of ``table`` that may not differ when a run is continued."""
    return {name: text for name, text in table.items() if name not in _MAY_CHANGE}


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that whoever looks at it stops where it likes."""
    caught: list[int] = []
    old = {
        name: signal.signal(name, lambda number, _: caught.append(number))
        for name in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)
