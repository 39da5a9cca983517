"""Weights on disk: what is written is read back, and whatever else a user names is told for what it is."""

import json
import logging
import os

import pytest
import tiny
import torch
from tiny_demo import write_raw

from sfpp_core import weights_file
from sfpp_core.checkpoint import check_student, load_student, parameter_shapes, save
from sfpp_core.config import WAN_1_3B, WAN_14B, RolloutSettings, StudentConfig
from sfpp_core.errors import CheckpointError, OutputError
from sfpp_core.inspection import inspect

SETTINGS = RolloutSettings(window=12, sink=3, sink_positions="relative", shift=8.0)
PLAIN = StudentConfig(dim=128, ffn_dim=64, heads=1, layers=2, text_dim=20)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "student.safetensors"


def save_tiny(path, tensors=None, *, stage="ode", dtype=None, notes=None):
    tensors = tiny.network().state_dict() if tensors is None else tensors
    save(path, tensors, tiny.CONFIG, SETTINGS, stage=stage, dtype=dtype, notes=notes)


def write_plain(path, *, prefix="", metadata=None, **changed):
    """Write a Wan transformer as others do: no metadata of ours."""
    tensors = {**tiny.network(PLAIN).state_dict(), **changed}
    kept = {prefix + name: tensor for name, tensor in tensors.items() if tensor is not None}
    weights_file.write(path, kept, metadata or {})


# --- our own files ----------------------------------------------------------------------------------------


def test_a_student_comes_back_as_it_was_saved(path):
    network = tiny.network()
    save_tiny(path, network.state_dict())
    loaded, config, settings = load_student(path)
    assert (config, settings) == (tiny.CONFIG, SETTINGS)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize(("stored", "wanted"), [(torch.float16, torch.float32), (torch.bfloat16, None)])
def test_weights_are_stored_and_loaded_in_the_dtype_asked_for(path, stored, wanted):
    save_tiny(path, dtype=stored)
    network, _, _ = load_student(path, dtype=wanted)
    assert {parameter.dtype for parameter in network.parameters()} == {wanted or stored}


def test_the_file_tells_what_it_holds_without_its_weights(path):
    save_tiny(path, dtype=torch.float16, notes={"world": "1"})
    info = inspect(path)
    assert (info.kind, info.stage, info.causal, info.dtypes) == ("student", "ode", True, ("F16",))
    assert (info.config, info.settings, info.notes) == (tiny.CONFIG, SETTINGS, {"world": "1"})
    assert info.parameters == sum(parameter.numel() for parameter in tiny.network().parameters())


def test_core_comfyui_finds_its_mark(path):
    save_tiny(path)
    metadata = weights_file.read_header(path).metadata
    assert json.loads(metadata["config"])["transformer"]["causal_ar"] is True


def test_a_teacher_is_not_marked_as_causal(path, caplog):
    save_tiny(path, stage="teacher")
    assert "config" not in weights_file.read_header(path).metadata
    assert not inspect(path).causal
    load_student(path)
    assert "not trained to generate chunk by chunk" in caplog.text


def test_the_same_weights_give_the_same_bytes(path, tmp_path):
    save_tiny(path, notes={"b": 1, "a": 2})
    save_tiny(tmp_path / "again", notes={"b": 1, "a": 2})
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_other_readers_agree_about_the_file(path):
    from safetensors.torch import load_file

    save_tiny(path)
    tensors = load_file(path)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in tiny.network().state_dict().items())


def test_a_failed_save_leaves_the_old_file(path, monkeypatch):
    save_tiny(path)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="cannot be written: No space left"):
        save_tiny(path, stage="other")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_tensors_that_do_not_fit_are_not_saved(path):
    tensors = tiny.network().state_dict()
    del tensors["head.modulation"]
    with pytest.raises(CheckpointError, match=r"lacks head\.modulation"):
        save_tiny(path, tensors)
    with pytest.raises(CheckpointError, match="'stage', a key that is taken"):
        save_tiny(path, notes={"stage": "x"})
    assert not path.exists()


# --- Wan's own naming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
def test_a_plain_wan_is_read_under_any_prefix_and_its_sizes_are_seen(path, prefix, caplog):
    write_plain(path, prefix=prefix)
    network, config, settings = load_student(path)
    assert (config, settings) == (PLAIN, RolloutSettings())
    assert torch.equal(network.head.modulation, tiny.network(PLAIN).head.modulation)
    assert "not trained to generate chunk by chunk" in caplog.text


def test_a_wan_marked_as_causal_needs_no_warning(path, caplog):
    write_plain(path, metadata={"config": '{"transformer": {"causal_ar": true}}'})
    load_student(path)
    assert not caplog.records


@pytest.mark.parametrize("mark", ["not json", "[]", "{}", '{"transformer": 3}'])
def test_metadata_of_others_does_no_harm(path, mark, caplog):
    write_plain(path, metadata={"config": mark})
    load_student(path)
    assert caplog.record_tuples[0][1] == logging.WARNING


