"""What the training loop does around a loss: accumulate, average, adapt, tell, forecast, stop at nonsense."""

import json
import logging
import math
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranked import Recipe, Toy, train
from torch import nn

from sfpp_core.lora import read_adapter
from training.adapters import LoraSettings, export_adapters
from training.config import ConfigError, load
from training.dry_run import Plan, forecast, report
from training.loop import LoopSettings, Loss, OptimiserSettings, Pieces, Trained, descend, run
from training.state import read_averaged
from training.teacher import DemoModel, load_demo_model
from training.train_teacher import TeacherSettings
from training.trained import NotFiniteError


def settings(out, **changes):
    return LoopSettings(
        **{"out": str(out), "iterations": 5, "device": "cpu", "tensorboard": False, **changes}
    )


def error_of(toy, x):
    return (toy(x) - x.sum(1, keepdim=True)).square().mean()


@pytest.mark.parametrize("matrix_lr", [0.0, 0.01])
def test_accumulated_pieces_move_the_weights_as_one_large_batch(matrix_lr):
    x = torch.randn(3, 8, 6)
    toys = []
    for parts in (1, 4):
        trained = Trained(Toy(), OptimiserSettings(lr=0.01, matrix_lr=matrix_lr, clip=0.3), updates=5)
        for update in range(3):
            losses = (Loss(error_of(trained.module, piece)) for piece in x[update].chunk(parts))
            numbers = descend(trained, losses, update, count=parts)
        toys.append((trained, numbers))
    for a, b in zip(*(trained.module.parameters() for trained, _ in toys), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 if matrix_lr else 1e-6)
    assert toys[0][1] == pytest.approx(toys[1][1], rel=1e-2)


def test_the_average_begins_when_it_is_told_to():
    trained = Trained(Toy(), OptimiserSettings(lr=0.1, ema=0.9, ema_from=2, warmup=1), updates=10)
    weights = []
    for update in range(5):
        trained.update(error_of(trained.module, torch.randn(4, 6)), update)
        weights.append(trained.module.head.weight.detach().clone())
    expected = weights[2]
    for later in weights[3:]:
        expected = 0.9 * expected + 0.1 * later
    torch.testing.assert_close(trained.averaged.head.weight, expected)
    assert not trained.averaged.head.weight.requires_grad


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_a_state_that_is_read_piece_by_piece_is_let_go_before_the_first_update(tmp_path, monkeypatch):
    mapped = []

    def train_to(iterations):
        trained = Trained(Toy(), OptimiserSettings(lr=0.1), updates=6)

        def step(iteration):
            mapped.append("last.pt" in Path("/proc/self/maps").read_text())
            return descend(trained, [Loss(error_of(trained.module, torch.ones(2, 6)))], iteration, count=1)

        loop = settings(tmp_path, iterations=iterations)
        run(loop, {"model": trained}, step, lambda path: None, recipe=Recipe(loop=loop))

    train_to(2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as where main memory is the scarcer one
    train_to(4)
    assert mapped == [False] * 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"betas": (0.9,)}, r"betas is \[0.9\]; it must be two numbers"),
        ({"ema": 1.0}, "ema is 1.0; it must be from 0"),
    ],
)
def test_impossible_optimisers_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        OptimiserSettings(lr=0.1, **wrong)


def test_without_an_average_the_weights_are_what_is_sampled_saved_once_and_handed_on(tmp_path):
    trained = Trained(Toy(), OptimiserSettings(lr=0.1, ema=0.0), updates=3)
    assert trained.averaged is trained.module

    def step(iteration):
        return descend(trained, [Loss(error_of(trained.module, torch.ones(2, 6)))], iteration, count=1)

    def sample(path):
        assert trained.averaged.head.weight.shape == (1, 6)

    loop = settings(tmp_path, iterations=3)
    run(loop, {"model": trained}, step, sample, recipe=Recipe(loop=loop))
    saved = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    assert list(saved["averaged"]) == ["n_averaged"]
    read = read_averaged(tmp_path / "last.pt")
    assert read.keys() == trained.module.state_dict().keys()
    assert torch.equal(read["head.weight"], trained.module.head.weight)
    again = Trained(Toy(), OptimiserSettings(lr=0.1, ema=0.0), updates=3)
    again.load_state_dict(saved)
    assert torch.equal(again.averaged.head.weight, trained.module.head.weight)
    assert forecast(trained, 1).averaged == 0


