"""Every training stage with its smoke settings, whole or cut short as by a power failure, alone or in ranks.

As a program, ``stage_runs.py JSON``, it runs what the list of ``[name, update, [key=value, ...]]`` says, one
after the other, and ends itself with SIGKILL in an update that is given.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from tiny_runs import write_run

from training.config import load

ROOT = Path(__file__).parent.parent
AUTOENCODER = f"autoencoder={ROOT / 'sfpp_core/demo/autoencoder.safetensors'}"
STAGES = {
    "autoencoder": ("train_autoencoder", "Settings", "demo_autoencoder", ["bf16=0.5"]),
    "teacher": ("train_teacher", "TeacherSettings", "demo_teacher", [AUTOENCODER]),
    "causal": (
        "train_causal",
        "CausalSettings",
        "demo_causal",
        [AUTOENCODER, "openings=2", "chunks=2", "cuts=0.5"],
    ),
    "pairs": ("make_ode_pairs", "PairSettings", "demo_ode_pairs", []),
    "ode": ("train_ode", "OdeSettings", "demo_ode", [AUTOENCODER]),
    "dmd": ("train_dmd", "DmdSettings", "demo_self_forcing", [AUTOENCODER]),
    "streaming": (
        "train_dmd",
        "DmdSettings",
        "demo_self_forcing_plus",
        [AUTOENCODER, "loop.out=runs/smoke/streaming", "streaming=true", "horizon=12"],
    ),
    "grpo": (
        "train_grpo",
        "GrpoSettings",
        "demo_grpo",
        [AUTOENCODER, "student_run=runs/smoke/self_forcing/last.pt"],
    ),
}
"""Module, settings, configuration and what a test changes of it, by stage; each after what it needs."""


def plant():
    """Write a small random model where every stage from the pairs on looks for those before it."""
    for name in ("teacher", "causal", "ode", "self_forcing"):
        write_run(Path("runs/smoke", name, "last.pt"))


class PowerFailureError(BaseException):
    """Ends a run as a kill does: nothing is saved on the way out."""


def raise_power_failure():
    """End the run within this process."""
    raise PowerFailureError


def begin(name, *overrides, until=None, fail=raise_power_failure):
    """Run one stage in the current folder; call ``fail`` in update ``until``."""
    module_name, kind, config, changed = STAGES[name]
    module = importlib.import_module(f"training.{module_name}")
    path = str(ROOT / "training" / "configs" / f"{config}.toml")
    settings = load(getattr(module, kind), [path, "--smoke", *changed, *overrides], stage=name)
    plain = getattr(module, "run", None)

    def run(loop, parts, step, sample, **rest):
        def failing(iteration):
            if iteration == until:
                fail()
            return step(iteration)

        plain(loop, parts, failing, sample if loop.sample_every < 1000 else lambda path: None, **rest)

    if plain is not None:
        module.run = run
    try:
        module.main(settings)
    finally:
        if plain is not None:
            module.run = plain


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, until, overrides in json.loads(sys.argv[1]):
        begin(name, *overrides, until=until, fail=lambda: os.kill(os.getpid(), signal.SIGKILL))
