"""Every training stage, one after the other, as a user runs them; two updates each, with a small model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sfpp_core import demo
from sfpp_core.inspection import inspect
from training import (
    evaluate,
    export,
    make_ode_pairs,
    train_causal,
    train_dmd,
    train_ode,
    train_teacher,
)
from training.config import ConfigError, load

CONFIGS = Path(__file__).parent.parent / "training" / "configs"
MODEL = ["model.dim=128", "model.ffn_dim=64", "model.heads=1", "model.layers=1", "model.text_dim=8"]
LOOP = ["loop.iterations=2", "loop.threads=1", "loop.tensorboard=false"]


def start(stage, kind, name, *overrides):
    """Run one stage with its shipped settings but for ``overrides``."""
    stage.main(load(kind, [str(CONFIGS / f"{name}.toml"), *overrides], stage=name))


def test_all_stages_lead_from_nothing_to_a_demo_that_generates(tmp_path):
    def at(name):
        return str(tmp_path / name)

    shape = [f"model.text_length={16}", "model.channels=16", "model.freq_dim=256", "model.eps=1e-6"]
    latents = f"latents={at('latents.safetensors')}"
    teacher = [latents, "clips=2", "batch=2", f"loop.out={at('teacher')}", *LOOP, *MODEL, *shape]
    start(train_teacher, train_teacher.TeacherSettings, "demo_teacher", *teacher)
    causal = [latents, "batch=2", f"loop.out={at('causal')}", f"teacher_run={at('teacher')}/last.pt"]
    start(train_causal, train_causal.CausalSettings, "demo_causal", *causal, *LOOP, "rollout.steps=1")
    pairs = [
        f"teacher={at('causal')}/last.pt",
        f"out={at('pairs')}",
        "pairs=4",
        "batch=2",
        "steps=4",
        "threads=1",
    ]
    start(make_ode_pairs, make_ode_pairs.PairSettings, "demo_ode_pairs", *pairs)
    ode = [f"pairs={at('pairs')}", f"teacher_run={at('causal')}/last.pt", f"loop.out={at('ode')}", "batch=2"]
    start(train_ode, train_ode.OdeSettings, "demo_ode", *ode, *LOOP)
    roles = [f"teacher_run={at('teacher')}/last.pt", f"student_run={at('ode')}/last.pt"]
    dmd = [*roles, f"loop.out={at('dmd')}", "batch=2", "warmup=0", "horizon=30", *LOOP]
    start(train_dmd, train_dmd.DmdSettings, "demo_self_forcing", *dmd)
    start(export, export.ExportSettings, "demo_export", f"run={at('dmd')}", "stage=test", f"out={at('demo')}")
    info = inspect(tmp_path / "demo" / demo.STUDENT)
    assert (info.kind, info.stage) == ("student", "test")
    measured = [f"out={at('table')}", f"student={at('dmd')}/last.pt", f"teacher={at('teacher')}/last.pt"]
    start(
        evaluate,
        evaluate.EvaluateSettings,
        "demo_evaluate",
        *measured,
        "prompts=2",
        "horizons=[1]",
        "threads=1",
    )
    assert (tmp_path / "table" / "table.md").read_text().count("\n") == 5
    assert (tmp_path / "table" / "sheet.png").exists()


def test_pairs_made_otherwise_are_told_apart(tmp_path):
    settings = make_ode_pairs.PairSettings(teacher=str(tmp_path / "t"), out=str(tmp_path), source="causal")
    (tmp_path / "t").write_bytes(b"one teacher")
    first = make_ode_pairs.identity(settings, 0, teacher=make_ode_pairs.digest_of(settings.teacher))
    path = tmp_path / "pairs_00000.safetensors"
    save_file({"states": torch.zeros(1)}, path, metadata=first)
    make_ode_pairs.check_made(path, first)
    (tmp_path / "t").write_bytes(b"another teacher")
    another = make_ode_pairs.digest_of(settings.teacher)
    with pytest.raises(ConfigError, match=r"pairs_00000\.safetensors was made with another teacher;"):
        make_ode_pairs.check_made(path, make_ode_pairs.identity(settings, 0, teacher=another))
    assert make_ode_pairs.identity(settings, 1, teacher=another)["captions"] != first["captions"]
