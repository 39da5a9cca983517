"""Students of every layout become models of the host: by itself where it can, else from their tensors."""

import json
from types import SimpleNamespace

import pack
import pytest
import torch
from safetensors.torch import save_file

from sfpp_core.config import StudentConfig
from sfpp_core.network import WanNetwork, initialise

student_file = pack.module("nodes.student_file")
host = pack.module("nodes._host")
errors = pack.module("sfpp_core.errors")
CONFIG = StudentConfig(dim=128, ffn_dim=64, heads=1, layers=1, text_dim=16, freq_dim=8)


@pytest.fixture
def wan():
    network = WanNetwork(CONFIG)
    initialise(network, seed=0)
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


@pytest.fixture
def loaded(monkeypatch):
    """Return what was handed to the host: a path, or tensors."""
    seen = SimpleNamespace(path=None, tensors=None, settings=None)

    def attach(model, settings):
        seen.settings = settings
        return model

    monkeypatch.setattr(
        host, "load_model", lambda path: vars(seen).update(path=path) or "model", raising=False
    )
    monkeypatch.setattr(
        host, "load_tensors", lambda found: vars(seen).update(tensors=found) or "model", raising=False
    )
    monkeypatch.setattr(host, "attach", attach, raising=False)
    return seen


@pytest.mark.parametrize("prefix", student_file.PREFIXES)
def test_what_the_host_can_load_it_loads_by_itself(tmp_path, wan, loaded, prefix):
    path = tmp_path / "a.safetensors"
    save_file({prefix + name: tensor for name, tensor in wan.items()}, path)
    student_file.load_student_file(path)
    assert (loaded.path, loaded.tensors) == (path, None)
    assert not loaded.settings.causal


@pytest.mark.parametrize(("choice", "sign"), [("auto", 2.0), ("ema", 2.0), ("live", 1.0)])
def test_a_training_state_gives_the_weights_asked_for_under_wan_s_names(tmp_path, wan, loaded, choice, sign):
    path = tmp_path / "state.pt"
    state = {
        "generator": {f"model.{name}": tensor for name, tensor in wan.items()},
        "generator_ema": {f"model._fsdp_wrapped_module.{name}": 2 * tensor for name, tensor in wan.items()},
        "critic": {f"model.{name}": 3 * tensor for name, tensor in wan.items()},
    }
    torch.save(state, path)
    student_file.load_student_file(path, choice=choice)
    assert loaded.tensors.keys() == wan.keys()
    assert all(torch.equal(loaded.tensors[name], sign * tensor) for name, tensor in wan.items())
    assert loaded.settings.causal


def test_scaled_weights_in_a_foreign_layout_are_handed_over_as_what_they_stand_for(tmp_path, wan, loaded):
    name, path = "blocks.0.ffn.0.weight", tmp_path / "a.safetensors"
    stored = {f"diffusion_model.{key}": tensor for key, tensor in wan.items()}
    stored[f"diffusion_model.{name}"] = (wan[name] / 0.01).to(torch.float8_e4m3fn)
    stored["diffusion_model.blocks.0.ffn.0.scale_weight"] = torch.tensor(0.01)
    stored["diffusion_model.scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    save_file(stored, path)
    student_file.load_student_file(path)
    assert loaded.tensors[name].dtype == torch.bfloat16
    torch.testing.assert_close(loaded.tensors[name].float(), wan[name], rtol=0.1, atol=1e-3)


def test_shards_are_one_entry_and_are_read_through_their_index(tmp_path, wan, loaded):
    names = list(wan)
    parts = {"m-00001-of-00002.safetensors": names[:9], "m-00002-of-00002.safetensors": names[9:]}
    for file, held in parts.items():
        save_file({name: wan[name] for name in held}, tmp_path / file)
    (entry,) = student_file.without_shards(list(parts))
    table = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (tmp_path / entry).write_text(json.dumps(table))
    student_file.load_student_file(tmp_path / entry)
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in wan.items())


def test_a_preset_overrides_the_file(tmp_path, wan, loaded):
    path = tmp_path / "a.safetensors"
    save_file(wan, path)
    student_file.load_student_file(path, preset="causal-forcing-framewise")
    assert (loaded.settings.rollout.chunk, loaded.settings.causal) == (1, True)
    with pytest.raises(errors.SettingsError, match="preset is 'fast'"):
        student_file.load_student_file(path, preset="fast")


def test_what_the_host_does_not_know_is_refused_by_name(tmp_path, wan, loaded, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_file(wan, path)
    monkeypatch.setattr(host, "load_model", lambda path: None)
    with pytest.raises(errors.CheckpointError, match=r"does not know what kind of Wan a\.safetensors is"):
        student_file.load_student_file(path)
