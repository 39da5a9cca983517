"""How much of a policy gradient is signal: how alike the gradients of independent batches are.

Run ``python -m tests.bench.bench_grpo [--batches N] [key=value ...]``; the settings are those of
``training/configs/demo_grpo.toml`` with these changes. Nothing is trained. The baseline is the first row: the
videos of a group differ by all their actions, and all chunks are weighed.

If a batch's gradient is a signal and independent noise, the expected cosine between two batches is the
signal's share of the squared length.
"""

import argparse
import itertools
import statistics
import sys
import time

import torch

from training.config import load
from training.grpo_settings import GrpoSettings
from training.train_grpo import Learner

CONFIG = "training/configs/demo_grpo.toml"
ROWS = {
    "all differs, all chunks weighed": ["differ=all", "chunk_share=1.0", "coarse=1"],
    "only what is weighed differs": ["differ=weighed", "mirrored=false", "chunk_share=1.0", "coarse=1"],
    "of one chunk": ["differ=weighed", "mirrored=false", "chunk_share=0.01", "coarse=1"],
    "of one chunk, mirrored": ["differ=weighed", "mirrored=true", "chunk_share=0.01", "coarse=1"],
    "its means over 4x4 cells": ["differ=weighed", "mirrored=true", "chunk_share=0.01", "coarse=4"],
    "its means over 8x8 cells": ["differ=weighed", "mirrored=true", "chunk_share=0.01", "coarse=8"],
}


def gradient(learner, iteration):
    """Return the gradient of one batch, flat, and the mean deviation of the rewards within a group."""
    learner.policy.model.zero_grad(set_to_none=True)
    telling, numbers = learner.play(iteration)
    for batch, trace, advantages in telling:
        for loss, _ in learner.policy.losses(batch, trace, advantages):
            loss.backward()
    grads = [weight.grad for weight in learner.policy.model.parameters() if weight.grad is not None]
    return torch.cat([grad.flatten() for grad in grads]), numbers["deviation"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(len(ROWS))))
    options, changes = parser.parse_known_args()
    torch.set_num_threads(1)
    sys.stdout.write("| videos of a group | cosine | its error | deviation | CPU s per batch |\n")
    sys.stdout.write("|---" * 5 + "|\n")
    for name in (list(ROWS)[row] for row in options.rows):
        settings = load(GrpoSettings, [CONFIG, "student_run=", *ROWS[name], *changes], stage="bench_grpo")
        learner = Learner(settings, torch.device("cpu"))
        begun = time.process_time()
        grads, deviations = zip(
            *(gradient(learner, number) for number in range(options.batches)), strict=True
        )
        seconds = (time.process_time() - begun) / options.batches
        cosines = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in itertools.combinations(grads, 2)]
        error = statistics.stdev(cosines) / len(cosines) ** 0.5
        cells = [name, f"{statistics.mean(cosines):.4f}", f"{error:.4f}"]
        cells += [f"{statistics.mean(deviations):.4f}", f"{seconds:.1f}"]
        sys.stdout.write("| " + " | ".join(cells) + " |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
