"""The reproduction: its stages, its processes and its tables, at the smallest size."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny_runs import write_clips, write_run

from sfpp_core import demo
from sfpp_core.config import RolloutSettings
from sfpp_core.tiny_autoencoder import AutoencoderConfig, TinyAutoencoder
from training import reproduce, train_dmd
from training.config import ConfigError, flatten, load
from training.loop import kept
from training.reproduction import runner
from training.reproduction.layout import LONGER, ODE, PLAIN, PLUS, Stage
from training.reproduction.settings import ReproduceSettings
from training.reproduction.stages import MODULES, Stages
from training.reproduction.summary import LEFT_OPEN, NUMBERS
from training.state import read_notes

CONFIGS = Path(__file__).parent.parent / "training" / "configs"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Return the files of a start that was made before: a model as a stage leaves it, and a decoder."""
    folder = tmp_path_factory.mktemp("given")
    write_run(folder / "last.pt", done=1, seconds=1.0, recipe={})
    write_clips(folder / "latents.safetensors")
    decoder = TinyAutoencoder(AutoencoderConfig(coarse=16, fine=16, mask=8, units=1))
    decoder.save(folder / "autoencoder.safetensors")
    return folder


def settings_of(given, out, *overrides, config="reproduce_cpu"):
    start = [f"given.{name}={given / 'last.pt'}" for name in ("causal", "ode")]
    start += [f"given.autoencoder={given / 'autoencoder.safetensors'}", f"out={out}", "seeds=[0]", "jobs=1"]
    path = str(CONFIGS / f"{config}.toml")
    return load(ReproduceSettings, [path, "--smoke", *start, "horizons=[1]", *overrides], stage="reproduce")


def ablations(config):
    """Return the ablations of a shipped file."""
    return tomllib.loads((CONFIGS / f"{config}.toml").read_text())["ablations"]


def shipped(config):
    return [(kind, name) for kind, group in ablations(config).items() for name in group]


class Done:
    """A process that has ended."""

    def __init__(self, status=0):
        self.status = status

    def poll(self):
        return self.status


def inside(words, log, threads):
    """Run a stage in this process."""
    kinds = {f"training.{module}": kind for module, kind in MODULES.values()}
    module = importlib.import_module(words[0])
    module.main(load(getattr(module, kinds[words[0]]), words[1:], stage=words[0]))
    return Done()


def never(words, log, threads):
    raise AssertionError(f"{words} was run again")


