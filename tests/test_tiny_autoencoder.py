"""The demo autoencoder: streamed equals one-shot, files carry their configuration, training ends in one."""

import errno
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfpp_core import tiny_autoencoder
from sfpp_core.errors import CheckpointError, OutputError, RolloutOrderError
from sfpp_core.tiny_autoencoder import AutoencoderConfig, TinyAutoencoder
from training import train_autoencoder as training
from training.loop import LoopSettings
from training.trained import OptimiserSettings
from training.world import render, sample_scene

SMALL = AutoencoderConfig(coarse=16, fine=8, mask=4)
DEMO = Path(tiny_autoencoder.__file__).parent / "demo" / "autoencoder.safetensors"


def network(config=SMALL):
    torch.manual_seed(0)
    autoencoder = TinyAutoencoder(config).eval()
    autoencoder.mean.uniform_(-1, 1)
    autoencoder.std.uniform_(0.5, 2)
    return autoencoder


def decoded(autoencoder, latents, chunks):
    autoencoder.reset()
    return torch.cat([autoencoder.decode(chunk) for chunk in latents.split(chunks, dim=2)], 1)


@pytest.mark.parametrize("padding", ["circular", "replicate", "zeros"])
@pytest.mark.parametrize("chunks", [1, 2, 3, 4, [1, 3, 3]])
def test_streamed_is_one_shot_bit_for_bit(chunks, padding):
    autoencoder = network(replace(AutoencoderConfig(), padding=padding))
    latents = torch.randn(1, 16, 7, 8, 8)
    assert torch.equal(decoded(autoencoder, latents, chunks), decoded(autoencoder, latents, 7))


def test_frames_and_latent_frames():
    autoencoder = network()
    latents = autoencoder.encode(torch.rand(2, 13, 3, 32, 48))
    assert latents.shape == (2, 16, 4, 4, 6)
    assert autoencoder.decode(latents[:, :, :1]).shape == (2, 1, 3, 32, 48)
    frames = autoencoder.decode(latents[:, :, 1:])
    assert frames.shape == (2, 12, 3, 32, 48) and frames.min() >= 0 and frames.max() <= 1


def test_a_latent_frame_knows_only_its_own_frames():
    autoencoder, frames = network(), torch.rand(1, 13, 3, 32, 32)
    latents = autoencoder.encode(frames)
    frames[:, 5:9] = 0
    differs = (autoencoder.encode(frames) != latents).flatten(3).any(-1).any(1)[0]
    assert differs.tolist() == [False, False, True, False]


def test_decoding_is_causal():
    autoencoder, latents = network(), torch.randn(1, 16, 6, 4, 4)
    before = decoded(autoencoder, latents, 6)
    latents[:, :, 3:] = 0
    assert torch.equal(decoded(autoencoder, latents, 6)[:, :9], before[:, :9])


def test_reset_forgets_the_video():
    autoencoder, latents = network(), torch.randn(1, 16, 3, 4, 4)
    first = autoencoder.decode(latents)
    assert autoencoder.decode(latents).shape[1] == 12
    autoencoder.reset()
    assert torch.equal(autoencoder.decode(latents), first)


def test_another_size_without_a_reset_is_refused():
    autoencoder = network()
    autoencoder.decode(torch.randn(1, 16, 3, 4, 4))
    with pytest.raises(RolloutOrderError, match=re.escape("call reset() first")):
        autoencoder.decode(torch.randn(1, 16, 3, 4, 6))


def test_the_network_lives_on_a_torus():
    autoencoder = network()
    frames = torch.rand(1, 5, 3, 32, 48)
    moved = autoencoder.encode(frames.roll((8, 16), (-2, -1)))
    assert torch.allclose(moved, autoencoder.encode(frames).roll((1, 2), (-2, -1)), atol=1e-5)
    drawn = decoded(autoencoder, moved, 3).roll((-8, -16), (-2, -1))
    assert torch.allclose(drawn, decoded(autoencoder, autoencoder.encode(frames), 3), atol=1e-5)


