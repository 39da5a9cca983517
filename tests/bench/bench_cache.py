"""Ways to keep keys and values, against the plain one: seconds per chunk, memory, and what rounding costs.

Run ``python -m tests.bench.bench_cache [--seconds 60] [--storages plain fp8 ...] [--full]``. Ratios and
errors compare rows of one run; the first row of each table is the baseline. The error is the relative
distance of the latents (root mean square) in the first five seconds and in the last five: a rollout feeds on
itself, so any rounding grows; the row in bfloat16 says how much to expect of it.

``--full`` takes Wan 1.3B at 832x480, window 21, bfloat16, random weights, on a GPU, and sets the peak of
allocated memory, within the first ten seconds of video and after them, against its forecast; without a GPU it
is the reduced run. Random weights show speed and memory, never quality.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import get_args

import torch

from sfpp_core import demo
from sfpp_core.attention import sdpa
from sfpp_core.cache_shape import CacheShape, StorageKind
from sfpp_core.checkpoint import load_student, load_words
from sfpp_core.config import WAN_1_3B, RolloutSettings, StudentConfig
from sfpp_core.forecast import forecast
from sfpp_core.geometry import VideoGeometry, frames_in
from sfpp_core.network import WanNetwork, initialise
from sfpp_core.sampler import LongSampler
from sfpp_core.student import CausalStudent

SMALL_WAN = StudentConfig(dim=256, ffn_dim=1024, heads=2, layers=6, text_dim=64, text_length=16)
SEVEN_CHUNKS = 7
"""About five seconds."""

COLUMNS = (
    "keys and values", "dtype", "s/chunk", "ratio", "cache MB", "host MB", "error, first 5 s", "last 5 s",
    "peak MB, first 10 s", "after", "forecast MB", "peak / forecast",
)  # fmt: skip


@dataclass
class Case:
    """A student to roll out, and what it makes."""

    name: str
    network: WanNetwork
    config: StudentConfig
    settings: RolloutSettings
    embeddings: torch.Tensor
    geometry: VideoGeometry


@dataclass
class Run:
    """What one rollout took and made."""

    seconds_per_chunk: float
    latents: list[torch.Tensor]
    peaks: tuple[int, int]
    """Allocated bytes, until about ten seconds and after; 0 without a GPU."""


def demo_case(frames):
    """Return the embedded demo, four steps per chunk to spare time."""
    network, config, settings = load_student(demo.file(demo.STUDENT), dtype=torch.float32)
    words, _ = load_words(demo.file(demo.WORDS))
    embeddings = words(["a red circle moves right slowly"])
    geometry = VideoGeometry(height=demo.SIZE, width=demo.SIZE, frames=frames, chunk=settings.chunk)
    return Case("the demo", network, config, replace(settings, steps=4), embeddings, geometry)


def random_case(name, config, height, width, frames):
    """Return a student of random weights, its head too, so that its rollout goes somewhere."""
    network = WanNetwork(config)
    initialise(network, seed=0)
    torch.nn.init.normal_(network.head.head.weight, std=0.02, generator=torch.Generator().manual_seed(1))
    shape = (1, config.text_length, config.text_dim)
    embeddings = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    geometry = VideoGeometry(height=height, width=width, frames=frames)
    return Case(name, network.requires_grad_(False), config, RolloutSettings(), embeddings, geometry)


def roll(case, storage, dtype, device):
    """Roll a student out once, timing every chunk."""
    student = CausalStudent(case.network.to(device, dtype), case.config, attend=sdpa)
    sampler = LongSampler(
        student=student, geometry=case.geometry, settings=case.settings, device=device, storage=storage
    )
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times, latents, early_peak, start = [], [], 0, clock()
    for clean in sampler.chunks(case.embeddings):
        latents.append(clean.cpu())  # waits for the GPU
        times.append(clock() - start)
        start = clock()
        if len(latents) == 2 * SEVEN_CHUNKS and on_gpu:
            early_peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return Run(statistics.median(times[SEVEN_CHUNKS:]), latents, (early_peak, peak))


def error(latents, base, part):
    """Return the relative distance of a part of two videos."""
    ours, theirs = torch.cat(latents[part], dim=2), torch.cat(base[part], dim=2)
    return float((ours - theirs).norm() / theirs.norm())


def table(case, storages, dtype, device, write):
    """Roll out with each storage and write what it took."""
    geometry = case.geometry
    write(
        f"\n{case.name}: {geometry.width}x{geometry.height}, {geometry.seconds:g} s, {geometry.chunks} "
        f"chunks, window {case.settings.window}, {device}, torch {torch.__version__}\n\n"
    )
    write(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n")
    shape = CacheShape.of(case.config, geometry, case.settings)
    rows = [(kind, dtype) for kind in storages]
    rows += [] if dtype == torch.bfloat16 else [("plain", torch.bfloat16)]
    base = None
    for kind, compute in rows:
        run = roll(case, kind, compute, device)
        base = base or run
        size = shape.bytes(kind, compute)
        early, late = (
            error(run.latents, base.latents, part)
            for part in (slice(None, SEVEN_CHUNKS), slice(-SEVEN_CHUNKS, None))
        )
        expected = forecast(case.config, geometry, case.settings, compute, storage=kind, decoder=0).device
        cells = (
            kind, str(compute)[6:], f"{run.seconds_per_chunk:.4f}",
            f"{run.seconds_per_chunk / base.seconds_per_chunk:.2f}", f"{size.device / 1e6:.2f}",
            f"{size.host / 1e6:.2f}", f"{early:.4f}", f"{late:.4f}",
            *(f"{peak / 1e6:.0f}" if peak else "" for peak in run.peaks), f"{expected / 1e6:.1f}",
            f"{max(run.peaks) / expected:.3f}" if max(run.peaks) else "",
        )  # fmt: skip
        write(f"| {' | '.join(cells)} |\n")
        sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="of video; 60, or 120 with --full")
    parser.add_argument("--storages", nargs="+", default=list(get_args(StorageKind)))
    parser.add_argument("--full", action="store_true", help="Wan 1.3B at 832x480; needs a GPU")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    full = options.full and device.type == "cuda"
    frames = frames_in(options.seconds or (120 if full else 60))
    if full:
        case = random_case("Wan 1.3B, random weights", WAN_1_3B, 480, 832, frames)
        table(case, options.storages, torch.bfloat16, device, sys.stdout.write)
        return
    small = random_case("a small Wan, random weights", SMALL_WAN, 64, 96, frames)
    for case in (demo_case(frames), small):
        table(case, options.storages, torch.float32, device, sys.stdout.write)


if __name__ == "__main__":
    main()