def test_saves_that_stay_are_runs_of_their_own_to_go_back_to(tmp_path):
    run_to = {"effective_batch": 8, "keep_every": 2, "log_every": 1}
    whole = train(Recipe(loop=settings(tmp_path / "whole", **run_to)))
    assert [path.name for path in sorted((tmp_path / "whole").glob("kept_*"))] == [
        "kept_000002",
        "kept_000004",
    ]
    back = tmp_path / "back"
    shutil.copytree(tmp_path / "whole" / "kept_000002", back)
    assert [json.loads(line)["iteration"] for line in (back / "log.jsonl").read_text().splitlines()] == [1, 2]
    again = train(Recipe(loop=settings(back, **run_to)))
    for a, b in zip(whole.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(a, b)
    # What came later did not reach what was kept.
    kept, last = (read_averaged(tmp_path / "whole" / name / "last.pt") for name in ("kept_000002", "."))
    assert not torch.equal(kept["head.weight"], last["head.weight"])


def test_a_line_of_the_log_is_the_mean_since_the_line_before(tmp_path):
    trained = Trained(Toy(), OptimiserSettings(lr=0.1), updates=5)
    waiting = {0: math.nan, 1: math.nan}

    def step(iteration):
        return {"loss": float(iteration), "late": waiting.get(iteration, 1.0)}

    loop = settings(tmp_path, log_every=2)
    run(loop, {"model": trained}, step, lambda path: None, recipe=Recipe(loop=loop))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["loss"]) for line in lines] == [(2, 0.5), (4, 2.5), (5, 4.0)]
    assert math.isnan(lines[0]["late"])
    assert lines[1]["late"] == 1.0
    assert all(line["peak_gigabytes"] > 0.1 for line in lines)


def test_weights_that_are_not_finite_stop_a_run_with_all_that_led_there(tmp_path):
    trained = Trained(Toy(), OptimiserSettings(lr=0.1), updates=5)
    before = trained.module.head.weight.detach().clone()

    def step(iteration):
        x = torch.full((2, 6), float("nan") if iteration == 2 else 1.0)
        return descend(trained, [Loss(error_of(trained.module, x), batch={"x": x})], iteration, count=1)

    loop = settings(tmp_path, save_seconds=0.0)
    with pytest.raises(
        NotFiniteError, match=r"loss is nan at update 2 \(iteration 2, rank 0\); what led there"
    ):
        run(loop, {"model": trained}, step, lambda path: None, recipe=Recipe(loop=loop))
    dump = torch.load(tmp_path / "not_finite_000002_rank0.pt", weights_only=True)
    assert dump["batch"]["x"].isnan().all()
    assert dump["state"] == {"done": 2, "path": str(tmp_path / "last.pt")}
    assert not torch.equal(trained.module.head.weight, before)
    assert trained.module.head.weight.isfinite().all()


def test_a_gradient_that_is_not_finite_is_named_and_not_followed():
    trained = Trained(Toy(), OptimiserSettings(lr=0.1), updates=5)
    before = trained.module.head.weight.detach().clone()
    # The square root is finite at 0, and its slope is not.
    loss = (trained.module.head.weight * 0).square().sum().sqrt()
    with pytest.raises(
        NotFiniteError, match=r"the gradient of head.weight and 0 more is not finite at update 3"
    ):
        trained.update(loss, 3)
    assert torch.equal(trained.module.head.weight, before)


