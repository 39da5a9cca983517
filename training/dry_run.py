"""What a run would take, told before it starts: sizes, memory of each rank, effective batch, time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sfpp_core.machine import in_words
from training import parallel
from training.trained import Trained

_FLOAT32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a stage knows of its own size."""

    pieces: parallel.Pieces | None = None
    """How its effective batch is cut."""

    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Shape of what it computes on, by name."""

    held: Mapping[str, int] = field(default_factory=dict)
    """Bytes it holds on every rank beside what is trained, by name: frozen models, caches, activations."""

    operations: Mapping[str, float] = field(default_factory=dict)
    """Operations of one iteration on each rank, by what they are for."""

    narrow: bool = False
    """Whether gathered weights are bfloat16, as on a GPU, where this machine has none."""

    teraflops: float = 0.0
    """Operations per second of one device, in 1e12, for the expected time; 0 is unknown."""

    @property
    def pace(self) -> float | None:
        """Seconds per iteration at that speed, if it is known."""
        total = sum(self.operations.values())
        return total / (1e12 * self.teraflops) if total and self.teraflops else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes one rank holds for one module in training."""

    weights: int
    """Its shard in float32, and with several ranks the whole weights while a loss is computed."""

    gradients: int
    """Of all weights until they are shared out, then of its shard."""

    optimisers: int
    """Averages of AdamW and Muon."""

    averaged: int
    """The averaged weights, where some are kept; whole while a sample is made."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimisers + self.averaged


def forecast(trained: Trained[Any], ranks: int, *, narrow: bool = False) -> Memory:
    """Return the bytes one of ``ranks`` holds for ``trained``. Activations are not part of it.

    Args:
        trained: The module.
        ranks: Processes that share the work.
        narrow: Gathered weights are bfloat16 even if this machine has no GPU.
    """
    matrices = {id(p) for group in _matrix_groups(trained) for p in group["params"]}
    whole_bytes = sharded_bytes = frozen = states = 0
    gathered = 2 if narrow or torch.cuda.is_available() else _FLOAT32
    for parameter in trained.module.parameters():
        numbers = parameter.numel()
        if not parameter.requires_grad:
            frozen += numbers * parameter.element_size()
        elif id(parameter) in matrices:
            whole_bytes += _FLOAT32 * numbers
            states += _FLOAT32 * numbers
        else:
            sharded_bytes += _FLOAT32 * numbers
            states += 2 * _FLOAT32 * numbers // ranks
    own = whole_bytes + sharded_bytes // ranks
    passing = 0 if ranks == 1 else sharded_bytes // _FLOAT32 * gathered
    return Memory(
        weights=frozen + own + passing,
        gradients=own + passing,
        optimisers=states,
        averaged=own + passing if trained.settings.ema else 0,
    )


def _matrix_groups(trained: Trained[Any]) -> list[dict[str, Any]]:
    """Return the groups of parameters that Muon moves."""
    return [group for muon in trained.optimisers[1:] for group in muon.param_groups]


def report(
    parts: Mapping[str, Trained[Any]], plan: Plan, *, ranks: int, iterations: int, pace: float | None
) -> list[str]:
    """Return the lines of a dry run.

    Args:
        parts: Everything that would be trained, by name.
        plan: What the stage knows.
        ranks: Processes that would share the work.
        iterations: Updates in the whole stage.
        pace: Seconds per update, if known.
    """
    lines = ["dry run: nothing is trained and nothing is written"]
    total = sum(plan.held.values())
    for name, shape in plan.shapes.items():
        lines.append(f"  {name}: {tuple(shape)}")
    for name, part in parts.items():
        memory = forecast(part, ranks, narrow=plan.narrow)
        total += memory.total
        counted = [p.numel() for p in part.module.parameters()]
        moved = sum(p.numel() for p in part.module.parameters() if p.requires_grad)
        lines.append(f"  {name}: {sum(counted):,} parameters, {moved:,} of them trained; on each rank")
        for what in ("weights", "gradients", "optimisers", "averaged"):
            lines.append(f"    {what}: {in_words(getattr(memory, what))}")
    for name, held in plan.held.items():
        lines.append(f"  {name}: {in_words(held)} on each rank")
    rest = "at most" if any("activations" in name for name in plan.held) else "and what activations take"
    lines.append(f"  in all {in_words(total)} on each of {ranks} ranks, {rest}")
    if (pieces := plan.pieces) is not None:
        lines.append(
            f"  effective batch {pieces.effective}: {pieces.ranks} ranks x {pieces.per_rank} pieces x "
            f"batch {pieces.batch}"
        )
    return [*lines, *_duration(plan, iterations, pace)]


def _duration(plan: Plan, iterations: int, pace: float | None) -> list[str]:
    """Return the lines about operations and time."""
    lines = []
    if plan.operations:
        lines.append(
            "  caches, activations and operations are counted as training/cost.py says, not measured"
        )
    for name, operations in plan.operations.items():
        size = operations / 1e12
        number = f"{size:,.0f}" if size >= 100 else f"{size:.3g}"
        lines.append(f"  {name}: {number}e12 operations per iteration on each rank")
    told = f"  {iterations:,} iterations, {_time(iterations, pace or plan.pace)}"
    if not pace and plan.pace:
        told += f", if a device computes {plan.teraflops:g}e12 operations a second"
    return [*lines, told]


def _time(iterations: int, pace: float | None) -> str:
    """Return the expected time in words."""
    if not pace:
        return "time unknown: give loop.seconds_per_update, or let a short run write its log"
    hours = iterations * pace / 3600
    return f"{hours:.1f} hours at {pace:.3g} s each"
