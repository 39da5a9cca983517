"""The demo as the host's CLIP and VAE."""

from types import SimpleNamespace

import pack
import pytest
import tiny_demo
import torch
from safetensors.torch import load_file

from sfpp_core import weights_file

demo_text = pack.module("nodes.demo_text")
demo_decoder = pack.module("nodes.demo_decoder")
loaders = pack.module("nodes.loaders")
host = pack.module("nodes._host")


@pytest.fixture
def files(tmp_path):
    return tiny_demo.write(tmp_path)


def tokenizer(files):
    return demo_text.Tokenizer(*loaders.load_words(files.words))


def test_the_user_is_told_what_is_lost_of_a_prompt(files, caplog, monkeypatch):
    said = []
    monkeypatch.setattr(host, "say", said.append)
    prompt = "a red 3D circle moves right a red circle"
    assert tokenizer(files).tokenize_with_weights(prompt) == {demo_text.KEY: [[(prompt, 1.0)]]}
    (text,) = said
    for part in ("the demo does not know: 3d.", "colours: red, blue", "only the first 7 known words count"):
        assert part in text
        assert part in caplog.text


def test_a_prompt_without_a_known_word_is_refused_and_an_empty_one_is_not(files, caplog):
    with pytest.raises(ValueError, match=r"the demo knows no word of the prompt 'ein Kreis'.*") as caught:
        tokenizer(files).tokenize_with_weights("ein Kreis")
    assert type(caught.value) is ValueError
    assert "colours: red, blue" in str(caught.value)
    assert tokenizer(files).tokenize_with_weights(" ") == {demo_text.KEY: [[(" ", 1.0)]]}
    assert not caplog.text


def test_a_damaged_decoder_of_the_demo_is_refused_where_it_is_loaded(files, monkeypatch):
    monkeypatch.setattr(pack.module("sfpp_core.demo"), "FOLDER", files.decoder.parent)
    tensors, header = load_file(files.decoder), weights_file.read_header(files.decoder)
    tensors["decoder.enter.weight"][0] = float("nan")
    weights_file.write(files.decoder, tensors, header.metadata)
    with pytest.raises(ValueError, match=r"decoder\.enter\.weight holds numbers that are not finite"):
        loaders.SFPPLoadDemo.execute()


def test_the_demo_decodes_the_same_whole_and_streamed(monkeypatch):
    autoencoder = demo_decoder.TinyAutoencoder(demo_decoder_config())
    patcher = SimpleNamespace(load_device="cpu")
    monkeypatch.setattr(host, "own_patcher", lambda module: patcher, raising=False)
    vae = demo_decoder.DemoVAE(autoencoder)
    latent = torch.randn(1, 16, 7, 4, 4)
    stream = vae.stream()
    streamed = torch.cat([stream.decode(part) for part in latent.split(3, dim=2)])
    whole = vae.decode(latent)
    assert whole.shape == (1, 25, 32, 32, 3)
    torch.testing.assert_close(whole[0].movedim(-1, 1), streamed)
    assert vae.encode(torch.rand(27, 32, 32, 3)).shape == (1, 16, 7, 4, 4)


def demo_decoder_config():
    return pack.module("sfpp_core.tiny_autoencoder").AutoencoderConfig(coarse=16, fine=8, mask=8, units=1)
