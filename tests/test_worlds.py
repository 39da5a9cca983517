"""The hard world: the standard one's scenes, told with less, and what that leaves to drift."""

import math
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path

import pytest
import torch

from sfpp_core import demo
from sfpp_core.inspection import inspect
from sfpp_core.tiny_autoencoder import TinyAutoencoder
from training import (
    evaluate,
    export,
    make_ode_pairs,
    train_causal,
    train_dmd,
    train_grpo,
    train_ode,
    train_teacher,
)
from training.config import ConfigError, build, flatten, load
from training.dmd_settings import DmdSettings
from training.evaluate import EvaluateSettings, decode
from training.export import ExportSettings
from training.grpo_settings import GrpoSettings
from training.make_ode_pairs import PairSettings, identity
from training.measuring import read_second
from training.reproduction.settings import ReproduceSettings
from training.reproduction.summary import clip_numbers, spread_of
from training.train_causal import CausalSettings
from training.train_ode import OdeSettings
from training.train_teacher import TeacherSettings
from training.world import CAPTION_WORDS, VOCABULARY, Wanted, parse_caption, render, sample_scene, words
from training.world_metrics import clip_ok, failures, measure
from training.worlds import HARD, STANDARD, WORLDS, world_of

CONFIGS = Path(__file__).parent.parent / "training" / "configs"
SCENES = [sample_scene((9, clip)) for clip in range(32)]


def text_of(scene):
    return HARD.caption(scene, 3)


def test_the_standard_world_is_what_it_always_was():
    """Digests from before there was another world."""
    pictures = (render(SCENES[:4], 5) * 255).round().byte().numpy().tobytes()
    captions = "\n".join(STANDARD.caption(scene, number) for number, scene in enumerate(SCENES)).encode()
    digests = [blake2b(made, digest_size=8).hexdigest() for made in (pictures, captions)]
    assert digests == ["ef1aa620f2210f3f", "37697d8be5677cb0"]
    assert STANDARD.version == "1" and HARD.version != STANDARD.version


def test_captions_of_the_hard_world_leave_colour_and_speed_open():
    spoken = set()
    for number, scene in enumerate(SCENES * 8):
        text = HARD.caption(scene, number)
        assert parse_caption(text) == Wanted(shape=scene.shape, direction=scene.direction), text
        assert len(words(text)) <= CAPTION_WORDS
        spoken |= set(words(text))
    left_out = set(VOCABULARY) - spoken
    known = "red orange yellow green cyan blue purple violet pink slowly slow gently fast quickly rapidly an"
    assert spoken <= set(VOCABULARY) and left_out == set(known.split())


@pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)
def test_sample_prompts_say_what_captions_say(world):
    for text in world.prompts:
        wanted = parse_caption(text)
        assert set(words(text)) <= set(VOCABULARY) and wanted.shape and wanted.direction
        assert (wanted.colour is None) == (wanted.speed is None) == (world == HARD)


# --- what is measured -----------------------------------------------------------------------------------

SECONDS, FRAMES = 6, 96


def drawn(scene, *, turned=0.0, moves=None):
    """Return a clip whose object takes on another colour, or makes other moves, as time goes by.

    Args:
        scene: What the clip shows.
        turned: Share of the way to orange at its end.
        moves: Frame of the true clip for each frame; ``None`` is all in turn.
    """
    clip = render([scene], FRAMES)[0]
    if turned:
        other = render([replace(scene, colour="orange")], FRAMES)[0]
        clip = torch.lerp(clip, other, torch.linspace(0, turned, FRAMES)[:, None, None, None])
    return clip if moves is None else clip[moves]


def slowing(frame):
    """Return the frame of the true clip that one shows which slows to half from the third second on."""
    return frame if frame < 32 else 32 + (frame - 32) // 2


