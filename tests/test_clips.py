"""Batches of encoded clips, and the cuts within them."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from training.config import ConfigError, load
from training.latents import Clips
from training.train_causal import CausalSettings

CONFIG = Path(__file__).parent.parent / "training" / "configs" / "demo_cuts.toml"


@pytest.fixture
def clips(tmp_path):
    """Return clips of 9 latent frames of 8x8 cells by their settings."""
    path = tmp_path / "latents.safetensors"
    latents = torch.randn(5, 2, 9, 8, 8, generator=torch.Generator().manual_seed(1)).half()
    save_file({"latents": latents}, path, metadata={"seed": "3"})
    return lambda **settings: Clips(path, seed=4, **settings)


def moves(clip, whole):
    """Return by how many cells each latent frame of ``clip`` is that of ``whole`` moved, ``(y, x)``."""
    found = []
    for frame, other in zip(clip.unbind(1), whole.unbind(1), strict=True):
        every = ((y, x) for y in range(8) for x in range(8))
        found.append(next(move for move in every if torch.equal(frame, other.roll(move, (-2, -1)))))
    return found


def cuts_of(clip, whole):
    """Return the latent frames that begin with a cut."""
    found = moves(clip, whole)
    return [frame for frame in range(1, 9) if found[frame] != found[frame - 1]]


def test_a_cut_moves_the_whole_rest_of_a_clip_by_two_cells_or_more(clips):
    for number in range(4):
        (whole,), *_ = clips().batch(number, 1)
        (clip,), *_ = clips(cuts=1.0).batch(number, 1)
        found = moves(clip, whole)
        assert cuts_of(clip, whole) == [3, 6]
        for before, after in ((found[0], found[3]), (found[3], found[6])):
            assert all(2 <= (b - a) % 8 <= 6 for a, b in zip(before, after, strict=True))


def test_cuts_come_at_their_share_of_the_places_where_they_may(clips):
    places = 400
    whole, cut = clips(), clips(cuts=0.3)
    found = [cuts_of(cut.batch(n, 1)[0][0], whole.batch(n, 1)[0][0]) for n in range(places // 2)]
    assert {place for clip in found for place in clip} == {3, 6}
    share = sum(map(len, found)) / places
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / places)


def test_the_clips_kept_are_never_cut_themselves(clips):
    cut = clips(cuts=1.0)
    before = cut.latents.clone()
    first, *_ = cut.batch(0, 4)
    again, *_ = cut.batch(0, 4)
    assert torch.equal(first, again)
    assert torch.equal(before, cut.latents)


@pytest.mark.parametrize("cuts", [-0.1, 1.5])
def test_a_share_of_cuts_that_is_none_is_refused(cuts):
    with pytest.raises(ConfigError, match=f"cuts is {cuts}; it is a share, from 0 to 1"):
        load(CausalSettings, [str(CONFIG), f"cuts={cuts}"], stage="test")
