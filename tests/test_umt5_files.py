"""What is no umT5, or not a whole one, is told from its header."""

from pathlib import Path

import pytest
import tiny_umt5 as umt5
import torch
from safetensors.torch import save_file

from sfpp_core.errors import CheckpointError
from sfpp_core.text_encoder import check_text_encoder


@pytest.fixture(scope="module")
def weights():
    return umt5.state(umt5.model())


BIAS, WO_SCALE = "relative_attention_bias", "encoder.block.1.layer.1.DenseReluDense.wo.weight_scale"
REFUSED = {
    "CLIP": ({"text_model.layers.0.weight": torch.ones(2, 2)}, "looks like a CLIP text encoder"),
    "student": ({"patch_embedding.weight": torch.ones(2, 2)}, "looks like a Wan transformer"),
    "llama": ({"model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)}, "looks like a language model"),
    "anything": ({"a": torch.ones(2)}, "of an unknown kind .it begins with a.*Choose umT5-XXL"),
    "T5 v1.1": (
        lambda w: {name: value for name, value in w.items() if BIAS not in name or "block.0." in name},
        "is a T5 v1.1.*only its first layer knows positions",
    ),
    "T5 v1.1 in Wan's names": (
        lambda w: {
            name.replace("blocks.0.pos_emb", "pos_emb"): value
            for name, value in umt5.wan(w).items()
            if "pos_embedding" not in name or "blocks.0." in name
        },
        "is a T5 v1.1",
    ),
    "T5 v1.0": (
        lambda w: {name.replace("wi_0", "wi"): value for name, value in w.items() if "wi_1" not in name},
        "is a T5 without gates",
    ),
    "a missing norm": (
        lambda w: umt5.changed(w, block__1__layer__0__layer_norm=None),
        "lacks encoder.block.1",
    ),
    "a missing table": (lambda w: umt5.changed(w, shared=None), "incomplete umT5 .'shared.weight'"),
    "a missing layer": (
        lambda w: {name: value for name, value in w.items() if "block.1." not in name},
        "lacks encoder.block.1.layer.0.SelfAttention.q.weight, .* and 6 more",
    ),
    "another shape": (
        lambda w: umt5.changed(w, block__2__layer__1__DenseReluDense__wo=torch.ones(24, 39)),
        r"wo.weight \(24, 39\) instead of \(24, 40\)",
    ),
    "more than umT5": (lambda w: w | {"encoder.more": torch.ones(1)}, "that umT5 has not: encoder.more"),
    "int8": (
        lambda w: umt5.changed(w, block__0__layer__0__SelfAttention__q=torch.ones(18, 24, dtype=torch.int8)),
        "is I8; of quantised encoders only fp8 is read",
    ),
    "a scale for every row": (
        lambda w: umt5.fp8(w, scale="weight_scale", mark="") | {WO_SCALE: torch.ones(3)},
        r"wo.weight_scale \(3,\) instead of \(\)",
    ),
    "heads that do not fit": (
        lambda w: umt5.changed(
            w, block__0__layer__0__SelfAttention__relative_attention_bias=torch.ones(32, 5)
        ),
        "has 5 heads, 18 channels",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_umt5_is_named_before_it_is_read(tmp_path, weights, case):
    change, message = REFUSED[case]
    content = change(weights) if callable(change) else change
    path = umt5.write_single(tmp_path / "any.safetensors", content, umt5.sentencepiece_model())
    with pytest.raises(CheckpointError, match=message):
        check_text_encoder(path)


def test_a_scaled_file_that_lacks_a_scale_is_refused(tmp_path, weights):
    packed = umt5.fp8(weights, scale="scale_weight", mark="scaled_fp8")
    del packed["encoder.block.1.layer.1.DenseReluDense.wo.scale_weight"]
    path = umt5.write_single(tmp_path / "any.safetensors", packed, umt5.sentencepiece_model())
    with pytest.raises(CheckpointError, match=r"wo\.weight is F8_E4M3 and lacks its scale"):
        check_text_encoder(path)


def test_a_folder_without_one_encoder_is_refused(tmp_path, weights):
    for name in ("a", "b"):
        save_file(weights, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"several umT5 encoders among a.safetensors, b.safetensors"):
        check_text_encoder(tmp_path)


def test_a_file_with_code_runs_none(tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"token_embedding.weight": Hostile()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError):
        check_text_encoder(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
