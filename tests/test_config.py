"""Architectures, rollout settings and their messages."""

import pytest

from sfpp_core.config import (
    DEMO,
    WAN_1_3B,
    WAN_14B,
    RolloutSettings,
    StudentConfig,
    from_table,
    to_table,
)
from sfpp_core.errors import SettingsError
from sfpp_core.network import WanNetwork


@pytest.mark.parametrize(("config", "parameters"), [(WAN_1_3B, 1_418_996_800), (WAN_14B, 14_288_491_584)])
def test_the_presets_have_the_published_parameter_counts(config, parameters):
    network = WanNetwork(config, device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_every_preset_has_head_dim_128():
    assert {config.head_dim for config in (WAN_1_3B, WAN_14B, DEMO)} == {128}


@pytest.mark.parametrize(
    "settings", [WAN_1_3B, RolloutSettings(window=12, sink=3), RolloutSettings(context_sigma=0.1)]
)
def test_settings_survive_a_table(settings):
    assert from_table(type(settings), to_table(settings), where="here") == settings


def test_a_table_names_the_noise_on_the_past_only_where_there_is_some():
    assert "context_sigma" not in to_table(RolloutSettings())
    assert to_table(RolloutSettings(context_sigma=0.1))["context_sigma"] == 0.1


def test_unknown_and_missing_keys_are_named():
    with pytest.raises(SettingsError, match=r"file\.toml: unknown key 'windw'; known keys: chunk, .*window"):
        from_table(RolloutSettings, {"windw": 3}, where="file.toml")
    with pytest.raises(SettingsError, match=r"meta: .*missing.*'heads'"):
        from_table(StudentConfig, {"dim": 8, "ffn_dim": 8, "layers": 1}, where="meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 2}, "window is 2 latent frames, smaller than a chunk of 3; use at least 3"),
        ({"window": 20}, "window is 20 latent frames; it must be a multiple of the chunk, 3, e.g. 21"),
        ({"sink": 1}, "sink is 1 latent frames; it must be a multiple of the chunk, 3, e.g. 0"),
        ({"sink": 21}, "sink is 21 latent frames and leaves no room .* use a sink of at most 18"),
        ({"sink": -3}, "sink is -3"),
        ({"steps": 0}, "steps is 0; it must be from 1 to 100"),
        ({"shift": 0.0}, "shift is 0.0; it must be above 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"context_sigma": 1.0}, "context_sigma is 1; it must be from 0 to below 1"),
        ({"sink_positions": "floating"}, "sink_positions is 'floating'; use 'absolute' or 'relative'"),
    ],
)
def test_impossible_rollouts_are_refused(change, message):
    with pytest.raises(SettingsError, match=message):
        RolloutSettings(**change)


@pytest.mark.parametrize("change", [{"dim": 0}, {"heads": 3}, {"layers": -1}])
def test_impossible_architectures_are_refused(change):
    with pytest.raises(SettingsError):
        StudentConfig(**{"dim": 64, "ffn_dim": 8, "heads": 4, "layers": 1, **change})
