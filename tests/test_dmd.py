"""The stage of distribution matching: its rollouts, roles and settings, and resuming."""

from pathlib import Path

import pytest
import torch
from tiny_runs import autoencoder, write_clips, write_run

from training import train_dmd
from training.config import ConfigError, load
from training.latents import Clips
from training.matching import Shown
from training.parallel import Pieces
from training.train_dmd import DmdSettings, Rollouts, load_roles, main

CONFIGS = Path(__file__).parent.parent / "training" / "configs"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the saved state of a run."""
    return write_run(tmp_path_factory.mktemp("runs") / "last.pt")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Return a file of clips as the teacher's stage leaves it."""
    return write_clips(tmp_path_factory.mktemp("clips") / "latents.safetensors")


def settings_of(runs, out, *overrides):
    """Return the shipped settings with small sizes."""
    autoencoder().save(out / "autoencoder.safetensors")
    roles = [f"teacher_run={runs}", f"student_run={runs}", f"autoencoder={out / 'autoencoder.safetensors'}"]
    sizes = [f"loop.out={out}", "batch=2", "segment=6", "clips=[6, 3]", "horizon=12", "warmup=1", "every=2"]
    config = str(CONFIGS / "demo_self_forcing.toml")
    return load(DmdSettings, [config, *roles, *sizes, *overrides], stage="train_dmd")


@pytest.fixture
def without_sheets(monkeypatch):
    """Leave out the samples, a minute of video per run; test_stages makes them."""
    monkeypatch.setattr(train_dmd, "roll_samples", lambda *_, **__: {})


VARIANTS = {
    "two pieces": ["streaming=true", "horizon=9", "loop.effective_batch=4"],
    "self-forcing": ["horizon=6"],
    "streaming": ["streaming=true", "critic_updates=2", "overlap=3", "first_latent=mask"],
    "whole segments": ["clips=[]", "critic_updates=1", "rollout.context_sigma=0.1"],
    "true past": ["past=data", "horizon=6", "at_zero=0.5"],
    "literal": ["backward_noise=finished", "first_latent=reencode", "last_step_only=true", "beta=[1, 2]"],
    "bidirectional": ["scores=bidirectional", "checkpointing=true", "at_zero=0"],
}


@pytest.mark.usefixtures("without_sheets")
@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_updates_equal_four_and_a_kill_and_six(runs, clips, tmp_path, variant):
    states = []
    given = [f"latents={clips}"] if variant == "true past" else []
    for name, stops in (("whole", [10]), ("parts", [4, 10])):
        (tmp_path / name).mkdir()
        for stop in stops:
            # A run of 4 that goes on to 10 has the rates of its own length, so the rate must not fall.
            rates = ["student.hold=1.0", "critic.hold=1.0", f"loop.iterations={stop}"]
            main(settings_of(runs, tmp_path / name, *VARIANTS[variant], *given, *rates))
        states.append(torch.load(tmp_path / name / "last.pt", weights_only=True))
    for part in ("model", "critic"):
        for key, value in states[0][part]["module"].items():
            torch.testing.assert_close(value, states[1][part]["module"][key], rtol=0, atol=0)
    start = torch.load(runs, weights_only=True)["model"]["averaged"]
    moved = [(states[0]["model"]["module"][name[7:]] - value).abs().max() for name, value in start.items()]
    assert max(moved) > 0


def test_the_segment_is_a_function_of_seed_and_piece(runs, tmp_path):
    settings = settings_of(runs, tmp_path, "clips=[6]")
    roles = load_roles(settings, autoencoder(), torch.device("cpu"))
    pieces = Pieces(batch=2, effective=2)
    with torch.no_grad():
        one, again, other = (Rollouts(settings, roles, pieces).next(piece)[0] for piece in (3, 3, 4))
    torch.testing.assert_close(one.clean, again.clean, rtol=0, atol=0)
    assert one.captions == again.captions
    assert (one.clean - other.clean).abs().max() > 0.01


