"""Distribution matching: what teacher and critic are shown and asked, streams, and the stage itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from tiny_runs import autoencoder, write_clips, write_run

from sfpp_core.kv_cache import CacheShape, RollingKVCache
from sfpp_core.noise import ChunkNoise
from sfpp_core.rollout import rollout
from sfpp_core.schedule import FewStepSchedule
from sfpp_core.student import CausalStudent, causal_mask
from training import train_dmd
from training.config import ConfigError, load
from training.first_latent import as_clips
from training.latents import Clips
from training.losses import guide
from training.matching import Shown
from training.parallel import Pieces
from training.scores import CausalScores, Levels, Noised, WholeScores
from training.streaming import Stream, StreamLaw
from training.train_dmd import DmdSettings, Rollouts, load_roles, main, park

CONFIGS = Path(__file__).parent.parent / "training" / "configs"
LEVELS = Levels(shift=5.0, least=0.43, largest=0.98)
SCHEDULE = FewStepSchedule.uniform(4)
SHAPE = CacheShape(
    layers=tiny.CONFIG.layers,
    heads=tiny.CONFIG.heads,
    head_dim=tiny.CONFIG.head_dim,
    tokens_per_chunk=18,
    latent_frames_per_chunk=3,
    window=7,
)
TEXTS = {"red": 3, "blue": 4, "": 5}


class Role:
    """A tiny model with a made-up text embedding per prompt."""

    def __init__(self):
        self.net = tiny.network()

    def bind(self, prompts, *, dtype=None):
        embeddings = torch.cat([tiny.text(seed=TEXTS[prompt]) for prompt in prompts])
        return CausalStudent(self.net, tiny.CONFIG).bind(embeddings)


CAPTIONS = ["red", "blue"]


@torch.no_grad()
def test_a_causal_score_of_a_chunk_knows_the_clean_past_and_nothing_later():
    scores, role, clean = CausalScores(LEVELS, SHAPE), Role(), tiny.latents(3, batch=2)
    at = scores.noised(clean, torch.Generator().manual_seed(0))
    before = scores.velocity(role, at, CAPTIONS)
    # Chunk 2 given chunks 0 and 1, in one forward under the causal mask: clean past, noisy last chunk.
    seen = torch.cat((clean[:, :, :6], at.noisy[:, :, 6:]), dim=2)
    sigma = at.sigma.flatten(1).clone()
    sigma[:, :6] = 0
    mask = causal_mask(9, 6, chunk=3, window=21)
    whole = role.bind(CAPTIONS).whole(seen, sigma, mask=mask)
    torch.testing.assert_close(before[:, :, 6:], whole[:, :, 6:], rtol=1e-4, atol=1e-5)
    other = clean.clone()
    other[:, :, 6:] += 1
    changed = scores.velocity(role, replace(at, clean=other), CAPTIONS)
    torch.testing.assert_close(changed, before, rtol=0, atol=0)


def test_every_chunk_of_every_clip_has_a_sigma_of_its_own_and_every_clip_of_a_bidirectional_batch():
    clean, generator = tiny.latents(7, batch=2), torch.Generator().manual_seed(0)
    causal = CausalScores(LEVELS, SHAPE).noised(clean, generator).sigma
    assert causal.shape == (2, 1, 21, 1, 1)
    chunks = causal.view(14, 3)
    assert torch.equal(chunks, chunks[:, :1].expand(14, 3))
    assert len(chunks[:, 0].unique()) > 10  # a few are at the clamp
    openings = CausalScores(LEVELS, SHAPE).noised(tiny.latents(1, batch=2), generator).sigma
    assert len(openings.unique()) == 2
    whole = WholeScores(LEVELS).noised(clean, generator).sigma
    assert whole.shape == (2, 1, 1, 1, 1)
    assert all(0.43 <= sigma <= 0.98 for sigma in (*causal.flatten(), *whole.flatten()))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_guidance_is_the_conventional_scale(kind):
    scores = CausalScores(LEVELS, SHAPE) if kind == "causal" else WholeScores(LEVELS)
    role, clean = Role(), tiny.latents(2, batch=2)
    at = scores.noised(clean, torch.Generator().manual_seed(0))
    plain, empty = scores.velocity(role, at, CAPTIONS), scores.velocity(role, at, ["", ""])
    guided = scores.velocity(role, at, CAPTIONS, 4.0)
    torch.testing.assert_close(guided, guide(plain, empty, 4.0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided, plain + 3 * (plain - empty), rtol=1e-3, atol=1e-4)


def test_the_noised_copy_carries_no_gradient_and_the_velocity_does():
    role = Role()
    role.net.requires_grad_(True)
    clean = tiny.latents(2, batch=2).requires_grad_(True)
    scores = CausalScores(LEVELS, SHAPE)
    at = scores.noised(clean, torch.Generator().manual_seed(0))
    assert isinstance(at, Noised)
    assert not at.noisy.requires_grad
    scores.velocity(role, at, CAPTIONS).square().mean().backward()
    assert clean.grad is None
    assert all(parameter.grad is not None for parameter in role.net.parameters())


def stream_segments(stream, turns, *, first=0):
    """Return the next segments of a stream, as the tiny role rolls them; turn i would begin video i."""
    role, like, made = Role(), torch.zeros(2, 16, 3, 4, 6), []
    for turn in range(first, first + turns):
        stream.turn(CAPTIONS, 5 + turn)
        made.append(stream.roll(role.bind(stream.captions), SCHEDULE, exit_step=3, like=like))
    return made


LAW = StreamLaw(horizon=9, chunks=3, overlap=1)


@torch.no_grad()
def test_a_stream_is_one_rollout_in_overlapping_segments():
    shape = replace(SHAPE, window=3)
    made = stream_segments(Stream(LAW, shape), 5)
    like = torch.zeros(2, 16, 3, 4, 6)
    cache = RollingKVCache(shape, batch=2, like=like)
    chunks = rollout(Role().bind(CAPTIONS), ChunkNoise(5), SCHEDULE, cache, chunks=9, like=like)
    whole = torch.cat(list(chunks), dim=2)
    for turn, rolled in enumerate(made[:4]):
        expected = whole[:, :, 6 * turn : 6 * turn + 9]
        torch.testing.assert_close(rolled.clean, expected, rtol=1e-4, atol=1e-5)
        first = max(0, 6 * turn - 6)
        torch.testing.assert_close(rolled.before, whole[:, :, first : 6 * turn], rtol=1e-4, atol=1e-5)
        assert rolled.old == (3 if turn else 0)
    # The next stretch would pass the horizon: another video, of another seed, from its start.
    assert made[4].before.shape[2] == 0
    assert (made[4].clean - made[0].clean).abs().max() > 0.1


def test_only_what_is_new_in_a_stream_has_a_gradient():
    shape = replace(SHAPE, window=3)
    stream, role = Stream(LAW, shape), Role()
    role.net.requires_grad_(True)
    like = torch.zeros(2, 16, 3, 4, 6)
    with torch.no_grad():
        stream.turn(CAPTIONS, 5)
        stream.roll(role.bind(CAPTIONS), SCHEDULE, exit_step=3, like=like)
    rolled = stream.roll(role.bind(CAPTIONS), SCHEDULE, exit_step=3, like=like)
    old = torch.autograd.grad(rolled.clean[:, :, :3].sum(), list(role.net.parameters()), retain_graph=True)
    assert all(grad.abs().max() == 0 for grad in old)
    new = torch.autograd.grad(rolled.clean[:, :, 3:].sum(), list(role.net.parameters()))
    assert all(grad.abs().max() > 0 for grad in new)
    _, mask = as_clips(rolled, "keep", autoencoder(), masked=3, length=rolled.clean.shape[2])
    assert mask[0].flatten().tolist() == [0] * 3 + [1] * 6


@torch.no_grad()
def test_a_stream_goes_on_after_a_kill_as_if_nothing_had_happened(tmp_path):
    whole = stream_segments(Stream(LAW, SHAPE), 4)
    first = Stream(LAW, SHAPE)
    stream_segments(first, 2)
    torch.save(first.state_dict(), tmp_path / "stream.pt")
    second = Stream(LAW, SHAPE)
    second.load_state_dict(torch.load(tmp_path / "stream.pt", weights_only=True))
    for expected, rolled in zip(whole[2:], stream_segments(second, 2, first=2), strict=True):
        torch.testing.assert_close(rolled.clean, expected.clean, rtol=0, atol=0)
        torch.testing.assert_close(rolled.before, expected.before, rtol=0, atol=0)


@torch.no_grad()
def test_a_stream_that_is_parked_between_its_turns_is_the_same_video():
    whole, stream = stream_segments(Stream(LAW, SHAPE), 3), Stream(LAW, SHAPE)
    for turn, expected in enumerate(whole):
        (rolled,) = stream_segments(stream, 1, first=turn)
        torch.testing.assert_close(rolled.clean, expected.clean, rtol=0, atol=0)
        assert rolled.old == expected.old
        park(stream)


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
        ("beta=[1]", "beta is \\[1\\]; it must be two numbers above 0"),
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
