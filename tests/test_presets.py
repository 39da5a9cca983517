"""The families' ways to roll out: each as a preset, and each at work."""

import pytest
import tiny
import torch

from sfpp_core.config import RolloutSettings, from_table, to_table
from sfpp_core.errors import SettingsError
from sfpp_core.geometry import VideoGeometry
from sfpp_core.kv_cache import CacheShape, RollingKVCache
from sfpp_core.noise import ChunkNoise
from sfpp_core.presets import FAMILIES, of_family
from sfpp_core.rollout import rollout
from sfpp_core.sampler import LongSampler

FACTS = {
    "self-forcing": (3, 21, 0, 4, [1000, 937.5, 833.333, 625]),
    "self-forcing++": (3, 21, 0, 4, [1000, 937.5, 833.333, 625]),
    "longlive": (3, 12, 3, 4, [1000, 937.5, 833.333, 625]),
    "rolling-forcing": (3, 21, 3, 5, [1000, 952.381, 882.353, 769.231, 555.556]),
    "infinity-rope": (3, 21, 3, 4, [1000, 937.5, 833.333, 625]),
    "causal-forcing": (3, 21, 0, 4, [1000, 937.5, 833.333, 625]),
    "causal-forcing-framewise": (1, 21, 0, 4, [1000, 937.5, 833.333, 625]),
    "causvid": (3, 21, 0, 3, [1000, 757, 522]),
    "krea": (3, 6, 0, 4, [1000, 937.5, 833.333, 625]),
}
"""Chunk, window and sink in latent frames, steps, and timesteps, as the authors publish them."""


def sampler(settings, *, chunks, restart=None, seed=0):
    frames = 1 + 4 * (chunks * settings.chunk - 1)
    geometry = VideoGeometry(height=32, width=48, frames=frames, chunk=settings.chunk)
    return LongSampler(
        student=tiny.student(), geometry=geometry, settings=settings, seed=seed, restart=restart
    )


def test_every_family_has_its_facts_and_no_others():
    assert set(FACTS) == set(FAMILIES)


@pytest.mark.parametrize("family", FACTS)
def test_a_preset_says_what_its_authors_say(family):
    settings = of_family(family)
    chunk, window, sink, steps, timesteps = FACTS[family]
    assert (settings.chunk, settings.window, settings.sink, settings.steps) == (chunk, window, sink, steps)
    assert [1000 * sigma for sigma in settings.schedule().sigmas] == pytest.approx(timesteps, abs=1e-3)


def test_sinks_are_placed_right_before_the_window_where_the_authors_do_so():
    relative = {name for name, settings in FAMILIES.items() if settings.sink_positions == "relative"}
    assert relative == {"rolling-forcing", "infinity-rope"}


def test_an_unknown_family_is_named_with_those_there_are():
    with pytest.raises(
        SettingsError, match=r"'self-forcing\+\+\+'; use one of self-forcing, self-forcing\+\+"
    ):
        of_family("self-forcing+++")


@pytest.mark.parametrize("family", FACTS)
def test_every_family_goes_on_past_its_window_and_can_be_taken_up_again(family):
    settings = of_family(family)
    chunks = 2 * settings.window_chunks + 2
    whole = list(sampler(settings, chunks=chunks).chunks(tiny.text()))
    assert len(whole) == chunks
    shorter = list(sampler(settings, chunks=settings.window_chunks + 1).chunks(tiny.text()))
    assert all(torch.equal(a, b) for a, b in zip(shorter, whole, strict=False))
    for done in (1, settings.window_chunks, chunks - 1):
        rest = list(sampler(settings, chunks=chunks).chunks(tiny.text(), past=whole[:done]))
        assert len(rest) == chunks - done
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[done:], strict=True))


@pytest.mark.parametrize(("window", "overlap"), [(6, 3), (9, 3), (9, 6)])
def test_a_window_that_starts_anew_sees_the_overlap_and_nothing_older(window, overlap):
    settings = RolloutSettings(window=window, overlap=overlap)
    made = list(sampler(settings, chunks=9).chunks(tiny.text()))
    bound, like = tiny.student().bind(tiny.text()), made[0]
    size, kept = settings.window_chunks, settings.overlap_chunks
    first = size - kept
    while first + kept < len(made):
        geometry = VideoGeometry(height=32, width=48, frames=1)
        cache = RollingKVCache(CacheShape.of(tiny.CONFIG, geometry, settings), batch=1, like=like)
        for chunk in range(kept):
            cache.open(chunk)
            bound.remember(made[first + chunk], cache)
            cache.close()
        noise = ChunkNoise(0, first)
        stop = min(size, len(made) - first)
        with torch.no_grad():
            again = rollout(bound, noise, settings.schedule(), cache, chunks=stop, like=like, start=kept)
            for chunk, clean in enumerate(again, start=first + kept):
                torch.testing.assert_close(clean, made[chunk], rtol=0, atol=0)
        first += size - kept


def test_what_a_new_window_begins_with_can_be_made_from_the_window_before():
    settings = RolloutSettings(window=9, overlap=3)
    seen = []

    def restart(before):
        seen.append(before)
        return before[:, :, -3:] * 0.5

    plain = list(sampler(settings, chunks=8).chunks(tiny.text()))
    made = list(sampler(settings, chunks=8, restart=restart).chunks(tiny.text()))
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], made[:3], strict=True))
    assert not torch.equal(plain[3], made[3])
    assert [tuple(before.shape) for before in seen] == [(1, 16, 9, 4, 6)] * 3
    torch.testing.assert_close(seen[1], torch.cat(made[2:5], dim=2), rtol=0, atol=0)
    rest = list(sampler(settings, chunks=8, restart=restart).chunks(tiny.text(), past=made[:6]))
    assert all(torch.equal(a, b) for a, b in zip(rest, made[6:], strict=True))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"overlap": 2}, "overlap is 2 latent frames; it must be a multiple of the chunk, 3, from 0 to 18"),
        ({"overlap": 21}, "overlap is 21 latent frames"),
        ({"overlap": -3}, "overlap is -3 latent frames"),
        ({"overlap": 3, "sink": 3}, "overlap is 3 and sink 3"),
        ({"sigmas": (1.0, 0.5)}, "steps is 4, but sigmas lists 2"),
        ({"sigmas": (0.9, 0.5), "steps": 2}, "sigmas must fall from 1"),
        ({"sigmas": (1.0, 0.0), "steps": 2}, "sigmas must fall from 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, says):
    with pytest.raises(SettingsError, match=says):
        RolloutSettings(**wrong)


def test_settings_survive_a_table():
    settings = of_family("causvid")
    table = to_table(settings) | {"sigmas": list(settings.sigmas)}  # as JSON and TOML give it
    assert from_table(RolloutSettings, table, where="here") == settings


def test_a_window_that_starts_anew_sees_given_chunks_in_the_dtype_of_the_rest():
    settings = RolloutSettings(window=9, overlap=3)
    seen = []

    def restart(before):
        seen.append(before.dtype)
        return before[:, :, -3:]

    made = list(sampler(settings, chunks=5).chunks(tiny.text()))
    start = torch.cat(made[:2], dim=2).double()
    again = list(sampler(settings, chunks=5, restart=restart).chunks(tiny.text(), start=start))
    assert seen == [torch.float32] * 1
    assert all(torch.equal(a.float(), b) for a, b in zip(again, made, strict=True))
