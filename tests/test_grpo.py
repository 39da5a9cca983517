"""The stage of reinforcement, with a small student of the demo world."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sfpp_core.config import StudentConfig
from sfpp_core.tiny_autoencoder import AutoencoderConfig, TinyAutoencoder
from training.config import ConfigError, load
from training.loop import OptimiserSettings, Trained
from training.teacher import DemoModel
from training.train_grpo import Batch, GrpoSettings, Learner, main

CONFIG = Path(__file__).parent.parent / "training" / "configs" / "demo_grpo.toml"
SMALL = StudentConfig(dim=128, ffn_dim=32, heads=1, layers=1, text_dim=8, text_length=16)


def brightness(video, caption):
    """Reward bright videos; stop the process politely when told to."""
    if STOP and not STOP.pop():
        os.kill(os.getpid(), signal.SIGTERM)
    return float(video.mean())


def same(video, caption):
    return 1.0


STOP = []
sys.modules["rewards_of_the_test"] = sys.modules[__name__]


@pytest.fixture
def settings(tmp_path):
    """Return a function that reads the shipped settings, made small, with changes."""
    torch.manual_seed(0)
    model = DemoModel(SMALL)
    nn.init.normal_(model.network.head.head.weight, std=0.2)
    trained = Trained(model, OptimiserSettings(lr=0.0), updates=1)
    torch.save({"model": trained.state_dict()}, tmp_path / "student.pt")
    decoder = TinyAutoencoder(AutoencoderConfig(coarse=16, fine=16, mask=8, units=1))
    decoder.mean.zero_()
    decoder.std.fill_(1)
    decoder.save(tmp_path / "decoder.safetensors")

    def make(*overrides):
        small = [
            f"student_run={tmp_path}/student.pt",
            f"autoencoder={tmp_path}/decoder.safetensors",
            f"loop.out={tmp_path}/out",
            "loop.iterations=3",
            "loop.sample_every=3",
            "latent_frames=6",
            "prompts=2",
            "group=4",
            "exam_videos=2",
            "reward.function=rewards_of_the_test:brightness",
            "least_deviation=0.01",
            "kl=0.0",
        ]
        return load(GrpoSettings, [str(CONFIG), *small, *overrides], stage="train_grpo")

    return make


def weights(learner):
    return torch.cat([parameter.detach().flatten() for parameter in learner.policy.model.parameters()])


def test_the_first_ratio_is_1_and_later_ones_are_clipped(settings):
    first = Learner(settings("updates=1"), torch.device("cpu"))
    numbers = first.step(0)
    assert numbers["ratio_off"] == 0
    assert numbers["moved"] == 0
    assert numbers["telling"] == 1
    assert numbers["norm"] > 0
    more = Learner(settings("updates=3", "optimiser.lr=0.01", "optimiser.warmup=1"), torch.device("cpu"))
    numbers = more.step(0)
    assert numbers["ratio_off"] > 1e-4
    assert 0 < numbers["clipped"] <= 1


def test_an_update_does_not_depend_on_what_is_computed_together(settings):
    whole, parts = (Learner(settings(f"at_once={size}"), torch.device("cpu")) for size in (0, 2))
    before = weights(whole)
    a, b = whole.step(0), parts.step(0)
    assert a["reward"] == pytest.approx(b["reward"], abs=1e-5)
    assert a["norm"] == pytest.approx(b["norm"], rel=1e-3)
    assert (weights(whole) - before).abs().max() > 0


def test_videos_of_a_group_share_their_caption_and_differ_by_their_actions(settings):
    for same_start in (True, False):
        first, second = Batch.draw(
            settings(f"same_start={str(same_start).lower()}", "differ=all", "coarse=1"), 5
        )
        assert len(set(first.captions)) == 1
        assert len(set(first.noise.actions)) == 4
        assert len(set(first.noise.starts)) == (1 if same_start else 4)
        assert not set(first.noise.starts) & set(second.noise.starts)


def test_each_group_weighs_a_chunk_of_its_own_and_differs_there_alone(settings):
    learner = Learner(settings("latent_frames=9", "chunk_share=0.1", "prompts=4"), torch.device("cpu"))
    batches = Batch.draw(learner.settings, 0)
    assert {len(batch.chosen) for batch in batches} == {1}
    assert len({chunk for batch in batches for chunk in batch.chosen}) > 1
    for batch in batches[:2]:
        (chunk,) = batch.chosen
        trace = learner.policy.play(batch.captions, batch.noise)
        for earlier in range(chunk):
            clean = trace.clean(earlier)
            torch.testing.assert_close(clean, clean[:1].expand_as(clean))
        assert trace.clean(chunk).std(0).max() > 0.01


def test_groups_that_tell_nothing_change_nothing(settings):
    learner = Learner(settings("reward.function=rewards_of_the_test:same"), torch.device("cpu"))
    before = weights(learner)
    numbers = learner.step(0)
    assert numbers["telling"] == 0
    assert "norm" not in numbers
    assert torch.equal(weights(learner), before)


def test_the_divergence_from_the_start_is_0_there_and_grows(settings):
    learner = Learner(settings("kl=0.1", "optimiser.lr=0.01", "optimiser.warmup=1"), torch.device("cpu"))
    assert learner.step(0)["kl"] == 0
    assert learner.step(1)["kl"] > 0
    assert all(parameter.grad is None for parameter in learner.policy.reference.parameters())


def test_a_copy_of_the_start_shares_what_adapters_leave_alone(settings):
    adapters = ["optimiser.lora.rank=4", "kl=0.1", "optimiser.lr=0.01", "optimiser.warmup=1"]
    learner = Learner(settings(*adapters), torch.device("cpu"))
    kept = {id(parameter) for parameter in learner.policy.reference.parameters()}
    assert kept < {id(parameter) for parameter in learner.policy.model.parameters()}
    assert learner.step(0)["kl"] == 0
    assert learner.step(1)["kl"] > 0


def test_the_reward_rises(settings):
    """Brighter videos are made likelier, and so the averaged student makes brighter ones."""
    wanted = ["loop.iterations=12", "optimiser.lr=0.003", "optimiser.ema=0.5", "group=8", "latent_frames=3"]
    main(settings(*wanted, "exam_videos=8", "reward.least_motion=1.0"))
    folder = Path(settings().loop.out)
    before, after = (
        json.loads((folder / f"sample_{iteration:06d}.json").read_text())["means"]["reward"]
        for iteration in (0, 12)
    )
    assert after > before + 0.005


def test_a_killed_run_goes_on_to_the_same_bits(settings, tmp_path):
    main(settings(f"loop.out={tmp_path}/whole"))
    # One reward per video: the exam's two, then eight per iteration; stopped within the second.
    STOP.extend([False] + [True] * 14)
    with pytest.raises(SystemExit, match="stopped at iteration 2 of 3"):
        main(settings(f"loop.out={tmp_path}/parts"))
    STOP.clear()
    main(settings(f"loop.out={tmp_path}/parts"))
    whole, parts = (torch.load(tmp_path / name / "last.pt")["model"] for name in ("whole", "parts"))
    for kind in ("module", "averaged"):
        assert all(torch.equal(whole[kind][name], parts[kind][name]) for name in whole[kind])


def test_groups_that_ranks_cannot_share_are_refused(settings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="prompts is 2; the 4 ranks share them, so it must be a mul"):
        settings()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("latent_frames=20", "latent_frames is 20; it must be a multiple of the chunk"),
        (
            ["rollout.overlap=3", "rollout.window=6", "latent_frames=9"],
            "rollout.overlap is 3, and a rollout of 9 latent frames is trained on a window that rolls",
        ),
        ("rollout.steps=1", "rollout.steps is 1, which leaves no action to learn"),
        ("group=1", "group is 1; comparing needs at least 2 videos"),
        ("at_once=3", "at_once is 3; it must divide the group, 4"),
        ("logprob_reduction=median", "logprob_reduction is 'median'; use 'mean' or 'sum'"),
        ("dtype=float16", "dtype is 'float16'; use 'auto' or 'float32' or 'bfloat16'"),
        ("clip=0", "clip is 0.0; it must be above 0"),
        ("step_share=1.5", "step_share is 1.5; it must be above 0 and at most 1"),
        ("coarse=0", "coarse is 0; it must be above 0"),
        (["coarse=2", "differ=all"], "coarse is 2, and differ is 'all'; set differ=weighed"),
        ("differ=some", "differ is 'some'; use 'weighed' or 'all'"),
        ("loop.effective_batch=4", "loop.effective_batch is 4; here it is prompts x group, 8"),
    ],
)
def test_impossible_settings_are_refused(settings, change, message):
    with pytest.raises(ConfigError, match=message):
        settings(*([change] if isinstance(change, str) else change))
