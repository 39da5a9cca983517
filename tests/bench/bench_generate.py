"""The command line, measured from outside: speed against playback, and memory against length.

Run ``python -m tests.bench.bench_generate [--seconds 30 60 240]``: one process per length with the embedded
demo, under the command line's own defaults. The baseline of every ratio is the first length.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, sys, time
from sfpp_core import generate
from sfpp_core.machine import peak_memory
from sfpp_core.plan import Request, plan
import torch

prompt, (out, seconds) = "a red circle moves right slowly", sys.argv[1:]
planned = plan(Request(prompt=prompt, out=out, seconds=float(seconds), settings={}))
torch.set_num_threads(planned.threads)
loaded = generate.load(planned)
clock, times = time.process_time(), []

def report(progress):
    global clock
    times.append(time.process_time() - clock)
    clock = time.process_time()

outcome = generate.run(planned, loaded, report=report)
peak = peak_memory() / 2**20
print(json.dumps({"frames": outcome.frames, "seconds": outcome.seconds, "peak": peak, "times": times}))
"""


def measure(seconds, folder):
    """Return what one process says of its run, and the bytes of its file."""
    out = Path(folder) / f"{seconds:g}.mp4"
    words = [sys.executable, "-c", CHILD, str(out), str(seconds)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return {**json.loads(done.stdout), "bytes": out.stat().st_size}


def mean(values):
    return sum(values) / len(values)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, nargs="+", default=[30, 60, 240])
    options = parser.parse_args()
    write = sys.stdout.write
    write("| video s | made in s | times playback | peak MB | ratio | CPU s/chunk 8-18 | last 11 | ratio |\n")
    write("|---|---|---|---|---|---|---|---|\n")
    base = None
    with tempfile.TemporaryDirectory() as folder:
        for seconds in options.seconds:
            run = measure(seconds, folder)
            base = base or run
            early, late = mean(run["times"][7:18]), mean(run["times"][-12:-1])
            write(
                f"| {seconds:g} | {run['seconds']:.1f} | {run['frames'] / 16 / run['seconds']:.1f}x "
                f"| {run['peak']:.0f} | {run['peak'] / base['peak']:.3f} "
                f"| {early:.4f} | {late:.4f} | {late / early:.2f} |\n"
            )


if __name__ == "__main__":
    main()
