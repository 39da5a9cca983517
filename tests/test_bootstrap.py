import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sfpp_core import bootstrap

SOURCE = Path(bootstrap.__file__)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository without .venv; pip is a list of the words it was called with."""
    (tmp_path / "requirements.txt").write_text("numpy  # arrays\n\ntqdm\n")
    (tmp_path / "pyproject.toml").write_text('[project.optional-dependencies]\ndev = ["pytest"]\n')
    venv = tmp_path / ".venv"
    for name, value in {
        "ROOT": tmp_path,
        "VENV": venv,
        "PYTHON": venv / "bin/python",
        "READY": venv / "bootstrap.txt",
        "UNFINISHED": tmp_path / ".venv.unfinished",
    }.items():
        monkeypatch.setattr(bootstrap, name, value)
    calls = []

    def make_venv():
        calls.append("venv")
        shutil.rmtree(venv, ignore_errors=True)
        bootstrap.PYTHON.parent.mkdir(parents=True)
        bootstrap.PYTHON.touch()

    monkeypatch.setattr(bootstrap, "make_venv", make_venv)
    monkeypatch.setattr(bootstrap, "pip_install", lambda *words: calls.append(words))
    monkeypatch.setattr(bootstrap, "has_pip", lambda: bootstrap.PYTHON.exists())
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(bootstrap, "answers", lambda url: False)
    monkeypatch.setattr(bootstrap, "run", lambda words, **options: 0)
    return SimpleNamespace(root=tmp_path, calls=calls)


def test_the_first_start_installs_and_the_second_does_nothing(checkout):
    bootstrap.prepare(testing=False)
    assert checkout.calls == ["venv", (bootstrap.TORCH_CPU,), ("numpy", "tqdm")]
    bootstrap.prepare(testing=False)
    assert len(checkout.calls) == 3


def test_tests_add_the_dev_extra_to_what_is_there(checkout):
    bootstrap.prepare(testing=False)
    bootstrap.prepare(testing=True)
    assert checkout.calls[3:] == [("numpy", "tqdm", "pytest")]
    bootstrap.prepare(testing=False)
    assert len(checkout.calls) == 4


def test_a_new_requirement_is_installed(checkout):
    bootstrap.prepare(testing=False)
    (checkout.root / "requirements.txt").write_text("numpy\ntqdm\npillow\n")
    bootstrap.prepare(testing=False)
    assert checkout.calls[3:] == [("numpy", "tqdm", "pillow")]


def test_a_killed_install_starts_afresh(checkout):
    bootstrap.prepare(testing=False)
    bootstrap.UNFINISHED.touch()
    bootstrap.prepare(testing=False)
    assert checkout.calls[3:] == checkout.calls[:3]
    assert not bootstrap.UNFINISHED.exists()


def test_a_venv_made_by_hand_is_kept(checkout):
    bootstrap.PYTHON.parent.mkdir(parents=True)
    bootstrap.PYTHON.touch()
    bootstrap.prepare(testing=False)
    assert "venv" not in checkout.calls


def test_a_gpu_gets_the_cuda_build_even_later(checkout, monkeypatch):
    bootstrap.prepare(testing=False)
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: True)
    bootstrap.prepare(testing=False)
    assert checkout.calls[3:] == ["venv", (bootstrap.TORCH_CUDA,), ("numpy", "tqdm")]


def test_the_cuda_build_stays_when_the_gpu_goes(checkout, monkeypatch):
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: True)
    bootstrap.prepare(testing=False)
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: False)
    bootstrap.prepare(testing=False)
    assert len(checkout.calls) == 3


@pytest.mark.parametrize(("code", "expected"), [(0, True), (9, False)])
def test_the_driver_decides_whether_there_is_a_gpu(monkeypatch, code, expected):
    monkeypatch.setattr(bootstrap.Path, "exists", lambda path: False)
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: name)
    monkeypatch.setattr(bootstrap.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=code))
    assert bootstrap.has_nvidia_gpu() is expected


def test_a_loaded_driver_is_a_gpu_and_no_driver_is_none(monkeypatch):
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: None)
    monkeypatch.setattr(bootstrap.Path, "exists", lambda path: path == Path("/proc/driver/nvidia/version"))
    assert bootstrap.has_nvidia_gpu()
    monkeypatch.setattr(bootstrap.Path, "exists", lambda path: False)
    assert not bootstrap.has_nvidia_gpu()


@pytest.mark.parametrize(
    ("system", "cuda", "index"),
    [("Linux", False, "cpu"), ("Windows", True, "cu130"), ("Linux", True, None), ("Darwin", False, None)],
)
def test_only_builds_the_registry_lacks_come_from_the_torch_index(monkeypatch, system, cuda, index):
    monkeypatch.setattr(bootstrap, "answers", lambda url: True)
    words = bootstrap.torch_index(cuda, system)
    assert words == (["--extra-index-url", bootstrap.TORCH_WHEELS + index] if index else [])


def test_an_unreachable_torch_index_is_left_out(monkeypatch):
    monkeypatch.setattr(bootstrap, "answers", lambda url: False)
    assert bootstrap.torch_index(False, "Linux") == []


def test_nothing_answers_on_a_closed_port():
    assert not bootstrap.answers("http://127.0.0.1:9/")


def test_a_python_without_venv_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"apt install python3\.\d+-venv"):
        bootstrap.make_venv()


def test_a_failed_install_says_so_and_is_not_taken_for_a_killed_one(monkeypatch, tmp_path):
    monkeypatch.setattr(bootstrap, "UNFINISHED", tmp_path / "unfinished")
    for code, left in ((1, False), (137, True)):
        bootstrap.UNFINISHED.touch()
        monkeypatch.setattr(bootstrap, "run", lambda words, code=code, **options: code)
        with pytest.raises(SystemExit, match="Run the same command again"):
            bootstrap.pip_install("numpy")
        assert bootstrap.UNFINISHED.exists() is left


@pytest.mark.parametrize(
    ("failing", "code"), [(None, 0), ("ruff", 1), ("pyright", 1), ("pytest", 5)], ids=lambda value: str(value)
)
def test_a_test_run_fails_if_any_part_does(monkeypatch, failing, code):
    parts = []

    def run(words, **options):
        parts.append(words[1])
        return 5 if words[1] == failing else 0

    monkeypatch.setattr(bootstrap, "run", run)
    assert bootstrap.run_tests(["-k", "ring"]) == code
    assert parts == ["ruff", "ruff", "pyright", "pytest"]


@pytest.fixture
def stub(tmp_path):
    """A set-up repository whose command reports how it was called; returns the path of its bootstrap.py."""
    core = tmp_path / "a repository" / "sfpp_core"
    core.mkdir(parents=True)
    root = core.parent
    shutil.copy(SOURCE, core)
    (core / "subprocess.py").write_text("raise SystemExit('a sibling module hid the standard library')\n")
    (core / "__init__.py").touch()
    (core / "__main__.py").write_text("import os, sys\nprint(os.getcwd(), sys.argv[1:])\nsys.exit(7)\n")
    (root / "requirements.txt").touch()
    (root / ".venv/bin").mkdir(parents=True)
    (root / ".venv/bin/python").symlink_to(sys.executable)
    (root / ".venv/bootstrap.txt").write_text(f"{bootstrap.TORCH_CPU}\n{bootstrap.TORCH_CUDA}\n")
    return core / "bootstrap.py"


@pytest.mark.skipif(os.name == "nt", reason="the stub is a symbolic link")
def test_the_command_gets_its_words_its_folder_and_returns_its_exit_code(stub, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    words = ["generate", "a red circle", "--out", "demo.mp4"]
    result = subprocess.run(
        [sys.executable, stub, *words], cwd=elsewhere, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 7, result.stderr
    assert result.stdout == f"{elsewhere} {words}\n"
    assert result.stderr == ""


def test_ctrl_c_is_left_to_the_child_and_reported_when_it_has_ended(monkeypatch):
    monkeypatch.setattr(bootstrap, "PYTHON", Path(sys.executable))
    program = "import os, signal; os.kill(os.getppid(), signal.SIGINT)"
    with pytest.raises(KeyboardInterrupt):
        bootstrap.run(["-c", program])
    assert bootstrap.run(["-c", "import sys; sys.exit(3)"]) == 3