def test_adapters_are_trained_saved_and_resumed_alone_and_the_core_reads_them(tmp_path):
    from tiny import CONFIG

    lora = LoraSettings(rank=2, alpha=4.0)
    optimiser = OptimiserSettings(lr=0.05, lora=lora, warmup=1)

    def made(iterations):
        model = DemoModel(replace(CONFIG, text_length=16))
        nn.init.normal_(model.network.head.head.weight, std=0.1)
        trained = Trained(model, optimiser, updates=4)
        noisy = torch.randn(1, CONFIG.channels, 2, 4, 4, generator=torch.Generator().manual_seed(0))

        def step(iteration):
            velocity = model.bind(["a red circle moves up"]).whole(noisy, torch.full((1, 1), 0.5))
            return descend(trained, [Loss(velocity.square().mean())], iteration, count=1)

        loop = settings(tmp_path, iterations=iterations)
        run(loop, {"model": trained}, step, lambda path: None, recipe=Recipe(loop=loop, optimiser=optimiser))
        return trained

    frozen = DemoModel(replace(CONFIG, text_length=16)).network.blocks[0].self_attn.q.weight
    assert torch.equal(made(2).module.network.blocks[0].self_attn.q.base_layer.weight, frozen)
    trained = made(4)
    saved = read_averaged(tmp_path / "last.pt")
    assert len(saved) == 2 * 10 * CONFIG.layers
    assert all(".lora_" in name for name in saved)
    with pytest.raises(ConfigError, match="holds adapters of a model, not a model"):
        load_demo_model(tmp_path / "last.pt")
    path = tmp_path / "adapter.safetensors"
    export_adapters(saved, path, lora, dtype=torch.float32)
    attention = trained.averaged.network.blocks[0].self_attn.q
    with torch.no_grad():
        change = attention(torch.eye(CONFIG.dim)) - attention.base_layer(torch.eye(CONFIG.dim))
    merged = read_adapter(path, CONFIG).merged("blocks.0.self_attn.q.weight", frozen.detach())
    assert change.abs().max() > 1e-4
    torch.testing.assert_close(merged - frozen, change.T, rtol=1e-3, atol=1e-5)


def test_adapters_that_fit_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"lora.targets is qkv; no matrix of a layer ends in one of them"):
        Trained(Toy(), OptimiserSettings(lr=0.1, lora=LoraSettings(rank=2, targets=("qkv",))), updates=1)
    with pytest.raises(ConfigError, match="rank -1 and alpha 0"):
        LoraSettings(rank=-1)


def test_a_run_made_before_a_setting_existed_goes_on_with_its_default(tmp_path):
    loop = settings(tmp_path, effective_batch=8)
    train(Recipe(loop=loop))
    path = tmp_path / "last.pt"
    state = torch.load(path, weights_only=True)
    assert state["recipe"].pop("loop.seed") == "0"
    torch.save(state, path)
    train(Recipe(loop=replace(loop, iterations=6)))
    torch.save(state, path)
    with pytest.raises(ConfigError, match=r"holds a run with loop.seed = 0, and it is 1 now"):
        train(Recipe(loop=replace(loop, seed=1)))


def test_a_dry_run_tells_sizes_memory_and_time_and_writes_nothing(tmp_path, caplog):
    from training import train_teacher

    loop = settings(
        tmp_path / "run", iterations=1000, dry_run=True, seconds_per_update=7.2, effective_batch=64
    )
    made = TeacherSettings(
        loop=loop,
        optimiser=OptimiserSettings(lr=1e-3),
        autoencoder="sfpp_core/demo/autoencoder.safetensors",
        latents=str(tmp_path / "latents"),
    )
    with caplog.at_level(logging.INFO):
        train_teacher.main(made)
    assert "clips: (16, 16, 21, 8, 8)" in caplog.text
    assert "effective batch 64: 1 ranks x 4 pieces x batch 16" in caplog.text
    assert "1,000 iterations, 2.0 hours at 7.2 s each" in caplog.text
    assert not list(tmp_path.iterdir())


