"""Runs stages as processes of their own, several at once, each when what it needs is done."""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from training.config import ConfigError
from training.measuring import write_json
from training.reproduction.layout import Stage
from training.reproduction.stages import Stages

logger = logging.getLogger(__name__)

LOG = "stage.log"
"""What a stage's process said, in its folder; starts after the first append to it."""

WALL = "wall.json"
"""How long the processes of a stage took in all, in its folder."""

_ROOT = Path(__file__).parent.parent.parent
_POLL = 0.1
_TAIL = 15


class StageError(RuntimeError):
    """A stage ended with an error."""


class Process(Protocol):
    """A process that was started."""

    def poll(self) -> int | None:
        """Return its exit status, or ``None`` while it runs."""
        ...

    def terminate(self) -> None:
        """Ask it to save and stop."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


Launch = Callable[[Sequence[str], Path, int], Process]
"""Starts a Python module: the words after ``python -m``, the file of what it says, its threads."""


def launch(words: Sequence[str], log: Path, threads: int, *, held: Sequence[int] = ()) -> Process:
    """Start ``python -m`` with ``words``; what it says is appended to ``log``, and it keeps ``held`` open."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    # Threads that wait without spinning: several stages share the cores.
    environment = os.environ | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    with log.open("ab") as file:
        # A session of its own: Ctrl-C reaches it through us, once.
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=tuple(held),
        )


@contextmanager
def alone(folder: Path) -> Iterator[Sequence[int]]:
    """Keep other reproductions out of ``folder``; yield what its stages keep open for the same end.

    A stage may outlive the reproduction that started it, if that was killed: then the folder is still taken.
    Where the system has no such locks (Windows), nothing is kept out.

    Raises:
        ConfigError: A reproduction, or a stage of one, runs in the folder.
    """
    try:
        import fcntl
    except ImportError:
        yield ()
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"a reproduction, or a stage that outlived one, still runs in {folder}; wait for it, stop "
                "it, or choose another folder for out."
            ) from error
        yield (file.fileno(),)


def run(
    stages: Stages, wanted: Sequence[Stage], after: Callable[[], None], *, launch: Launch = launch
) -> None:
    """Run the stages of ``wanted``.

    SIGTERM and Ctrl-C are passed on to what runs, which saves and stops; a second one ends it at once.

    Args:
        stages: All stages.
        wanted: Those to run, each after those it needs.
        after: Called whenever a student was measured.
        launch: How a process is started.

    Raises:
        StageError: A stage ended with an error; the others were stopped as by SIGTERM.
        SystemExit: The reproduction was stopped.
    """
    pool = _Pool(stages, wanted, launch)
    with _signals() as caught:
        while pool.busy:
            if caught or pool.failed:
                pool.stop(kill=len(caught) > 1)
            else:
                pool.start()
            for stage in pool.take_done():
                if stage.kind == "evaluate":
                    after()
            time.sleep(_POLL)
    if caught:
        raise SystemExit("stopped; run the same command again to continue.")
    if pool.failed:
        raise StageError(pool.failed.report())


class _Running:
    """A stage under way."""

    def __init__(self, stage: Stage, folder: Path, process: Process) -> None:
        self.stage, self.folder, self.process = stage, folder, process
        self._began = time.monotonic()
        self.asked = False

    def told(self) -> str:
        """Return its time in words."""
        return f"{(time.monotonic() - self._began) / 60:.1f} min"

    def keep_time(self) -> None:
        """Add its time to that of the stage's earlier processes."""
        seconds = time.monotonic() - self._began + (wall_seconds(self.folder) or 0.0)
        write_json(self.folder / WALL, {"seconds": seconds})

    def report(self) -> str:
        """Return what to tell of its failure."""
        log = self.folder / LOG
        lines = log.read_text(errors="replace").splitlines()[-_TAIL:]
        said = "\n".join(f"  {line}" for line in lines)
        return f"stage {self.stage.name} failed; the end of {log}:\n{said}"


def wall_seconds(folder: Path) -> float | None:
    """Return how long the processes of the stage in ``folder`` took, ``None`` if that is not known."""
    path = folder / WALL
    return json.loads(path.read_text())["seconds"] if path.exists() else None


class _Pool:
    """Stages that wait and stages that run."""

    def __init__(self, stages: Stages, wanted: Sequence[Stage], launch: Launch) -> None:
        self._stages, self._launch = stages, launch
        self._waiting, self._count = list(wanted), len(wanted)
        self._running: list[_Running] = []
        self.failed: _Running | None = None

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._waiting or self._running)

    def start(self) -> None:
        """Start every stage whose needs are done, as far as there is room."""
        unfinished = {stage.name for stage in self._waiting} | {each.stage.name for each in self._running}
        ready = [stage for stage in self._waiting if not unfinished & set(stage.needs)]
        for stage in ready[: self._stages.settings.jobs - len(self._running)]:
            self._waiting.remove(stage)
            self._running.append(self._begin(stage))

    def _begin(self, stage: Stage) -> _Running:
        """Start the process of a stage."""
        folder = self._stages.folder(stage.name)
        folder.mkdir(parents=True, exist_ok=True)
        words = [stage.module, *self._stages.arguments(stage)]
        with (folder / LOG).open("a") as log:
            log.write(f"\n$ python -m {shlex.join(words)}\n")
        logger.info("%s started; it tells more in %s", stage.name, folder / LOG)
        process = self._launch(words, folder / LOG, self._stages.settings.threads)
        return _Running(stage, folder, process)

    def take_done(self) -> list[Stage]:
        """Return the stages that ended well since the last call."""
        done = []
        for each in [each for each in self._running if each.process.poll() is not None]:
            self._running.remove(each)
            each.keep_time()
            if each.process.poll() == 0:
                done.append(each.stage)
                left = len(self._waiting) + len(self._running)
                told = (self._count - left, self._count, each.stage.name, each.told())
                logger.info("%d of %d: %s done in %s", *told)
            elif not each.asked:
                self.failed = self.failed or each
        return done

    def stop(self, *, kill: bool) -> None:
        """Start nothing more, and ask every process once to stop, or end it."""
        self._waiting.clear()
        for each in self._running:
            if kill:
                each.process.kill()
            elif not each.asked:
                each.asked = True
                logger.info("stopping %s", each.stage.name)
                each.process.terminate()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list."""
    caught: list[int] = []
    old = {
        name: signal.signal(name, lambda number, _: caught.append(number))
        for name in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)
