"""Wan 2.2 of 5B in the host: 48 channels, cells of 16 pixels, 24 frames a second."""

import subprocess
from dataclasses import replace
from pathlib import Path

import files
import numpy as np
import pytest
import torch
import wan_files
from PIL import Image
from prompts import PROMPT, core_loader, decoding, sampling, saving
from safetensors.torch import load_file

from sfpp_core import demo
from sfpp_core.checkpoint import save
from sfpp_core.config import RolloutSettings
from sfpp_core.decoder import load_decoder, load_encoder
from sfpp_core.latent_space import WAN_2_2
from sfpp_core.video import video_info

pytestmark = pytest.mark.host

CONFIG = replace(files.CONFIG, channels=48)
PICTURE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def words():
    """Return the embeddings of the prompt: the demo's words, as wide as Wan's text."""
    return demo.load().words([PROMPT])


@pytest.fixture(scope="module")
def weights():
    return files.wan(CONFIG)


@pytest.fixture(scope="module")
def folder(host, weights):
    """Return the model folders of the host, with a 5B in small, its autoencoders and a picture in reach."""
    models = host.base / "models"
    files.write(models / "diffusion_models/five.safetensors", weights)
    wan_files.write_wan(models / "vae/wan22.safetensors", wan_files.SMALL_2_2)
    wan_files.write_wan(models / "vae/wan21.safetensors", wan_files.SMALL_2_1)
    script = Path(__file__).parent / "write_vae.py"
    command = [host.python, str(script), "tiny48", str(models / "vae/tiny22.safetensors")]
    subprocess.run(command, cwd=host.source, check=True, capture_output=True)
    Image.fromarray(PICTURE).save(host.base / "input/picture.png")
    return models


def latent(host, prompt):
    """Return the normalised latent that the host computes."""
    (path,) = host.files(host.run(prompt | saving()), "save")
    return WAN_2_2.normalise(load_file(path)["latent_tensor"])


def five_b(**settings):
    return sampling(core_loader("five.safetensors"), **settings)


def vae(name):
    return {"vae": ("VAELoader", {"vae_name": f"{name}.safetensors"})}


def picture(name="wan22"):
    """Return the nodes from a picture to its latent."""
    return vae(name) | {
        "picture": ("LoadImage", {"image": "picture.png"}),
        "encoded": ("VAEEncode", {"pixels": ["picture", 0], "vae": ["vae", 0]}),
    }


def images(name, source):
    """Return the node of the host that saves pictures."""
    return {name: ("SaveImage", {"images": list(source), "filename_prefix": name})}


def pixels(host, outputs, name):
    paths = host.files(outputs, name)
    return np.stack([np.asarray(Image.open(path), dtype=np.int16) for path in paths])


def assert_same(seen, expected, tolerance=2e-3):
    torch.testing.assert_close(seen, expected[:, :, : seen.shape[2]], rtol=0, atol=tolerance)


def test_the_host_computes_what_the_package_computes_alone(host, folder, weights, words):
    seen = latent(host, five_b(seconds=2))
    assert seen.shape == (1, 48, 13, 4, 4)  # 49 of the 48 frames
    assert_same(seen, files.alone(weights, words, config=CONFIG, seconds=2))


@pytest.mark.parametrize("kind", ["of ours", "marked as causal"])
def test_load_student_loads_what_core_may_stumble_over(host, folder, weights, words, kind):
    path = folder / "diffusion_models" / f"{kind}.safetensors"
    if kind == "of ours":
        save(path, weights, CONFIG, RolloutSettings(window=9), stage="dmd")
        settings = RolloutSettings(window=9)
        assert_same(
            latent(host, sampling(core_loader(path.name), seconds=1)),
            files.alone(weights, words, config=CONFIG),
        )
    else:
        files.write(path, weights, files.CAUSAL)
        settings = RolloutSettings()
    seen = latent(host, sampling(("SFPPLoadStudent", {"student": path.name}), seconds=2))
    assert_same(seen, files.alone(weights, words, config=CONFIG, seconds=2, settings=settings))


def test_a_lora_gives_what_weights_with_the_lora_in_them_give(host, folder, weights, words):
    adapter = files.lora(weights)
    files.write(folder / "loras/five.safetensors", adapter)
    change = ("LoraLoaderModelOnly", {"lora_name": "five.safetensors", "strength_model": 0.7})
    seen = latent(host, sampling(core_loader("five.safetensors"), change))
    assert_same(seen, files.alone(files.merged(weights, adapter, 0.7), words, config=CONFIG))


def test_a_picture_is_the_first_frame(host, folder, weights, words):
    encoder = load_encoder(folder / "vae/wan22.safetensors")
    start = encoder.encode(torch.from_numpy(PICTURE).movedim(-1, 0)[None, None] / 255)
    seen = latent(host, five_b(start=["encoded", 0]) | picture())
    assert_same(seen[:, :, :1], start, 1e-3)
    assert_same(seen, files.alone(weights, words, config=CONFIG, start=start), 5e-3)


