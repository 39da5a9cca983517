"""What the command line understands."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from . import drift_command
from .attention import NAMES
from .cache_shape import StorageKind
from .config import SinkPositions
from .cues import CHANGES, Change
from .decoder import PREVIEW
from .errors import ScriptError, SettingsError, SFPPError
from .lora import parse_lora_option
from .naming import Choice
from .presets import FAMILIES
from .request import DTYPES, Request
from .run.going_on import Replay
from .run.manifest import is_run, read_manifest
from .run.production import VIDEO, Choices
from .run.requests import extended, moved, request_fields
from .script import load_script
from .text_cache import default_folder

_ONE_PROMPT = "say what the video shows: either a prompt, or --script with a file, and not both."

Command = Callable[[argparse.Namespace, list[int]], int]
"""Runs a command; gets the arguments and the signals that come meanwhile, returns the exit code."""

EXAMPLE = """\
examples:
  python -m sfpp_core generate "a red circle moves right slowly" --seconds 60 --out video.mp4
  python -m sfpp_core generate "a cat surfs a wave" --student self_forcing_dmd.pt --decoder Wan2.1_VAE.pth
      --text-encoder umt5_xxl_fp8_e4m3fn_scaled.safetensors --seconds 60 --out cat.mp4
  python -m sfpp_core generate "a red circle moves right slowly [10s] | a blue square moves up fast [10s]"
      --seconds 20 --out change.mp4
  python -m sfpp_core generate "a red circle moves right slowly" --run circle --seconds 600
  python -m sfpp_core generate --run circle --extend 30
  python -m sfpp_core generate "a blue circle moves right slowly" --run blue --branch circle --from 42.5
