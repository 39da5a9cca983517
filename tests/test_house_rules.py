"""Rules of the house that a linter cannot see."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOST = {
    "comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths",
    "latent_preview", "node_helpers", "nodes", "server",
}  # fmt: skip
MAY_NOT_IMPORT = {
    "sfpp_core": HOST | {"training", "sfpp_core"},
    "training": HOST,
    "nodes": {"training", "sfpp_core"},  # relative imports only: the host gives us no package name
}
LATE = {
    "diffusers", "transformers", "peft", "sentencepiece", "tokenizers", "ftfy", "matplotlib", "torchvision",
    "cv2", "xformers", "flash_attn", "sageattention",
}  # fmt: skip
SOURCES = [path for folder in MAY_NOT_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]
EVERYTHING = [ROOT / "__init__.py", *SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]

BLOCK = re.compile("block(?!ed|ing)", re.IGNORECASE)  # the thing, not the verb
OTHER_BANS = re.compile(r"^_*(num|n|maybe)_|(^|_)idx($|_)|_v\d+$", re.IGNORECASE)
UPSTREAM_ATTRIBUTES = {"blocks"}  # Wan's name for its layers, part of every parameter name


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> set[str]:
    """Return the top-level names of every absolute import in a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def coined(source: str) -> Iterator[str]:
    """Yield every name a file makes up itself; names it only uses belong to others."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.alias(asname=str(name)):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()) if name not in UPSTREAM_ATTRIBUTES:
                yield name
            case ast.MatchAs(name=str(name)) | ast.ExceptHandler(name=str(name)):
                yield name


def banned_names(source: str) -> set[str]:
    return {name for name in coined(source) if BLOCK.search(name) or OTHER_BANS.search(name)}


def files_of_the_project() -> list[Path]:
    """Return every file git knows or would add; without git, the sources."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return EVERYTHING
    paths = (ROOT / os.fsdecode(name) for name in listing.split(b"\0") if name)
    return [path for path in paths if path.is_file()]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_inwards(path):
    folder = path.relative_to(ROOT).parts[0]
    banned = MAY_NOT_IMPORT[folder] | (HOST if folder == "nodes" and path.name != "_host.py" else set())
    assert not imported(path) & banned


def test_the_bootstrap_needs_nothing_but_python():
    assert imported(ROOT / "sfpp_core/bootstrap.py") <= sys.stdlib_module_names


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_no_file_outgrows_a_sitting(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_names_keep_to_the_glossary(path):
    assert not banned_names(path.read_text())


@pytest.mark.parametrize(
    ("source", "banned"),
    [
        ("def f(num_frames, *, n_heads): ...", {"num_frames", "n_heads"}),
        ("block_size = 1", {"block_size"}),
        ("class AttentionBlock: ...", {"AttentionBlock"}),
        ("for idx, _num_x in x: chunk_idx = student_v2 = 0", {"idx", "_num_x", "chunk_idx", "student_v2"}),
        ("import x as maybe_x", {"maybe_x"}),
        ("self.blocks = 1", set()),
        ("blocks = 1", {"blocks"}),
        ("def blocked(): ...", set()),
        ("y = f(block_size=1).num_heads['blocks.0'] + numbers + index", set()),
    ],
)
def test_the_glossary_bans_names_we_coin_and_no_others(source, banned):
    assert banned_names(source) == banned


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nobody_prints(path):
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    assert not any(isinstance(call, ast.Name) and call.id == "print" for call in calls)


def test_the_package_imports_without_the_host():
    """ComfyUI loads us from a path, under a name no import statement could spell."""
    name = "/custom_nodes/ComfyUI-SelfForcingPP"
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.comfy_entrypoint)
    assert not HOST & set(sys.modules)


def test_importing_the_core_brings_in_no_heavy_library():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES]
    core = [name for name in modules if name.startswith("sfpp_core.") and not name.endswith("__")]
    program = f"""
import importlib, sys
for name in {core}:
    importlib.import_module(name)
sys.exit(", ".join({LATE} & set(sys.modules)) or 0)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_node_pack_asks_for_little():
    """A node manager installs each line by itself; naming torch there would replace the host's own."""
    lines = (ROOT / "requirements.txt").read_text().split("\n")
    names = [re.split(r"[^A-Za-z0-9_-]", line)[0] for line in lines if line]
    assert not {"torch", "torchvision", "torchaudio", "xformers"} & set(names)
    assert not [line for line in lines if line.startswith("-") or "<" in line or "==" in line]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["dependencies"]) == set(filter(None, lines))


def test_both_ruffs_are_the_same_version():
    dev = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    (version,) = (line.partition("==")[2] for line in dev if line.startswith("ruff=="))
    assert f"rev: v{version}\n" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_ci_runs_the_test_command_of_the_readme():
    command = "python3 sfpp_core/bootstrap.py test"
    assert command in (ROOT / "README.md").read_text()
    assert command in (ROOT / ".ci/run").read_text()


def test_no_file_names_a_folder_of_one_machine():
    folder = re.compile(rb"(?<![\w.~$}>-])/(?:home|root|work|workspace|mnt|Users)/[\w.-]")
    found = {name_of(path) for path in files_of_the_project() if folder.search(path.read_bytes())}
    assert not found
