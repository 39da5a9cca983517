"""Seconds per chunk and memory of a rollout, against a named baseline: a cache that keeps everything.

Run ``python -m tests.bench.bench_rollout [--size cpu|demo|wan] [--chunks N]``. Weights are random: this
measures speed and memory, never quality. Ratios compare columns measured in the same run.
"""

import argparse
import resource
import statistics
import sys
import time

import torch

from sfpp_core.attention import matmul, sdpa
from sfpp_core.config import DEMO, WAN_1_3B, RolloutSettings, StudentConfig
from sfpp_core.geometry import VideoGeometry
from sfpp_core.kv_cache import CacheShape, RollingKVCache
from sfpp_core.network import WanNetwork, initialise
from sfpp_core.noise import ChunkNoise
from sfpp_core.rollout import rollout
from sfpp_core.student import CausalStudent

SIZES = {
    "demo": (DEMO, 64, 64),
    "cpu": (StudentConfig(dim=384, ffn_dim=2240, heads=6, layers=8), 160, 256),
    "wan": (WAN_1_3B, 480, 832),
}
"""Student, height and width."""


def seconds_per_chunk(student, geometry, settings, *, window, device):
    """Return the time of every chunk, and the bytes of the cache."""
    shape = CacheShape(
        layers=student.config.layers,
        heads=student.config.heads,
        head_dim=student.config.head_dim,
        tokens_per_chunk=geometry.tokens_per_chunk,
        latent_frames_per_chunk=settings.chunk,
        window=window,
    )
    like = torch.zeros(1, student.config.channels, *geometry.chunk_shape, device=device)
    cache = RollingKVCache(shape, batch=1, like=like.to(student.dtype))
    bound = student.bind(torch.zeros(1, student.config.text_length, student.config.text_dim, device=device))
    schedule = settings.schedule()
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times, start = [], clock()
    for _ in rollout(bound, ChunkNoise(0), schedule, cache, chunks=geometry.chunks, like=like):
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
        start = clock()
    return times, shape.numbers * torch.finfo(student.dtype).bits // 8


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, height, width = SIZES[options.size]
    settings = RolloutSettings()
    geometry = VideoGeometry(height=height, width=width, frames=12 * options.chunks - 3)
    write = sys.stdout.write
    write(
        f"{options.size}: {width}x{height}, {geometry.chunks} chunks, {device}, torch {torch.__version__}\n"
    )
    write("| cache | attention | dtype | s/chunk at 8 | s/chunk at the end | end / 8 | speed | cache MB |\n")
    write("|---|---|---|---|---|---|---|---|\n")
    base = None
    cases = [("keeps everything", geometry.chunks, sdpa, torch.float32)]
    cases += [
        ("rolling, window 21", settings.window_chunks, attend, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for attend in (sdpa, matmul)
    ]
    with torch.inference_mode():
        network = WanNetwork(config, device=device)
        initialise(network, seed=0)
        for name, window, attend, dtype in cases:
            student = CausalStudent(network.to(dtype), config, attend=attend)
            times, numbers = seconds_per_chunk(student, geometry, settings, window=window, device=device)
            early, late = statistics.median(times[6:10]), statistics.median(times[-5:-1])
            base = base or late
            write(
                f"| {name} | {attend.__name__} | {str(dtype)[6:]} | {early:.4f} | {late:.4f} "
                f"| {late / early:.2f} | {base / late:.2f}x | {numbers / 1e6:.1f} |\n"
            )
    write(f"peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB\n")


if __name__ == "__main__":
    main()
