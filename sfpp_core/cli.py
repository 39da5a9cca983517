"""The command line: ``python -m sfpp_core generate``, ``decode``, ``report`` and ``info``.

Exit codes: 0 done; 1 failed while generating; 2 cannot be done as asked; 128 + N ended by signal N (130 for
Ctrl-C, 143 for a plain kill), with what was made by then in the file.
"""

import argparse
import contextlib
import logging
import signal
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from tqdm import tqdm

from . import drift_command
from .cli_options import choices_of, parser, request_of
from .compute import device_named
from .errors import SFPPError
from .explain import file_lines
from .generate import load, run
from .machine import in_words, lacks_memory, peak_memory
from .plan import Plan, plan
from .recording import Outcome, Progress, Recording
from .redecode import plan_redecoding, redecode
from .run.describe import run_lines
from .run.manifest import is_run
from .run.production import begin, produce

DISTRIBUTION = "selfforcing-plusplus"
"""Name of this package on an index."""

FAILED, IMPOSSIBLE = 1, 2
"""Exit codes: failed while generating; cannot be done as asked."""

Work = Callable[[Callable[[Progress], None]], Outcome]
"""Makes a video; gets what wants to know how far it is."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line on ``words``, or on those of the process; return the exit code."""
    commands = {"generate": _generate, "decode": _decode, "report": drift_command.run, "info": _info}
    arguments = parser(commands, version=_version()).parse_args(words)
    with _messages(), _ending_signals() as caught:
        try:
            return arguments.command(arguments, caught)
        except SFPPError as error:
            return _refuse(error, IMPOSSIBLE, debug=arguments.debug)
        except OSError as error:
            if arguments.debug:
                raise
            where = error.filename or "a file"
            _say(f"error: {where}: {error.strerror or error}; check the path and its permissions.")
            return IMPOSSIBLE
        except (MemoryError, RuntimeError) as error:
            if arguments.debug or not lacks_memory(error):
                raise
            _say(_with_notes("the memory ran out; use a smaller window, width or height.", error))
            return FAILED
        except KeyboardInterrupt:
            _say("stopped before anything was made.")
            return _ended_by(caught)


def _generate(arguments: argparse.Namespace, caught: list[int]) -> int:
    """Make one video."""
    planned = plan(request_of(arguments))
    torch.set_num_threads(planned.threads)
    if not arguments.quiet:
        _say("\n".join(planned.lines()))
    if planned.request.run is not None:
        return _generate_run(planned, arguments, caught)
    loaded = load(planned)
    return _show(
        lambda report: run(planned, loaded, report=report),
        planned.recording,
        frames=planned.geometry.frames,
        arguments=arguments,
        caught=caught,
    )


def _generate_run(planned: Plan, arguments: argparse.Namespace, caught: list[int]) -> int:
    """Make what a run lacks."""
    choices = choices_of(arguments)
    with begin(planned, choices) as run:
        if not arguments.quiet:
            _say(f"run      {run.folder}, {run.kept} of {run.chunks} chunks are there")
        return _show(
            lambda report: produce(planned, run, choices, report=report),
            planned.recording,
            frames=planned.geometry.frames,
            arguments=arguments,
            caught=caught,
        )


def _decode(arguments: argparse.Namespace, caught: list[int]) -> int:
    """Make a video of kept latents."""
    job = plan_redecoding(
        arguments.latents,
        decoder=arguments.decoder,
        out=arguments.out,
        device=device_named(arguments.device or "auto"),
        tile=arguments.tile,
        enlarge=arguments.enlarge,
    )
    if not arguments.quiet:
        _say("\n".join(job.lines()))
    return _show(
        lambda report: redecode(job, report=report),
        job.recording,
        frames=job.frames,
        arguments=arguments,
        caught=caught,
    )


def _info(arguments: argparse.Namespace, caught: list[int]) -> int:  # noqa: ARG001 - the shape of a command
    """Explain one file, or a run."""
    lines = run_lines(arguments.file) if is_run(arguments.file) else file_lines(arguments.file)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _show(
    work: Work, recording: Recording, *, frames: int, arguments: argparse.Namespace, caught: list[int]
) -> int:
    """Do the work under a progress bar, say how it ended, and return the exit code."""
    try:
        with _bar(recording, frames, quiet=arguments.quiet) as bar:
            outcome = work(lambda progress: _advance(bar, recording, progress))
    except SFPPError as error:
        return _refuse(error, FAILED, debug=arguments.debug)
    if not arguments.quiet or not outcome.complete:
        _say(_summary(recording, frames, outcome))
    return 0 if outcome.complete else _ended_by(caught)


def _bar(recording: Recording, frames: int, *, quiet: bool) -> "tqdm[NoReturn]":
    """Return the progress bar of a run, counting frames."""
    alive = sys.stderr.isatty()
    return tqdm(
        total=frames,
        desc=f"chunk 0/{recording.chunks}",
        unit=" frames",
        bar_format="{desc} |{bar:24}| {rate_noinv_fmt}, {remaining} left",
        mininterval=0.2 if alive else 10.0,
        disable=quiet,
    )


def _advance(bar: "tqdm[NoReturn]", recording: Recording, progress: Progress) -> None:
    """Move the bar on by one chunk."""
    place = f"chunk {progress.chunks}/{progress.total_chunks}"
    video = f"{progress.frames / recording.fps:.1f} of {bar.total / recording.fps:g} s"
    bar.set_description_str(f"{place}, {video}", refresh=False)
    bar.update(progress.frames - bar.n)


def _summary(recording: Recording, frames: int, outcome: Outcome) -> str:
    """Return how a run ended, for people."""
    if not outcome.frames:
        return "stopped before the first frame; nothing was written."
    video = outcome.frames / recording.fps
    text = f"{recording.out}: {video:.1f} s, {outcome.frames} frames"
    if not outcome.complete:
        text = f"stopped; {text} of {frames / recording.fps:g} s are there and play"
    if (made := (outcome.frames - outcome.before) / recording.fps) > 0:
        text += f"; made in {outcome.seconds:.1f} s, {made / outcome.seconds:.2g} times as fast as it plays"
    peak = peak_memory()
    return text + (f", peak memory {in_words(peak)}." if peak else ".")


def _refuse(error: SFPPError, code: int, *, debug: bool) -> int:
    """Show an error without its traceback and return ``code``."""
    if debug:
        raise error
    _say(_with_notes(str(error), error))
    return code


def _with_notes(text: str, error: Exception) -> str:
    """Return how an error is shown: ``text``, and the notes that were put on it on its way."""
    return " ".join((f"error: {text}", *getattr(error, "__notes__", ())))


def _ended_by(caught: Sequence[int]) -> int:
    """Return the exit code of a process that a signal ended, as a shell counts."""
    return 128 + (caught[0] if caught else signal.SIGINT)


def _say(text: str) -> None:
    """Write to stderr: stdout is for what is asked for."""
    sys.stderr.write(text + "\n")


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    """Show the warnings of the package on stderr, one line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger(__package__)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def _ending_signals() -> Iterator[list[int]]:
    """Let a plain kill and a closed terminal end a run as Ctrl-C does; yield the signals that came."""
    caught: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the shape of a handler
        caught.append(number)
        raise KeyboardInterrupt

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    # Ignored signals stay ignored: nohup means it.
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _version() -> str:
    """Return the version, from the repository if this is one."""
    project = Path(__file__).parent.parent / "pyproject.toml"
    if project.is_file():
        return tomllib.loads(project.read_text())["project"]["version"]
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"
