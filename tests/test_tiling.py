"""Tiles: shares that sum to one, frames like the whole picture's, and sizes that are refused."""

from itertools import pairwise

import pytest
import torch
from wan_files import SMALL_2_1, TINY, write_tiny, write_wan

from sfpp_core.decoder import load_decoder
from sfpp_core.errors import GeometryError, RolloutOrderError, SettingsError
from sfpp_core.tiling import TiledDecoder, spans
from sfpp_core.tiny_autoencoder import AutoencoderConfig, TinyAutoencoder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiles") / "tiny.safetensors"
    write_tiny(path, TINY)
    return load_decoder(path)


def decoded(decoder, latents, chunks):
    decoder.reset()
    return torch.cat([decoder.decode(chunk) for chunk in latents.split(chunks, dim=2)], 1)


@pytest.mark.parametrize("cells", [1, 4, 5, 7, 16, 30, 60])
@pytest.mark.parametrize(("tile", "overlap"), [(4, 0), (4, 1), (4, 3), (8, 2), (64, 8)])
def test_shares_sum_to_one_and_neighbours_overlap(cells, tile, overlap):
    laid = spans(cells, tile, overlap, 8)
    total = torch.zeros(cells * 8)
    for span in laid:
        assert span.stop - span.start == min(tile, cells)
        total[span.start * 8 : span.stop * 8] += span.share
    assert torch.allclose(total, torch.ones_like(total))
    assert all(a.stop - b.start >= overlap for a, b in pairwise(laid))
    assert laid[0].start == 0 and laid[-1].stop == cells


def test_one_tile_over_all_is_the_whole_picture_bit_for_bit(tiny):
    latents = torch.randn(1, 16, 5, 6, 7)
    whole = decoded(tiny, latents, [1, 3, 1])
    assert torch.equal(decoded(TiledDecoder(tiny, tile=64, overlap=16), latents, [1, 3, 1]), whole)


def test_tiles_fade_into_the_whole_picture(tiny):
    """What a tile lacks is what lies beyond its edge: near it, where its share is small."""
    latents = torch.randn(1, 16, 4, 24, 24)
    whole = decoded(tiny, latents, [1, 3])
    tiled = decoded(TiledDecoder(tiny, tile=96, overlap=64, rest_on="cpu"), latents, [1, 3])
    error = (tiled - whole).abs()
    assert tiled.shape == whole.shape
    assert 0 < error.max() < 0.1 * (whole.max() - whole.min())
    assert error[..., :8, :8].max() < 1e-6
    crude = decoded(TiledDecoder(tiny, tile=96, overlap=0), latents, [1, 3])
    assert error.mean() < 0.3 * (crude - whole).abs().mean()


def test_streamed_tiles_are_one_shot_tiles_with_wans_autoencoder(tmp_path):
    path = tmp_path / "vae.safetensors"
    write_wan(path, SMALL_2_1)
    decoder = load_decoder(path)
    latents = torch.randn(1, 16, 3, 3, 5)
    tiled = TiledDecoder(decoder, tile=24, overlap=8)
    frames = decoded(tiled, latents, [1, 1, 1])
    assert frames.shape == (1, 9, 3, 24, 40) and frames.min() >= 0 and frames.max() <= 1
    assert torch.allclose(decoded(tiled, latents, 3), frames, atol=1e-6)
    assert (frames - decoded(decoder, latents, 3)).abs().mean() < 0.05


def test_the_demos_decoder_can_be_tiled():
    torch.manual_seed(0)
    decoder = TinyAutoencoder(AutoencoderConfig(coarse=16, fine=8, mask=4, padding="replicate")).eval()
    latents = torch.randn(1, 16, 4, 16, 16)
    whole = decoded(decoder, latents, 4)
    assert (decoded(TiledDecoder(decoder, tile=96, overlap=64), latents, [1, 3]) - whole).abs().max() < 0.05


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (100, 16, "tile is 100 pixels; use a multiple of 8, e.g. 96"),
        (0, 0, "tile is 0 pixels; use a multiple of 8, e.g. 8"),
        (64, 12, "overlap is 12 pixels; use a multiple of 8, e.g. 16"),
        (64, -8, "overlap is -8 pixels"),
        (64, 64, "tile is 64 pixels and neighbours share 64; use tiles of at least 88"),
    ],
)
def test_impossible_tiles_are_refused(tiny, tile, overlap, message):
    with pytest.raises(SettingsError, match=message):
        TiledDecoder(tiny, tile=tile, overlap=overlap)


def test_misuse_is_refused(tiny, monkeypatch):
    tiled = TiledDecoder(tiny, tile=16, overlap=8)
    with pytest.raises(GeometryError, match=r"this autoencoder, wan2\.1"):
        tiled.decode(torch.zeros(1, 4, 1, 2, 2))
    tiled.decode(torch.zeros(1, 16, 1, 3, 3))
    with pytest.raises(RolloutOrderError, match=r"another size"):
        tiled.decode(torch.zeros(1, 16, 1, 4, 3))
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(tiled._tiles[1], "decode", lambda chunk: (_ for _ in ()).throw(MemoryError))
        tiled.decode(torch.zeros(1, 16, 1, 3, 3))
    with pytest.raises(RolloutOrderError, match=r"interrupted between two tiles"):
        tiled.decode(torch.zeros(1, 16, 1, 3, 3))
    tiled.reset()
    assert tiled.decode(torch.zeros(1, 16, 1, 4, 3)).shape == (1, 1, 3, 32, 24)
