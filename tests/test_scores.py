"""What teacher and critic are shown and asked, and streams that go on from update to update."""

from dataclasses import replace

import pytest
import tiny
import torch
from tiny_runs import autoencoder

from sfpp_core.kv_cache import RollingKVCache
from sfpp_core.noise import ChunkNoise
from sfpp_core.rollout import rollout
from sfpp_core.schedule import FewStepSchedule
from sfpp_core.student import CausalStudent, causal_mask
from training.first_latent import as_clips
from training.losses import guide
from training.scores import CausalScores, Levels, Noised, WholeScores
from training.streaming import Stream, StreamLaw
from training.train_dmd import park

LEVELS = Levels(shift=5.0, least=0.43, largest=0.98)
SCHEDULE = FewStepSchedule.uniform(4)
SHAPE = tiny.cache_shape(7)
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
