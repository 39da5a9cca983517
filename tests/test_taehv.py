"""The tiny decoder and the preview: streamed equals one-shot, and taehv's own where that is at hand."""

import importlib.util
import logging
import os
from dataclasses import replace

import pytest
import torch
from wan_files import TINY, write_tiny

from sfpp_core.decoder import check_decoder, load_decoder, load_encoder
from sfpp_core.errors import CheckpointError, GeometryError, RolloutOrderError, SettingsError
from sfpp_core.latent_space import WAN_2_1, WAN_2_2

FOR_2_2 = replace(TINY, space=WAN_2_2)
PUBLISHED = (256, 128, 64, 64)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "tiny.safetensors"
    write_tiny(file)
    return file


def decoded(decoder, latents, chunks):
    decoder.reset()
    return torch.cat([decoder.decode(chunk) for chunk in latents.split(chunks, dim=2)], 1)


@pytest.mark.parametrize("sizes", [TINY, FOR_2_2], ids=["wan2.1", "wan2.2"])
def test_streamed_is_one_shot(tmp_path, sizes):
    path = tmp_path / "tiny.safetensors"
    write_tiny(path, sizes)
    decoder = load_decoder(path, channels=sizes.space.channels)
    latents = torch.randn(2, sizes.space.channels, 7, 3, 4)
    whole = decoded(decoder, latents, 7)
    stride = sizes.space.spatial_stride
    assert whole.shape == (2, 25, 3, 3 * stride, 4 * stride) and whole.std() > 0.01
    assert whole.min() >= 0 and whole.max() <= 1
    for chunks in (1, 3, [1, 3, 3], [4, 3]):
        assert (decoded(decoder, latents, chunks) - whole).norm() < 1e-6 * whole.norm()


def test_the_past_matters_and_the_future_does_not(path):
    decoder, latents = load_decoder(path), torch.randn(1, 16, 4, 2, 2)
    frames = decoded(decoder, latents, 4)
    other = latents.clone()
    other[:, :, 2] += 1
    changed = (decoded(decoder, other, 4) != frames).flatten(2).any(-1)[0]
    assert not changed[:5].any() and changed[5:9].all() and changed[9:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_that_are_not_float16_take_the_autoencoders_own_latents(tmp_path, path, dtype, caplog):
    other = tmp_path / "light.safetensors"
    write_tiny(other, dtype=dtype)
    with caplog.at_level(logging.INFO):
        light = load_decoder(other)
    assert "taken for LightX2V's" in caplog.text
    usual = load_decoder(path)
    usual.load_state_dict(light.state_dict())
    latents = torch.randn(1, 16, 1, 2, 2)
    assert torch.equal(light.decode(latents), usual.decode(WAN_2_1.restore(latents)))
    usual.reset()
    assert not torch.equal(light.decode(latents), usual.decode(latents))


def test_computed_in_bfloat16_the_frames_are_float32(path):
    latents = torch.randn(1, 16, 2, 2, 2)
    exact, rounded = load_decoder(path), load_decoder(path, dtype=torch.bfloat16)
    frames = rounded.decode(latents)
    assert frames.dtype == torch.float32
    assert 0 < (frames - exact.decode(latents)).abs().max() < 0.02


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, *shape, value=0.0):
    return lambda tensors: tensors.update({name: torch.full(shape, value, dtype=torch.float16)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("decoder.22.weight"), "of no Wan"),
        (drop("decoder.9.conv.2.bias"), r"decoder.9.conv.2.bias missing, foreign or of a wrong shape"),
        (put("decoder.1.weight", 16, 32, 3, 3), "of no Wan"),
        (put("decoder.7.conv.weight", 32, 16, 1, 1), r"makes \(2, 2, 2\) frames of one"),
        (put("decoder.1.bias", 16, value=float("inf")), "decoder.1.bias holds numbers that are not finite"),
    ],
)
def test_damaged_files_and_those_of_other_models_are_refused(tmp_path, change, message):
    path = tmp_path / "tiny.safetensors"
    write_tiny(path, change=change)
    with pytest.raises(CheckpointError, match=message):
        load_decoder(path)


def test_a_tiny_decoder_does_not_encode(path):
    with pytest.raises(SettingsError, match=r"cannot encode the frames to start from; choose a complete"):
        load_encoder(path)


def test_latents_of_another_shape_are_refused(path):
    decoder = load_decoder(path)
    with pytest.raises(GeometryError, match=r"this autoencoder, wan2\.1, takes"):
        decoder.decode(torch.zeros(1, 48, 1, 2, 2))
    decoder.decode(torch.zeros(1, 16, 1, 2, 2))
    with pytest.raises(RolloutOrderError, match="another size"):
        decoder.decode(torch.zeros(1, 16, 1, 3, 2))


@pytest.mark.parametrize("space", [WAN_2_1, WAN_2_2], ids=["wan2.1", "wan2.2"])
def test_the_preview_needs_no_file_and_has_the_videos_size(space):
    decoder = load_decoder("preview", channels=space.channels)
    latents = torch.randn(1, space.channels, 4, 3, 5)
    whole = decoded(decoder, latents, 4)
    assert whole.shape == (1, 13, 3, 3 * space.spatial_stride, 5 * space.spatial_stride)
    assert torch.allclose(decoded(decoder, latents, [1, 3]), whole, atol=1e-6)
    assert torch.equal(whole[:, 1], whole[:, 4]) and not torch.equal(whole[:, 4], whole[:, 5])


def test_the_preview_of_zero_is_grey_and_a_channel_adds_its_colour():
    decoder = load_decoder("preview")
    latents = torch.zeros(1, 16, 1, 2, 2)
    grey = (torch.tensor(WAN_2_1.grey) + 1) / 2
    assert torch.allclose(decoder.decode(latents)[0, 0, :, 0, 0], grey)
    latents[:, 2] = 0.5
    more = decoder.decode(latents)[0, -1, :, 8, 8] - grey
    assert torch.allclose(more, torch.tensor([0.3568, 0.2548, 0.1747]) / 4, atol=1e-6)


def test_a_file_called_preview_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_decoder("preview").weights is None
    write_tiny(tmp_path / "preview")
    assert check_decoder("preview").weights is not None


@pytest.mark.weights
@pytest.mark.parametrize("sizes", [TINY, FOR_2_2], ids=["wan2.1", "wan2.2"])
def test_parity_with_taehv(tmp_path, sizes):
    """Against the reference; ``SFPP_TAEHV`` names its ``taehv.py``."""
    source = os.environ.get("SFPP_TAEHV")
    if not source:
        pytest.skip("SFPP_TAEHV names no taehv.py")
    spec = importlib.util.spec_from_file_location("taehv_reference", source)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    path = tmp_path / "tiny.safetensors"
    tensors = {}
    write_tiny(path, replace(sizes, widths=PUBLISHED), change=lambda table: tensors.update(table))
    network = reference.TAEHV(None, patch_size=sizes.patch, latent_channels=sizes.space.channels)
    tensors.pop("encoder.0.weight")
    wanted = network.state_dict()
    network.load_state_dict(wanted | {name: value.float() for name, value in tensors.items()})
    latents = torch.randn(1, sizes.space.channels, 5, 4, 4)
    with torch.no_grad():
        expected = network.decode_video(latents.transpose(1, 2), show_progress_bar=False)
    frames = decoded(load_decoder(path), latents, [1, 3, 1])
    assert (frames - expected).norm() < 1e-5 * expected.norm()
