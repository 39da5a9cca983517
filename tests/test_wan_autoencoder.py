"""The autoencoders of Wan: streamed equals one-shot, every layout loads, every other file is refused."""

import copy
import re

import pytest
import torch
from safetensors.torch import save_file
from wan_files import SMALL_2_1, SMALL_2_2, network, wan_tensors, write_wan

from sfpp_core.decoder import check_decoder, load_decoder, load_encoder
from sfpp_core.errors import CheckpointError, GeometryError, RolloutOrderError, SettingsError, SFPPError
from sfpp_core.wan_names import diffusers_name

BOTH = pytest.mark.parametrize("sizes", [SMALL_2_1, SMALL_2_2], ids=["wan2.1", "wan2.2"])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return both autoencoders on disk, and diffusers' own for comparison."""
    folder = tmp_path_factory.mktemp("wan")
    made = {}
    for sizes in (SMALL_2_1, SMALL_2_2):
        path = folder / f"{sizes.space.name}.safetensors"
        made[sizes] = path, write_wan(path, sizes)
    return made


def distance(a, b):
    return float((a - b).norm() / b.norm())


def one_shot(made, sizes, latents):
    with torch.no_grad():
        frames = made.decode(sizes.space.restore(latents)).sample
    return ((frames + 1) / 2).transpose(1, 2)


@BOTH
def test_streamed_decoding_is_one_shot_decoding(files, sizes):
    path, made = files[sizes]
    latents = torch.randn(1, sizes.space.channels, 6, 2, 3)
    expected = one_shot(made, sizes, latents)
    assert expected.std() > 0.05 and ((expected == 0) | (expected == 1)).float().mean() < 0.01
    decoder = load_decoder(path)
    for chunks in (1, 3, [1, 3, 2], [2, 1, 3], 6):
        decoder.reset()
        frames = torch.cat([decoder.decode(chunk) for chunk in latents.split(chunks, dim=2)], 1)
        assert frames.shape == expected.shape and frames.dtype == torch.float32
        assert distance(frames, expected) < 1e-5, chunks


@BOTH
def test_streamed_encoding_is_one_shot_encoding(files, sizes):
    path, made = files[sizes]
    stride = sizes.space.spatial_stride
    frames = torch.rand(1, 13, 3, 2 * stride, 3 * stride)
    with torch.no_grad():
        expected = made.encode((frames * 2 - 1).transpose(1, 2)).latent_dist.mode()
    expected = sizes.space.normalise(expected)
    encoder = load_encoder(path)
    for pieces in ([13], [1, 4, 8], [5, 8], [9, 4]):
        encoder.reset()
        latents = torch.cat([encoder.encode(piece) for piece in frames.split(pieces, dim=1)], 2)
        assert latents.shape == (1, sizes.space.channels, 4, 2, 3)
        assert distance(latents, expected) < 1e-5, pieces


@BOTH
def test_every_layout_gives_the_same_frames(files, sizes, tmp_path):
    path, made = files[sizes]
    latents = torch.randn(1, sizes.space.channels, 2, 2, 2)
    expected = load_decoder(path).decode(latents)
    (tmp_path / "pipeline/vae").mkdir(parents=True)
    (tmp_path / "pipeline/transformer").mkdir()
    places = {
        tmp_path / "Wan_VAE.pth": tmp_path / "Wan_VAE.pth",
        tmp_path / "pipeline/vae/diffusion_pytorch_model.safetensors": tmp_path / "pipeline",
    }
    for file, chosen in places.items():
        write_wan(file, sizes, made, naming="wan" if file.suffix == ".pth" else "diffusers")
        assert torch.equal(load_decoder(chosen).decode(latents), expected)
        assert load_encoder(chosen).space is sizes.space


def test_names_are_those_of_diffusers_own_conversion():
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    tensors = wan_tensors(SMALL_2_1, network(SMALL_2_1))
    assert len(tensors) == len(SMALL_2_1.network().state_dict())
    theirs = convert_wan_vae_to_diffusers({name: name for name in tensors})
    assert {diffusers_name(name): name for name in tensors} == theirs


def test_a_stranger_to_the_student_is_refused_early(files):
    path, _ = files[SMALL_2_2]
    info = check_decoder(path, channels=48)
    assert (info.space.channels, info.space.spatial_stride) == (48, 16)
    with pytest.raises(SettingsError, match=r"48 channels and these have 16; .*Wan2.1_VAE"):
        load_decoder(path, channels=16)


def test_bfloat16_is_close_and_frames_stay_float32(files):
    path, made = files[SMALL_2_1]
    latents = torch.randn(1, 16, 2, 2, 2)
    frames = load_decoder(path, dtype=torch.bfloat16).decode(latents)
    assert frames.dtype == torch.float32
    assert 0 < distance(frames, one_shot(made, SMALL_2_1, latents)) < 0.03


