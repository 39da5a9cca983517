"""The training loop and its settings; the demo's stages at a size a test can afford."""

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sfpp_core.config import StudentConfig
from training.config import ConfigError, build, load
from training.encode_prompts import EncodeSettings
from training.evaluate import EvaluateSettings
from training.export import ExportSettings
from training.guidance import Guidance
from training.loop import LoopSettings, OptimiserSettings, Trained, run
from training.make_ode_pairs import PairSettings
from training.reproduction.settings import ReproduceSettings
from training.teacher import DemoModel, trajectory
from training.train_autoencoder import Settings as AutoencoderSettings
from training.train_causal import CausalSettings
from training.train_dmd import DmdSettings
from training.train_grpo import GrpoSettings
from training.train_ode import OdeSettings, draw_levels, pick_states
from training.train_teacher import TeacherSettings

CONFIGS = Path(__file__).parent.parent / "training" / "configs"
KINDS = {
    "demo_causal": CausalSettings,
    "demo_cuts": CausalSettings,
    "demo_autoencoder": AutoencoderSettings,
    "demo_teacher": TeacherSettings,
    "demo_ode_pairs": PairSettings,
    "demo_ode": OdeSettings,
    "demo_self_forcing": DmdSettings,
    "demo_self_forcing_plus": DmdSettings,
    "demo_export": ExportSettings,
    "demo_evaluate": EvaluateSettings,
    "demo_grpo": GrpoSettings,
    "demo_truth": GrpoSettings,
    "wan_prompts": EncodeSettings,
    "wan_ode_pairs": PairSettings,
    "wan_ode": OdeSettings,
    "wan_1_3b_8gpu": DmdSettings,
    "wan_1_3b_1gpu": DmdSettings,
    "wan_1_3b_lora_24gb": DmdSettings,
    "wan_grpo": GrpoSettings,
    "wan_export": ExportSettings,
    "hard_causal": CausalSettings,
    "hard_ode_pairs": PairSettings,
    "hard_ode": OdeSettings,
    "hard_self_forcing": DmdSettings,
    "hard_self_forcing_plus": DmdSettings,
    "hard_evaluate": EvaluateSettings,
    "reproduce_cpu": ReproduceSettings,
    "reproduce_gpu": ReproduceSettings,
    "reproduce_hard": ReproduceSettings,
    "ablations_cpu": ReproduceSettings,
}


