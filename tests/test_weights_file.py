"""One safetensors file: what is whole, what is damaged, and what is something else."""

import pytest
import tiny
import tiny_demo
import torch
from tiny_demo import write_raw

from sfpp_core.checkpoint import load_student, save
from sfpp_core.errors import CheckpointError
from sfpp_core.inspection import inspect
from sfpp_core.weights import open_weights
from sfpp_core.weights_file import _header_bytes, write


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"Dear student,\nthis is a letter.\n", "looks like a text file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "looks like a PNG picture"),
        (b"PK\x03\x04" + bytes(40), "a PyTorch pickle or zip archive that is cut short"),
        (b"GGUF" + bytes(40), "a GGUF file"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\0\0\0\x20ftypisom" + bytes(40), "an MP4 video"),
        (bytes(range(200)), "looks like another kind of file"),
        (b"abc", "looks like a text file"),
        (b"\x10\0\0\0\0\0\0\0{", "is not a safetensors file"),
    ],
)
def test_files_that_are_no_model_are_named_for_what_they_are(path, content, message):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_student(path)


def test_paths_that_are_no_file_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder without weights; name the"):
        load_student(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist; check the path"):
        load_student(tmp_path / "none.safetensors")


@pytest.mark.parametrize("missing", [1, 5000, 400_000])
def test_a_truncated_file_is_told_from_a_foreign_one(path, missing):
    save(path, tiny.network().state_dict(), tiny.CONFIG, tiny_demo.SETTINGS, stage="ode")
    content = path.read_bytes()
    path.write_bytes(content[:-missing])
    with pytest.raises(CheckpointError, match=f"is cut short: .* of {len(content):,} bytes"):
        load_student(path)
    path.write_bytes(content[:500])
    with pytest.raises(CheckpointError, match="is cut short inside its header, at 500 bytes"):
        load_student(path)
    path.write_bytes(content + b"more")
    with pytest.raises(CheckpointError, match="4 bytes too many"):
        load_student(path)


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        b"{nonsense",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {}}',
        b'{"a":' + b"[" * 100_000,
        {"__metadata__": []},
        {"__metadata__": {"a": 1}},
        {"a": {**F32, "dtype": "Q7"}},
        {"a": {**F32, "dtype": ["F32"]}},
        {"a": {**F32, "shape": [-1]}},
        {"a": {**F32, "shape": [True]}},
        {"a": {**F32, "shape": "1"}},
        {"a": {**F32, "shape": [2**70]}},
        {"a": {**F32, "data_offsets": [0]}},
        {"a": {**F32, "data_offsets": [4, 0]}},
        {"a": {**F32, "data_offsets": [0.0, 4.0]}},
        {"a": F32, "b": F32},
        {"a": {**F32, "data_offsets": [4, 8]}},
    ],
    ids=range(17),
)
def test_hostile_headers_are_refused(path, header):
    write_raw(path, header, bytes(4))
    with pytest.raises(CheckpointError, match="damaged header"):
        inspect(path)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_begins_like_a_pickle_is_a_header(path, length):
    tensor = torch.arange(6.0)
    plain = len(_header_bytes({"numbers": tensor}, {"note": ""})) - 8
    write(path, {"numbers": tensor}, {"note": "x" * (length - plain)})
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    assert torch.equal(open_weights(path).tensor("numbers"), tensor)