def test_copies_share_weights_and_remember_apart(files):
    decoder = load_decoder(files[SMALL_2_1][0])
    first, second = torch.randn(2, 1, 16, 2, 2, 2).unbind()
    alone = [decoder.decode(first), decoder.decode(first)]
    decoder.reset()
    twin = copy.copy(decoder)
    twin.reset()
    assert torch.equal(decoder.decode(first), alone[0])
    twin.decode(second)
    twin.rest("cpu")
    assert torch.equal(decoder.decode(first), alone[1])
    assert twin.decoder is decoder.decoder


def test_latents_and_frames_of_a_wrong_shape_are_refused(files):
    decoder, encoder = load_decoder(files[SMALL_2_1][0]), load_encoder(files[SMALL_2_1][0])
    for shape in ((1, 48, 1, 2, 2), (16, 1, 2, 2), (1, 16, 0, 2, 2)):
        with pytest.raises(GeometryError, match=re.escape(str(shape))):
            decoder.decode(torch.zeros(shape))
    decoder.decode(torch.zeros(1, 16, 1, 2, 2))
    with pytest.raises(RolloutOrderError, match="another size; call reset"):
        decoder.decode(torch.zeros(1, 16, 1, 2, 3))
    for shape, message in (
        ((1, 2, 3, 16, 16), "there are 2 frames; give 1, 5, 9"),
        ((1, 1, 3, 16, 20), "20x16; both sides must be multiples of 8"),
        ((1, 1, 4, 16, 16), "frames are"),
    ):
        with pytest.raises(GeometryError, match=message):
            encoder.encode(torch.zeros(shape))
    encoder.encode(torch.zeros(1, 1, 3, 16, 16))
    with pytest.raises(GeometryError, match="there are 5 frames; give 4, 8, 12"):
        encoder.encode(torch.zeros(1, 5, 3, 16, 16))


def test_after_an_interruption_the_decoder_says_so(files, monkeypatch):
    decoder = load_decoder(files[SMALL_2_1][0])
    decoder.decode(torch.zeros(1, 16, 1, 2, 2))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            decoder.decoder.mid_block, "forward", lambda *a, **b: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        decoder.decode(torch.zeros(1, 16, 1, 2, 2))
    with pytest.raises(RolloutOrderError, match="interrupted; call reset"):
        decoder.decode(torch.zeros(1, 16, 1, 2, 2))


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, *shape, value=0.0):
    return lambda tensors: tensors.update({name: torch.full(shape, value)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("decoder.head.2.bias"), "lacks decoder.conv_out.bias; it is incomplete"),
        (drop("conv2.weight"), "incomplete autoencoder of Wan"),
        (put("decoder.extra", 1), "no autoencoder of Wan has: decoder.extra"),
        (put("decoder.head.2.bias", 4), r"decoder.conv_out.bias is \(4,\) and has to be \(3,\)"),
        (put("conv2.weight", 4, 4, 1, 1, 1), "of 4 latent channels, and wan2.1 has 16"),
        (put("decoder.head.0.gamma", 5000, 1, 1, 1), "5000 wide"),
        (
            put("decoder.head.2.bias", 3, value=float("nan")),
            "decoder.head.2.bias holds numbers that are not finite",
        ),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, message):
    path = tmp_path / "vae.safetensors"
    write_wan(path, SMALL_2_1, change=change)
    with pytest.raises(CheckpointError, match=message):
        load_decoder(path)


def test_a_file_cut_short_is_refused(files, tmp_path):
    path = tmp_path / "vae.safetensors"
    path.write_bytes(files[SMALL_2_1][0].read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut short"):
        check_decoder(path)


def test_a_decoder_alone_decodes_and_cannot_encode(tmp_path):
    def decoder_only(tensors):
        for name in [name for name in tensors if name.startswith(("encoder.", "conv1."))]:
            del tensors[name]

    path = tmp_path / "vae.safetensors"
    write_wan(path, SMALL_2_1, change=decoder_only)
    assert load_decoder(path).decode(torch.zeros(1, 16, 1, 1, 1)).shape == (1, 1, 3, 8, 8)
    with pytest.raises(CheckpointError, match="holds no encoder"):
        load_encoder(path)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (
            {"decoder.conv_in.weight": (4, 4, 3, 3), "decoder.mid.block_1.norm1.weight": (4,)},
            "for single pictures",
        ),
        ({"decoder.conv_in.conv.weight": (4, 4, 3, 3, 3)}, "another video model"),
        ({"a.lora_up.weight": (4, 4)}, "a LoRA"),
    ],
)
def test_other_models_are_named(tmp_path, names, what):
    path = tmp_path / "vae.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, path)
    with pytest.raises(
        CheckpointError, match=f"is not a decoder; it looks like .*{what}.* Choose the autoencoder"
    ):
        check_decoder(path)


def test_without_diffusers_the_remedy_is_named(files, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers.models.autoencoders.autoencoder_kl_wan", None)
    with pytest.raises(SFPPError, match="pip install diffusers"):
        check_decoder(files[SMALL_2_1][0])
