"""The training loop: step, clip, average, log, sample, save. Knows no loss.

A batch is a function of the seed and the iteration, so a run that was killed and resumed makes the same
weights as one that was not.
"""

import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from training.config import ConfigError

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

Step = Callable[[int], dict[str, float]]
"""Makes the update of one iteration and returns the numbers worth logging."""

Sample = Callable[[Path], None]
"""Writes a sample sheet to a path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """Length and bookkeeping of one stage."""

    out: str
    """Folder of the run: log, samples, ``last.pt``."""

    iterations: int
    """Updates in the whole stage."""

    seed: int = 0
    """Of the initial weights and of every batch."""

    save_seconds: float = 60.0
    """Seconds between saves."""

    sample_every: int = 500
    """Updates between sample sheets."""

    threads: int = 1
    """CPU threads of torch."""

    device: str = "auto"
    """``auto`` is the GPU if there is one."""

    def pick_device(self) -> torch.device:
        """Return the device to train on, with torch's threads set."""
        torch.set_num_threads(self.threads)
        name = self.device if self.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserSettings:
    """How the weights of one module are updated."""

    lr: float
    """Learning rate of AdamW."""

    matrix_lr: float = 0.0
    """Learning rate of Muon for the matrices of the transformer layers; 0 leaves them to AdamW."""

    betas: tuple[float, ...] = (0.9, 0.99)
    """Decay of AdamW's averages."""

    warmup: int = 50
    """Updates over which the learning rates rise."""

    hold: float = 0.5
    """Share of the updates before the learning rates fall along a cosine to 0."""

    clip: float = 1.0
    """Largest norm of the gradient."""

    ema: float = 0.995
    """Decay of the averaged weights."""


class Trained(Generic[M]):
    """A module with its optimisers and its averaged weights.

    Muon moves the matrices of the transformer layers, AdamW the rest.
    """

    def __init__(self, module: M, settings: OptimiserSettings, *, updates: int) -> None:
        """Take ``module`` for a stage of ``updates`` updates."""
        self.module = module
        self._averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        self._settings, self._updates = settings, updates
        matrices, rest = [], []
        for name, parameter in module.named_parameters():
            is_matrix = settings.matrix_lr and ".blocks." in name and parameter.ndim == 2
            (matrices if is_matrix else rest).append(parameter)
        betas = (settings.betas[0], settings.betas[1])
        adam = torch.optim.AdamW(rest, lr=settings.lr, betas=betas, weight_decay=0.0)
        self._optimisers: list[tuple[torch.optim.Optimizer, float]] = [(adam, settings.lr)]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=settings.matrix_lr, weight_decay=0.0)
            self._optimisers.append((muon, settings.matrix_lr))

    @property
    def averaged(self) -> M:
        """The averaged weights, as a module of the same kind."""
        return cast(M, self._averaged.module)

    def rate(self, update: int) -> float:
        """Return the share of the full learning rate at ``update``."""
        rising = min(1.0, (update + 1) / max(1, self._settings.warmup))
        hold = self._settings.hold
        past = max(0.0, update / self._updates - hold) / max(1e-9, 1 - hold)
        return rising * 0.5 * (1 + math.cos(math.pi * past))

    def accumulate(self, loss: Tensor, update: int) -> None:
        """Add the gradient of ``loss`` to that of the coming update.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at update {update}; the last save is as it was.")
        loss.backward()

    def update(self, loss: Tensor, update: int) -> float:
        """Follow the gradient of ``loss`` and of all accumulated since the last update; return its norm.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        self.accumulate(loss, update)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self._settings.clip)
        for optimiser, lr in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr * self.rate(update)
            optimiser.step()
            optimiser.zero_grad()
        self._averaged.update_parameters(self.module)
        return norm.item()

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on."""
        return {
            "module": self.module.state_dict(),
            "averaged": self._averaged.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser, _ in self._optimisers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.module.load_state_dict(state["module"])
        self._averaged.load_state_dict(state["averaged"])
        for (optimiser, _), saved in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)


def run(
    settings: LoopSettings, parts: Mapping[str, Trained[Any]], step: Step, sample: Sample, *, recipe: Any
) -> None:
    """Run the iterations of one stage.

    Continues from ``last.pt`` in the output folder if it is there. SIGTERM and Ctrl-C save and stop.

    Args:
        settings: Length and bookkeeping.
        parts: Everything that is trained, by the name it is saved under.
        step: Makes the update of one iteration; draws its batch from the iteration.
        sample: Writes a sample sheet.
        recipe: The dataclass of all settings of the stage; a run is continued only with the same ones.

    Raises:
        ConfigError: The folder holds a run with other settings.
    """
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    table = _flat(asdict(recipe))
    start, seconds = _resume(out / "last.pt", parts, table)
    _cut_log(out / "log.jsonl", start)
    began, saved = time.monotonic() - seconds, time.monotonic()
    with _stop_signals() as stopped, tqdm(total=settings.iterations, initial=start, desc=out.name) as bar:
        for iteration in range(start, settings.iterations):
            numbers = step(iteration)
            done = iteration + 1
            bar.update()
            if done % 20 == 0:
                bar.set_postfix({name: f"{number:.4f}" for name, number in numbers.items()})
                _log(out / "log.jsonl", {"iteration": done, "seconds": time.monotonic() - began, **numbers})
            due = time.monotonic() - saved > settings.save_seconds
            if due or stopped or done == settings.iterations:
                _save(
                    out / "last.pt",
                    parts,
                    {"done": done, "seconds": time.monotonic() - began, "recipe": table},
                )
                saved = time.monotonic()
            if done % settings.sample_every == 0 or done == settings.iterations:
                sample(out / f"sample_{done:06d}.png")
            if stopped:
                raise SystemExit(
                    f"stopped at iteration {done} of {settings.iterations}; run again to continue."
                )


_MAY_CHANGE = {"iterations", "threads", "device", "save_seconds", "sample_every", "out"}
"""Settings of the loop that may differ when a run is continued."""


def _flat(table: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Return nested settings as text by dotted name."""
    flat: dict[str, str] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{name}.")
        elif above != "loop." or name not in _MAY_CHANGE:
            flat[above + name] = str(value)
    return flat


def _save(path: Path, parts: Mapping[str, Trained[Any]], notes: dict[str, Any]) -> None:
    """Write the state of every part, whole or not at all."""
    state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**state, **notes}, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)  # noqa: PTH105 - atomic on every system


def _resume(path: Path, parts: Mapping[str, Trained[Any]], recipe: dict[str, str]) -> tuple[int, float]:
    """Restore every part; return the updates done and the seconds spent."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location="cpu", weights_only=True)
    before = state["recipe"]
    for name in sorted(before.keys() | recipe.keys()):
        if before.get(name) != recipe.get(name):
            raise ConfigError(
                f"{path.parent} holds a run with {name} = {before.get(name)}, and it is {recipe.get(name)} "
                "now; put it back to continue, or choose another folder."
            )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    logger.info("continuing %s at iteration %d", path.parent, state["done"])
    return state["done"], state["seconds"]


def _cut_log(path: Path, done: int) -> None:
    """Drop the lines of iterations after ``done``: they were lost with a kill and are made again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["iteration"] <= done]
        path.write_text("".join(line + "\n" for line in lines))


def _log(path: Path, numbers: dict[str, float]) -> None:
    """Append one line of JSON."""
    with path.open("a") as file:
        file.write(json.dumps(numbers) + "\n")


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that the loop stops between two updates."""
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
