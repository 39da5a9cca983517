"""What the command line refuses: each mistake has its own message and exit code, and no traceback."""

import contextlib
import subprocess
from pathlib import Path

import pytest
import tiny
import tiny_demo
import torch
from tiny_demo import PROMPT, command, refused

from sfpp_core import cli, demo, plan, weights_file
from sfpp_core.checkpoint import save


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_demo.write(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "video.mp4"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--height", "481"], "height is 481; it must be a multiple of 16, e.g. 480."),
        (["--width", "0"], "width is 0; it must be a multiple of 16"),
        (["--height", "-16"], "height is -16"),
        (["--seconds", "0"], "seconds is 0; ask for more than 0, e.g. 60."),
        (["--seconds", "-1"], "seconds is -1; ask for more than 0"),
        (["--seconds", "1e9"], "seconds is 1e+09; the longest video is a week"),
        (["--seconds", "nan"], "seconds is nan; ask for more than 0"),
        (["--seconds", "inf"], "seconds is inf"),
        (["--seconds", "soon"], "argument --seconds: invalid float value: 'soon'"),
        (["--window", "2"], "window is 2 latent frames, smaller than a chunk of 3; use at least 3"),
        (["--window", "20"], "window is 20 latent frames; it must be a multiple of the chunk, 3, e.g. 21."),
        (["--sink", "9"], "sink is 9 latent frames and leaves no room for a chunk of 3 in a window of 9"),
        (["--sink", "-3"], "sink is -3"),
        (["--window", str(3 * 10**10)], "of memory and there is"),
        (["--steps", "0"], "steps is 0; it must be from 1 to 100"),
        (["--shift", "0"], "shift is 0.0; it must be above 0"),
        (["--enlarge", "0"], "enlarge is 0; at 32x32 use 1 to 256"),
        (["--enlarge", "1000"], "enlarge is 1000; at 32x32 use 1 to 256"),
        (["--width", "8208"], "width is 8208; players take at most 8192 pixels, use fewer."),
        (["--height", "16384", "--enlarge", "4"], "height is 16384; players take at most 8192 pixels"),
        (["--threads", "0"], "threads is 0; use at least 1"),
        (["--attention", "fast"], "attention is 'fast'; use one of auto, probe, sdpa, matmul"),
        (
            ["--attention", "flash", "--device", "cpu"],
            "attention 'flash' needs a CUDA GPU and bfloat16 or float16; use 'auto'.",
        ),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--sink-positions", "late"], "invalid choice: 'late'"),
        (["--sed", "3"], "unrecognized arguments: --sed"),
        (["--student", "none.safetensors"], "none.safetensors does not exist; check the path."),
        (["--decoder", "none.safetensors"], "none.safetensors does not exist"),
        (["--out", "video.avi"], "the output is 'video.avi'; it must be a video (name.mp4)"),
        (["--out", "none/video.mp4"], "the folder none does not exist"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    files, out, capsys, monkeypatch, options, expected
):
    monkeypatch.setattr(cli, "load", None)
    refused(capsys, command(files, out, *options), expected)
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(files, out, capsys):
    refused(capsys, command(files, out, "--device", "cuda"), "PyTorch finds no NVIDIA GPU here; use 'cpu'")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", "the prompt is empty"),
        ("  \n", "the prompt is empty"),
        ("dogs!", "no word of the prompt 'dogs!'"),
    ],
)
def test_a_prompt_that_says_nothing_is_refused_with_what_is_known(files, out, capsys, prompt, expected):
    refused(capsys, command(files, out, prompt=prompt), expected, "colours: red, blue")


def test_files_that_are_no_student_are_refused(files, out, capsys, tmp_path):
    bad = tmp_path / "bad.safetensors"
    content = files.student.read_bytes()
    cases = {
        content[:-1000]: f"bad.safetensors is cut short: {len(content) - 1000:,} of {len(content):,} bytes",
        b"This is a letter.": "bad.safetensors is not a safetensors file; it looks like a text file",
        files.words.read_bytes(): "bad.safetensors is not a student; it looks like the demo's words",
    }
    for bad_content, expected in cases.items():
        bad.write_bytes(bad_content)
        refused(capsys, command(files, out, "--student", bad), expected)
    weights_file.write(bad, {"unet.lora_A.weight": torch.zeros(1)}, {})
    refused(capsys, command(files, out, "--student", bad), "is not a student; it looks like a LoRA")


def test_weights_that_are_not_numbers_are_refused(files, out, capsys, tmp_path):
    bad, tensors = tmp_path / "bad.safetensors", tiny.network().state_dict()
    tensors["head.head.weight"][0, 0] = float("nan")
    save(bad, tensors, tiny.CONFIG, tiny_demo.SETTINGS, stage="ode")
    refused(
        capsys, command(files, out, "--student", bad), "head.head.weight holds numbers that are not finite"
    )
    assert not out.exists()


def test_a_wan_student_needs_its_text_encoder_and_its_decoder(files, out, capsys, tmp_path):
    config = tiny.StudentConfig(dim=128, ffn_dim=64, heads=1, layers=1, text_dim=4096)
    wan = tmp_path / "wan.safetensors"
    weights_file.write(wan, tiny.network(config).state_dict(), {})
    words = command(files, out, "--student", wan)
    refused(capsys, words, "the word encoder makes 7 embeddings of 20 and the student hears 512 of 4096")
    for option in ("--words", "--decoder"):
        del words[words.index(option) : words.index(option) + 2]
    refused(capsys, words, "hears 512 embeddings of 4096, made by umT5; name the text encoder with --text-en")


def test_a_demo_without_its_files_is_told(out, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "FOLDER", tmp_path)
    refused(capsys, ["generate", PROMPT, "--out", str(out)], "the embedded demo lacks student.safetensors")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write to")
def test_a_folder_that_cannot_be_written_is_refused(files, capsys):
    refused(capsys, command(files, "/proc/video.mp4"), "the folder /proc cannot be written to")


@contextlib.contextmanager
def small_disk(folder, size):
    """Mount a small disk on ``folder``, where that is permitted."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_refused_or_ends_the_run(files, capsys, tmp_path, monkeypatch):
    out, options = tmp_path / "video.mp4", {"seconds": "20", "enlarge": "8"}
    with small_disk(tmp_path, "64k"):
        refused(capsys, command(files, out, **options), "MB free and the video needs about")
        monkeypatch.setattr(plan, "forecast_bytes", lambda *_, **__: 0)
        refused(capsys, command(files, out, **options), str(out), "free some room", code=1)