def test_a_chunk_after_the_other_is_decoded_as_core_and_the_package_decode_the_whole(host, folder):
    prompt = five_b(seconds=2) | decoding(vae=["vae", 0], image_seconds=5.0) | vae("wan22") | saving()
    prompt |= images("streamed", ("video", 1)) | images("whole", ("decode", 0))
    prompt["decode"] = ("VAEDecode", {"samples": ["sampler", 0], "vae": ["vae", 0]})
    outputs = host.run(prompt)
    (path,) = host.files(outputs, "video")
    info = video_info(path)
    assert (info.frames, info.width, info.height, info.fps) == (48, 64, 64, 24)
    streamed, whole = (pixels(host, outputs, name) for name in ("streamed", "whole"))
    assert (len(streamed), len(whole)) == (48, 49)
    assert whole.std(axis=0).max() > 1  # the pictures change, so a wrong past would show
    assert np.abs(whole[:48] - streamed).max() <= 1
    normalised = WAN_2_2.normalise(load_file(host.files(outputs, "save")[0])["latent_tensor"])
    alone = load_decoder(folder / "vae/wan22.safetensors").decode(normalised)[0, :48].movedim(1, -1)
    assert np.abs((alone * 255).numpy() - streamed).max() < 2
    assert "cannot be streamed exactly" not in host.log


def test_a_tiny_vae_of_48_channels_is_streamed_exactly(host, folder):
    prompt = five_b(seconds=2) | decoding(vae=["vae", 0], image_seconds=5.0) | vae("tiny22")
    prompt |= images("tiny_streamed", ("video", 1)) | images("tiny_whole", ("decode", 0))
    prompt["decode"] = ("VAEDecode", {"samples": ["sampler", 0], "vae": ["vae", 0]})
    outputs = host.run(prompt)
    streamed, whole = (pixels(host, outputs, f"tiny_{way}") for way in ("streamed", "whole"))
    assert whole.std(axis=0).max() > 1
    assert np.abs(whole[:48] - streamed).max() <= 1


@pytest.mark.parametrize("tile", [0, 128])
def test_tiles_and_previews_play_at_24_frames_a_second(host, folder, tile):
    chosen = {"vae": ["vae", 0], "tile": tile} if tile else {}
    outputs = host.run(five_b(size=192) | vae("wan22") | decoding(**chosen))
    info = video_info(host.files(outputs, "video")[0])
    assert (info.frames, info.width, info.height, info.fps) == (24, 192, 192, 24)


REFUSALS = {
    "size": (
        lambda: five_b(size=80) | decoding(),
        ("SFPPLongSampler", "height is 80; it must be a multiple of 32, e.g. 64"),
    ),
    "decoder": (
        lambda: five_b() | decoding(vae=["vae", 0]) | vae("wan21"),
        ("SFPPDecodeToVideo", "the video has 48: use the Wan 2.2 VAE"),
    ),
    "start": (
        lambda: five_b(start=["encoded", 0]) | picture("wan21") | decoding(),
        ("SFPPLongSampler", "start has 16 latent channels and the model 48; encode the image or clip with"),
    ),
    "core's start": (
        lambda: five_b(start=["room", 0]) | picture() | ROOM | decoding(),
        ("SFPPLongSampler", "start leaves frames open for a sampler to fill"),
    ),
    "other decoder": (
        lambda: (
            sampling(("SFPPLoadStudent", {"student": "demo (built in)"}))
            | decoding(vae=["vae", 0])
            | vae("wan22")
        ),
        ("SFPPDecodeToVideo", "the video has 16: use the Wan 2.1 VAE"),
    ),
}
ROOM = {
    "room": (
        "Wan22ImageToVideoLatent",
        {"vae": ["vae", 0], "start_image": ["picture", 0], "length": 49, "batch_size": 1}
        | {"width": 64, "height": 64},
    )
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_does_not_fit_is_refused_before_anything_is_generated(host, folder, kind):
    make, (node, message) = REFUSALS[kind]
    seen, said = host.error(make())
    assert (seen, message in said) == (node, True), said


@pytest.mark.parametrize("storage", ["plain", "fp8"])
def test_the_host_is_asked_for_what_a_run_takes(host, folder, storage):
    cache = {"window": 9, "sink": 0, "sink_positions": "absolute", "storage": storage}
    prompt = five_b(seconds=2, size=384, cache=["cache", 0])
    prompt |= {
        "cache": ("SFPPCacheSettings", cache),
        "probe": ("SFPPTestProbeMemory", {"samples": ["sampler", 0]}),
    }
    host.run(prompt | saving("probe"))
    seen = host.get("/sfpp_probe")
    assert 0.5 * seen["asked"] < seen["peak"] < 1.05 * seen["asked"], seen
