"""A soak: minutes of demo video in one run, watched for anything that grows.

    python tests/bench/bench_soak.py --minutes 60

Samples memory and open files of the run's process, and the seconds each chunk took, from outside; writes them
as CSV and as a plot, and fails if the last quarter of the run differs from the second.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PROMPT = "a red circle moves right slowly"
ALLOWED = {"rss": 1.05, "files": 1.0, "pace": 1.25}
"""Largest ratio of the last quarter to the second."""

LEAST_CHUNKS = 400
"""Chunks of the shortest run that is judged, 5 minutes: in a shorter one memory still grows to its size, and
what else the machine does weighs as much as a quarter."""


def sample(process):
    """Return the resident bytes and the open files of a process."""
    place = Path(f"/proc/{process}")
    lines = (place / "status").read_text().splitlines()
    resident = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
    return resident, len(list((place / "fd").iterdir()))


def watch(run, *, minutes, every):
    """Make one run and return a row per sample: seconds, chunks, resident bytes, open files."""
    words = ["generate", PROMPT, "--run", str(run), "--seconds", str(minutes * 60), "--quiet"]
    rows, start = [], time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "sfpp_core", *words], cwd=ROOT)
    try:
        while process.poll() is None:
            time.sleep(every)
            try:
                resident, files = sample(process.pid)
            except (OSError, StopIteration):
                break
            chunks = len(list((run / "latents").glob("[!.]*.safetensors"))) if run.exists() else 0
            rows.append((time.monotonic() - start, chunks, resident, files))
    finally:
        process.wait()
    if process.returncode:
        sys.exit(f"the run ended with {process.returncode}")
    return rows


def ratios(rows):
    """Return, for each quantity, its median in the last quarter over that in the second."""
    # Once all chunks are there only the video is finished: the encoder is gone and nothing has a pace.
    made = [row for row in rows if 0 < row[1] < rows[-1][1]]
    quarter = len(made) // 4
    if quarter < 2:
        sys.exit("too few samples; ask for more minutes, or --every fewer seconds")
    second, last = made[quarter : 2 * quarter], made[-quarter:]

    def pace(part):
        return (part[-1][0] - part[0][0]) / max(1, part[-1][1] - part[0][1])

    def median(part, column):
        return statistics.median(row[column] for row in part)

    return {
        "rss": median(last, 2) / median(second, 2),
        "files": median(last, 3) / median(second, 3),
        "pace": pace(last) / pace(second),
    }


def draw(rows, path, title):
    """Draw memory, open files and seconds per chunk over the chunks made."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, sharex=True, figsize=(9, 8))
    chunks = [row[1] for row in rows]
    axes[0].plot(chunks, [row[2] / 1e6 for row in rows])
    axes[1].plot(chunks, [row[3] for row in rows])
    span = max(1, len(rows) // 60)
    pairs = [(a, b) for a, b in zip(rows, rows[span:], strict=False) if b[1] > a[1]]
    axes[2].plot([b[1] for _, b in pairs], [(b[0] - a[0]) / (b[1] - a[1]) for a, b in pairs])
    for axis, name in zip(axes, ("resident memory, MB", "open files", "seconds per chunk"), strict=True):
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[2].set_xlabel("chunks made")
    axes[0].set_title(title)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main():
    """Run the soak."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--minutes", type=float, default=60.0, help="length of the video (default 60)")
    options.add_argument("--every", type=float, default=2.0, help="seconds between samples (default 2)")
    options.add_argument("--out", type=Path, default=HERE, help="folder for soak.csv and soak.png")
    options.add_argument("--run", type=Path, help="folder of the run (default: one that is removed)")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = watch(given.run or Path(folder) / "run", minutes=given.minutes, every=given.every)
    with (given.out / "soak.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("seconds", "chunks", "resident_bytes", "open_files"), *rows])
    found = ratios(rows)
    said = ", ".join(f"{name} {ratio:.3f}" for name, ratio in found.items())
    title = f"{given.minutes:g} minutes of demo video in one run; last quarter over second: {said}"
    draw(rows, given.out / "soak.png", title)
    sys.stdout.write(f"{title}\n")
    if rows[-1][1] < LEAST_CHUNKS:
        sys.exit(f"too short to judge: {rows[-1][1]} chunks of {LEAST_CHUNKS}; ask for more minutes")
    if grown := [name for name, ratio in found.items() if ratio > ALLOWED[name]]:
        sys.exit(f"not flat: {', '.join(grown)}")


if __name__ == "__main__":
    main()
