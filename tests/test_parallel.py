"""Several ranks train as one: the same numbers, states that any number of them continues, a clear end."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranked import Recipe, train
from stage_runs import begin, plant

from training.config import ConfigError, load
from training.loop import LoopSettings
from training.parallel import Pieces
from training.state import newest, read_averaged

ROOT = Path(__file__).parent.parent
PROGRAM = str(ROOT / "tests" / "ranked.py")
STAGES = str(ROOT / "tests" / "stage_runs.py")
PLACE = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def start(ranks, out, *, loop, **options):
    """Start the toy's training on some ranks."""
    return launch(ranks, [PROGRAM, str(out), json.dumps({"loop": loop, **options})])


def launch(ranks, words):
    """Start a program on some ranks without torchrun's watching process, which costs seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {**PLACE, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]


def end(processes):
    """Wait for all ranks; return their exit codes and what each told."""
    told = [process.communicate(timeout=240)[1].decode() for process in processes]
    return [process.returncode for process in processes], told


def alone(out, **loop):
    """Train the toy in this process."""
    settings = LoopSettings(out=str(out), device="cpu", effective_batch=8, tensorboard=False, **loop)
    return train(Recipe(loop=settings))


def compare(one, other):
    """Check that two runs made the same weights, up to the order of sums."""
    a, b = read_averaged(one / "last.pt"), read_averaged(other / "last.pt")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2e-4, atol=2e-5, msg=name)


def test_two_ranks_train_as_one_and_one_goes_on_from_there(tmp_path):
    bookkeeping = {"sample_every": 3, "keep_every": 4}
    codes, told = end(start(2, tmp_path / "ranks", loop={"iterations": 6, **bookkeeping}))
    assert codes == [0, 0], told
    alone(tmp_path / "whole", iterations=6, **bookkeeping)
    assert [path.name for path in sorted((tmp_path / "ranks").glob("last*"))] == ["last-000006"]
    compare(tmp_path / "whole", tmp_path / "ranks")
    compare(tmp_path / "whole" / "kept_000004", tmp_path / "ranks" / "kept_000004")
    for folder in ("whole", "ranks"):
        drift = float((tmp_path / folder / "sample_000006.png").read_text())
        lines = [json.loads(line) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        assert [line.get("drift") for line in lines if line["iteration"] == 6] == [None, drift]
    alone(tmp_path / "whole", iterations=10)
    alone(tmp_path / "ranks", iterations=10)
    assert [path.name for path in sorted((tmp_path / "ranks").glob("last*"))] == ["last.pt"]
    compare(tmp_path / "whole", tmp_path / "ranks")


@pytest.mark.slow
def test_the_state_of_two_ranks_goes_on_on_four_and_that_of_one_on_two(tmp_path):
    alone(tmp_path / "whole", iterations=10)
    alone(tmp_path / "ranks", iterations=3)
    for ranks, iterations in ((2, 6), (4, 10)):
        codes, told = end(start(ranks, tmp_path / "ranks", loop={"iterations": iterations}))
        assert codes == [0] * ranks, told
        assert newest(tmp_path / "ranks" / "last.pt").name == f"last-{iterations:06d}"
    compare(tmp_path / "whole", tmp_path / "ranks")


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_leaves_a_state(tmp_path):
    """The real launcher: it must see the end too, and not wait."""
    options = {"loop": {"iterations": 10, "save_seconds": 0}, "until": 5, "failing": 1}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*launcher, PROGRAM, str(tmp_path / "ranks"), json.dumps(options)]
    result = subprocess.run(words, env=PLACE, capture_output=True, text=True, timeout=240)
    assert result.returncode != 0
    assert "rank 0 lost another rank in iteration 5" in result.stderr
    assert "Start the same command again to continue, on any number of ranks" in result.stderr
    done = json.loads((newest(tmp_path / "ranks" / "last.pt") / "notes.json").read_text())["done"]
    assert done >= 4
    alone(tmp_path / "ranks", iterations=10)
    alone(tmp_path / "whole", iterations=10)
    compare(tmp_path / "whole", tmp_path / "ranks")


@pytest.mark.slow
def test_one_rank_told_to_stop_stops_all_at_the_same_update(tmp_path):
    processes = start(2, tmp_path, loop={"iterations": 100_000})
    log = tmp_path / "log.jsonl"
    while not log.exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    codes, told = end(processes)
    assert codes == [1, 1]
    stops = {line for text in told for line in text.splitlines() if line.startswith("stopped at")}
    assert len(stops) == 1
    done = json.loads((newest(tmp_path / "last.pt") / "notes.json").read_text())["done"]
    assert stops == {f"stopped at iteration {done} of 100000; run again to continue."}


FOUR = ["batch=1", "loop.effective_batch=4", "loop.sample_every=1000", "loop.save_seconds=1000"]
HELD = ["student.hold=1.0", "critic.hold=1.0"]
RANKED = {
    "ode": ("ode", [*FOUR, "optimiser.hold=1.0"]),
    "dmd": ("dmd", [*FOUR, *HELD]),
    "streaming": ("streaming", [*FOUR, *HELD]),
    "grpo": ("grpo", ["prompts=4", "loop.sample_every=1000", "optimiser.hold=1.0"]),
}
"""Stage and what is changed of its smoke run, by the name of the run."""


def program(place, *changes, names=tuple(RANKED)):
    """Return the program that runs stages, writing to folders that begin with ``place``."""
    runs = [
        [RANKED[name][0], None, [*RANKED[name][1], f"loop.out={place}_{name}", *changes]] for name in names
    ]
    return [STAGES, json.dumps(runs)]


def follow(one, other, part="model"):
    """Check that two runs moved the same way, up to the order of sums."""
    one, other = (read_averaged(Path(out, "last.pt"), name=part) for out in (one, other))
    begun = read_averaged(Path("runs/smoke/causal/last.pt"))
    nothing = {name: torch.zeros(()) for name in one}
    moved, apart, size = (
        torch.stack([(one[name] - by[name]).double().square().sum() for name in one]).sum().sqrt()
        for by in (begun, other, nothing)
    )
    rounded = torch.finfo(torch.float32).eps * size  # three small steps are hardly more than the weights' own
    assert moved > 100 * rounded
    assert apart < 1e-3 * moved + rounded


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A folder in which the stages from the causal initialisation on can run."""
    monkeypatch.chdir(tmp_path)
    plant()
    with contextlib.redirect_stderr(io.StringIO()):
        begin("pairs")


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_two_ranks_of_a_stage_train_as_one():
    for ranks, place in ((1, "whole"), (2, "ranks")):
        codes, told = end(launch(ranks, program(place, "loop.iterations=3")))
        assert codes == [0] * ranks, told
    for name in RANKED:
        assert newest(Path(f"ranks_{name}/last.pt")).name == "last-000003"
        for part in ("model", "critic")[: 2 if name in ("dmd", "streaming") else 1]:
            follow(f"whole_{name}", f"ranks_{name}", part)


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_what_two_ranks_of_a_stage_began_goes_on_on_one_and_on_four():
    """With the videos that were being streamed, which every rank kept for itself.

    The whole run has two ranks too: against one, a sum in another order can turn a bit of bfloat16.
    """
    names = ("streaming", "grpo")
    for ranks, place, iterations in ((2, "whole", 6), (2, "four", 3)):
        codes, told = end(launch(ranks, program(place, f"loop.iterations={iterations}", names=names)))
        assert codes == [0] * ranks, told
    for name in names:
        shutil.copytree(f"four_{name}", f"one_{name}")
    kept = sorted(path.name for path in Path("one_streaming/last-000003").glob("own-*"))
    assert kept == ["own-0.pt", "own-1.pt"]
    for ranks, place in ((1, "one"), (4, "four")):
        codes, told = end(launch(ranks, program(place, "loop.iterations=6", names=names)))
        assert codes == [0] * ranks, told
        assert not any("new ones begin" in text for text in told)
        for name in names:
            follow(f"whole_{name}", f"{place}_{name}")


def test_the_pieces_of_all_ranks_are_those_of_one(monkeypatch):
    whole = [piece for iteration in range(3) for piece in Pieces(batch=2, effective=8).of(iteration)]
    assert whole == list(range(12))
    shared = Pieces(batch=2, effective=8, ranks=2)
    assert (shared.per_update, shared.per_rank) == (4, 2)
    seen = []
    for rank in range(2):
        monkeypatch.setattr("training.parallel.rank", lambda rank=rank: rank)
        seen += [piece for iteration in range(3) for piece in shared.of(iteration)]
    assert sorted(seen) == whole
    with pytest.raises(
        ConfigError, match=r"effective_batch is 6; with 2 ranks and batch 2 it must be a multi"
    ):
        Pieces(batch=2, effective=6, ranks=2)


def test_the_autoencoder_trains_in_one_process_and_says_so(monkeypatch):
    from training.train_autoencoder import Settings

    monkeypatch.setenv("WORLD_SIZE", "2")
    config = str(ROOT / "training" / "configs" / "demo_autoencoder.toml")
    with pytest.raises(ConfigError, match="trains in one process, and torchrun started 2; use python -m"):
        load(Settings, [config], stage="train_autoencoder")
