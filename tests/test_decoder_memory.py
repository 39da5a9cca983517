"""The forecast of a decoder's memory, against the peak of all tensors alive while it decodes."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from wan_files import SMALL_2_1, TINY, write_tiny, write_wan

from sfpp_core.decoder import check_decoder, load_decoder
from sfpp_core.decoder_memory import decoder_bytes
from sfpp_core.errors import SettingsError
from sfpp_core.latent_space import WAN_2_2

PUBLISHED = (256, 128, 64, 64)


def measured(path, *, width, height, latent_frames, dtype=torch.float32):
    """Return the bytes of the weights and of the largest set of tensors in the first three chunks."""
    decoder = load_decoder(path, dtype=dtype)
    stride = decoder.spatial_stride
    chunk = torch.randn(1, decoder.channels, latent_frames, height // stride, width // stride)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        for piece in (chunk[:, :, :1], chunk[:, :, :1], chunk):
            decoder.decode(piece)
    events = record.profiler.kineto_results.events()
    now = peak = 0
    for _, change in sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    ):
        now += change
        peak = max(peak, now)
    return peak + sum(weights.nbytes for weights in decoder.parameters())


NARROW = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        reason="a CPU without bfloat16 products imitates them, over copies in float32",
    ),
)


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize(("latent_frames", "space"), [(1, TINY.space), (3, TINY.space), (3, WAN_2_2)])
def test_the_forecast_of_the_tiny_decoder_is_what_it_takes(tmp_path, latent_frames, space, dtype):
    path = tmp_path / "tiny.safetensors"
    write_tiny(path, replace(TINY, widths=PUBLISHED, space=space))
    size = {"width": 64, "height": 64, "latent_frames": latent_frames, "dtype": dtype}
    seen = measured(path, **size)
    assert 0.9 * seen < decoder_bytes(check_decoder(path), **size) < 1.15 * seen


@pytest.mark.slow
def test_the_forecast_of_wans_decoder_is_what_it_takes(tmp_path):
    path = tmp_path / "vae.safetensors"
    write_wan(path, replace(SMALL_2_1, decoder_width=96))
    size = {"width": 128, "height": 96, "latent_frames": 2, "dtype": torch.bfloat16}
    seen = measured(path, **size)
    assert 0.95 * seen < decoder_bytes(check_decoder(path), **size) < 1.1 * seen


def test_the_preview_takes_next_to_nothing():
    size = {"width": 832, "height": 480}
    assert decoder_bytes(check_decoder("preview"), **size) < 150e6


def test_tiles_take_less_and_bad_ones_are_refused(tmp_path):
    path = tmp_path / "vae.safetensors"
    write_wan(path, SMALL_2_1)
    info = check_decoder(path)
    size = {"width": 832, "height": 480, "dtype": torch.bfloat16}
    whole, tiled = decoder_bytes(info, **size), decoder_bytes(info, **size, tile=256)
    resting = decoder_bytes(info, **size, tile=256, rest_elsewhere=True)
    assert resting < tiled < whole
    assert decoder_bytes(info, **size, tile=1024) >= whole
    with pytest.raises(SettingsError, match="tile is 100"):
        decoder_bytes(info, **size, tile=100)
