"""Prompts over time, in the sampler: what came before is untouched, and each change is what it says."""

import itertools
import random
from dataclasses import replace
from typing import get_args

import pytest
import tiny
import torch

from sfpp_core.cache_shape import CacheShape, StorageKind
from sfpp_core.config import RolloutSettings
from sfpp_core.cues import Change, Cue, Voice, as_cues
from sfpp_core.errors import ConditioningError, SettingsError
from sfpp_core.geometry import VideoGeometry
from sfpp_core.kv_cache import RollingKVCache
from sfpp_core.noise import ChunkNoise
from sfpp_core.rollout import rollout
from sfpp_core.sampler import LongSampler

A, B, C = (tiny.text(seed=seed) for seed in (3, 4, 5))
IMAGE = tiny.latents(1, chunk=1, seed=8)
CHUNKS = 9
LIKE = torch.empty(1, 16, 3, 4, 6)


def cue(chunk, text, change="soft"):
    return Cue(chunk=chunk, embeddings=text, change=Change.parse(change))


def sampler(chunks=CHUNKS, *, lead=0, **options):
    own = ("storage", "context_sigma", "finish", "restart", "seed")
    own = {name: options.pop(name) for name in own if name in options}
    settings = RolloutSettings(**{"window": 9, "steps": 2, **options})
    frames = 1 + 4 * (lead + chunks * settings.chunk - 1)
    geometry = VideoGeometry(height=32, width=48, frames=frames, chunk=settings.chunk, lead=lead)
    return LongSampler(student=tiny.student(), geometry=geometry, settings=settings, **own)


def made(run, text, **options):
    options |= {"start": IMAGE} if run.geometry.lead else {}
    return list(run.chunks(text, **options))


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


KINDS = ["soft", "soft:1", "cut", "cut+sink", "blend:3"]
WAYS = [{}, {"sink": 3}, {"sink": 3, "sink_positions": "relative"}, {"overlap": 3}, {"lead": 1}]
WAYS += [{"lead": 1, "sink": 3}, {"lead": 1, "overlap": 6}]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_before_a_change_is_untouched_and_a_stopped_run_goes_on(way, kind):
    """At the first chunk, before the window is full, after, and at the last one."""
    run = sampler(**way)
    plain = made(run, A)
    for place in (1, 5, CHUNKS - 1):
        whole = made(run, [cue(0, A), cue(place, B, kind)])
        assert equal(whole[:place], plain[:place])
        assert not torch.equal(whole[place], plain[place])
        for done in {place, min(place + 1, CHUNKS - 1)}:
            assert equal(made(run, [cue(0, A), cue(place, B, kind)], past=whole[:done]), whole[done:])


def test_a_table_of_scripts_goes_on_from_anywhere_and_longer_ones_begin_with_shorter_ones():
    pick = random.Random(0)
    for _ in range(8):
        way = pick.choice(WAYS)
        count = pick.randrange(1, 4)
        places = [0, *sorted(pick.sample(range(1, CHUNKS), count))]
        cues = [cue(place, pick.choice([A, B, C]), pick.choice(KINDS)) for place in places]
        run = sampler(**way)
        whole = made(run, cues)
        done = pick.randrange(1, CHUNKS)
        assert equal(made(run, cues, past=whole[:done]), whole[done:]), (way, cues, done)
        start = torch.cat(whole[:done], dim=2)
        assert equal(list(run.chunks(cues, start=start)), whole), (way, places, done)
        shorter = pick.randrange(1, CHUNKS)
        early = [each for each in cues if each.chunk < shorter]
        assert equal(made(sampler(shorter, **way), early), whole[:shorter]), (way, places, shorter)


def test_one_cue_is_one_prompt():
    run = sampler()
    assert equal(made(run, [cue(0, A, "cut")]), made(run, A))


class Rows:
    """The plain meaning of a memory: a list of chunks per layer, each with the time it stands at."""

    def __init__(self):
        self.rows, self.times = [[] for _ in range(tiny.CONFIG.layers)], []

    @property
    def opened(self):
        return self

    def open(self, latent_frame, *, seen):
        """Open a chunk that sees the chunks of the numbers ``seen``."""
        self.first, self.seen = latent_frame, seen
        for row in self.rows:
            row.append(None)

    def write(self, layer, k, v):
        row = self.rows[layer]
        row[-1] = (k, v)
        return [torch.cat(part, dim=2) for part in zip(*(row[n] for n in [*self.seen, -1]), strict=True)]


