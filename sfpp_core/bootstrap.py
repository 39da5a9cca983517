"""First start on a fresh machine: make .venv, install what is needed, hand over.

Run as a file with any Python 3.11 or newer, from any folder::

    python3 sfpp_core/bootstrap.py generate "a red circle moves right slowly" --seconds 60 --out demo.mp4
    python3 sfpp_core/bootstrap.py test

``test`` runs the linters and the tests; every other word goes to ``python -m sfpp_core`` in .venv. Only the
standard library is used here, and nothing of the package: none of it can be imported yet.
"""

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # the folder of this file, whose modules would hide others of the same name
if sys.version_info < (3, 11):  # noqa: UP036 - an older Python must be told, not shown a traceback
    raise SystemExit(
        f"Python {sys.version_info[0]}.{sys.version_info[1]} is too old; 3.11 or newer is needed. "
        "Install one and call it by name, e.g. python3.11 sfpp_core/bootstrap.py"
    )

import contextlib
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
READY = VENV / "bootstrap.txt"
"""Requirements installed to the end, one per line."""
UNFINISHED = ROOT / ".venv.unfinished"
"""Exists while pip works; found at the start, it means that pip was killed and .venv cannot be trusted."""

TORCH_CUDA = "torch"
TORCH_CPU = "torch==2.13.0"
"""Pinned where no driver decides which versions work, so that every CPU machine has the same numbers."""
TORCH_WHEELS = "https://download.pytorch.org/whl/"
LINTERS = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["pyright"])
IN_PARALLEL = ["--numprocesses=auto", "--maxprocesses=4", "--dist=loadfile"]
"""A test takes one thread, so there is a process per core, up to what fits in memory; a file stays in one."""


def has_nvidia_gpu() -> bool:
    """Return whether an NVIDIA driver answers on this machine."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        return subprocess.run([command, "-L"], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def answers(url: str) -> bool:
    """Return whether a web page can be opened within three seconds."""
    import urllib.request  # late: only the first start asks

    try:
        with urllib.request.urlopen(url, timeout=3):
            return True
    except OSError:
        return False


def torch_index(cuda: bool, system: str) -> list[str]:
    """Return pip's options for the wanted build of torch where the registry's own wheel is the other one.

    PyPI carries the CUDA build for Linux and the CPU build for Windows and macOS; the other two builds are on
    PyTorch's index only. Pip prefers them by their local version (``2.13.0+cpu`` > ``2.13.0``). Pip would
    retry an unreachable index for minutes, so it is named only if it answers; otherwise the registry's wheel
    is taken, which works too: it is larger, or leaves the GPU idle.
    """
    folder = {("Linux", False): "cpu", ("Windows", True): "cu130"}.get((system, cuda))
    if folder is None or not answers(f"{TORCH_WHEELS}{folder}/torch/"):
        return []
    return ["--extra-index-url", TORCH_WHEELS + folder]


def requirements(testing: bool) -> list[str]:
    """Return what is needed besides torch: the lines of requirements.txt, for tests the dev extra too."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    wanted = [line for line in lines if line]
    if testing:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wanted += project["optional-dependencies"]["dev"]
    return wanted


def installed() -> set[str]:
    """Return the requirements that .venv is known to meet."""
    return set(READY.read_text().splitlines()) if READY.exists() and PYTHON.exists() else set()