def test_all_pieces_of_an_iteration_roll_out_equally_far_and_differ_in_what_they_show(
    runs, tmp_path, monkeypatch
):
    settings = settings_of(runs, tmp_path, "horizon=60", "clips=[6, 3]")
    roles = load_roles(settings, autoencoder(), torch.device("cpu"))
    drawn = []
    monkeypatch.setattr(roles, "roll", lambda texts, noise, *law, past: drawn.append((law, texts, noise)))
    rollouts = Rollouts(settings, roles, Pieces(batch=2, effective=8))
    for piece in range(24):
        rollouts.next(piece)
    laws = [law for law, _, _ in drawn]
    assert all(len(set(map(str, laws[first : first + 4]))) == 1 for first in range(0, 24, 4))
    assert len({str(law) for law in laws}) > 3
    assert len({tuple(texts) for _, texts, _ in drawn}) > 20


@pytest.mark.usefixtures("without_sheets")
def test_the_critic_of_one_round_goes_on_in_the_next(runs, tmp_path):
    for name in ("first", "next"):
        (tmp_path / name).mkdir()
    first = settings_of(runs, tmp_path / "first", "horizon=6", "critic.lr=1e-2", "loop.iterations=2")
    main(first)
    saved = torch.load(tmp_path / "first" / "last.pt", weights_only=True)["critic"]["module"]
    given = f"critic_run={tmp_path / 'first' / 'last.pt'}"
    roles = load_roles(settings_of(runs, tmp_path / "next", given), autoencoder(), torch.device("cpu"))
    held = roles.critic.state_dict()
    assert held.keys() == saved.keys()
    assert all(torch.equal(held[name], saved[name]) for name in saved)
    begun = roles.teacher.state_dict()
    assert any(not torch.equal(held[name], begun[name]) for name in saved)


@pytest.mark.parametrize(("window", "chunks"), [(21, 6), (9, 2), (24, 7)])
def test_a_true_past_fills_the_window_but_for_a_chunk_with_the_clip_that_the_caption_tells_of(
    runs, clips, tmp_path, window, chunks, monkeypatch
):
    changed = ["past=data", f"latents={clips}", "horizon=6", "at_zero=0", f"rollout.window={window}"]
    settings = settings_of(runs, tmp_path, *changed)
    roles = load_roles(settings, autoencoder(), torch.device("cpu"))
    seen = []
    roll = roles.roll

    def watched(captions, noise, segment, *rest, past):
        seen.append((segment.start, past))
        return roll(captions, noise, segment, *rest, past=past)

    monkeypatch.setattr(roles, "roll", watched)
    with torch.no_grad():
        shown, _ = Rollouts(settings, roles, Pieces(batch=2, effective=2)).next(3)
    wanted, captions, _ = Clips(clips, seed=settings.loop.seed + 2).batch(3, 2)
    (start, past), each = seen[0], len(shown.captions) // 2
    assert start == chunks
    assert torch.equal(past, wanted[:, :, : 3 * chunks])
    assert list(shown.captions) == [text for text in captions for _ in range(each)]


def test_clips_of_a_true_past_are_needed_to_train_and_not_to_tell_what_it_takes(runs, tmp_path, caplog):
    changed = ["past=data", f"latents={tmp_path / 'nowhere'}", "horizon=6"]
    with caplog.at_level("INFO"):
        main(settings_of(runs, tmp_path, *changed, "loop.dry_run=true"))
    assert "rollout" in caplog.text
    with pytest.raises(
        ConfigError, match=r"latents is .*nowhere, which does not exist; run training.train_t"
    ):
        main(settings_of(runs, tmp_path, *changed))


def test_a_share_of_the_videos_with_a_true_past_begins_without_one(runs, clips, tmp_path, monkeypatch):
    settings = settings_of(runs, tmp_path, "past=data", f"latents={clips}", "horizon=6", "at_zero=0.5")
    roles = load_roles(settings, autoencoder(), torch.device("cpu"))
    starts = []
    monkeypatch.setattr(roles, "roll", lambda *given, past: starts.append((given[2].start, past is None)))
    rollouts = Rollouts(settings, roles, Pieces(batch=2, effective=2))
    for piece in range(12):
        rollouts.next(piece)
    assert set(starts) == {(0, True), (6, False)}


