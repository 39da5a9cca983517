"""The files of a demo: its words, its decoder, and all three together."""

from pathlib import Path

import pytest
import tiny
import tiny_demo
import torch

from sfpp_core import demo, weights_file
from sfpp_core.checkpoint import load_student, load_words, save_words
from sfpp_core.config import DEMO
from sfpp_core.decoder import load_decoder
from sfpp_core.errors import CheckpointError
from sfpp_core.inspection import inspect
from sfpp_core.words import WordEncoder


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


@pytest.fixture(scope="module")
def demo_files(tmp_path_factory):
    return tiny_demo.write(tmp_path_factory.mktemp("demo"))


def test_words_come_back_with_their_vocabulary(path):
    encoder = WordEncoder(("red", "blue"), text_dim=6, text_length=4)
    save_words(path, encoder, groups={"colours": ("red", "blue")})
    loaded, groups = load_words(path)
    assert groups == {"colours": ("red", "blue")}
    assert loaded.vocabulary == ("red", "blue")
    assert torch.allclose(loaded(["blue red"]), encoder(["blue red"]), atol=1e-3)
    assert not loaded.table.weight.requires_grad


def test_a_demo_is_loaded_from_its_three_files(demo_files):
    loaded = demo.load(demo_files.student.parent)
    assert loaded.config == tiny.CONFIG
    assert loaded.groups == tiny_demo.GROUPS
    assert loaded.words(["a red circle"]).shape == (1, tiny.CONFIG.text_length, tiny.CONFIG.text_dim)
    assert loaded.autoencoder.decode(torch.zeros(1, 16, 3, 4, 4)).shape == (1, 9, 3, 32, 32)


@pytest.mark.parametrize("name", [demo.STUDENT, demo.WORDS, demo.AUTOENCODER])
def test_a_demo_that_lacks_a_file_says_which(tmp_path, name):
    tiny_demo.write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"the embedded demo lacks {name}"):
        demo.load(tmp_path)


def test_files_of_the_demo_are_not_mistaken_for_each_other(demo_files):
    with pytest.raises(CheckpointError, match="is not a student; it looks like the demo's words"):
        load_student(demo_files.words)
    with pytest.raises(CheckpointError, match="is not a word encoder; it looks like a student"):
        load_words(demo_files.student)
    with pytest.raises(CheckpointError, match="is not a decoder; it looks like a student"):
        load_decoder(demo_files.student)


def test_a_decoder_is_loaded_by_what_its_file_holds(demo_files, tmp_path):
    other = tmp_path / "anything.bin"
    other.write_bytes(Path(demo_files.decoder).read_bytes())
    decoder = load_decoder(other)
    assert decoder.decode(torch.zeros(1, 16, 1, 4, 4)).shape == (1, 1, 3, 32, 32)


def test_a_damaged_decoder_is_refused(demo_files, path):
    from safetensors.torch import load_file

    tensors, header = load_file(demo_files.decoder), weights_file.read_header(demo_files.decoder)
    tensors["decoder.enter.weight"][0] = float("nan")
    weights_file.write(path, tensors, header.metadata)
    with pytest.raises(CheckpointError, match=r"decoder\.enter\.weight holds numbers that are not finite"):
        load_decoder(path)
    weights_file.write(path, tensors, {"sfpp_decoder": '{"coarse": 1000000000}'})
    with pytest.raises(CheckpointError, match="coarse is 1000000000; save the file again"):
        load_decoder(path)
    path.write_bytes(Path(demo_files.decoder).read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="is cut short"):
        load_decoder(path)


def test_the_embedded_demo_stays_small():
    assert sum(path.stat().st_size for path in demo.FOLDER.rglob("*") if path.is_file()) <= 25_000_000


def test_the_embedded_student_names_its_stage_and_its_settings():
    info = inspect(demo.file(demo.STUDENT))
    assert info.kind == "student" and info.causal
    assert info.stage
    assert info.settings is not None and info.settings.chunk == 3
    assert info.config == DEMO