@torch.no_grad()
def by_hand(clip, kept, place, text, *, steps=2):
    """Return chunk ``place`` made over a memory of the chunks ``kept``, each at its own time."""
    bound, rows, noise = tiny.student().bind(text), Rows(), ChunkNoise(0)
    for number, chunk in enumerate(kept):
        rows.open(3 * chunk, seen=range(number))
        bound.remember(clip[chunk], rows)
    rows.open(3 * place, seen=range(len(kept)))
    schedule = RolloutSettings(steps=steps).schedule()
    noisy = noise.draw(tuple(LIKE.shape), chunk=place, step=0, like=LIKE)
    for step, sigma in enumerate(schedule.sigmas):
        clean = noisy - sigma * bound(noisy, sigma, rows)
        if step + 1 < steps:
            fresh, after = noise.draw(tuple(LIKE.shape), chunk=place, step=step + 1, like=LIKE), step + 1
            noisy = (1 - schedule.sigmas[after]) * clean + schedule.sigmas[after] * fresh
    return clean


@pytest.mark.parametrize(
    ("kind", "sink", "place", "kept"),
    [
        ("soft", 0, 1, [0]),
        ("soft", 0, 6, [4, 5]),
        ("soft", 3, 6, [0, 5]),
        ("soft", 3, 2, [0, 1]),
        ("soft:1", 0, 6, [5]),
        ("soft:1", 3, 6, [0, 5]),
        ("soft:9", 0, 6, [4, 5]),
        ("cut", 0, 6, []),
        ("cut", 3, 6, []),
        ("cut+sink", 0, 6, []),
        ("cut+sink", 3, 6, [0]),
        ("cut+sink", 3, 1, [0]),
    ],
)
def test_a_change_is_the_memory_built_again_by_hand(kind, sink, place, kept):
    """Window 9 latent frames: the open chunk and two more, one of them the sink if there is one."""
    whole = made(sampler(sink=sink), [cue(0, A), cue(place, B, kind)])
    torch.testing.assert_close(by_hand(whole, kept, place, B), whole[place], rtol=1e-4, atol=1e-5)


