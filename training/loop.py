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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

logger = logging.getLogger(__name__)

Loss = Callable[[int], tuple[Tensor, dict[str, float]]]
"""From the iteration to its loss and the numbers worth logging."""

Sample = Callable[[nn.Module, Path], None]
"""Writes a sample sheet of the averaged weights to a path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """Length, optimiser and bookkeeping of one stage."""

    out: str
    """Folder of the run: log, samples, ``last.pt``."""

    iterations: int
    """Updates in the whole stage."""

    seed: int = 0
    """Of the initial weights and of every batch."""

    matrix_lr: float = 0.01
    """Learning rate of Muon, for the matrices of the transformer layers."""

    lr: float = 1e-3
    """Learning rate of AdamW, for everything else."""

    warmup: int = 50
    """Updates over which the learning rates rise."""

    hold: float = 0.5
    """Share of the updates before the learning rates fall along a cosine to 0."""

    clip: float = 1.0
    """Largest norm of the gradient."""

    ema: float = 0.995
    """Decay of the averaged weights."""

    save_seconds: float = 60.0
    """Seconds between saves."""

    sample_every: int = 500
    """Updates between sample sheets."""

    threads: int = 1
    """CPU threads of torch."""

    device: str = "auto"
    """``auto`` is the GPU if there is one."""

    def rate(self, iteration: int) -> float:
        """Return the share of the full learning rate at ``iteration``."""
        rising = min(1.0, (iteration + 1) / max(1, self.warmup))
        past = max(0.0, iteration / self.iterations - self.hold) / max(1e-9, 1 - self.hold)
        return rising * 0.5 * (1 + math.cos(math.pi * past))

    def pick_device(self) -> torch.device:
        """Return the device to train on, with torch's threads set."""
        torch.set_num_threads(self.threads)
        name = self.device if self.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(name)


class Optimisers:
    """Muon for the matrices of the transformer layers, AdamW for the rest, as one optimiser."""

    def __init__(self, module: nn.Module, settings: LoopSettings) -> None:
        matrices, rest = [], []
        for name, parameter in module.named_parameters():
            (matrices if ".blocks." in name and parameter.ndim == 2 else rest).append(parameter)
        self._settings = settings
        self._optimisers = (
            (torch.optim.Muon(matrices, lr=settings.matrix_lr, weight_decay=0.0), settings.matrix_lr),
            (torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0), settings.lr),
        )

    def step(self, iteration: int) -> None:
        """Update at the learning rate of ``iteration`` and forget the gradients."""
        for optimiser, lr in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr * self._settings.rate(iteration)
            optimiser.step()
            optimiser.zero_grad()

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of both."""
        return [optimiser.state_dict() for optimiser, _ in self._optimisers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore the state of both."""
        for (optimiser, _), state in zip(self._optimisers, states, strict=True):
            optimiser.load_state_dict(state)


def run(settings: LoopSettings, module: nn.Module, loss: Loss, sample: Sample) -> nn.Module:
    """Train ``module`` in place and return its averaged weights.

    Continues from ``last.pt`` in the output folder if it is there. SIGTERM and Ctrl-C save and stop.

    Args:
        settings: Length, optimiser and bookkeeping.
        module: Everything that is trained.
        loss: Loss of one iteration; draws its batch from the iteration.
        sample: Writes a sample sheet.

    Raises:
        FloatingPointError: The loss is not finite; the last save is left as it is.
    """
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    optimisers = Optimisers(module, settings)
    parts = {"module": module, "averaged": averaged, "optimisers": optimisers}
    start, seconds = _resume(out / "last.pt", parts)
    began, saved = time.monotonic() - seconds, time.monotonic()
    with _stop_signals() as stopped, tqdm(total=settings.iterations, initial=start, desc=out.name) as bar:
        for iteration in range(start, settings.iterations):
            value, numbers = loss(iteration)
            if not torch.isfinite(value):
                raise FloatingPointError(
                    f"loss is {value.item()} at iteration {iteration}; see {out}/last.pt."
                )
            value.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
            optimisers.step(iteration)
            averaged.update_parameters(module)
            done = iteration + 1
            bar.update()
            if done % 20 == 0:
                numbers = {"loss": value.item(), "norm": norm.item(), **numbers}
                bar.set_postfix({name: f"{number:.4f}" for name, number in numbers.items()})
                _log(out / "log.jsonl", {"iteration": done, "seconds": time.monotonic() - began, **numbers})
            due = time.monotonic() - saved > settings.save_seconds
            if due or stopped or done == settings.iterations:
                _save(out / "last.pt", parts, done, time.monotonic() - began)
                saved = time.monotonic()
            if done % settings.sample_every == 0 or done == settings.iterations:
                sample(averaged.module, out / f"sample_{done:06d}.png")
            if stopped:
                raise SystemExit(
                    f"stopped at iteration {done} of {settings.iterations}; run again to continue."
                )
    return averaged.module


def _save(path: Path, parts: dict[str, Any], done: int, seconds: float) -> None:
    """Write the state of every part, whole or not at all."""
    state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**state, "done": done, "seconds": seconds}, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)  # noqa: PTH105 - atomic on every system


def _resume(path: Path, parts: dict[str, Any]) -> tuple[int, float]:
    """Restore every part; return the updates done and the seconds spent."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    logger.info("continuing %s at iteration %d", path.parent, state["done"])
    return state["done"], state["seconds"]


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