def test_the_forecast_counts_what_a_rank_holds():
    with torch.device("meta"):
        trained = Trained(nn.Linear(1000, 1000, bias=False), OptimiserSettings(lr=1e-3), updates=1)
    alone, shared = forecast(trained, 1), forecast(trained, 4)
    assert (alone.weights, alone.gradients, alone.optimisers, alone.averaged) == (4e6, 4e6, 8e6, 4e6)
    # A quarter of each in shards; whole weights and whole gradients while a loss is computed.
    assert (shared.optimisers, shared.gradients) == (2e6, 5e6)
    work = {"large": 2.5e15, "small": 2.04e11}
    plan = Plan(pieces=Pieces(batch=1, effective=8, ranks=4), held={"teacher": 3_000_000}, operations=work)
    told = "\n".join(report({"model": trained}, plan, ranks=4, iterations=10, pace=None))
    assert "1,000,000 parameters, 1,000,000 of them trained" in told
    assert "in all 20 MB on each of 4 ranks" in told
    assert "effective batch 8: 4 ranks x 2 pieces x batch 1" in told
    assert "large: 2,500e12 operations" in told
    assert "small: 0.204e12 operations" in told
    assert "time unknown: give loop.seconds_per_update" in told


def test_numbers_reach_tensorboard_and_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(Recipe(loop=settings(tmp_path, effective_batch=8, tensorboard=True)))
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert {"loss", "norm", "seconds", "drift"} <= set(board.Tags()["scalars"])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert board.Scalars("loss")[0].value == pytest.approx(lines[0]["loss"])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_and_sigterm_save_and_stop_between_two_updates(tmp_path, name, capsys):
    trained = Trained(Toy(), OptimiserSettings(lr=0.1), updates=5)
    loop = settings(tmp_path, save_seconds=1000.0)

    def step(iteration):
        if iteration == 2:
            signal.raise_signal(getattr(signal, name))
        x = torch.ones(2, 6)
        return descend(trained, [Loss(error_of(trained.module, x))], iteration, count=1)

    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(SystemExit, match="stopped at iteration 3 of 5; run again to continue"):
        run(loop, {"model": trained}, step, lambda path: None, recipe=Recipe(loop=loop))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["done"] == 3
    assert signal.getsignal(getattr(signal, name)) is before
    # Progress: done and planned updates, the time taken and the time left.
    assert re.search(r"3/5 \[\d\d:\d\d<[\d:]+", capsys.readouterr().err)


@pytest.mark.slow
def test_numbers_reach_weights_and_biases_and_a_resumed_run_is_the_same_one(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for iterations in (20, 40):
        loop = settings(tmp_path, effective_batch=8, iterations=iterations, wandb="mine", sample_every=100)
        train(Recipe(loop=loop))
    name = (tmp_path / "wandb_id").read_text()
    written = [path.read_bytes() for path in tmp_path.glob(f"wandb/offline-run-*/run-{name}.wandb")]
    assert len(written) == 2
    for file in written:
        assert all(word in file for word in (b"mine", b"optimiser.lr", b"loss", b"norm", b"drift"))


def test_without_tensorboard_the_log_is_kept_and_the_rest_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("training.journal.importlib.util.find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        train(Recipe(loop=settings(tmp_path, effective_batch=8, tensorboard=True)))
    assert "TensorBoard is not installed (pip install tensorboard)" in caplog.text
    assert (tmp_path / "log.jsonl").exists()
    with pytest.raises(
        ConfigError, match=r"loop.wandb is 'mine', and the package is not installed: pip install"
    ):
        settings(tmp_path, wandb="mine")


def test_options_of_every_stage(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(
        'autoencoder = "a"\nlatents = "runs/l"\n'
        '[loop]\nout = "elsewhere/t"\niterations = 900\n[optimiser]\nlr = 1'
    )
    made = load(TeacherSettings, [str(path), "--smoke", "loop.iterations=2", "--dry-run"], stage="x")
    assert (made.loop.out, made.latents) == ("runs/smoke/t", "runs/smoke/l")
    assert (made.loop.iterations, made.batch, made.loop.dry_run) == (2, 2, True)
    with pytest.raises(ConfigError, match=r"x has no option --smok; known options: --dry-run, --smoke"):
        load(TeacherSettings, [str(path), "--smok"], stage="x")


def test_a_run_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(ConfigError, match=r"last.pt does not exist; run the stage that writes it first"):
        read_averaged(tmp_path / "last.pt")
