"""How a student was trained to be rolled out: its exported file says so, and so does who measures it."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny_runs import write_run

from sfpp_core import demo
from sfpp_core.checkpoint import load_student
from sfpp_core.config import RolloutSettings
from sfpp_core.errors import CheckpointError
from training.config import ConfigError, flatten
from training.evaluate import EvaluateSettings, tell_other_rollout
from training.export import ExportSettings, main
from training.state import read_rollout
from training.teacher import load_demo_model
from training.worlds import world_of

SINK = RolloutSettings(sink=3, sink_positions="relative", window=12)


def exported(folder, **notes):
    write_run(folder / "run" / "last.pt", **notes)
    (folder / "run" / "log.jsonl").touch()
    main(ExportSettings(run=str(folder / "run"), stage="test", out=str(folder / "out")))
    return folder / "out" / demo.STUDENT


@pytest.mark.parametrize(
    "rollout",
    [
        SINK,
        RolloutSettings(steps=2, sigmas=(1.0, 0.5), context_sigma=0.1),
        RolloutSettings(steps=1, sigmas=(1.0,), overlap=9),
    ],
)
def test_a_student_is_exported_with_the_rollout_it_was_trained_with(tmp_path, rollout):
    path = exported(tmp_path, recipe=flatten({"rollout": asdict(rollout), "batch": 2}))
    _, _, settings = load_student(path)
    assert settings == rollout != RolloutSettings()


def test_a_run_from_before_a_setting_existed_is_exported_with_its_default(tmp_path):
    recipe = flatten({"rollout": asdict(SINK)})
    for name in ("sigmas", "overlap", "context_sigma"):
        recipe.pop(f"rollout.{name}")
    assert load_student(exported(tmp_path, recipe=recipe))[2] == SINK


def test_measuring_a_student_otherwise_than_it_was_trained_is_told(tmp_path, caplog):
    run = write_run(tmp_path / "last.pt", recipe=flatten({"rollout": asdict(SINK)}))
    settings = EvaluateSettings(out=str(tmp_path), student=str(run), rollout=SINK)
    tell_other_rollout(settings)
    tell_other_rollout(EvaluateSettings(out=str(tmp_path), rollout=demo.load().settings))
    assert not caplog.messages
    tell_other_rollout(replace(settings, rollout=replace(SINK, sink=0)))
    assert caplog.messages == [
        f"{run} was trained with rollout.sink = 3, not 0; it is measured with the settings given."
    ]


def test_a_run_that_rolled_nothing_out_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="says nothing of how it was rolled out; is it a run of a student"):
        exported(tmp_path, recipe={"batch": "2"})
    assert read_rollout(tmp_path / "run" / "last.pt") is None
    assert not (tmp_path / "out").exists()


def test_an_exported_student_is_a_start_like_its_run(tmp_path):
    """In float16, the dtype of the file, the weights are those of the run."""
    path = exported(tmp_path, recipe=flatten({"rollout": asdict(SINK), "world": "hard"}))
    model, run = load_demo_model(path), load_demo_model(tmp_path / "run" / "last.pt")
    assert model.config == run.config
    assert model.state_dict().keys() == run.state_dict().keys()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, run.state_dict()[name].half().float(), rtol=0, atol=0)
    assert read_rollout(path) == SINK
    assert world_of(str(path)) == "hard"


def test_no_start_at_all_is_the_embedded_student():
    shipped, model = demo.load(), load_demo_model(Path())
    for name, weight in shipped.network.state_dict().items():
        torch.testing.assert_close(model.network.state_dict()[name], weight, rtol=0, atol=0)
    assert torch.equal(model.words.table.weight, shipped.words.table.weight)
    assert read_rollout(Path()) == shipped.settings


def test_an_exported_student_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_demo_model(tmp_path / "student.safetensors")
    assert world_of(str(tmp_path / "student.safetensors")) is None
