"""What the README claims is so."""

import math
import re
import shlex
from pathlib import Path

import pytest

from sfpp_core import demo
from sfpp_core.checkpoint import load_words, parameter_shapes
from sfpp_core.cli_options import parser
from sfpp_core.config import DEMO
from training.world import WORD_GROUPS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
START = "python3 sfpp_core/bootstrap.py"


def groups():
    """Return the words of the embedded demo by heading, or those it will be trained on."""
    path = demo.FOLDER / demo.WORDS
    return load_words(path)[1] if path.exists() else WORD_GROUPS


def commands():
    """Return every line of the README that a user is asked to type."""
    parts = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line for part in parts for line in part.splitlines() if line]


def tree():
    """Return the paths that the tree names, each folder with a slash at its end."""
    (text,) = re.findall(r"## Where everything is\n\n```\n(.*?)```", README, re.DOTALL)
    paths, folder = [], ""
    for line in text.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
        paths.append(name if not line.startswith(" ") else folder + name)
    return paths


def test_the_words_listed_are_those_the_demo_knows():
    (sentence,) = re.findall(r"^It knows (.*?)\.", README, re.DOTALL | re.MULTILINE)
    listed = re.findall(r"(\w+) \(([^)]*)\)", sentence)
    said = {heading: tuple(words.replace("\n", " ").split(", ")) for heading, words in listed}
    assert said == groups()


def test_the_demo_has_as_many_parameters_as_it_says():
    parameters = sum(math.prod(shape) for shape in parameter_shapes(DEMO).values())
    assert re.findall(r"([\d.]+) million parameters", README) == [f"{parameters / 1e6:.1f}"] == ["5.9"]


def test_the_two_commands_stand_in_it():
    starts = [line for line in commands() if line.startswith(START)]
    assert len(starts) == 2
    assert f"{START} test" in starts


@pytest.mark.parametrize("line", [line for line in commands() if " generate " in line])
def test_every_generate_command_is_understood(line):
    words = shlex.split(line)
    commands = dict.fromkeys(("generate", "decode", "report", "info"), print)
    arguments = parser(commands, version="0").parse_args(words[words.index("generate") :])
    assert arguments.out.endswith(".mp4")
    known = {word for group in groups().values() for word in group}
    # A command for the demo names all four things it can be told.
    assert arguments.student or len(known & set(arguments.prompt.split())) == 4


def test_every_file_of_the_tree_exists():
    paths = tree()
    assert len(set(paths)) == len(paths)
    missing = [
        path for path in paths if not (ROOT / path).exists() or path.endswith("/") != (ROOT / path).is_dir()
    ]
    assert not missing


@pytest.mark.parametrize("folder", ["sfpp_core", "sfpp_core/run", "nodes", "training"])
def test_every_module_is_in_the_tree(folder):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob("*.py")}
    private = {f"{folder}/__init__.py", f"{folder}/__main__.py"}
    assert modules - private <= set(tree()), sorted(modules - private - set(tree()))