"""

NOTES = """\
Without --student the embedded demo is used: one coloured shape that moves over a plain background. It says
what it knows when a prompt holds a word it does not. The same prompt, seed and settings give the same video,
and a longer video begins with the shorter one. The file plays while it grows; Ctrl-C ends it early and leaves
what is there.
Prompts over time: "a cat [5s] | a dog [10s]" with the length of each scene, "[0s: a cat] [5s: a dog]" with
the time it begins at, "a cat | a dog" in equal shares, or JSON. Text before the first bracket is common to
all scenes. [5s cut: a dog] or a dog [10s cut] says how the scene takes over; else --switch does. Scenes begin
at the nearest chunk. What comes before a change does not depend on it.
Nothing is ever downloaded.
"""

_SETTINGS = ("chunk", "window", "sink", "sink_positions", "overlap", "steps", "shift")
"""Options that change the field of the same name in ``RolloutSettings``."""


def parser(commands: Mapping[str, Command], *, version: str) -> argparse.ArgumentParser:
    """Return the parser of the whole command line.

    Args:
        commands: What runs ``generate``, ``decode``, ``report`` and ``info``.
        version: Of the package.
    """
    kind = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser(
        prog="python -m sfpp_core",
        description="Minutes of video from a causal Wan 2.1 student, on the command line.",
        epilog=EXAMPLE,
        formatter_class=kind,
    )
    whole.add_argument("--version", action="version", version=f"%(prog)s {version}")
    added = whole.add_subparsers(required=True, metavar="command")
    summary = "make a video from a prompt"
    generate = added.add_parser(
        "generate", help=summary, description=summary, epilog=EXAMPLE + "\n" + NOTES, formatter_class=kind
    )
    _add_generate_options(generate)
    summary = "make a video again from the latents a run has kept, e.g. with a better decoder"
    decode = added.add_parser("decode", help=summary, description=summary)
    _add_decode_options(decode)
    report = added.add_parser("report", help=drift_command.SUMMARY, description=drift_command.SUMMARY)
    drift_command.add_options(report)
    summary = "explain a weights file: what it holds, its sizes, the memory it needs; or a run: how far it is"
    info = added.add_parser("info", help=summary, description=summary)
    said = "weights: a file, an index of shards, a folder; or the folder of a run"
    info.add_argument("file", type=Path, metavar="FILE", help=said)
    for name, command in {"generate": generate, "decode": decode, "report": report, "info": info}.items():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(command=commands[name])
    return whole


def _add_generate_options(command: argparse.ArgumentParser) -> None:
    """Add the options of ``generate``."""
    add = command.add_argument
    add("prompt", nargs="?", help="what the video shows; prompts over time as explained below")
    add("--script", type=Path, metavar="FILE", help="prompts over time from a file, in place of a prompt")
    add("--switch", type=_change, metavar="WAY", help=f"how prompts change (default soft): {CHANGES}")
    _add_output_options(command, required=False)
    add("--seconds", type=float, metavar="S", help="length in seconds (default 60)")
    add("--seed", type=int, metavar="N", help="seed of all noise, any whole number (default 0)")
    add("--start", type=Path, metavar="PATH", help="begin with a picture, a clip, or a folder of latents")
    add("--latents", type=Path, metavar="FOLDER", help="keep the latents there, to be decoded again")
    said = "measure drift meanwhile: a folder, or a .csv, .json or .png file"
    add("--report", type=Path, metavar="PATH", help=said)
    add = command.add_argument_group("size").add_argument
    add(
        "--width",
        type=int,
        metavar="PX",
        help="pixels, a multiple of 16, or 32 for 5B (default: the student's)",
    )
    add(
        "--height",
        type=int,
        metavar="PX",
        help="pixels, a multiple of 16, or 32 for 5B (default: the student's)",
    )
    add = command.add_argument_group(
        "rollout", "defaults are those the student was trained with"
    ).add_argument
    add("--preset", metavar="FAMILY", help=f"settings of a family: {', '.join(FAMILIES)}")
    add("--chunk", type=int, metavar="N", help="latent frames generated together, e.g. 3")
    add(
        "--window",
        type=int,
        metavar="N",
        help="latent frames attention sees, a multiple of the chunk, e.g. 21",
    )
    add("--sink", type=int, metavar="N", help="first latent frames kept in sight for ever, e.g. 0 or 3")
    add("--sink-positions", choices=get_args(SinkPositions), help="where in time attention places the sink")
    add("--overlap", type=int, metavar="N", help="latent frames shared by windows that start anew; 0 rolls")
    add("--steps", type=int, metavar="N", help="denoising steps per chunk, e.g. 4")
    add("--shift", type=float, metavar="X", help="shift of the noise levels towards 1, e.g. 5")
    said = "pull colour and contrast towards the first seconds, from 0 (off) to 1"
    add("--anchor", type=float, metavar="X", help=said)
    said = "noise on the past as remembered, e.g. 0.1; 0 is what the student was trained with"
    add("--context-sigma", type=float, metavar="X", help=said)
    _add_models(command)
    _add_run(command)
    add = _add_machine(command)
    kinds = get_args(StorageKind)
    add("--cache", dest="storage", choices=kinds, help="how keys and values are kept")
    add("--dtype", choices=("auto", *DTYPES), help="auto is float32 on a CPU, else bfloat16")
    add("--attention", metavar="NAME", help=f"back end: {', '.join(NAMES)} (default auto)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: one for small videos, else all)")


def _add_models(command: argparse.ArgumentParser) -> None:
    """Add the options that name files of models."""
    models = command.add_argument_group("models", "defaults are those of the embedded demo")
    add = models.add_argument
    add("--student", type=Path, metavar="PATH", help="student: safetensors, .pt, shards, a diffusers folder")
    add("--weights", choices=get_args(Choice), help="averaged or live weights of a .pt")
    add("--lora", type=_lora, action="append", metavar="FILE[:X]", help="LoRA and its strength")
    add("--text-encoder", type=Path, metavar="PATH", help="umT5: single file, .pth, a diffusers folder")
    add("--tokenizer", type=Path, metavar="PATH", help="its tokenizer, where it is not beside it")
    said = "keep text embeddings there; without a name, in your cache folder"
    add("--text-cache", type=_cache, nargs="?", const="", metavar="FOLDER", help=said)
    add("--words", type=Path, metavar="FILE", help="word encoder of a demo student")
    _add_decoder(models)
    add("--encoder", type=Path, metavar="PATH", help="encodes --start, where the decoder cannot: Wan2.1_VAE")


def _add_decode_options(command: argparse.ArgumentParser) -> None:
    """Add the options of ``decode``."""
    command.add_argument("latents", type=Path, metavar="FOLDER", help="what --latents or --run has kept")
    _add_output_options(command, required=True)
    _add_decoder(command)
    _add_machine(command)


def _add_run(command: argparse.ArgumentParser) -> None:
    """Add the options of a run on disk."""
    said = "a folder that keeps all that is made: the same command goes on with it, whatever ended it"
    add = command.add_argument_group("run", said).add_argument
    add("--run", type=Path, metavar="FOLDER", help="its folder; what is not said again is as it was")
    add("--extend", type=float, metavar="S", help="make a complete run longer by so many seconds")
    said = "keep what comes before this second; make anew what follows"
    add("--from", dest="seconds_kept", type=float, metavar="S", help=said)
    add(
        "--branch", type=Path, metavar="OLD", help="let a new run share its beginning, up to --from, with OLD"
    )
    add("--restart", action="store_true", help="begin again; what is there is moved aside, never deleted")
    said = "how the past is recalled: all of it, exactly, or the last windows; auto is all of a short past"
    add("--replay", choices=get_args(Replay), default="auto", help=said)
    said = "keep keys and values too, every N chunks and at the end: a run goes on exactly, and at once; "
    said += "they take as much of the disk as of memory (default 0: never)"
    add("--keep-cache", type=int, default=0, metavar="N", help=said)


def _add_output_options(command: argparse.ArgumentParser, *, required: bool) -> None:
    """Add where a video goes."""
    add = command.add_argument
    add(
        "--out",
        required=required,
        metavar="PATH",
        help="video to write: name.mp4, or a folder for PNG pictures"
        + ("" if required else f" (of a run: {VIDEO} in its folder)"),
    )
    said = "show each pixel as N x N (default: up to 512 pixels a side)"
    add("--enlarge", type=int, metavar="N", help=said)
    add("--quiet", action="store_true", help="only warnings and errors")


def _add_decoder(command: argparse._ActionsContainer) -> None:
    """Add what turns latents into frames."""
    add = command.add_argument
    add(
        "--decoder", type=_decoder, metavar="PATH", help=f"Wan2.1_VAE, taew2_1, or {PREVIEW} (no file needed)"
    )
    add("--tile", type=int, metavar="PX", help="decode in square tiles of so many pixels, for small cards")


def _add_machine(command: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
    """Add where to compute; return what adds more to that group."""
    add = command.add_argument_group("machine").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), help="auto is the GPU if there is one")
    return add


def _lora(text: str) -> tuple[Path, float]:
    """Parse ``FILE[:STRENGTH]``."""
    try:
        return parse_lora_option(text)
    except SFPPError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _change(text: str) -> Change:
    """Parse the way of a change."""
    try:
        return Change.parse(text)
    except SFPPError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _cache(text: str) -> Path:
    """Return the folder that is named, or the user's own; that is looked for only if it is wanted."""
    try:
        return Path(text) if text else default_folder()
    except SFPPError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _decoder(text: str) -> Path | str:
    """Keep the word that is no path."""
    return text if text == PREVIEW else Path(text)