@pytest.mark.parametrize("padding", ["circular", "replicate"])
def test_padding_and_its_gradient(padding):
    x = torch.randn(2, 1, 4, 3, dtype=torch.double, requires_grad=True)
    expected = torch.nn.functional.pad(x, (1, 1, 1, 1), mode=padding)
    assert torch.equal(tiny_autoencoder.pad(x, padding), expected)
    assert torch.autograd.gradcheck(lambda y: tiny_autoencoder.pad(y, padding), x)


def test_a_file_carries_its_configuration(tmp_path):
    autoencoder = network()
    autoencoder.save(tmp_path / "weights.safetensors", dtype=torch.float32)
    loaded = TinyAutoencoder.load(tmp_path / "weights.safetensors")
    latents = torch.randn(1, 16, 3, 4, 4)
    assert loaded.config == SMALL
    assert torch.equal(loaded.decode(latents), autoencoder.decode(latents))


def test_a_file_appears_only_once_it_is_whole_and_anyone_may_read_it(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    network().save(path)
    before = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o644

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"weights.safetensors cannot be written: No space left on device"):
        network(replace(SMALL, fine=12)).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_other_libraries_read_the_file(tmp_path):
    from safetensors.torch import load_file

    autoencoder = network()
    autoencoder.save(tmp_path / "weights.safetensors")
    weights = load_file(tmp_path / "weights.safetensors")
    assert weights.keys() == autoencoder.state_dict().keys()
    for name, value in autoencoder.state_dict().items():
        assert torch.equal(weights[name], value.half()), name


def test_a_file_that_is_cut_short_or_missing_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(CheckpointError, match="does not exist; check the path"):
        TinyAutoencoder.load(path)
    network().save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="is cut short"):
        TinyAutoencoder.load(path)


def test_weights_that_are_not_floats_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    save_file({"mean": torch.zeros(16, dtype=torch.int8)}, path, metadata={"sfpp_decoder": "{}"})
    with pytest.raises(CheckpointError, match="holds I8 numbers; weights are F64, F32, F16, BF16"):
        TinyAutoencoder.load(path)


def test_a_foreign_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other.safetensors has no 'sfpp_decoder' in its metadata"):
        TinyAutoencoder.load(tmp_path / "other.safetensors")


def test_weights_of_another_size_are_refused(tmp_path):
    autoencoder = network()
    autoencoder.config = replace(SMALL, fine=12)
    autoencoder.save(tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"odd.safetensors does not fit its own configuration"):
        TinyAutoencoder.load(tmp_path / "odd.safetensors")


def test_the_demo_weights_draw_the_world_cleanly():
    autoencoder = TinyAutoencoder.load(DEMO)
    clips = render([sample_scene((9, clip)) for clip in range(8)], 21)
    latents = autoencoder.encode(clips)
    error = (decoded(autoencoder, latents, 3) - clips).square().mean((2, 3, 4))
    assert -10 * error.log10().mean() > 34
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    assert mean.abs().max() < 0.5 and std.min() > 0.5 and std.max() < 1.6
    assert DEMO.stat().st_size <= 4_000_000


def small(tmp_path, **changes):
    values = {"clips": 2, "frames": 9, "config": SMALL, "bf16": 0.5, "measured": 8} | changes
    loop = LoopSettings(out=str(tmp_path / "run"), iterations=4, sample_every=2)
    return training.Settings(loop=loop, optimiser=OptimiserSettings(lr=1e-3), **values)


def test_training_runs_to_a_usable_file(tmp_path):
    loaded = TinyAutoencoder.load(training.main(small(tmp_path)))
    assert loaded.config == SMALL and not torch.equal(loaded.std, torch.ones(16))
    assert list((tmp_path / "run").glob("*.png"))


def test_a_frozen_encoder_stays_as_it_is(tmp_path):
    network().save(tmp_path / "start.safetensors")
    before = TinyAutoencoder.load(tmp_path / "start.safetensors")
    after = TinyAutoencoder.load(training.main(small(tmp_path, start=tmp_path / "start.safetensors")))
    for (name, old), value in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        is_fixed = name.startswith(("encoder.", "mean", "std"))
        assert torch.equal(old, value) == is_fixed or name.endswith("gain"), name