TRUE = torch.arange(FRAMES)
FAULTS = {
    "truth": ({}, set()),
    "another colour at the end": ({"turned": 1.0}, {"identity"}),
    "half as fast": ({"moves": torch.tensor([slowing(frame) for frame in range(FRAMES)])}, {"pace"}),
    "freezing": ({"moves": TRUE.clamp(max=40)}, {"pace", "motion"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_shows_in_its_own_number(fault):
    changes, reasons = FAULTS[fault]
    for scene in (replace(scene, colour="red", speed="fast") for scene in SCENES[:2]):
        text = text_of(scene)
        seconds = measure(drawn(scene, **changes), text)
        broken = {name for second in seconds for name in failures(second, parse_caption(text))}
        assert (broken - {"colour"}) == reasons  # between two colours it is none of them
        assert clip_ok(seconds, text) == (not reasons)
        numbers = clip_numbers(seconds, text)
        assert (numbers["colour drift"] > 0.2) == (numbers["hue drift"] > 15) == ("identity" in reasons)
        assert numbers["other colour"] == ("identity" in reasons)
        assert numbers["frozen"] == ("motion" in reasons)
        expected = {"half as fast": 0.6, "freezing": 0.3}.get(fault, 1.0)
        assert numbers["pace"] == pytest.approx(expected, abs=0.05)


def test_a_hue_that_drifts_drifts_by_so_much():
    scene = replace(SCENES[0], colour="red")
    seconds = measure(drawn(scene, turned=1.0), text_of(scene))
    drifts = [second.colour_drift for second in seconds]
    assert drifts == sorted(drifts) and drifts[0] == 0
    # Red and orange are 0.44 apart, of which five sixths lie between the first second and the last.
    assert drifts[-1] == pytest.approx(0.44 * 80 / 95, abs=0.02)
    assert 20 < seconds[-1].hue_drift < 60


def test_what_the_caption_names_is_held_to_the_caption_alone():
    scene = replace(SCENES[0], colour="red", speed="fast")
    seconds = measure(drawn(scene, turned=1.0), STANDARD.caption(scene, 3))
    broken = {name for second in seconds for name in failures(second, parse_caption(text_in_full(scene)))}
    assert broken == {"colour"}


def text_in_full(scene):
    return STANDARD.caption(scene, 3)


def test_a_video_that_never_moves_is_frozen():
    scene = replace(SCENES[2], speed="slow")
    seconds = measure(drawn(scene, moves=TRUE * 0), text_of(scene))
    assert clip_numbers(seconds, text_of(scene))["frozen"] == 1
    assert all(abs(second.pace) < 1e-3 for second in seconds)
    assert all("motion" in failures(second, parse_caption(text_of(scene))) for second in seconds)


def test_what_is_not_there_has_neither_a_colour_nor_a_speed():
    scene, text = SCENES[0], text_of(SCENES[0])
    gone = render([scene], 1)[0].flatten(2).median(-1).values[:, :, None, None].expand(64, -1, 64, 64)
    first, *empty, last = measure(torch.cat([drawn(scene)[:16], gone, drawn(scene)[80:]]), text)
    assert all("present" in failures(second, parse_caption(text)) for second in empty)
    assert all(math.isnan(number) for second in empty for number in (second.pace, second.colour_drift))
    numbers = clip_numbers([first, *empty, last], text)
    assert (numbers["frozen"], numbers["other colour"]) == (0, 0)
    assert numbers["pace"] == pytest.approx(1, abs=0.02)
    numbers = clip_numbers([first, *empty, *empty], text)
    assert all(math.isnan(numbers[name]) for name in ("frozen", "other colour", "pace", "hue drift"))
    spread = spread_of("frozen", [[math.nan, math.nan], [1.0, math.nan]])
    assert (spread.mean, spread.deviation, spread.told(2)) == (1.0, None, "1.00 (0.00)")


def test_the_truth_is_right_as_the_shipped_autoencoder_draws_it():
    autoencoder = TinyAutoencoder.load(demo.FOLDER / demo.AUTOENCODER)
    scenes = SCENES[:4]
    clips = render(scenes, 49)
    with torch.inference_mode():
        videos = decode(autoencoder, autoencoder.encode(clips))
    psnr = -10 * (videos - clips).square().mean((2, 3, 4)).log10().mean(1)
    assert psnr.min() > 32
    for scene, video in zip(scenes, videos, strict=True):
        seconds = measure(video, text_of(scene))
        assert clip_ok(seconds, text_of(scene))
        assert max(second.colour_drift for second in seconds) < 0.02
        assert all(second.pace == pytest.approx(1, abs=0.02) for second in seconds)


def test_measurements_made_before_are_still_read():
    second = measure(render([SCENES[0]], 16)[0], text_in_full(SCENES[0]))[0]
    new = ("seen", "colour_drift", "hue_drift", "pace")
    old = read_second({name: value for name, value in asdict(second).items() if name not in new})
    assert old.colour == second.colour and old.pace != old.pace
    assert failures(old, parse_caption(text_of(SCENES[0]))) == ()
    assert clip_numbers([old], text_in_full(SCENES[0]))["colour drift"] != 0


# --- settings -------------------------------------------------------------------------------------------

LOOP = {"out": "x", "iterations": 1}
RATE = {"lr": 1e-4}
ROLES = {"teacher_run": "t", "student_run": "s", "autoencoder": "a"}
NEEDED = {
    TeacherSettings: {"loop": LOOP, "optimiser": RATE, "autoencoder": "a", "latents": "l"},
    CausalSettings: {
        "loop": LOOP, "optimiser": RATE, "teacher_run": "t", "autoencoder": "a", "latents": "l",
    },
    PairSettings: {"teacher": "t", "out": "x", "source": "causal"},
    OdeSettings: {"loop": LOOP, "optimiser": RATE, "pairs": "p", "teacher_run": "t", "autoencoder": "a"},
    DmdSettings: {"loop": LOOP, "student": RATE, "critic": RATE, **ROLES},
    GrpoSettings: {"loop": LOOP, "optimiser": RATE},
    EvaluateSettings: {"out": "x"},
}  # fmt: skip


@pytest.mark.parametrize("kind", NEEDED)
def test_an_unknown_world_is_refused_by_every_stage(kind):
    with pytest.raises(ConfigError, match="world is 'soft'; use one of standard, hard"):
        build(kind, {**NEEDED[kind], "world": "soft"}, where="test")
    assert build(kind, dict(NEEDED[kind]), where="test").world == "standard"


@pytest.mark.parametrize("kind", [PairSettings, OdeSettings, DmdSettings, GrpoSettings])
def test_a_video_of_wan_has_no_world(kind):
    with pytest.raises(ConfigError, match="these are videos of Wan"):
        build(kind, {**NEEDED[kind], "video": {"prompts": "p"}, "world": "hard"}, where="test")


def test_pairs_of_the_standard_world_keep_what_they_were_made_with(tmp_path):
    settings = PairSettings(teacher="t", out=str(tmp_path), source="causal", batch=2)
    plain, hard = (identity(one, 0, teacher="t") for one in (settings, replace(settings, world="hard")))
    assert '"world"' not in plain["recipe"] and '"world": "hard"' in hard["recipe"]
    assert plain["captions"] != hard["captions"]


def test_a_measurement_of_the_standard_world_keeps_its_recipe():
    settings = EvaluateSettings(out="x")
    assert "world" not in evaluate.recipe_of(settings)
    assert evaluate.recipe_of(replace(settings, world="hard"))["world"] == "hard"


def planted(path, world):
    """Write what a run says of itself; without a world as it was when there was one."""
    torch.save({"recipe": {} if world is None else {"world": world}, "done": 1, "seconds": 1.0}, path)
    return str(path)


def test_a_run_remembers_its_world(tmp_path):
    assert world_of(planted(tmp_path / "hard.pt", "hard")) == "hard"
    assert world_of(planted(tmp_path / "old.pt", None)) == "standard"
    assert world_of("") == "standard"
    assert world_of(str(tmp_path / "nowhere.pt")) is None


@pytest.mark.parametrize(
    ("stage", "name", "setting"),
    [
        (make_ode_pairs, "ode_pairs", "teacher"),
        (train_ode, "ode", "teacher_run"),
        (train_dmd, "self_forcing", "teacher_run"),
        (train_dmd, "self_forcing_plus", "student_run"),
        (evaluate, "evaluate", "student"),
        (evaluate, "evaluate", "teacher"),
    ],
)
def test_runs_of_another_world_are_refused(stage, name, setting, tmp_path):
    kinds = {make_ode_pairs: PairSettings, train_ode: OdeSettings, train_dmd: DmdSettings}
    path = planted(tmp_path / "last.pt", "standard")
    where = f"loop.out={tmp_path}/out" if stage in (train_ode, train_dmd) else f"out={tmp_path}/out"
    words = [str(CONFIGS / f"hard_{name}.toml"), f"{setting}={path}", where]
    settings = load(kinds.get(stage, EvaluateSettings), words, stage="test")
    with pytest.raises(ConfigError, match=rf"{setting} is .*, which learned the standard world, and this is"):
        stage.main(settings)
    assert not (tmp_path / "out").exists()


def test_the_embedded_student_is_of_the_standard_world(tmp_path):
    settings = load(
        GrpoSettings, [str(CONFIGS / "demo_grpo.toml"), "student_run=", "world=hard"], stage="test"
    )
    with pytest.raises(ConfigError, match="student_run is the embedded demo, which learned the standard"):
        train_grpo.starting_model(settings, None, torch.device("cpu"))
    with pytest.raises(ConfigError, match="student is the embedded demo"):
        evaluate.main(EvaluateSettings(out=str(tmp_path), world="hard"))


RATES = "optimiser.matrix_lr optimiser.lr optimiser.hold optimiser.ema"
BETWEEN = {
    "causal": (CausalSettings, f"teacher_run loop.iterations {RATES}"),
    "ode_pairs": (PairSettings, "teacher out pairs"),
    "ode": (OdeSettings, "teacher_run pairs loop.iterations"),
    "self_forcing": (DmdSettings, "teacher_run student_run"),
    "self_forcing_plus": (DmdSettings, "teacher_run student_run"),
    "evaluate": (EvaluateSettings, "student teacher out rollout.sink rollout.sink_positions"),
}
"""What the settings of the two worlds differ in, beside the world and the folder of the run."""


@pytest.mark.parametrize("name", BETWEEN)
def test_both_worlds_are_compared_with_the_same_settings(name):
    kind, different = BETWEEN[name]
    standard, hard = (
        flatten(asdict(load(kind, [str(CONFIGS / f"{world}_{name}.toml")], stage="test")))
        for world in ("demo", "hard")
    )
    found = {setting for setting in standard if standard[setting] != hard[setting]}
    assert found - {"loop.out"} == {"world", *different.split()}


def test_students_are_measured_as_they_were_trained():
    def read(kind, name):
        return load(kind, [str(CONFIGS / f"{name}.toml")], stage="test")

    hard, shown = read(EvaluateSettings, "hard_evaluate"), read(EvaluateSettings, "demo_evaluate")
    trained = read(DmdSettings, "hard_self_forcing_plus")
    assert (hard.student, hard.rollout) == (f"{trained.loop.out}/last.pt", trained.rollout)
    assert (shown.student, shown.rollout) == ("", demo.load().settings)


def test_a_reproduction_of_an_unknown_world_is_refused():
    with pytest.raises(ConfigError, match="world is 'soft'"):
        load(ReproduceSettings, [str(CONFIGS / "reproduce_hard.toml"), "world=soft"], stage="test")


# --- the chain ------------------------------------------------------------------------------------------


def test_the_hard_world_is_learned_from_a_teacher_of_the_standard_one(tmp_path, monkeypatch):
    from stage_runs import AUTOENCODER, plant

    worlds = []
    for stage in (train_ode, train_dmd):
        monkeypatch.setattr(stage, "roll_samples", lambda *_, world, **__: worlds.append(world))
    monkeypatch.chdir(tmp_path)
    plant()
    stages = [
        (train_causal, CausalSettings, "causal", [AUTOENCODER, "chunks=2", "openings=1", "clips=2"]),
        (make_ode_pairs, PairSettings, "ode_pairs", []),
        (train_ode, OdeSettings, "ode", [AUTOENCODER]),
        (train_dmd, DmdSettings, "self_forcing_plus", [AUTOENCODER]),
        (evaluate, EvaluateSettings, "evaluate", [f"autoencoder={demo.FOLDER / demo.AUTOENCODER}"]),
    ]
    for stage, kind, name, changed in stages:
        words = [str(CONFIGS / f"hard_{name}.toml"), "--smoke", *changed]
        small = ["loop.iterations=1", "loop.sample_every=1"] if "loop" in kind.__annotations__ else []
        stage.main(load(kind, [*words, *small], stage=name))
    assert worlds == [HARD, HARD]
    runs = Path("runs/smoke/hard")
    for name in ("causal", "ode", "self_forcing_plus"):
        assert world_of(str(runs / name / "last.pt")) == "hard"
    assert Path("runs/smoke/latents.safetensors").exists()
    assert "| student |" in (runs / "evaluation" / "table.md").read_text()
    made = str(tmp_path / "demo")
    export.main(ExportSettings(run=str(runs / "self_forcing_plus"), stage="test", out=made))
    assert inspect(tmp_path / "demo" / demo.STUDENT).notes["world"] == HARD.version
    pairs = make_ode_pairs.Pairs(runs / "pairs", make_ode_pairs.load_states(*first_row(runs)).shape[1:])
    assert pairs.world == "hard" and parse_caption(pairs.captions[0]).colour is None
    standard = load(OdeSettings, [str(CONFIGS / "demo_ode.toml"), f"pairs={runs / 'pairs'}"], stage="ode")
    with pytest.raises(ConfigError, match=r"the pairs in .* are of the hard world, and this is of the stand"):
        train_ode.open_pairs(standard, pairs.shape)


def first_row(runs):
    return runs / "pairs" / "pairs_00000.safetensors", 0


def test_a_teacher_may_learn_another_world(tmp_path):
    settings = build(TeacherSettings, {**NEEDED[TeacherSettings], "world": "hard"}, where="test")
    assert settings.world == "hard" and train_teacher.first_weights(settings) is not None
