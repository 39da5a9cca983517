"""What the command line understands."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

from . import drift_command
from .attention import NAMES
from .cache_shape import StorageKind
from .config import SinkPositions
from .cues import CHANGES, SOFT, Change
from .decoder import PREVIEW
from .errors import ScriptError, SFPPError
from .lora import parse_lora_option
from .naming import Choice
from .presets import FAMILIES
from .request import DTYPES, Request
from .script import load_script
from .text_cache import default_folder

Command = Callable[[argparse.Namespace, list[int]], int]
"""Runs a command; gets the arguments and the signals that come meanwhile, returns the exit code."""

EXAMPLE = """\
examples:
  python -m sfpp_core generate "a red circle moves right slowly" --seconds 60 --out video.mp4
  python -m sfpp_core generate "a cat surfs a wave" --student self_forcing_dmd.pt --decoder Wan2.1_VAE.pth
      --text-encoder umt5_xxl_fp8_e4m3fn_scaled.safetensors --seconds 60 --out cat.mp4
  python -m sfpp_core generate "a red circle moves right slowly [10s] | a blue square moves up fast [10s]"
      --seconds 20 --out change.mp4
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
    summary = "explain a weights file: what it holds, its sizes, the memory it needs"
    info = added.add_parser("info", help=summary, description=summary)
    info.add_argument("file", type=Path, metavar="FILE", help="weights: a file, an index of shards, a folder")
    for name, command in {"generate": generate, "decode": decode, "report": report, "info": info}.items():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(command=commands[name])
    return whole


def _add_generate_options(command: argparse.ArgumentParser) -> None:
    """Add the options of ``generate``."""
    add = command.add_argument
    add("prompt", nargs="?", help="what the video shows; prompts over time as explained below")
    add("--script", type=Path, metavar="FILE", help="prompts over time from a file, in place of a prompt")
    add("--switch", type=_change, default=SOFT, metavar="WAY", help=f"how prompts change: {CHANGES}")
    _add_output_options(command)
    add("--seconds", type=float, default=60.0, metavar="S", help="length in seconds (default 60)")
    add("--seed", type=int, default=0, metavar="N", help="seed of all noise, any whole number (default 0)")
    add("--start", type=Path, metavar="PATH", help="begin with a picture, a clip, or a folder of latents")
    add("--latents", type=Path, metavar="FOLDER", help="keep the latents there, to be decoded again")
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
    _add_models(command)
    add = _add_machine(command)
    kinds = get_args(StorageKind)
    add("--cache", dest="storage", choices=kinds, default="plain", help="how keys and values are kept")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto is float32 on a CPU, else bfloat16")
    add("--attention", metavar="NAME", default="auto", help=f"back end: {', '.join(NAMES)} (default auto)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: one for small videos, else all)")


def _add_models(command: argparse.ArgumentParser) -> None:
    """Add the options that name files of models."""
    models = command.add_argument_group("models", "defaults are those of the embedded demo")
    add = models.add_argument
    add("--student", type=Path, metavar="PATH", help="student: safetensors, .pt, shards, a diffusers folder")
    add("--weights", choices=get_args(Choice), default="auto", help="averaged or live weights of a .pt")
    add("--lora", type=_lora, action="append", default=[], metavar="FILE[:X]", help="LoRA and its strength")
    add("--text-encoder", type=Path, metavar="PATH", help="umT5: single file, .pth, a diffusers folder")
    add("--tokenizer", type=Path, metavar="PATH", help="its tokenizer, where it is not beside it")
    said = "keep text embeddings there; without a name, in your cache folder"
    add("--text-cache", type=_cache, nargs="?", const="", metavar="FOLDER", help=said)
    add("--words", type=Path, metavar="FILE", help="word encoder of a demo student")
    _add_decoder(models)
    add("--encoder", type=Path, metavar="PATH", help="encodes --start, where the decoder cannot: Wan2.1_VAE")


def _add_decode_options(command: argparse.ArgumentParser) -> None:
    """Add the options of ``decode``."""
    command.add_argument("latents", type=Path, metavar="FOLDER", help="what --latents has kept")
    _add_output_options(command)
    _add_decoder(command)
    _add_machine(command)


def _add_output_options(command: argparse.ArgumentParser) -> None:
    """Add where a video goes."""
    add = command.add_argument
    add("--out", required=True, metavar="PATH", help="video to write: name.mp4, or a folder for PNG pictures")
    add("--enlarge", type=int, metavar="N", help="show each pixel as N x N (default: about 512 pixels high)")
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
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is the GPU if there is one")
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


def _prompt(arguments: argparse.Namespace) -> str:
    """Return the prompt, or what the file in its place holds."""
    if (arguments.prompt is None) == (arguments.script is None):
        raise ScriptError("say what the video shows: either a prompt, or --script with a file, and not both.")
    return arguments.prompt if arguments.script is None else load_script(arguments.script)


def request_of(arguments: argparse.Namespace) -> Request:
    """Return what the arguments of ``generate`` ask for.

    Raises:
        ScriptError: There is no prompt, or one too many, or the file of a script cannot be read.
    """
    given = vars(arguments)
    names = (
        "switch",
        "out",
        "seconds",
        "seed",
        "width",
        "height",
        "student",
        "words",
        "decoder",
        "enlarge",
    )
    names += ("preset", "weights", "text_encoder", "tokenizer", "text_cache", "tile", "start", "encoder")
    names += ("latents", "storage", "attention", "device", "dtype", "threads")
    settings = {name: given[name] for name in _SETTINGS if given[name] is not None}
    chosen = {name: given[name] for name in names}
    return Request(prompt=_prompt(arguments), **chosen, loras=tuple(given["lora"]), settings=settings)