@pytest.mark.parametrize("changed", ["rollout.window=6", "rollout.sink=3"])
def test_teacher_and_critic_see_the_whole_segment_whatever_the_student_sees(runs, tmp_path, changed):
    sizes = ["segment=9", "clips=[]", "horizon=9"]
    plain, short = (
        load_roles(settings_of(runs, tmp_path, *sizes, *more), autoencoder(), torch.device("cpu"))
        for more in ([], [changed])
    )
    assert short.shape != plain.shape
    assert short.scores.shape.past(2) == [0, 1]
    clean = torch.randn(2, 16, 9, 8, 8, generator=torch.Generator().manual_seed(0))
    at = plain.scores.noised(clean, torch.Generator().manual_seed(1))
    for role in (short.teacher, short.critic):
        asked = [
            roles.scores.velocity(role.float(), at, ["a red circle moves up fast", ""])
            for roles in (plain, short)
        ]
        torch.testing.assert_close(*asked, rtol=0, atol=0)


def test_the_overall_weights_reach_both_losses(runs, tmp_path):
    """Chunk by chunk: causal scores judge each at a sigma of its own."""
    plain, more = (
        load_roles(settings_of(runs, tmp_path, *changed), autoencoder(), torch.device("cpu"))
        for changed in (["overall=0", "critic_overall=0"], ["overall=3", "critic_overall=3"])
    )
    for parameter in plain.critic.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    more.critic.load_state_dict(plain.critic.state_dict())
    clean = torch.randn(2, 16, 6, 8, 8, requires_grad=True)
    shown = Shown(clean=clean, mask=None, captions=["a red circle moves up fast"] * 2)
    grads, critics = [], []
    for roles in (plain, more):
        loss = roles.student_loss(shown, torch.Generator().manual_seed(1))
        grads.append(torch.autograd.grad(loss, clean)[0].unflatten(2, (2, 3)))
        critics.append(roles.critic_loss(shown.detached(), torch.Generator().manual_seed(1)).item())
    common = grads[0].mean((3, 4, 5), keepdim=True)
    assert common.abs().max() > 1e-7
    torch.testing.assert_close(grads[1], grads[0] + 3 * common)
    assert critics[1] > critics[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scores=acausal", "scores is 'acausal'; use one of causal, bidirectional"),
        ("backward_noise=x", "use one of rollout, finished"),
        ("first_latent=drop", "use one of keep, mask, reencode"),
        ("horizon=20", "horizon is 20; it must be a multiple of the chunk"),
        ("horizon=3", "horizon is 3, shorter than the segment, 6"),
        ("clips=[4]", "clips is \\[4\\]; 4 must be a multiple of the chunk, 3, and go into the segment, 6"),
        ("clips=[0]", "clips is \\[0\\]; 0 must be a multiple of the chunk, 3"),
        ("clips=[-3]", "clips is \\[-3\\]; -3 must be a multiple of the chunk, 3"),
        ("masked=3", "masked is 3; it must be 0 or more and below the shortest clip, 3"),
        ("overall=-1", "overall is -1.0; it must be 0 or more"),
        ("critic_overall=-0.5", "critic_overall is -0.5; it must be 0 or more"),
        ("opening=-1", "opening is -1.0; it must be 0 or more"),
        (["scores=bidirectional", "opening=2"], "opening is 2.0, and bidirectional scores judge a segment"),
        ("overlap=6", "overlap is 6; it must be below the segment, 6"),
        ("beta=[1]", "beta is \\[1.0\\]; it must be two numbers above 0"),
        ("past=true clips", "past is 'true clips'; use one of own, data"),
        ("latents=x", "latents is x, and past is 'own', which reads no clips; set past to 'data'"),
        (["past=data", "horizon=6"], "past is 'data', and latents is empty; name the file of clips"),
        (
            ["past=data", "latents=x"],
            "so nothing is rolled out before a segment: set horizon to the segment, 6",
        ),
        (
            ["past=data", "latents=x", "horizon=6", "streaming=true"],
            "horizon to the segment, 6, and streaming",
        ),
        (
            ["past=data", "latents=x", "horizon=6", "rollout.window=27"],
            "rollout.window is 27; a past of true clips, 21 latent frames long, fills a window from 6 to 24",
        ),
        (
            ["rollout.overlap=3", "rollout.window=6"],
            "a rollout of 12 latent frames is trained on a window that rolls; set it to 0, or roll",
        ),
        (["past=data", "video.prompts=x"], "past is 'data', which is clips of the demo's world; for Wan"),
    ],
)
def test_impossible_settings_are_refused(runs, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        settings_of(runs, tmp_path, *([override] if isinstance(override, str) else override))
