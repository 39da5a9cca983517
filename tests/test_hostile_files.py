"""Files that are wrong, cut short, mixed up or made to do harm: each ends in an error of its own."""

import json
import os
import pickle
import random
import subprocess
import zipfile

import layouts
import pytest
import torch
from layouts import CONFIG, write, write_pickle, write_shards

from sfpp_core import cli
from sfpp_core.checkpoint import load_student
from sfpp_core.errors import CheckpointError
from sfpp_core.weights import open_weights


class Command:
    """An object whose pickle, when it is loaded, calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# --- pickles that bring code along ------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("function", "named"),
    [
        (os.system, "posix.system"),
        (eval, "eval"),
        (subprocess.Popen, "Popen"),
        (torch.hub.load, "torch.hub.load"),
    ],
    ids=["system", "eval", "Popen", "hub"],
)
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, monkeypatch, function, named, old):
    monkeypatch.chdir(tmp_path)
    harm = Command(function, {eval: "open('harm', 'w')"}.get(function, "touch harm"))
    state = {"generator": {**layouts.tensors(), "blocks.0.modulation": harm}}
    path = write_pickle(tmp_path / "model", state, old=old)
    with pytest.raises(CheckpointError, match=rf"loading it would call .*{named}\. Nothing of it was run"):
        load_student(path)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_bare_pickle_runs_nothing_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").write_bytes(pickle.dumps(Command(os.system, "touch harm"), protocol=2))
    with pytest.raises(CheckpointError, match=r"would call posix\.system"):
        load_student(tmp_path / "model")
    assert not (tmp_path / "harm").exists()


def test_the_same_pickle_would_have_run_elsewhere(tmp_path, monkeypatch):
    """What makes the tests above worth something."""
    monkeypatch.chdir(tmp_path)
    path = write_pickle(tmp_path / "model", Command(os.system, "touch harm"))
    torch.load(path, weights_only=False)
    assert (tmp_path / "harm").exists()


# --- pickles that are wrong -------------------------------------------------------------------------------


def zipped(path, contents, *, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    return path


def nested(depth):
    table = {"a": torch.zeros(1)}
    for _ in range(depth):
        table = {"a": table}
    return table


def compressed(path):
    """Write a training state and compress it, as an archiver would."""
    write_pickle(path, {"generator": layouts.tensors()})
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    return zipped(path, contents, compression=zipfile.ZIP_DEFLATED)


def with_directory(path, changes):
    """Write a training state and change its archive's last entry of contents: bytes by their offset."""
    data = bytearray(write_pickle(path, layouts.tensors()).read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    for offset, byte in changes.items():
        data[entry + offset] = byte
    path.write_bytes(data)


PICKLES = {
    "of a later zip": (lambda p: with_directory(p, {6: 250}), "cut short or damaged .zip file version"),
    "names that are no text": (
        # A flag says that the name is UTF-8, and its first byte cannot be.
        lambda p: with_directory(p, {9: 8, 46: 255}), "cut short or damaged .*can't decode",
    ),
    "cut short": (lambda p: cut(write_pickle(p, layouts.tensors()), -300), "zip archive that is cut short"),
    "old, cut short": (
        lambda p: cut(write_pickle(p, layouts.tensors(), old=True), -300), "a damaged PyTorch pickle",
    ),
    "old, a few bytes": (lambda p: p.write_bytes(b"\x80\x02abc"), "a damaged PyTorch pickle"),
    "another archive": (lambda p: zipped(p, {"letter.txt": "Dear"}), "archive that holds no PyTorch weights"),
    "two pickles": (lambda p: zipped(p, {"a/data.pkl": "", "b/data.pkl": ""}), "holds no PyTorch weights"),
    "compressed": (compressed, "a compressed zip archive; unpack it"),
    "garbage inside": (
        lambda p: zipped(p, {"a/data.pkl": b"\0" * 99, "a/version": "3"}), "a damaged PyTorch pickle",
    ),
    "a whole module": (
        lambda p: write_pickle(p, torch.nn.Linear(2, 2)), "would call torch.nn.modules.linear.Linear",
    ),
    "a list": (lambda p: write_pickle(p, [torch.zeros(1)]), "holds a list, not tensors by name"),
    "a tensor": (lambda p: write_pickle(p, torch.zeros(1)), "holds a Tensor, not tensors by name"),
    "numbers alone": (lambda p: write_pickle(p, {"step": 3}), "without a tensor in it"),
    "nothing": (lambda p: write_pickle(p, {}), "without a tensor in it"),
    "too deep": (lambda p: write_pickle(p, nested(12)), "nests tables deeper than 8"),
    "two of one name": (
        lambda p: write_pickle(p, {"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)}),
        "two tensors of the name 'a.b'",
    ),
    "more than it holds": (
        lambda p: write_pickle(p, {"a": torch.zeros(1).expand(10**12)}),
        "a claims .1000000000000,., more than the",
    ),
    "sparse": (lambda p: write_pickle(p, {"a": torch.eye(3).to_sparse()}), "a is no plain tensor"),
    "without data": (lambda p: write_pickle(p, {"a": torch.zeros(3, device="meta")}), "a is no plain tensor"),
    "complex": (
        lambda p: write_pickle(p, changed(head__modulation=torch.zeros(1, 2, 128, dtype=torch.cfloat))),
        "head.modulation is complex64, which is not read",
    ),
    "an adapter": (
        lambda p: write_pickle(p, {"generator_lora": {"self_attn.q.lora_A.weight": torch.zeros(4, 1536)}}),
        "a LoRA of rank 4 for Wan2.1-T2V-1.3B, which changes a model",
    ),
    "a judge": (
        lambda p: write_pickle(p, {"critic": layouts.prefixed(layouts.tensors(), "model.")}),
        "is not a student",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_that_are_wrong_say_how(tmp_path, case):
    make, message = PICKLES[case]
    make(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message):
        load_student(tmp_path / "model")


# --- tensors that do not make a model ---------------------------------------------------------------------


def changed(**tensors):
    """Return the small Wan with some tensors replaced, added, or taken away (``None``)."""
    state = {**layouts.tensors(), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def scaled(**tensors):
    kept, _ = layouts.new_fp8(layouts.tensors())
    kept |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in kept.items() if tensor is not None}


NAN = torch.full((1, 2, 128), float("nan"))
BYTES = torch.zeros(64, 64, dtype=torch.uint8)
STATES = {
    "not finite": (lambda: changed(head__modulation=NAN), "head.modulation holds numbers that are not fin"),
    "not finite in 8 bits": (
        lambda: changed(blocks__0__ffn__0__weight=NAN[0, :1].repeat(64, 1).to(torch.float8_e4m3fn)),
        "blocks.0.ffn.0.weight holds numbers that are not finite",
    ),
    "missing": (lambda: changed(head__head__bias=None), "lacks head.head.bias; is it complete"),
    "shape": (
        lambda: changed(blocks__1__ffn__2__bias=torch.zeros(7)),
        r"blocks.1.ffn.2.bias \(7,\) instead of \(128,\)",
    ),
    "rank": (
        lambda: changed(patch_embedding__weight=torch.zeros(128, 16)),
        r"wrong shape: patch_embedding.weight \(128, 16\) instead of \(128, 16, 1, 2, 2\)",
    ),
    "image model": (
        lambda: changed(img_emb__proj__0__weight=torch.zeros(1280)),
        "has not: img_emb.proj.0.weight; choose another",
    ),
    "a layer twice": (
        lambda: {**layouts.tensors(), "_orig_mod.head.modulation": torch.zeros(1, 2, 128)},
        "has head.modulation twice, as _orig_mod.head.modulation and head.modulation",
    ),
    "two namings": (
        lambda: layouts.tensors() | layouts.in_diffusers(layouts.tensors()),
        r"mixes the names of Wan \(blocks.0.cross_attn.* and of diffusers \(blocks.0.attn1",
    ),
    "another model beside it": (
        lambda: changed(double_blocks__0__weight=torch.zeros(2)), "has not: double_blocks.0.weight",
    ),
    "fp8 without its scale": (
        lambda: scaled(blocks__0__ffn__0__weight_scale=None),
        "blocks.0.ffn.0.weight is F8_E4M3 and lacks its scale",
    ),
    "a scale alone": (
        lambda: scaled(blocks__9__ffn__0__weight_scale=torch.ones(())),
        "has blocks.9.ffn.0.weight_scale but lacks blocks.9.ffn.0.weight",
    ),
    "a scale for parts of rows": (
        lambda: scaled(blocks__0__ffn__0__weight_scale=torch.ones(64, 4)),
        "one scale for all rows, or one for each",
    ),
    "a scale of a plain weight": (
        lambda: scaled(blocks__0__ffn__0__weight=torch.ones(64, 128)), "has a scale but is F32, not fp8",
    ),
    "a scale that is not finite": (
        lambda: scaled(blocks__0__ffn__0__weight_scale=torch.tensor(float("inf"))),
        "blocks.0.ffn.0.weight holds numbers that are not finite",
    ),
    "nvfp4": (
        lambda: scaled(blocks__0__ffn__0__weight=BYTES, blocks__0__ffn__0__weight_scale_2=torch.ones(())),
        r"blocks.0.ffn.0.weight is nvfp4 \(U8\), which is not read. Choose the same model in bf16",
    ),
    "int8": (lambda: changed(blocks__0__ffn__0__weight=BYTES.to(torch.int8)), "is I8, which is not read"),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_tensors_that_make_no_student_are_named(tmp_path, case):
    make, message = STATES[case]
    with pytest.raises(CheckpointError, match=message):
        load_student(write(tmp_path / "model", make()), dtype=torch.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 7 + b"\x7f{" + b"x" * 99, "is not a safetensors file"),
        ((90_000_000).to_bytes(8, "little") + b"{" + b"x" * 99, "cut short inside its header, at 108 bytes"),
        (b"", "is empty"),
        (b"GGUF\x03\0\0\0" + bytes(40), "read by ComfyUI's GGUF loader alone; take the model as safetensors"),
        (b"{}", "is not an index of shards"),
        (b"{nonsense", "is not an index of shards"),
        (b'{"weight_map": []}', "is not an index of shards"),
        (b'{"weight_map": {"a": 3}}', "is not an index of shards"),
        (b'{"a": ' * 30_000, "is not an index of shards"),
        (b'{"weight_map": {"a": "../model"}}', "names '../model', which is no weights file beside it"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "names '/etc/passwd', which is no weights file beside it"),
        (b'{"weight_map": {"a": ".."}}', r"names '\.\.', which is no weights file beside it"),
        (b'{"weight_map": {"a": "model"}}', "names 'model', which is no weights file beside it"),
        (b'{"weight_map": {"a": "other"}}', "other does not exist; model names it: get all shards, 1 in"),
    ],
)  # fmt: skip
def test_contents_that_are_no_weights_are_told_apart(tmp_path, content, message):
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_student(tmp_path / "model")


# --- shards and folders -----------------------------------------------------------------------------------


def shard(index, number):
    return sorted(index.parent.glob("*.safetensors"))[number]


def test_a_shard_that_is_missing_is_named(tmp_path):
    index = write_shards(tmp_path, layouts.tensors())
    shard(index, 1).unlink()
    with pytest.raises(
        CheckpointError, match=r"00002-of-00003.safetensors does not exist; .* get all shards, 3"
    ):
        load_student(tmp_path)


def test_a_shard_that_is_cut_short_is_named(tmp_path):
    cut(shard(write_shards(tmp_path, layouts.tensors()), 1), -5)
    with pytest.raises(CheckpointError, match=r"00002-of-00003.safetensors is cut short"):
        load_student(tmp_path)


def test_a_shard_alone_is_not_taken_for_the_model(tmp_path):
    index = write_shards(tmp_path, layouts.tensors(), shards=40)
    with pytest.raises(CheckpointError, match=r"lacks|one of its shards; name their folder|not a student"):
        load_student(shard(index, 0))


def test_shards_of_two_models_are_not_mixed(tmp_path):
    index = write_shards(tmp_path / "a", layouts.tensors())
    bigger = layouts.tensors(CONFIG.__class__(dim=256, ffn_dim=64, heads=2, layers=2, text_dim=20))
    shard(write_shards(tmp_path / "b", bigger), 1).rename(shard(index, 1))
    with pytest.raises(CheckpointError, match=r"tensors of the wrong shape: .* instead of \(128"):
        load_student(index)
    other = write_shards(tmp_path / "c", layouts.in_diffusers(layouts.tensors()))
    shard(other, 1).rename(shard(index, 1))
    with pytest.raises(CheckpointError, match=r"00002-of-00003.*shards of two models may be mixed"):
        load_student(index)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    index = write_shards(tmp_path, layouts.tensors())
    table = json.loads(index.read_text())
    table["weight_map"]["extra.weight"] = shard(index, 2).name
    index.write_text(json.dumps(table))
    with pytest.raises(
        CheckpointError, match=r"00003-of-00003.safetensors lacks extra.weight, which the index"
    ):
        load_student(index)


def test_folders_must_hold_one_model(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder without weights"):
        load_student(tmp_path)
    for name in ("b.safetensors", "a.safetensors"):
        write(tmp_path / name, layouts.tensors())
    with pytest.raises(CheckpointError, match=r"several weights: a.safetensors, b.safetensors; name the one"):
        load_student(tmp_path)


# --- anything at all --------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
def test_damaged_pickles_end_in_an_error_or_in_weights(tmp_path, old):
    path = write_pickle(tmp_path / "model", {"generator": {"a": torch.zeros(3), "b": torch.ones(2)}}, old=old)
    whole, dice, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        path.write_bytes(damaged)
        try:
            assert all(tensor.numel() < 1000 for _, tensor in open_weights(path).read())
        except CheckpointError:
            refused += 1
    assert 20 < refused < 100


def test_the_command_line_shows_the_error_and_no_traceback(tmp_path, capsys):
    path = write_pickle(tmp_path / "model", {"a": Command(os.system, "true")})
    assert cli.main(["info", str(path)]) == 2
    said = capsys.readouterr().err
    assert "would call posix.system" in said and "Traceback" not in said