def child_environment() -> dict[str, str]:
    """Return the environment for the Python in .venv: our packages importable, settings of others gone."""
    gone = ("PYTHONHOME", "PIP_PREFIX", "PIP_TARGET")
    kept = {name: value for name, value in os.environ.items() if name not in gone}
    return kept | {"PYTHONPATH": str(ROOT), "PIP_USER": "0", "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}


def say(text: str) -> None:
    """Write one line to stderr; stdout belongs to the command."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def run(words: list[str], **options: Any) -> int:
    """Run the Python of .venv to its end and return its exit code as a shell would.

    Ctrl-C reaches it directly and is its own to handle; ``KeyboardInterrupt`` follows when it has ended.
    """
    presses = []
    before = signal.signal(signal.SIGINT, lambda *_: presses.append(True))
    try:
        code = subprocess.run([str(PYTHON), *words], env=child_environment(), **options).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    if presses:
        raise KeyboardInterrupt
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let a second start wait until the first has installed everything (no lock on Windows)."""
    if os.name == "nt":
        yield
        return
    import fcntl

    with Path(__file__).open() as lock:
        with contextlib.suppress(OSError):  # some network drives cannot lock
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_venv() -> None:
    """Make .venv anew, empty but for pip."""
    if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise SystemExit(
            f"Python {version} at {sys.executable} comes without venv, which is needed to install anything. "
            f"On Debian and Ubuntu: sudo apt install python{version}-venv. Then run this command again."
        )
    # The base interpreter, since the one in .venv cannot be cleared from inside.
    base = getattr(sys, "_base_executable", "") or sys.executable
    if subprocess.run([base, "-m", "venv", "--clear", str(VENV)], stdout=sys.stderr).returncode:
        raise SystemExit(f"Could not make {VENV}; the lines above say why.")


def pip_install(*words: str) -> None:
    """Run pip in .venv; its report goes to stderr."""
    options = ["--disable-pip-version-check", "--no-input", "--no-warn-script-location"]
    code = run(["-m", "pip", "install", *options, *words], stdout=sys.stderr)
    if code:
        if code < 128:  # pip ended by itself: nothing half-done counts as installed, the next start goes on
            UNFINISHED.unlink()
        raise SystemExit("Installing stopped; pip says why above. Run the same command again to go on.")


def has_pip() -> bool:
    """Return whether .venv exists and its pip starts."""
    return PYTHON.exists() and run(["-m", "pip", "--version"], capture_output=True) == 0


def install(torch: str, wanted: list[str]) -> None:
    """Bring .venv to the wanted state, whatever state it is in."""
    before = installed()
    # A CPU build would count as "already satisfied", so a GPU that came later needs a new start.
    fresh = UNFINISHED.exists() or not has_pip() or (torch == TORCH_CUDA and TORCH_CPU in before)
    say(f"Setting up {VENV} (once; torch alone is a download of 200 MB, 3 GB with CUDA) ...")
    UNFINISHED.touch()
    if fresh:
        make_venv()
        before = set()
    if torch not in before:
        pip_install(torch, *torch_index(torch == TORCH_CUDA, platform.system()))
    pip_install(*wanted)
    READY.write_text("\n".join(sorted(before | {torch, *wanted})) + "\n")
    UNFINISHED.unlink()
    probe = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if torch == TORCH_CUDA and run(["-c", probe], capture_output=True):
        say("There is an NVIDIA GPU, but this torch cannot use it (is the driver too old?); the CPU is used.")


def prepare(testing: bool) -> None:
    """Install what is missing; when nothing is, read one small file and return."""
    with one_at_a_time():
        done = set() if UNFINISHED.exists() else installed()
        torch = TORCH_CUDA if TORCH_CUDA in done or has_nvidia_gpu() else TORCH_CPU
        wanted = requirements(testing)
        if not done >= {torch, *wanted}:
            install(torch, wanted)


def run_tests(words: list[str]) -> int:
    """Run the linters, then pytest with the given words, on all cores; return 0 if all are content."""
    failed = [" ".join(linter) for linter in LINTERS if run(["-m", *linter], cwd=ROOT)]
    if failed:
        say(f"Not content: {', '.join(failed)}. Whatever the tests say below, this run has failed.")
    return run(["-m", "pytest", *IN_PARALLEL, *words], cwd=ROOT) or int(bool(failed))


def hand_over(words: list[str]) -> int:
    """Become ``python -m sfpp_core``: signals, exit code and relative paths are the command's own."""
    # -P: modules of the folder the user happens to be in are not ours.
    words = ["-P", "-m", "sfpp_core", *words]
    if os.name != "nt":
        os.execve(PYTHON, [str(PYTHON), *words], child_environment())
    return run(words)  # Windows has no exec


def main(words: list[str]) -> int:
    """Set up, then test or hand over; return the exit code."""
    testing = words[:1] == ["test"]
    try:
        prepare(testing)
        return run_tests(words[1:]) if testing else hand_over(words)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        say(f"Could not set up {VENV}: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
