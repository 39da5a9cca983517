"""Time of one update of distribution matching over growing horizons, against a model of its cost.

Run ``python -m tests.bench.bench_dmd [--horizons 1 4 10] [--batch N]``. Weights are random: this measures
speed, never quality. The baseline is the model: passes counted, times the measured time of one pass.

With s steps, a segment of K chunks that starts at chunk i, and a student's step in c chunk passes (one
forward of one chunk, weighed by what it attends to):

- rollout: (s + 1) passes per chunk, clean pass included, of i + K chunks;
- gradient of the segment: twice a pass in K chunks;
- teacher with guidance and critic: K passes and K clean ones, of 3 clips in all;
- update of the critic: K passes, K clean ones, and twice a pass for its gradient.
"""

import argparse
import sys
import time
from dataclasses import replace

import torch

from sfpp_core.config import DEMO, RolloutSettings
from sfpp_core.kv_cache import CacheShape, RollingKVCache
from sfpp_core.noise import ChunkNoise
from sfpp_core.tiny_autoencoder import TinyAutoencoder
from training.matching import Matching, RollOptions
from training.scores import CausalScores, Levels
from training.segments import Segment
from training.teacher import CLIP, DemoModel

CAPTION = "a red circle moves right slowly"
SEGMENT = 7
"""Chunks."""


def roles(rollout):
    """Return the three roles at demo size, with random weights."""
    models = [DemoModel(replace(DEMO, text_length=16), seed=seed) for seed in range(3)]
    models[1].to(torch.bfloat16).requires_grad_(False)
    shape = CacheShape.of(DEMO, CLIP, rollout)
    options = RollOptions(backward_noise="rollout", first_latent="keep", masked=0, checkpointing=False)
    return Matching(
        *models,
        scores=CausalScores(Levels(shift=5.0, least=0.4, largest=0.98), shape),
        schedule=rollout.schedule(),
        shape=shape,
        options=options,
        autoencoder=TinyAutoencoder(),
        guidance=1.5,
    )


def clock(make, *, times=2):
    """Return the seconds of CPU one call takes."""
    make()
    start = time.process_time()
    for _ in range(times):
        make()
    return (time.process_time() - start) / times


@torch.no_grad()
def seconds_per_pass(matching, captions, *, full):
    """Return the seconds of one forward of one chunk, with an empty or a full memory behind it."""
    like = torch.zeros(len(captions), DEMO.channels, *CLIP.chunk_shape)
    cache = RollingKVCache(matching.shape, batch=len(captions), like=like.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        bound = matching.bound(captions)
        for chunk in range(matching.shape.window - 1 if full else 0):
            cache.open(chunk)
            bound.remember(like, cache)
            cache.close()
        cache.open(cache.next)
        return clock(lambda: bound(like, 0.5, cache), times=6)


def passes(start, steps):
    """Return the passes of the rollout before the segment, within it, and of everything else."""
    before, within = (steps + 1) * start, (steps + 1) * SEGMENT
    return before, within, 2 * SEGMENT + 3 * 2 * SEGMENT + 4 * SEGMENT


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--horizons", type=int, nargs="+", default=[1, 2, 4, 10])
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rollout = RolloutSettings()
    matching, captions = roles(rollout), [CAPTION] * options.batch
    full, empty = (seconds_per_pass(matching, captions, full=full) for full in (True, False))
    growing = (full + empty) / 2
    sys.stdout.write(
        f"one pass: {1000 * empty:.1f} ms without a past, {1000 * full:.1f} ms with a full one\n\n"
    )
    sys.stdout.write(
        "| horizon | start, chunks | passes | rollout's share | model s | measured s | ratio |\n"
    )
    sys.stdout.write("|---" * 7 + "|\n")
    for horizon in options.horizons:
        # The mean of uniform starts: the model is linear in it.
        start = SEGMENT * (horizon - 1) // 2
        segment = Segment(start=start, chunks=SEGMENT, exit_step=rollout.steps - 1)

        def update(segment=segment):
            shown = matching.roll(captions, ChunkNoise(0), segment, CLIP.chunk_shape, SEGMENT * rollout.chunk)
            matching.student_loss(shown, torch.Generator().manual_seed(0)).backward()
            matching.critic_loss(shown, torch.Generator().manual_seed(1)).backward()

        before, within, rest = passes(start, rollout.steps)
        filling = min(start, SEGMENT) * (rollout.steps + 1)
        in_segment = growing if start == 0 else full
        model = filling * growing + (before - filling) * full + within * in_segment + rest * growing
        measured = clock(update)
        cells = [
            f"{horizon}x",
            start,
            before + within + rest,
            f"{(before + within) / (before + within + rest):.2f}",
        ]
        cells += [f"{model:.2f}", f"{measured:.2f}", f"{measured / model:.2f}"]
        sys.stdout.write("| " + " | ".join(map(str, cells)) + " |\n")


if __name__ == "__main__":
    main()