def test_one_command_leads_to_tables_plots_and_sheets(given, tmp_path, monkeypatch):
    monkeypatch.setattr(train_dmd, "roll_samples", lambda *_, **__: {})
    settings = settings_of(given, tmp_path, "captions=3", "time_ratio=0")
    reproduce.main(settings, launch=inside)
    table = (tmp_path / "table.md").read_text()
    for method in (ODE, PLAIN, LONGER, PLUS, f"{PLUS}: beta_1_2"):
        assert f"| {method} |" in table
    assert "Not finished" not in table and "nan" not in table and "other colour" not in table
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["methods"][PLUS]["horizons"]["1"]) == set(NUMBERS)
    for name in ("drift", "right", "range", "sheets/self_forcing_plus-0", "sheets/ode"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000

    logs = {name: last_line(tmp_path / name) for name in ("self_forcing-0", "self_forcing_plus-0")}
    took, pace = logs["self_forcing_plus-0"]["seconds"], logs["self_forcing-0"]["seconds"] / 3
    longer = read_notes(tmp_path / "self_forcing_longer-0" / "last.pt")
    assert longer["done"] == max(1, round(took / pace))
    stages = Stages(replace(settings, time_ratio=1.4))
    assert "loop.iterations=4" in stages.arguments(stages.by_name["self_forcing_longer-0"])  # of 3 updates

    reproduce.main(settings, launch=never)
    (tmp_path / "evaluate-ode" / "seconds.json").unlink()
    assert [stage.name for stage in Stages(settings).wanted()] == ["evaluate-ode"]
    with pytest.raises(ConfigError, match=r"loop\.seed|horizon = 12, and it is 9 now"):
        Stages(replace(settings, overrides={"self_forcing_plus": ["horizon=9"]})).wanted()


def test_the_hard_world_has_columns_of_its_own(given, tmp_path, monkeypatch):
    monkeypatch.setattr(train_dmd, "roll_samples", lambda *_, **__: {})
    state = torch.load(given / "last.pt", weights_only=True)
    hard = tmp_path / "last.pt"
    torch.save({**state, "recipe": {"world": "hard"}}, hard)
    changes = ["equal_time=false", "ablations={}", "captions=1", "batch=1", f"given.causal={hard}"]
    settings = settings_of(given, tmp_path / "out", *changes, f"given.ode={hard}", config="reproduce_hard")
    reproduce.main(settings, launch=inside)
    table = (tmp_path / "out" / "table.md").read_text()
    head = next(line for line in table.splitlines() if line.startswith("| horizon "))
    assert head.split(" | ")[2:-1] == [*NUMBERS, *LEFT_OPEN][:-1] and head.endswith(f"{LEFT_OPEN[-1]} |")
    assert "**The hard world**" in table
    assert all(f"- *{name}*: " in table for name in LEFT_OPEN)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(LEFT_OPEN) < set(results["methods"][PLUS]["horizons"]["1"])
    assert (tmp_path / "out" / "open.png").stat().st_size > 1000
    assert read_notes(tmp_path / "out" / "self_forcing-0" / "last.pt")["recipe"]["world"] == "hard"
    with pytest.raises(ConfigError, match=r"ode is .*last\.pt, which learned the standard world"):
        Stages(settings_of(given, tmp_path, f"given.causal={hard}", config="reproduce_hard"))


def last_line(folder):
    return json.loads((folder / "log.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("config", ["reproduce_cpu", "reproduce_gpu", "reproduce_hard"])
def test_shipped_settings_lay_out_every_stage_from_nothing(config, tmp_path):
    settings = load(
        ReproduceSettings, [str(CONFIGS / f"{config}.toml"), f"out={tmp_path}", "given={}"], stage="reproduce"
    )
    lines = reproduce.plan(Stages(settings))
    told = [line.partition(":")[0] for line in lines if ": to do" in line]
    assert told[:5] == ["autoencoder", "teacher", "causal", "pairs", "ode"]
    for stage in ("self_forcing-2", "self_forcing_plus-2", "self_forcing_longer-2"):
        assert {stage, f"evaluate-{stage}"} <= set(told)
    assert not list(tmp_path.iterdir())


def test_a_student_is_measured_with_the_window_it_was_trained_with(given, tmp_path):
    stages = Stages(settings_of(given, tmp_path, 'ablations={self_forcing={short=["rollout.window=9"]}}'))
    read = stages.read(stages.by_name["evaluate-self_forcing-short-0"])
    assert read.rollout.window == 9
    assert stages.read(stages.by_name["evaluate-self_forcing-0"]).rollout.window == 21


def test_a_reinforced_student_is_rolled_out_as_it_was_before(given, tmp_path):
    stages = Stages(settings_of(given, tmp_path, "grpo=true", "ablations={}"))
    before = stages.read(stages.by_name["self_forcing_plus-0"]).rollout
    assert (before.sink, before.sink_positions) == (3, "relative")
    for name in ("grpo-0", "evaluate-grpo-0"):
        assert stages.read(stages.by_name[name]).rollout == before


def test_a_run_that_is_given_is_measured_as_it_says_it_was_trained(given, tmp_path):
    rollout = RolloutSettings(window=12, sink=3, context_sigma=0.1)
    run = write_run(tmp_path / "mine" / "last.pt", recipe=flatten({"rollout": asdict(rollout)}))
    names = [f"students.mine={run}", f"given.self_forcing-0={run}", f"students.old={given / 'last.pt'}"]
    stages = Stages(settings_of(given, tmp_path, *names, "ablations={}"))
    for name, wanted in {"mine": rollout, "self_forcing-0": rollout, "old": RolloutSettings()}.items():
        assert stages.read(stages.by_name[f"evaluate-{name}"]).rollout == wanted


def test_an_exported_student_can_be_the_start(given, tmp_path):
    stages = Stages(settings_of(given, tmp_path, f"given.ode={demo.file(demo.STUDENT)}", "ablations={}"))
    assert "ode" not in [stage.name for stage in stages.wanted()]
    read = stages.read(stages.by_name["self_forcing_plus-0"])
    assert read.student_run == str(demo.file(demo.STUDENT))
    assert stages.read(stages.by_name["evaluate-ode"]).rollout == demo.load().settings
    with pytest.raises(ConfigError, match=r"ode is given as .*nothing.safetensors, which does not exist"):
        Stages(settings_of(given, tmp_path, f"given.ode={tmp_path}/nothing.safetensors"))


ALL = [
    (config, kind, name)
    for config in ("reproduce_cpu", "reproduce_gpu", "ablations_cpu")
    for kind, name in shipped(config)
]


@pytest.mark.parametrize(("config", "kind", "name"), ALL)
def test_every_shipped_ablation_has_its_setting_when_it_is_trained_and_measured(
    given, tmp_path, config, kind, name
):
    """Smoke or not; ``Stages`` reads the settings of every stage."""
    group = ablations(config)
    for words in (["smoke=true"], ["smoke=false"]):
        given_clips = f"given.latents={given / 'latents.safetensors'}"
        settings = settings_of(given, tmp_path, given_clips, *words, config=config)
        stages = Stages(replace(settings, ablations=group))
        stage = stages.by_name[f"{kind}-{name}-0"]
        trained, plain = stages.read(stage), stages.read(stages.by_name[f"{kind}-0"])
        changed = {
            key for key, value in flatten(asdict(trained)).items() if value != flatten(asdict(plain))[key]
        }
        wanted = {word.partition("=")[0] for word in group[kind][name]}
        assert wanted <= changed <= wanted | {"loop.out", "latents"}
        measured = stages.read(stages.by_name[f"evaluate-{stage.name}"])
        assert measured.rollout == trained.rollout


def test_a_run_on_true_clips_waits_for_the_teachers_stage_unless_they_are_given(given, tmp_path):
    true = 'ablations={self_forcing={true=["past=data"]}}'
    stages = Stages(settings_of(given, tmp_path, true))
    wanted = [stage.name for stage in stages.wanted()]
    assert wanted.index("teacher") < wanted.index("self_forcing-true-0")
    assert "causal" not in wanted
    path = given / "latents.safetensors"
    stages = Stages(settings_of(given, tmp_path, true, f"given.latents={path}"))
    assert "teacher" not in [stage.name for stage in stages.wanted()]
    assert stages.read(stages.by_name["self_forcing-true-0"]).latents == str(path)
    with pytest.raises(ConfigError, match=r"stage self_forcing-true-0 goes on from .* nothing makes it"):
        Stages(settings_of(given, tmp_path, true, f"given.teacher={given / 'last.pt'}"))


@pytest.mark.parametrize(("name", "words"), [("noisy", "rollout.context_sigma=0.1"), ("true", "past=data")])
def test_an_ablation_of_the_past_is_trained_and_measured(given, tmp_path, monkeypatch, name, words):
    monkeypatch.setattr(train_dmd, "roll_samples", lambda *_, **__: {})
    clips = f"given.latents={given / 'latents.safetensors'}"
    settings = settings_of(given, tmp_path, clips, f'ablations={{self_forcing={{{name}=["{words}"]}}}}')
    stages = Stages(settings)
    last = stages.by_name[f"evaluate-self_forcing-{name}-0"]
    runner.run(stages, [stages.by_name[last.inputs["student"]], last], lambda: None, launch=inside)
    assert stages.is_complete(last)
    recipe = json.loads(json.loads((tmp_path / last.name / "seconds.json").read_text())["recipe"]["rollout"])
    assert recipe.get("context_sigma") == (0.1 if name == "noisy" else None)


def test_only_existing_students_can_be_measured(given, tmp_path):
    names = ["seeds=[]", "ablation_seeds=[]", f"students.mine={given / 'last.pt'}"]
    wanted = [stage.name for stage in Stages(settings_of(given, tmp_path, *names)).wanted()]
    assert wanted == ["evaluate-ode", "evaluate-mine"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("jobs=0", "jobs is 0; it must be at least 1"),
        ("horizons=[]", "name at least one"),
        ("time_ratio=-1", "time_ratio is -1"),
        ("ablation_seeds=[7]", "ablation_seeds has 7, which is none of seeds"),
        ("given.tutor=x", "unknown stage 'tutor'; known stages: .*self_forcing-0"),
        ("given.pairs=x", "pairs is given as x, which does not exist"),
        ("students.ode=x", "'ode', which is the name of a stage"),
        ("overrides.teachers=[]", "unknown key 'teachers'; known keys: autoencoder"),
        ("overrides.ode=batch", "overrides are lists of text"),
        ('overrides.ode=["batches=3"]', "unknown key 'batches'"),
        ('ablations.self_forcing.x=["window=3"]', "stage self_forcing-x-0: .*unknown key 'window'"),
        ('overrides.self_forcing=["every=2"]', "different updates of the student"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(given, tmp_path, override, message):
    given_ode = "given.ode=" if "overrides.ode" in override else "jobs=1"
    with pytest.raises(ConfigError, match=message):
        settings = settings_of(given, tmp_path, given_ode, override)
        kept = {name: path for name, path in settings.given.items() if path}
        Stages(replace(settings, given=kept))


@pytest.mark.parametrize(
    ("done", "horizon", "complete"), [(3, "6", True), (2, "6", False), (3, "9", "horizon"), (4, "6", "of 4")]
)
def test_the_saved_state_says_whether_a_run_is_complete(given, tmp_path, done, horizon, complete):
    stages = Stages(settings_of(given, tmp_path))
    stage = stages.by_name["self_forcing-0"]
    (tmp_path / stage.name).mkdir()
    recipe = kept(flatten(asdict(stages.read(stage)))) | {"horizon": horizon}
    state = {"done": done, "seconds": 1.0, "recipe": recipe}
    torch.save(state, tmp_path / stage.name / "last.pt")
    if isinstance(complete, bool):
        assert stages.is_complete(stage) == complete
    else:
        with pytest.raises(ConfigError, match=complete):
            stages.is_complete(stage)


def test_a_run_from_before_a_setting_existed_was_made_with_its_default(given, tmp_path):
    stages = Stages(settings_of(given, tmp_path))
    stage = stages.by_name["self_forcing-0"]
    recipe = kept(flatten(asdict(stages.read(stage))))
    for unknown in ("world", "rollout.context_sigma"):
        recipe.pop(unknown)
    state = {"done": 3, "seconds": 1.0, "recipe": recipe}
    write_run(tmp_path / stage.name / "last.pt", **state)
    assert stages.is_complete(stage)
    assert recipe.pop("overall") == "4.0"
    write_run(tmp_path / stage.name / "last.pt", **state)
    with pytest.raises(ConfigError, match=r"holds a run with overall = 0.0, and it is 4.0 now"):
        stages.is_complete(stage)


STUBBORN = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path("saved").touch()
    sys.exit("stopped")
signal.signal(signal.SIGTERM, save)
pathlib.Path("started").touch()
time.sleep(60)
"""
FAILING = """
import pathlib, time, sys
while not pathlib.Path("started").exists():
    time.sleep(0.01)
sys.exit("lost")
"""


def starts(program, folder):
    def launch(words, log, threads):
        with log.open("ab") as file:
            chosen = program if isinstance(program, str) else program[words[0]]
            return subprocess.Popen([sys.executable, "-c", chosen], stdout=file, stderr=file, cwd=folder)

    return launch


def test_a_stop_is_passed_on(given, tmp_path):
    stages = Stages(settings_of(given, tmp_path))

    def stop():
        while not (tmp_path / "started").exists():
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(SystemExit, match="run the same command again"):
        runner.run(stages, stages.wanted()[:1], lambda: None, launch=starts(STUBBORN, tmp_path))
    assert (tmp_path / "saved").exists()
    assert runner.wall_seconds(tmp_path / "evaluate-ode") > 0


def test_a_failure_stops_the_others_and_is_told(given, tmp_path):
    stages = Stages(settings_of(given, tmp_path, "jobs=2"))
    pair = [stages.by_name[name] for name in ("evaluate-ode", "self_forcing-0")]
    programs = {"training.evaluate": STUBBORN, "training.train_dmd": FAILING}
    with pytest.raises(runner.StageError, match=r"stage self_forcing-0 failed(.|\n)*lost"):
        runner.run(stages, pair, lambda: None, launch=starts(programs, tmp_path))
    assert (tmp_path / "saved").exists()


def test_a_folder_is_taken_as_long_as_a_stage_runs_in_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "lasting.py").write_text("import time\ntime.sleep(60)\n")
    with runner.alone(tmp_path) as held:
        process = runner.launch(["lasting"], tmp_path / "log", 1, held=held)
    with pytest.raises(ConfigError, match="still runs in"), runner.alone(tmp_path):
        pass
    process.kill()
    process.wait()
    with runner.alone(tmp_path):
        pass


def test_stages_begin_when_what_they_need_is_done(given, tmp_path):
    stages, order = Stages(settings_of(given, tmp_path, "jobs=9")), []

    def launch(words, log, threads):
        order.append(log.parent.name)
        return Done()

    first, second = stages.by_name["self_forcing-0"], stages.by_name["evaluate-self_forcing-0"]
    other = Stage(name="ode", kind="ode")
    runner.run(stages, [second, first], lambda: order.append("told"), launch=launch)
    assert order == ["self_forcing-0", "evaluate-self_forcing-0", "told"]
    assert other.needs == ()