@pytest.mark.parametrize(("config", "parameters"), [(WAN_1_3B, 1_418_996_800), (WAN_14B, 14_288_491_584)])
def test_the_published_sizes_have_the_published_number_of_parameters(config, parameters):
    assert sum(torch.Size(shape).numel() for shape in parameter_shapes(config).values()) == parameters


# --- what does not fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"blocks.1.ffn.0.bias": None}, r"lacks blocks\.1\.ffn\.0\.bias"),
        ({"extra.weight": torch.zeros(1)}, r"has tensors that Wan 2\.1 text-to-video has not: extra\.weight"),
        ({"head.head.bias": torch.zeros(3)}, r"wrong shape: head\.head\.bias \(3,\) instead of \(64,\)"),
        ({"patch_embedding.weight": torch.zeros(128, 36, 1, 2, 2)}, "takes 36 latent channels and gives 16"),
        ({"head.modulation": torch.zeros(1, 2, 0)}, r"head\.modulation is empty"),
        ({"text_embedding.0.weight": None}, "incomplete Wan transformer"),
        ({"blocks.1.cross_attn.k_img.weight": torch.zeros(1)}, "k_img"),
    ],
)
def test_a_wan_that_does_not_fit_is_refused_by_name(path, changed, message):
    write_plain(path, **changed)
    with pytest.raises(CheckpointError, match=message):
        load_student(path)


def test_many_missing_tensors_are_counted(path):
    write_plain(
        path, **{name: None for name in tiny.network(PLAIN).state_dict() if name.startswith("blocks.1.s")}
    )
    with pytest.raises(
        CheckpointError, match=r"lacks blocks\.1\.self_attn\.q\.weight, .* and 6 more; is it complete"
    ):
        load_student(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_named(path, value):
    tensors = tiny.network().state_dict()
    tensors["blocks.2.self_attn.v.weight"][3, 4] = value
    save_tiny(path, tensors)
    with pytest.raises(
        CheckpointError, match=r"blocks\.2\.self_attn\.v\.weight holds numbers that are not finite"
    ):
        load_student(path)


def test_weights_too_large_for_the_dtype_are_told_from_damaged_ones(path):
    tensors = tiny.network().state_dict()
    tensors["head.head.weight"][0, 0] = 1e6
    save_tiny(path, tensors)
    with pytest.raises(
        CheckpointError, match=r"head\.head\.weight is too large for torch\.float16; use bfloat16"
    ):
        load_student(path, dtype=torch.float16)


def test_quantised_weights_are_refused_by_name(path):
    save_tiny(path)
    header = path.read_bytes()
    size = 8 + int.from_bytes(header[:8], "little")
    table = json.loads(header[8:size])
    table["head.modulation"]["dtype"] = "I32"
    write_raw(path, table, header[size:])
    with pytest.raises(CheckpointError, match=r"head\.modulation is I32, which is not read\. Choose"):
        check_student(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unet.lora_A.weight", "it looks like a LoRA"),
        ("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion UNet"),
        ("condition_embedder.time_proj.weight", "a part of a Wan transformer"),
        ("blocks.7.self_attn.norm_q.weight", "perhaps one of its shards; name their folder"),
        ("decoder.middle.0.weight", "a Wan autoencoder"),
        ("something", r"an unknown kind \(it begins with something\)"),
    ],
)
def test_foreign_models_are_recognised(path, name, message):
    weights_file.write(path, {name: torch.zeros(2)}, {})
    assert inspect(path).kind == ("adapter" if "lora" in name else "unknown")
    with pytest.raises(CheckpointError, match=f"is not a student; .*{message}"):
        load_student(path)


def change_ours(path, change):
    """Save a tiny student and change the table of our metadata."""
    save_tiny(path)
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])
    table = json.loads(header["__metadata__"]["sfpp"])
    header["__metadata__"]["sfpp"] = change(table) or json.dumps(table)
    write_raw(path, header, content[size:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: "not json", "'sfpp' is not JSON"),
        (lambda table: "[]", "not a JSON table"),
        (lambda table: table.pop("student") and None, "lacks the StudentConfig"),
        (lambda table: table["student"].update(layers=10**9), "says layers 1000000000, its tensors 3"),
        (lambda table: table["student"].update(dim=96), "says dim 96, its tensors 48"),
        (lambda table: table["student"].update(dim="48"), "dim is '48'"),
        (lambda table: table["student"].update(heads=5), "dim / heads must be an even number"),
        (lambda table: table["student"].update(text_length=10**12), "at most 8192 make sense"),
        (lambda table: table["student"].update(colour=1), "unknown key 'colour'"),
        (lambda table: table["student"].pop("heads") and None, "heads"),
        (lambda table: table["rollout"].update(window=1), "window is 1 latent frames"),
        (lambda table: table["rollout"].update(steps=4.5), "steps is 4.5"),
        (lambda table: table["rollout"].update(chunk=True), "chunk is True"),
    ],
)
def test_metadata_of_ours_that_is_impossible_is_refused(path, change, message):
    change_ours(path, change)
    with pytest.raises(CheckpointError, match=message):
        load_student(path)
