"""Text embeddings on disk: found again exactly, never of another encoder, never trusted when damaged."""

import itertools

import pytest
import tiny_umt5 as umt5
import torch
from safetensors.torch import load_file, save_file

from sfpp_core import text_cache, umt5_tokenizer
from sfpp_core.errors import OutputError, SFPPError
from sfpp_core.text_cache import default_folder, encode_prompts
from sfpp_core.text_encoder import TextEncoder, load_text_encoder
from sfpp_core.umt5_files import UMT5File

LENGTH = 40
PROMPTS = ("a cat surfs a wave", "", "a cat surfs a wave", "the sea is cold &amp; grey")


@pytest.fixture(scope="module")
def spiece():
    return umt5.sentencepiece_model()


@pytest.fixture
def path(tmp_path, spiece):
    return umt5.write_single(tmp_path / "umt5.safetensors", umt5.state(umt5.model()), spiece)


@pytest.fixture
def encode(path, tmp_path):
    """Return a function that encodes with the encoder and the cache of the test."""

    def run(prompts=PROMPTS, path=path, **settings):
        return encode_prompts(path, prompts, **{"cache": tmp_path / "kept", "text_length": LENGTH} | settings)

    return run


@pytest.fixture
def encoded(monkeypatch):
    """Return a list that grows by the texts of every pass through the encoder."""
    passes, rows = [], TextEncoder.rows

    def watched(self, texts):
        passes.append([text.prompt for text in texts])
        return rows(self, texts)

    monkeypatch.setattr(TextEncoder, "rows", watched)
    return passes


def files(folder):
    return sorted((folder / "kept").glob("*"))


def test_the_cache_gives_back_exactly_what_was_encoded(tmp_path, path, encode, encoded):
    plain = load_text_encoder(path, text_length=LENGTH)(PROMPTS)
    encoded.clear()
    first, again = encode(), encode()
    assert torch.equal(plain, first)
    assert torch.equal(plain, again)
    assert encoded == [["a cat surfs a wave", "", "the sea is cold & grey"]]  # one pass, equal prompts once
    assert len(files(tmp_path)) == 3


def test_without_a_cache_nothing_is_written(tmp_path, encode, encoded):
    assert torch.equal(encode(cache=None), encode(cache=None))
    assert len(encoded) == 2
    assert files(tmp_path) == []


def test_only_what_is_new_is_encoded(encode, encoded):
    encode(["a cat"])
    encode(["a dog", "a cat"])
    assert encoded == [["a cat"], ["a dog"]]


def test_kept_prompts_need_neither_weights_nor_libraries(monkeypatch, path, encode):
    first = encode()
    monkeypatch.setattr(umt5_tokenizer, "find_spec", lambda name: None if name != "ftfy" else True)
    for method in ("rows", "layer"):
        monkeypatch.setattr(UMT5File, method, None)
    assert torch.equal(encode(), first)
    with pytest.raises(SFPPError, match="umT5 needs transformers"):
        encode(["a dog"])


def test_whatever_changes_the_numbers_changes_the_name(tmp_path, spiece, encode, encoded):
    other = umt5.state(umt5.model())
    other["encoder.block.1.layer.0.layer_norm.weight"] *= 1.01
    other = umt5.write_single(tmp_path / "other.safetensors", other, spiece)
    moved = umt5.write_tokenizer(tmp_path / "moved", spiece)
    changed = umt5.write_tokenizer_json(tmp_path / "changed", spiece)
    encode(["a cat"])
    encode(["a cat"], tokenizer=moved)
    assert len(encoded) == 1
    for settings in ({"dtype": torch.bfloat16}, {"text_length": 41}, {"path": other}, {"tokenizer": changed}):
        encoded.clear()
        encode(["a cat"], **settings)
        encode(["a cat"], **settings)
        assert len(encoded) == 1, settings
    assert len(files(tmp_path)) == 5


def test_the_encoder_is_known_again_under_another_name(tmp_path, path, encode, encoded):
    encode(["a cat"])
    path.rename(tmp_path / "renamed.safetensors")
    encode(["a cat"], path=tmp_path / "renamed.safetensors")
    assert len(encoded) == 1


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-5])


def poisoned(file):
    rows = load_file(file)["embeddings"] * torch.nan
    save_file({"embeddings": rows}, file, metadata={"prompt": "a cat"})


def of_another_prompt(file):
    save_file(load_file(file), file, metadata={"prompt": "a dog"})


def of_another_width(file):
    save_file({"embeddings": torch.ones(3, 23)}, file, metadata={"prompt": "a cat"})


def with_more_tensors(file):
    save_file(load_file(file) | {"more": torch.ones(1)}, file, metadata={"prompt": "a cat"})


@pytest.mark.parametrize(
    "damage",
    [cut_short, poisoned, of_another_prompt, of_another_width, with_more_tensors],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_file_is_warned_of_and_made_again(tmp_path, encode, encoded, caplog, damage):
    first = encode(["a cat"])
    (file,) = files(tmp_path)
    damage(file)
    assert torch.equal(encode(["a cat"]), first)
    assert "are of no use and made again" in caplog.text
    caplog.clear()
    assert torch.equal(encode(["a cat"]), first)
    assert (len(encoded), caplog.text) == (2, "")


def test_a_long_prompt_is_warned_of_each_time(encode, caplog):
    for _ in range(2):
        caplog.clear()
        encode(["the wind is strong " * 9], text_length=8)
        assert "only the first 7 count" in caplog.text


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_encoded(tmp_path, encode, encoded):
    (tmp_path / "kept").write_text("a file")
    with pytest.raises(OutputError, match=r"kept cannot keep text embeddings.*name another folder"):
        encode()
    assert encoded == []


def test_a_full_disk_is_warned_of_and_the_embeddings_are_there(monkeypatch, tmp_path, encode, caplog):
    def full(*_):
        raise OutputError("no space left")

    monkeypatch.setattr(text_cache, "write", full)
    assert torch.equal(encode(), encode(cache=None))
    assert "are not kept: no space left" in caplog.text


@pytest.mark.parametrize(
    ("platform", "variable", "end"),
    [("linux", "XDG_CACHE_HOME", ""), ("win32", "LOCALAPPDATA", ""), ("darwin", "HOME", "Library/Caches")],
)
def test_the_folder_of_this_user_is_where_caches_are(monkeypatch, tmp_path, platform, variable, end):
    monkeypatch.setattr(text_cache.sys, "platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))
    assert default_folder() == tmp_path / end / "selfforcing-plusplus/text"


def test_names_differ_for_all_prompts(tmp_path, encode):
    prompts = ["".join(letters) for letters in itertools.product("ab ", repeat=3)]
    encode(prompts)
    assert len(files(tmp_path)) == len({" ".join(prompt.split()) for prompt in prompts})