def test_a_second_change_builds_on_the_first():
    """After a cut with the sink kept, the sink is still the video's; after a plain cut it is the shot's."""
    whole = made(sampler(sink=3), [cue(0, A), cue(4, B, "cut+sink"), cue(7, C, "soft")])
    torch.testing.assert_close(by_hand(whole, [0, 6], 7, C), whole[7], rtol=1e-4, atol=1e-5)
    whole = made(sampler(sink=3), [cue(0, A), cue(4, B, "cut"), cue(7, C, "soft")])
    torch.testing.assert_close(by_hand(whole, [4, 6], 7, C), whole[7], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sink", [0, 3])
@pytest.mark.parametrize("place", [1, 5])
def test_a_cut_is_a_new_rollout_at_that_place(sink, place):
    run = sampler(sink=sink)
    whole = made(run, [cue(0, A), cue(place, B, "cut")])
    with torch.inference_mode():
        cache = RollingKVCache(CacheShape.of(tiny.CONFIG, run.geometry, run.settings), batch=1, like=LIKE)
        student, schedule = tiny.student().bind(B), run.settings.schedule()
        again = rollout(student, ChunkNoise(0, place), schedule, cache, chunks=CHUNKS - place, like=LIKE)
        assert equal(list(again), whole[place:])


@pytest.mark.parametrize("storage", get_args(StorageKind))
def test_every_storage_builds_its_memory_again(storage):
    cues = [cue(0, A), cue(5, B), cue(7, C, "cut+sink")]
    run = sampler(storage=storage, sink=3, sink_positions="relative")
    whole = made(run, cues)
    assert equal(made(run, cues, past=whole[:6]), whole[6:])
    plain = made(sampler(sink=3, sink_positions="relative"), cues)
    apart = [(a - b).norm() / b.norm() for a, b in zip(whole, plain, strict=True)]
    assert max(apart) <= (0 if storage in ("plain", "host") else 0.1)


def test_a_window_that_starts_anew_hears_the_prompt_of_its_time_and_forgets_what_is_before_a_cut():
    """Windows of 3 chunks that share 1: they begin at 3, 5 and 7, and after a cut at 4 at 7."""
    run = sampler(overlap=3)
    whole = made(run, [cue(0, A), cue(5, B, "soft")])
    torch.testing.assert_close(by_hand(whole, [4], 5, B), whole[5], rtol=1e-4, atol=1e-5)
    whole = made(run, [cue(0, A), cue(4, B, "cut")])
    for place, kept in {4: [], 5: [4], 6: [4, 5], 7: [6], 8: [6, 7]}.items():
        torch.testing.assert_close(by_hand(whole, kept, place, B), whole[place], rtol=1e-4, atol=1e-5)


def test_what_a_window_begins_with_stays_after_a_soft_change_in_it_and_is_not_asked_for_after_a_cut():
    seen = []

    def restart(before):
        seen.append(before)
        return before[:, :, -3:] * 0.5

    run = sampler(overlap=3, restart=restart)
    whole = made(run, [cue(0, A), cue(4, B), cue(6, C, "cut")])
    windows = [torch.cat(whole[first : first + 3], dim=2) for first in (0, 0, 2)]
    assert equal(seen, windows)
    halved = {**dict(enumerate(whole)), 2: whole[2] * 0.5}
    torch.testing.assert_close(by_hand(halved, [2, 3], 4, B), whole[4], rtol=1e-4, atol=1e-5)
    assert equal(made(run, [cue(0, A), cue(4, B), cue(6, C, "cut")], past=whole[:5]), whole[5:])


def test_an_image_stays_in_sight_of_a_soft_change_as_long_as_it_would_have_been():
    other = IMAGE + 1
    for place, sink, matters in ((1, 0, True), (5, 0, False), (5, 3, True)):
        run = sampler(lead=1, sink=sink)
        whole = made(run, [cue(0, A), cue(place, B)])
        changed = torch.cat((other, whole[0][:, :, 1:]), dim=2)
        again = next(run.chunks([cue(0, A), cue(place, B)], past=[changed, *whole[1:place]]))
        assert torch.equal(again, whole[place]) != matters


def test_a_blend_moves_from_one_prompt_to_the_other_in_equal_steps():
    voice = Voice(tiny.student(), [cue(0, A), cue(4, B, "blend:4")], device="cpu")
    shares = [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    for chunk, share in enumerate(shares):
        torch.testing.assert_close(voice.text(chunk), (1 - share) * A + share * B)
    assert torch.equal(voice.text(3), A)
    assert torch.equal(voice.text(7), B)
    assert [voice.until(chunk, 9) for chunk in range(9)] == [4, 4, 4, 4, 5, 6, 7, 9, 9]


def test_a_blend_that_is_cut_short_goes_on_from_where_it_was():
    voice = Voice(tiny.student(), [cue(0, A), cue(4, B, "blend:4"), cue(6, C, "blend:2")], device="cpu")
    torch.testing.assert_close(voice.text(6), ((A + B) / 2 + C) / 2)
    assert torch.equal(voice.text(7), C)


def test_any_number_of_blends_can_be_cut_short():
    """Each goes half the way to its prompt."""
    cues = [cue(0, A), *(cue(chunk, B, "blend:2") for chunk in range(1, 1500))]
    voice = Voice(tiny.student(), cues, device="cpu")
    torch.testing.assert_close(voice.text(3), (A + 7 * B) / 8)
    torch.testing.assert_close(voice.text(1498), B)


def test_a_blend_keeps_the_memory():
    whole = made(sampler(), [cue(0, A), cue(3, B, "blend:2")])
    bound = [tiny.student().bind(text) for text in (A, (A + B) / 2, B)]
    heard = [bound[0]] * 3 + [bound[1]] + [bound[2]] * (CHUNKS - 4)
    run = sampler()
    with torch.inference_mode():
        cache = RollingKVCache(CacheShape.of(tiny.CONFIG, run.geometry, run.settings), batch=1, like=LIKE)
        for chunk, student in enumerate(heard):
            options = {"chunks": chunk + 1, "start": chunk, "like": LIKE, "keep_last": True}
            (clean,) = rollout(student, ChunkNoise(0), run.settings.schedule(), cache, **options)
            torch.testing.assert_close(clean, whole[chunk], rtol=1e-5, atol=1e-6)


def test_one_prompt_is_bound_at_a_time_and_once_per_change():
    student, asked = tiny.student(), []
    bind = student.bind
    student.bind = lambda text: asked.append(text) or bind(text)
    run = sampler()
    run = LongSampler(student=student, geometry=run.geometry, settings=run.settings)
    list(run.chunks([cue(0, A), cue(2, B), cue(4, C, "blend:2"), cue(7, A, "cut")]))
    assert len(asked) == 5


def test_memory_does_not_grow_with_scenes(monkeypatch):
    most = 0
    hold = LongSampler._hold

    def holding(self, held, *rest):
        nonlocal most
        hold(self, held, *rest)
        most = max(most, len(held))

    monkeypatch.setattr(LongSampler, "_hold", holding)
    cues = [cue(0, A), *(cue(chunk, B, KINDS[chunk // 4 % 5]) for chunk in range(4, 40, 4))]
    made(sampler(40, steps=1, sink=3), cues)
    assert most <= 2 * 3 + 2


def test_the_past_can_be_remembered_under_noise():
    plain, cues = made(sampler(), A), [cue(0, A), cue(5, B)]
    run = sampler(context_sigma=0.1)
    whole = made(run, A)
    assert torch.equal(whole[0], plain[0])
    assert not torch.equal(whole[1], plain[1])
    for way in ({}, {"lead": 1}, {"overlap": 3}):
        run = sampler(context_sigma=0.1, **way)
        whole = made(run, cues)
        assert equal(made(run, cues, past=whole[:6]), whole[6:])
    with pytest.raises(SettingsError, match=r"context_sigma is 1; it must be from 0 to below 1"):
        sampler(context_sigma=1.0)


def test_the_noise_on_the_past_is_the_students_unless_another_is_asked_for():
    asked, geometry = made(sampler(context_sigma=0.1), A), sampler().geometry
    settings = RolloutSettings(window=9, steps=2, context_sigma=0.1)
    own = LongSampler(student=tiny.student(), geometry=geometry, settings=settings)
    assert equal(made(own, A), asked)
    assert equal(made(replace(own, context_sigma=0.0), A), made(sampler(), A))


def test_chunks_can_be_mapped_before_they_are_shown_and_remembered():
    seen = []

    def finish(chunk, clean):
        seen.append(chunk)
        return clean * 0.5 if chunk == 3 else clean

    plain = made(sampler(), A)
    whole = made(sampler(finish=finish), A)
    assert seen == list(range(CHUNKS))
    assert equal(whole[:3], plain[:3])
    assert torch.equal(whole[3], plain[3] * 0.5)
    assert not torch.equal(whole[4], plain[4])
    del seen[:]
    cues = [cue(0, A), cue(5, B, "cut")]
    whole = made(sampler(finish=finish), cues)
    del seen[:]
    assert equal(made(sampler(finish=finish), cues, past=whole[:6]), whole[6:])
    assert seen == list(range(CHUNKS))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("soft", "soft"),
        (" cut ", "cut"),
        ("#", "cut"),
        ("cut+sink", "cut+sink"),
        ("soft:3", "soft:3"),
        ("blend", "blend:4"),
        ("blend:12", "blend:12"),
    ],
)
def test_a_change_is_written_as_it_is_read(text, said):
    assert str(Change.parse(text)) == said
    assert Change.parse(said) == Change.parse(text)


@pytest.mark.parametrize(
    "text", ["", "fade", "soft:0", "soft:", "blend:", "blend:x", "cut+", "soft+sink", "blend:1.5"]
)
def test_what_names_no_change_is_refused(text):
    with pytest.raises(
        SettingsError, match=r"names no way to change the prompt; use soft, cut, cut\+sink or"
    ):
        Change.parse(text)


@pytest.mark.parametrize("chunks", [0, 1001])
def test_a_blend_has_a_length(chunks):
    with pytest.raises(SettingsError, match=f"a blend over {chunks} chunks cannot be; use 1 to 1000"):
        Change.parse(f"blend:{chunks}")


def test_cues_in_disorder_are_refused():
    for places in ([], [1], [0, 3, 3], [0, 3, 2]):
        with pytest.raises(SettingsError, match="the first must be 0 and each after the one before"):
            as_cues([cue(place, A) for place in places])
    with pytest.raises(ConditioningError, match=r"cues hold embeddings for \[1, 2\] videos"):
        as_cues([cue(0, A), cue(1, tiny.text(batch=2))])
    with pytest.raises(ConditioningError, match="text embeddings have shape"):
        next(sampler().chunks([cue(0, A), cue(1, A[..., :3])]))


def test_a_batch_follows_one_script():
    both = [torch.cat((A, B)), torch.cat((B, C))]
    cues = [cue(place, text) for place, text in zip((0, 3), both, strict=True)]
    pairs = list(itertools.islice(sampler().chunks(cues), 5))
    first = made(sampler(), [cue(0, A), cue(3, B)])
    for pair, alone in zip(pairs, first, strict=False):
        assert pair.shape[0] == 2
        assert pair.isfinite().all()
        assert pair.shape[1:] == alone.shape[1:]
