"""umT5 without ComfyUI: every layout of its weights, Wan's prompts and lengths, memory."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import tiny_umt5 as umt5
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from sfpp_core import text_encoder, umt5_tokenizer
from sfpp_core.config import WAN_1_3B
from sfpp_core.errors import CheckpointError, ConditioningError, NumericsError, SettingsError, SFPPError
from sfpp_core.text_encoder import check_text_encoder, load_text_encoder, text_encoder_bytes
from sfpp_core.umt5_files import UMT5Sizes, umt5_shapes
from sfpp_core.umt5_tokenizer import clean_prompt

LENGTH = 40
CLOSE = {"rtol": 1e-5, "atol": 3e-5}  # of numbers up to 4


@pytest.fixture(scope="session")
def spiece():
    return umt5.sentencepiece_model()


@pytest.fixture(scope="session")
def oracle():
    return umt5.model()


@pytest.fixture(scope="session")
def weights(oracle):
    return umt5.state(oracle)


@pytest.fixture
def single(tmp_path, weights, spiece):
    return umt5.write_single(tmp_path / "umt5.safetensors", weights, spiece)


def as_written(*, dtype=torch.float32, pack=None):
    """Return a writer of ComfyUI's single file."""

    def write(folder, encoder, spiece):
        weights = umt5.state(encoder, dtype)
        weights = pack(weights) if pack else weights
        return umt5.write_single(folder / "any_name.safetensors", weights, spiece), umt5.unpacked(weights)

    return write


def prefixed(folder, encoder, spiece):
    weights = {f"umt5xxl.transformer.{name}": value for name, value in umt5.state(encoder).items()}
    return umt5.write_single(folder / "clip.safetensors", weights, spiece), umt5.state(encoder)


def with_decoder(folder, encoder, spiece):
    """Write the whole umT5, of which the encoder is a half."""
    weights = umt5.state(encoder)
    more = {
        "decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(3, 3),
        "lm_head.weight": torch.ones(2),
    }
    more |= {"encoder.embed_tokens.weight": weights["shared.weight"].clone()}
    return umt5.write_single(folder / "whole.safetensors", weights | more, spiece), weights


def diffusers(*, part="", json=False):
    """Return a writer of diffusers' folder, in shards."""

    def write(folder, encoder, spiece):
        encoder.save_pretrained(folder / "text_encoder", max_shard_size="30kB")
        assert len(list((folder / "text_encoder").glob("*.safetensors"))) > 1
        (umt5.write_tokenizer_json if json else umt5.write_tokenizer)(folder / "tokenizer", spiece)
        return folder / part, umt5.state(encoder)

    return write


def wan(*, dtype=torch.bfloat16, whole_folder=False):
    """Return a writer of Wan's own folder."""

    def write(folder, encoder, spiece):
        weights = umt5.state(encoder, dtype)
        torch.save(umt5.wan(weights), folder / "models_t5_umt5-xxl-enc-bf16.pth")
        torch.save({"decoder.middle.0.weight": torch.ones(3)}, folder / "Wan2.1_VAE.pth")
        save_file(tiny.network().state_dict(), folder / "diffusion_pytorch_model.safetensors")
        umt5.write_tokenizer(folder / "google/umt5-xxl", spiece)
        path = folder if whole_folder else folder / "models_t5_umt5-xxl-enc-bf16.pth"
        return path, {name: value.float() for name, value in weights.items()}

    return write


def wan_fp8(folder, encoder, spiece):
    """Write Wan's names in safetensors, cast to fp8 without scales, the tokenizer beside it."""
    weights = umt5.state(encoder, torch.float8_e4m3fn)
    save_file(umt5.wan(weights), folder / "enc.safetensors")
    umt5.write_tokenizer(folder, spiece)
    return folder / "enc.safetensors", {name: value.float() for name, value in weights.items()}


