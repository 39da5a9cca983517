"""A toy trained by one process or several: what the tests of the training engine start with torchrun."""

import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from training import parallel
from training.loop import LoopSettings, Loss, OptimiserSettings, Trained, descend, run


class Layer(nn.Module):
    """A layer that is never called as a whole, like Wan's: others compute with its weights."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 6)
        self.modulation = nn.Parameter(torch.ones(1, 6))


class Toy(nn.Module):
    """Two layers between a frozen entrance and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(6, 6).requires_grad_(False)
        self.net = nn.ModuleDict({"blocks": nn.ModuleList([Layer(), Layer()])})
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        x = self.enter(x)
        for layer in self.net["blocks"]:
            x = x + torch.tanh(layer.q(x)) * layer.modulation
        return self.head(x)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of the toy's run."""

    loop: LoopSettings
    optimiser: OptimiserSettings = field(
        default_factory=lambda: OptimiserSettings(
            lr=0.02, matrix_lr=0.01, weight_decay=0.01, warmup=2, ema=0.5, ema_from=2, clip=0.5
        )
    )


def train(recipe, *, until=None, failing=None, batch=2):
    """Train the toy; after ``until`` updates, end as a process does that is killed.

    Args:
        recipe: Settings.
        until: Update in which rank ``failing`` ends, or every rank where that is ``None``.
        failing: The rank that ends.
        batch: Clips computed at once.
    """
    device = recipe.loop.pick_device()
    toy = Toy().to(device)
    trained = Trained(toy, recipe.optimiser, updates=20)
    pieces = recipe.loop.pieces(batch)

    def loss_of(piece):
        x = torch.randn(batch, 6, generator=torch.Generator().manual_seed(piece))
        return Loss((toy(x) - x.sum(1, keepdim=True)).square().mean(), batch=x)

    def step(iteration):
        if iteration == until and failing in (None, parallel.rank()):
            os.kill(os.getpid(), signal.SIGKILL)
        return descend(trained, map(loss_of, pieces.of(iteration)), iteration, count=pieces.per_rank)

    def sample(path):
        x = torch.ones(1, 6)
        path.write_text(str(trained.averaged(x).item()))
        return {"drift": trained.averaged(x).item()}

    run(recipe.loop, {"model": trained}, step, sample, recipe=recipe)
    return trained


if __name__ == "__main__":
    out, options = sys.argv[1], json.loads(sys.argv[2])
    loop = LoopSettings(out=out, device="cpu", effective_batch=8, tensorboard=False, **options.pop("loop"))
    train(Recipe(loop=loop), **options)
    Path(out, f"finished_{parallel.rank()}").touch()