class Toy(nn.Module):
    """A module with a matrix for each optimiser."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(6, 6)]), "out": nn.Linear(6, 1)})

    def forward(self, x):
        return self.net["out"](torch.tanh(self.net["blocks"][0](x)))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    loop: LoopSettings
    toy: OptimiserSettings


def train(out, *, iterations=10, stop_at=None, lr=0.05):
    """Train a toy; send this process SIGTERM in iteration ``stop_at``."""
    toy = Toy()
    settings = OptimiserSettings(lr=lr, matrix_lr=0.01, ema=0.5, warmup=2)
    trained = Trained(toy, settings, updates=iterations)

    def step(iteration):
        if iteration == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        generator = torch.Generator().manual_seed(iteration)
        x = torch.randn(8, 6, generator=generator)
        loss = (toy(x) - x.sum(1, keepdim=True)).square().mean()
        return {"norm": trained.update(loss, iteration)}

    loop = LoopSettings(out=str(out), iterations=iterations, sample_every=5, tensorboard=False)
    recipe = Recipe(loop=loop, toy=settings)

    def sample(path):
        path.write_text("sheet")

    run(loop, {"toy": trained}, step, sample, recipe=recipe)
    return trained.averaged, toy


def test_ten_updates_equal_four_and_a_kill_and_six(tmp_path):
    averaged, plain = train(tmp_path / "whole")
    with pytest.raises(SystemExit, match="stopped at iteration 4 of 10; run again to continue"):
        train(tmp_path / "parts", stop_at=3)
    resumed_averaged, resumed = train(tmp_path / "parts")
    for whole, parts in ((averaged, resumed_averaged), (plain, resumed)):
        for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_run_goes_on_only_with_its_own_settings(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, stop_at=3)
    with pytest.raises(ConfigError, match=r"holds a run with toy.lr = 0.05, and it is 0.1 now; put it back"):
        train(tmp_path, lr=0.1)
    train(tmp_path, iterations=12)


def test_what_was_lost_with_a_kill_is_logged_once(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, iterations=60, stop_at=30)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"iteration": 40}\n')
    train(tmp_path, iterations=60)
    lines = [json.loads(line)["iteration"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [20, 40, 60]


def test_training_lowers_the_loss_and_leaves_samples_and_a_log(tmp_path):
    _, toy = train(tmp_path, iterations=60)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [20, 40, 60]
    x = torch.randn(500, 6)
    errors = [(net(x) - x.sum(1, keepdim=True)).square().mean() for net in (toy, Toy())]
    assert errors[0] < 0.7 * errors[1]
    assert (tmp_path / "sample_000060.png").exists()


def test_a_loss_that_is_not_finite_stops_the_run():
    trained = Trained(Toy(), OptimiserSettings(lr=0.1), updates=3)
    with pytest.raises(FloatingPointError, match="loss is nan at update 2"):
        trained.update(trained.module.net["out"].bias.sum() * float("nan"), 2)


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 3


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    rate: float = 1.0
    levels: tuple[float, ...] = ()
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "x", "nmae": 1}, r"f: unknown key 'nmae'; known keys: inner, levels, name, rate"),
        ({}, "f: key 'name' is required"),
        ({"name": "x", "inner": {"sise": 1}}, r"f:\[inner\]: unknown key 'sise'"),
        ({"name": "x", "inner": 3}, "'inner' must be a table, got 3"),
        ({"name": "x", "rate": "fast"}, "f: rate is 'fast'; it must be of type float"),
        ({"name": "x", "inner": {"size": True}}, "size is True; it must be of type int"),
        (
            {"name": "x", "levels": [0.5, "a"]},
            "f: levels, an element of it, is 'a'; it must be of type float",
        ),
    ],
)
def test_wrong_settings_are_refused(table, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer, table, where="f")


def test_overrides_reach_nested_settings(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('name = "x"\n')
    words = ["inner.size=7", "name=hello world", "rate=2", "levels=[1, 0.5]"]
    settings = load(Outer, [str(path), *words], stage="test")
    assert settings == Outer(name="hello world", rate=2.0, levels=(1.0, 0.5), inner=Inner(size=7))
    with pytest.raises(ConfigError, match=r"override 'name.x=3': 'name' is no section, its value is 'x'"):
        load(Outer, [str(path), "name.x=3"], stage="test")
    with pytest.raises(ConfigError, match="has no '='"):
        load(Outer, [str(path), "rate"], stage="test")
    with pytest.raises(ConfigError, match="does not exist"):
        load(Outer, [str(tmp_path / "b.toml")], stage="test")


@pytest.mark.parametrize("name", KINDS)
def test_every_shipped_configuration_is_valid(name):
    load(KINDS[name], [str(CONFIGS / f"{name}.toml")], stage=name)


def test_levels_visit_every_step_about_equally_often():
    rng = np.random.default_rng(0)
    drawn = [draw_levels(rng, 7, 4) for _ in range(400)]
    assert all(set(levels) == {0, 1, 2, 3} for levels in drawn)
    shares = np.bincount(np.ravel(drawn)) / 2800
    assert np.allclose(shares, 0.25, atol=0.03)
    assert {levels[0] for levels in drawn} == {0, 1, 2, 3}


def test_every_chunk_stands_at_its_own_level():
    states = torch.arange(5.0).view(5, 1, 1, 1, 1, 1).expand(5, 2, 3, 6, 2, 2)
    clip = pick_states(states, [2, 4], 3)
    assert clip[1, 0, :, 0, 0].tolist() == [2, 2, 2, 4, 4, 4]


SMALL = StudentConfig(dim=24, ffn_dim=32, heads=2, layers=1, text_dim=8, text_length=16)


def test_a_trajectory_passes_through_the_students_noise_levels_and_guidance_1_is_none():
    teacher = DemoModel(SMALL)
    nn.init.normal_(teacher.network.head.head.weight, std=0.1)
    noise, prompts = torch.randn(2, 16, 3, 4, 4), ["a red circle moves up", ""]
    states = list(trajectory(teacher, noise, prompts, steps=8, guidance=2.0))
    assert [round(1000 * sigma, 2) for sigma, _ in states[::2]] == [1000, 937.5, 833.33, 625, 0]
    sigma, asked = torch.full((2, 1), 0.5), []
    for guidance in (Guidance(1.0), Guidance(3.0)):
        bound = teacher.bind(guidance.captions(prompts))
        asked.append(guidance.of(bound.whole(guidance.batch(noise), guidance.batch(sigma))))
    plain, guided = asked
    torch.testing.assert_close(plain, teacher.bind(prompts).whole(noise, sigma))
    torch.testing.assert_close(guided[1], plain[1], rtol=1e-4, atol=1e-5)
    assert (guided[0] - plain[0]).abs().max() > 1e-4


@pytest.mark.parametrize("config", ["demo_causal", "demo_ode", "demo_ode_pairs"])
def test_a_stage_of_true_clips_refuses_noise_on_the_past(config):
    with pytest.raises(ConfigError, match=r"rollout.context_sigma is 0.1, and this stage remembers the past"):
        load(KINDS[config], [str(CONFIGS / f"{config}.toml"), "rollout.context_sigma=0.1"], stage=config)


def test_pairs_need_states_at_the_students_steps():
    with pytest.raises(ConfigError, match="steps is 10; it must be a multiple of the student's steps, 4"):
        PairSettings(teacher="t", out="o", source="causal", steps=10)


def test_every_configuration_is_checked():
    assert {path.stem for path in CONFIGS.glob("*.toml")} == set(KINDS)


def test_a_smoke_run_never_writes_over_the_files_that_ship():
    settings = load(ExportSettings, [str(CONFIGS / "demo_export.toml"), "--smoke"], stage="export")
    assert settings.out == "runs/smoke/export"