def request_of(arguments: argparse.Namespace) -> Request:
    """Return what the arguments of ``generate`` ask for. A run that is there says what they leave open.

    Raises:
        CheckpointError: The run is damaged.
        ScriptError: There is no prompt, or one too many, or the file of a script cannot be read.
        SettingsError: They leave too much open, or do not go together.
    """
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    known = _said_before(arguments)
    if "script" in given:
        if "prompt" in given:
            raise ScriptError(_ONE_PROMPT)
        given["prompt"] = load_script(given["script"])
    if arguments.extend is not None:
        known["seconds"] = extended(arguments.run, arguments.extend)
    if "prompt" not in {**known, **given}:
        raise ScriptError(_ONE_PROMPT)
    if arguments.run is not None:
        known["run"] = arguments.run
        known.setdefault("out", str(arguments.run / VIDEO))
    elif arguments.out is None:
        raise SettingsError(
            "the following arguments are required: --out, the video to write, or --run, a folder for it all."
        )
    fresh = {field.name: given[field.name] for field in fields(Request) if field.name in given}
    if "lora" in given:
        fresh["loras"] = tuple(given["lora"])
    changed = {name: given[name] for name in _SETTINGS if name in given}
    settings = {**known.get("settings", {}), **changed}
    return Request(**{**known, **fresh, "settings": settings})


def choices_of(arguments: argparse.Namespace) -> Choices:
    """Return what else the arguments of ``generate`` say of a run."""
    return Choices(
        seconds_kept=arguments.seconds_kept,
        branch=arguments.branch,
        anew=arguments.restart,
        replay=arguments.replay,
        keep_cache=arguments.keep_cache,
    )


def _said_before(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of the request that a run, or the one it branches from, was begun with."""
    run, branch = arguments.run, arguments.branch
    alone = {"--extend": arguments.extend, "--from": arguments.seconds_kept, "--branch": branch}
    alone["--restart"] = arguments.restart or None
    if run is None:
        if idle := [option for option, value in alone.items() if value is not None]:
            raise SettingsError(f"{idle[0]} is for runs; name the folder of one with --run.")
        return {}
    if arguments.keep_cache < 0:
        raise SettingsError(f"--keep-cache is {arguments.keep_cache}; it must be 0 or more chunks.")
    if arguments.restart:
        return {}
    if is_run(run):
        return moved(request_fields(read_manifest(run).request, where=run), run)
    if branch is None:
        return {}
    known = request_fields(read_manifest(branch).request, where=branch)
    del known["out"]
    return known