LAYOUTS = {
    "ComfyUI float32": as_written(),
    "ComfyUI float16": as_written(dtype=torch.float16),
    "ComfyUI bfloat16": as_written(dtype=torch.bfloat16),
    "ComfyUI fp8 old": as_written(pack=lambda w: umt5.fp8(w, scale="scale_weight", mark="scaled_fp8")),
    "ComfyUI fp8 new": as_written(pack=lambda w: umt5.fp8(w, scale="weight_scale", mark="comfy_quant")),
    "behind a prefix": prefixed,
    "with its decoder": with_decoder,
    "diffusers": diffusers(),
    "diffusers, tokenizer.json": diffusers(json=True),
    "diffusers, text_encoder alone": diffusers(part="text_encoder"),
    "Wan .pth": wan(),
    "Wan .pth float32": wan(dtype=torch.float32),
    "Wan folder": wan(whole_folder=True),
    "Wan names in fp8": wan_fp8,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_what_transformers_gives(tmp_path, oracle, spiece, layout):
    path, stored = LAYOUTS[layout](tmp_path, oracle, spiece)
    plain = umt5.model()
    plain.load_state_dict(stored, strict=False)
    clean = [clean_prompt(prompt) for prompt in umt5.PROMPTS]
    seen = load_text_encoder(path, text_length=LENGTH)(umt5.PROMPTS)
    assert (seen.dtype, seen.shape) == (torch.float32, (len(clean), LENGTH, 24))
    torch.testing.assert_close(seen, umt5.embeddings(plain, spiece, clean, LENGTH), **CLOSE)
    assert not torch.equal(seen[0, :3], seen[3, :3])


def test_the_names_of_wan_are_those_of_its_own_code():
    names = umt5.wan(umt5.state(umt5.model(num_layers=1)))
    assert set(names) == {
        "token_embedding.weight", "norm.weight", "blocks.0.norm1.weight", "blocks.0.norm2.weight",
        "blocks.0.attn.q.weight", "blocks.0.attn.k.weight", "blocks.0.attn.v.weight",
        "blocks.0.attn.o.weight",
        "blocks.0.pos_embedding.embedding.weight", "blocks.0.ffn.gate.0.weight", "blocks.0.ffn.fc1.weight",
        "blocks.0.ffn.fc2.weight",
    }  # fmt: skip


@pytest.mark.parametrize("prompt", umt5.PROMPTS)
def test_both_kinds_of_tokenizer_give_wans_tokens(tmp_path, single, spiece, prompt):
    folder = umt5.write_tokenizer_json(tmp_path / "json", spiece)
    known = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>")
    settings = {"padding": "max_length", "truncation": True, "max_length": 12, "add_special_tokens": True}
    expected = known([clean_prompt(prompt)], **settings)
    length = sum(expected["attention_mask"][0])
    for tokenizer in (folder, folder / "tokenizer.json", None):
        encoder = load_text_encoder(single, tokenizer=tokenizer, text_length=12)
        assert encoder.tokens(clean_prompt(prompt)).numbers == expected["input_ids"][0][:length]


@pytest.mark.parametrize(
    ("typed", "clean"),
    [
        ("  a\n\tcat  ", "a cat"),
        ("a &amp;amp; b &lt;c&gt;", "a & b <c>"),
        ("\u201chey\u201d\uff0cit\u2019s", '"hey",it\'s'),
        ("schÃ¶n", "schön"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned_as_wan_cleans_them(typed, clean):
    assert clean_prompt(typed) == clean


def without(monkeypatch, *libraries):
    """Make libraries look as if they were not installed."""
    found = umt5_tokenizer.find_spec
    monkeypatch.setattr(umt5_tokenizer, "find_spec", lambda name: None if name in libraries else found(name))


def test_without_ftfy_only_what_it_would_repair_is_warned_of(monkeypatch, caplog):
    typed = "a cat,\n (red:1.3)  100% <ok> & more"
    repaired = clean_prompt(typed)
    without(monkeypatch, "ftfy")
    assert clean_prompt(typed) == repaired
    assert not caplog.records
    for typed in ("it\u2019s", "a &amp; b"):
        caplog.clear()
        clean_prompt(typed)
        assert f"The prompt {typed!r} goes without" in caplog.text
        assert "pip install ftfy" in caplog.text


@pytest.mark.parametrize("library", ["transformers", "sentencepiece"])
def test_a_missing_library_is_named_with_its_remedy(monkeypatch, single, library):
    without(monkeypatch, library)
    check_text_encoder(single)
    with pytest.raises(SFPPError, match=f"umT5 needs {library}.*pip install {library}"):
        load_text_encoder(single)


def test_a_long_prompt_is_cut_as_wan_cuts_it_and_said_so(single, oracle, spiece, caplog):
    prompt = "the wind is strong and the sea is cold"
    encoder = load_text_encoder(single, text_length=8)
    seen = encoder([prompt])
    torch.testing.assert_close(seen, umt5.embeddings(oracle, spiece, [prompt], 8), **CLOSE)
    tokens = len(encoder.tokenizer(prompt))
    assert f"has {tokens} tokens; only the first 7 count" in caplog.text
    assert f"Cut are {tokens - 7}, from" in caplog.text


def test_an_empty_prompt_has_one_row_and_no_prompts_none(single):
    encoder = load_text_encoder(single, text_length=LENGTH)
    rows = encoder([""])[0].abs().sum(dim=1) > 0
    assert rows.tolist() == [True] + [False] * (LENGTH - 1)
    assert encoder([]).shape == (0, LENGTH, 24)


def test_a_prompt_does_not_depend_on_the_others(monkeypatch, single):
    encoder = load_text_encoder(single, text_length=LENGTH)
    together = encoder(umt5.PROMPTS)
    alone = torch.cat([encoder([prompt]) for prompt in umt5.PROMPTS])
    assert torch.equal(together, alone)
    monkeypatch.setattr(text_encoder, "TOKENS_AT_ONCE", 50)
    assert torch.equal(together, encoder(umt5.PROMPTS))


def test_bfloat16_is_close_and_float16_is_refused(single):
    exact = load_text_encoder(single, text_length=LENGTH)(umt5.PROMPTS)
    rough = load_text_encoder(single, text_length=LENGTH, dtype=torch.bfloat16)(umt5.PROMPTS)
    assert rough.dtype == torch.bfloat16
    # Random weights make attention sharp, so roundings grow; real ones are milder.
    assert torch.nn.functional.cosine_similarity(rough.float()[0, :4], exact[0, :4], dim=1).min() > 0.9
    with pytest.raises(SettingsError, match=r"cannot be computed in torch.float16; use float32, bfloat16"):
        load_text_encoder(single, dtype=torch.float16)


def test_the_check_reads_no_weight_and_says_what_is_there(single, monkeypatch):
    monkeypatch.setattr("sfpp_core.umt5_files.UMT5File.rows", None)
    info = check_text_encoder(single, replace(tiny.CONFIG, text_dim=24))
    assert "umT5 in transformers names, F32: 3 layers, width 24" in str(info)
    with pytest.raises(ConditioningError, match="of width 24 and the student needs 20"):
        check_text_encoder(single, tiny.CONFIG)


@pytest.mark.parametrize("end", ["shared", "block__2__layer__1__DenseReluDense__wi_0", "final_layer_norm"])
def test_numbers_that_are_not_finite_are_named(tmp_path, weights, spiece, end):
    (name,) = set(weights) - set(umt5.changed(weights, **{end: None}))
    path = umt5.write_single(tmp_path / "a.safetensors", weights | {name: weights[name] * torch.nan}, spiece)
    with pytest.raises(CheckpointError, match=f"{name} holds numbers that are not finite"):
        load_text_encoder(path)(["a cat"])


def test_numbers_that_outgrow_the_dtype_are_an_error_and_no_picture(tmp_path, weights, spiece):
    large = umt5.changed(weights, block__0__layer__1__DenseReluDense__wo=torch.full((24, 40), 3e38))
    path = umt5.write_single(tmp_path / "a.safetensors", large, spiece)
    encoder = load_text_encoder(path, text_length=LENGTH)
    with pytest.raises(NumericsError, match=r"not finite of 'a cat' in torch\.float32"):
        encoder(["a cat"])


def test_a_missing_or_foreign_tokenizer_is_named(tmp_path, weights, spiece):
    path = tmp_path / "umt5.safetensors"
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"has no tokenizer: neither tokenizer.json nor spiece.model"):
        check_text_encoder(path)
    with pytest.raises(CheckpointError, match=r"elsewhere has no tokenizer"):
        check_text_encoder(path, tokenizer=tmp_path / "elsewhere")
    for name, content, message in (
        ("spiece.model", b"nonsense", "is no sentencepiece model"),
        ("tokenizer.json", b"{}", "is no tokenizer"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            load_text_encoder(path, tokenizer=tmp_path / name)
    longer = umt5.state(umt5.model(vocab_size=5000))
    path = umt5.write_single(tmp_path / "longer.safetensors", longer, spiece)
    with pytest.raises(CheckpointError, match="knows 144 tokens and the text encoder 5000"):
        load_text_encoder(path)


MEASURE = """
import sys
from pathlib import Path
import torch
from sfpp_core.machine import peak_memory
from sfpp_core.text_encoder import load_text_encoder

torch.set_num_threads(1)
load_text_encoder(Path(sys.argv[1]), text_length=512)(["a cat"])
before = peak_memory()
load_text_encoder(Path(sys.argv[2]), text_length=512)(["a cat surfs " * 200])
sys.stdout.write(str(peak_memory() - before))
"""


@pytest.mark.slow
def test_encoding_takes_the_memory_of_a_layer(tmp_path, single, spiece):
    large = umt5.model(d_model=1024, d_kv=64, num_heads=16, d_ff=2560, num_layers=4)
    path = umt5.write_single(tmp_path / "large.safetensors", umt5.state(large, torch.bfloat16), spiece)
    command = [sys.executable, "-c", MEASURE, str(single), str(path)]
    # Tensors of the real encoder are large enough to be given back to the system at once; so are these then.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=settings)
    forecast, taken = text_encoder_bytes(path), int(result.stdout)
    assert 0.8 * forecast < taken < 1.2 * forecast < 1.5 * path.stat().st_size


def test_the_real_encoder_needs_no_more_than_its_table(tmp_path, spiece):
    """The header of umT5-XXL in 16 bits, 11.4 GB of which none are written."""
    sizes = UMT5Sizes(
        vocabulary=256_384, dim=4096, ffn_dim=10_240, heads=64, head_dim=64, layers=24, buckets=32
    )
    table, end = {}, 0
    for name, shape in umt5_shapes(sizes).items():
        start, end = end, end + 2 * math.prod(shape)
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(table).encode()
    path = tmp_path / "umt5_xxl.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    umt5.write_tokenizer(tmp_path, spiece)
    info = check_text_encoder(path, WAN_1_3B)
    assert info.file.sizes == sizes
    assert 11.3e9 < info.file.weights.file_bytes < 11.4e9
    assert text_encoder_bytes(path, torch.bfloat16) == text_encoder_bytes(path) == 256_384 * 4096 * 2


def test_transformers_says_nothing(single, caplog, capsys):
    load_text_encoder(single)(["a cat"])
    assert not caplog.records
    assert capsys.readouterr() == ("", "")
