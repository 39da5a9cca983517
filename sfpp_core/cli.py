"""The command line: ``python -m sfpp_core generate`` and ``python -m sfpp_core info``.

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
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import NoReturn, get_args

import torch
from tqdm import tqdm

from .attention import NAMES
from .config import SinkPositions
from .errors import SFPPError
from .explain import file_lines
from .generate import Outcome, Progress, load, run
from .geometry import FPS
from .machine import in_words, lacks_memory, peak_memory
from .plan import DTYPES, Plan, Request, plan

DISTRIBUTION = "selfforcing-plusplus"
"""Name of this package on an index."""

FAILED, IMPOSSIBLE = 1, 2
"""Exit codes: failed while generating; cannot be done as asked."""

EXAMPLE = """\
example:
  python -m sfpp_core generate "a red circle moves right slowly" --seconds 60 --out video.mp4
"""

NOTES = """\
Without --student the embedded demo is used: one coloured shape that moves over a plain background. It says
what it knows when a prompt holds a word it does not. The same prompt, seed and settings give the same video,
and a longer video begins with the shorter one. The file plays while it grows; Ctrl-C ends it early and leaves
what is there.
Nothing is ever downloaded.
"""

_SETTINGS = ("window", "sink", "sink_positions", "steps", "shift")
"""Options that change the field of the same name in ``RolloutSettings``."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line on ``words``, or on those of the process; return the exit code."""
    arguments = _parser().parse_args(words)
    with _messages(), _ending_signals() as caught:
        try:
            return arguments.command(arguments, caught)
        except SFPPError as error:
            return _refuse(error, IMPOSSIBLE, debug=arguments.debug)
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
    planned = plan(_request(arguments))
    torch.set_num_threads(planned.threads)
    if not arguments.quiet:
        _say("\n".join(planned.lines()))
    loaded = load(planned)
    try:
        with _bar(planned, quiet=arguments.quiet) as bar:
            outcome = run(planned, loaded, report=lambda progress: _advance(bar, progress))
    except SFPPError as error:
        return _refuse(error, FAILED, debug=arguments.debug)
    if not arguments.quiet or not outcome.complete:
        _say(_summary(planned, outcome))
    return 0 if outcome.complete else _ended_by(caught)


def _info(arguments: argparse.Namespace, caught: list[int]) -> int:  # noqa: ARG001 - the shape of a command
    """Explain one file."""
    sys.stdout.write("\n".join(file_lines(arguments.file)) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m sfpp_core",
        description="Minutes of video from a causal Wan 2.1 student, on the command line.",
        epilog=EXAMPLE,
        formatter_class=kind,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(required=True, metavar="command")
    summary = "make a video from a prompt"
    generate = commands.add_parser(
        "generate", help=summary, description=summary, epilog=EXAMPLE + "\n" + NOTES, formatter_class=kind
    )
    _add_generate_options(generate)
    generate.set_defaults(command=_generate)
    summary = "explain a weights file: what it holds, its sizes, the memory it needs"
    info = commands.add_parser("info", help=summary, description=summary)
    info.add_argument("file", type=Path, metavar="FILE", help="a .safetensors file")
    info.set_defaults(command=_info)
    for command in (generate, info):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_generate_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``generate``."""
    add = parser.add_argument
    add("prompt", help="what the video shows")
    add("--out", required=True, metavar="PATH", help="video to write: name.mp4, or a folder for PNG pictures")
    add("--seconds", type=float, default=60.0, metavar="S", help="length in seconds (default 60)")
    add("--seed", type=int, default=0, metavar="N", help="seed of all noise, any whole number (default 0)")
    size = parser.add_argument_group("size")
    add = size.add_argument
    add("--width", type=int, metavar="PX", help="pixels, a multiple of 16 (default: the demo's 64)")
    add("--height", type=int, metavar="PX", help="pixels, a multiple of 16 (default: the demo's 64)")
    add("--enlarge", type=int, metavar="N", help="show each pixel as N x N (default: about 512 pixels high)")
    rollout = parser.add_argument_group("rollout", "defaults are those the student was trained with")
    add = rollout.add_argument
    add("--window", type=int, metavar="N", help="latent frames attention sees, a multiple of 3, e.g. 21")
    add("--sink", type=int, metavar="N", help="first latent frames kept in sight for ever, e.g. 0 or 3")
    add("--sink-positions", choices=get_args(SinkPositions), help="where in time attention places the sink")
    add("--steps", type=int, metavar="N", help="denoising steps per chunk, e.g. 4")
    add("--shift", type=float, metavar="X", help="shift of the noise levels towards 1, e.g. 5")
    models = parser.add_argument_group("models", "defaults are those of the embedded demo")
    add = models.add_argument
    add("--student", type=Path, metavar="FILE", help="student, a .safetensors file")
    add("--words", type=Path, metavar="FILE", help="word encoder of the student")
    add("--decoder", type=Path, metavar="FILE", help="decoder")
    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is the GPU if there is one")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto is float32 on a CPU, else bfloat16")
    add("--attention", metavar="NAME", default="auto", help=f"back end: {', '.join(NAMES)} (default auto)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: one for small videos, else all)")
    add("--quiet", action="store_true", help="only warnings and errors")


def _request(arguments: argparse.Namespace) -> Request:
    """Return what the arguments ask for."""
    given = vars(arguments)
    names = ("prompt", "out", "seconds", "seed", "width", "height", "student", "words", "decoder", "enlarge")
    chosen = {name: given[name] for name in (*names, "attention", "device", "dtype", "threads")}
    settings = {name: given[name] for name in _SETTINGS if given[name] is not None}
    return Request(**chosen, settings=settings)


def _bar(planned: Plan, *, quiet: bool) -> "tqdm[NoReturn]":
    """Return the progress bar of a run, counting frames."""
    alive = sys.stderr.isatty()
    return tqdm(
        total=planned.geometry.frames,
        desc=f"chunk 0/{planned.geometry.chunks}",
        unit=" frames",
        bar_format="{desc} |{bar:24}| {rate_noinv_fmt}, {remaining} left",
        mininterval=0.2 if alive else 10.0,
        disable=quiet,
    )


def _advance(bar: "tqdm[NoReturn]", progress: Progress) -> None:
    """Move the bar on by one chunk."""
    place = f"chunk {progress.chunks}/{progress.total_chunks}"
    video = f"{progress.frames / FPS:.1f} of {bar.total / FPS:g} s"
    bar.set_description_str(f"{place}, {video}", refresh=False)
    bar.update(progress.frames - bar.n)


def _summary(planned: Plan, outcome: Outcome) -> str:
    """Return how a run ended, for people."""
    if not outcome.frames:
        return "stopped before the first frame; nothing was written."
    video = outcome.frames / FPS
    text = f"{planned.request.out}: {video:.1f} s, {outcome.frames} frames"
    if not outcome.complete:
        text = f"stopped; {text} of {planned.geometry.seconds:g} s are there and play"
    text += f"; made in {outcome.seconds:.1f} s, {video / outcome.seconds:.2g} times as fast as it plays"
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
