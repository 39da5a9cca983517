"""LoRA files that cannot be merged: each ends in an error of its own, which names value and remedy."""

import json

import pytest
import tiny
import torch
from test_lora import KOHYA, factors, flat, save, written

from sfpp_core.checkpoint import save as save_student
from sfpp_core.config import WAN_1_3B, RolloutSettings
from sfpp_core.errors import CheckpointError
from sfpp_core.lora import read_adapter

Q = "blocks.0.self_attn.q"


def good(**changed):
    """Return a small good LoRA with tensors replaced, added, or removed with ``None``."""
    tensors = written(factors([Q, "blocks.1.ffn.0"]), lambda m: m, **KOHYA)
    return {name: tensor for name, tensor in (tensors | changed).items() if tensor is not None}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lora.safetensors"


def test_the_good_one_is_good(path):
    save(path, good())
    assert len(read_adapter(path, tiny.CONFIG).changed) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        # partners
        ({f"{Q}.lora_up.weight": None}, rf"incomplete: of {Q} it has .*lora_down\.weight but not the other"),
        ({f"{Q}.lora_down.weight": None}, rf"incomplete: of {Q} it has .*lora_up\.weight but not the other"),
        (
            {"blocks.2.ffn.0.alpha": torch.ones(())},
            r"of blocks\.2\.ffn\.0 it has .*alpha but not the factors",
        ),
        ({"blocks.2.ffn.0.lora_B.bias": torch.ones(96)}, r"of blocks\.2\.ffn\.0 .* but not the factors"),
        # shapes
        (
            {f"{Q}.lora_up.weight": torch.ones(48, 3)},
            r"lora_up\.weight \(48, 3\) has rank 3, .*lora_down\.weight \(4, 48\) has rank 4; they must be",
        ),
        ({f"{Q}.lora_down.weight": torch.ones(0, 48)}, r"lora_down\.weight is empty"),
        ({f"{Q}.lora_down.weight": torch.ones(())}, r"lora_down\.weight is empty"),
        ({f"{Q}.lora_up.weight": torch.ones(48)}, rf"cannot change {Q}\.weight \(48, 48\)"),
        (
            {"blocks.1.ffn.0.lora_up.weight": torch.ones(95, 4)},
            r"\(95, 4\) and .*\(4, 48\) cannot change blocks\.1",
        ),
        ({"blocks.1.norm3.diff": torch.ones(47)}, r"\(47,\) cannot change blocks\.1\.norm3\.weight \(48,\)"),
        ({"patch_embedding.diff": torch.ones(48, 36, 1, 2, 2)}, r"36, 1, 2, 2\) cannot change patch"),
        (
            {
                "patch_embedding.lora_up.weight": torch.ones(48, 4, 1, 1, 1),
                "patch_embedding.lora_down.weight": torch.ones(4, 16, 2, 2, 1),
            },
            r"\(4, 16, 2, 2, 1\) cannot change patch_embedding\.weight \(48, 16, 1, 2, 2\)",
        ),
        # numbers
        (
            {f"{Q}.lora_up.weight": torch.full((48, 4), torch.nan)},
            r"up\.weight holds numbers that are not finite",
        ),
        ({"blocks.1.diff_m": torch.full((1, 6, 48), torch.inf)}, r"diff_m holds numbers that are not finite"),
        ({f"{Q}.alpha": torch.tensor(torch.nan)}, r"q\.alpha is nan; the file is damaged"),
        ({f"{Q}.alpha": torch.ones(2)}, r"q\.alpha has shape \(2,\); it must be one number"),
        # twice
        ({f"diffusion_model.{Q}.alpha": torch.ones(())}, r"diffusion_model\.blocks.*the same thing twice"),
        ({f"{Q}.lora_down.second.weight": torch.ones(4, 48)}, r"the same thing twice: perhaps two LoRAs"),
        (
            {f"{Q}.diff": torch.ones(48, 48)},
            rf"changes {Q}\.weight twice: {Q}\.diff and {Q}\.lora_up\.weight",
        ),
        (
            {"blocks.1.diff_m": torch.ones(1, 6, 48), "blocks.1.modulation.diff": torch.ones(1, 6, 48)},
            "n twice",
        ),
        # names
        ({"blocks.3.ffn.0.diff": torch.ones(96, 48)}, r"of 3 layers: blocks\.3\.ffn\.0\.diff; choose"),
        ({"blocks.0.ffn.1.diff": torch.ones(1)}, r"no parameter of a Wan .*: blocks\.0\.ffn\.1\.diff"),
        ({"blocks.0.ffn.0.weight": torch.ones(96, 48)}, r"no parameter .*: blocks\.0\.ffn\.0\.weight"),
        ({"transformer_2.proj_out.diff": torch.ones(64, 48)}, r"no parameter.*transformer_2\.proj_out\.diff"),
        (
            {"blocks.0.diff": torch.ones(1), "something": torch.ones(1)},
            r"no parameter.*: blocks\.0\.diff, something",
        ),
        (
            {f"blocks.{layer}.x.diff": torch.ones(1) for layer in range(9)},
            r"blocks\.0\.x\.diff, .* and 5 more",
        ),
        # kinds
        ({f"{Q}.dora_scale": torch.ones(48, 1)}, r"q\.dora_scale: a DoRA"),
        ({f"{Q}.lora_magnitude_vector.weight": torch.ones(48)}, "a DoRA"),
        ({"lora_unet_blocks_0_ffn_0.hada_w1_a": torch.ones(4, 4)}, r"hada_w1_a: a LoHa; use a plain LoRA"),
        ({"lora_unet_blocks_0_ffn_0.lokr_w1": torch.ones(4, 4)}, r"lokr_w1: a LoKr"),
        ({"blocks.0.ffn.0.oft_blocks": torch.ones(4, 4)}, r"oft_blocks: an OFT"),
        ({f"{Q}.lora_mid.weight": torch.ones(4, 4)}, "a LoRA of three factors"),
        ({f"{Q}.set_weight": torch.ones(48, 48)}, "weights to be replaced"),
        (
            {"blocks.0.cross_attn.k_img.lora_down.weight": torch.ones(4, 48)},
            "a LoRA for an image-to-video Wan",
        ),
        ({"lora_unet_blocks_0_cross_attn_v_img.alpha": torch.ones(())}, "image-to-video Wan"),
        ({"blocks.0.cross_attn.norm_k_img.diff": torch.ones(48)}, "image-to-video Wan"),
        ({"diffusion_model.img_emb.proj.1.diff_b": torch.ones(48)}, "image-to-video Wan"),
        ({"transformer.blocks.0.attn2.add_k_proj.lora_A.weight": torch.ones(4, 48)}, "image-to-video Wan"),
        ({"condition_embedder.image_embedder.norm1.diff": torch.ones(48)}, "image-to-video Wan"),
        ({"lora_te1_encoder_0_q.alpha": torch.ones(())}, "a LoRA of a text encoder, which would be lost"),
        ({"text_encoder.x.lora_A.weight": torch.ones(4, 4)}, "a LoRA of a text encoder"),
        ({"vace_blocks.0.ffn.0.diff": torch.ones(96, 48)}, "a LoRA for VACE"),
    ],
)
def test_what_cannot_be_merged_is_named(path, changed, message):
    save(path, good(**changed))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(path, tiny.CONFIG)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("layout", ["wan", "kohya", "kohya, ffn alone"])
def test_a_lora_of_another_size_is_told_by_its_width(path, layout):
    modules = {"blocks.35.ffn.0": (13824, 5120), "blocks.0.ffn.2": (5120, 13824)}
    if layout != "kohya, ffn alone":
        modules |= {"blocks.0.self_attn.q": (5120, 5120), "blocks.0.cross_attn.o": (5120, 5120)}
    pairs = {
        name: (torch.zeros(rows, 1), torch.zeros(1, columns)) for name, (rows, columns) in modules.items()
    }
    save(
        path, written(pairs, (lambda m: m) if layout == "wan" else lambda m: f"lora_unet_{flat(m)}", **KOHYA)
    )
    with pytest.raises(
        CheckpointError,
        match=r"a Wan of width 5120 \(Wan 2\.1 14B\), the student has width 1536 \(Wan 2\.1 1\.3B\); choose",
    ):
        read_adapter(path, WAN_1_3B)


def test_a_lora_stored_as_whole_numbers_is_refused(tmp_path):
    path = tmp_path / "lora.pt"
    torch.save(good(**{f"{Q}.lora_up.weight": torch.ones(48, 4, dtype=torch.int8)}), path)
    with pytest.raises(CheckpointError, match=r"lora_up\.weight is I8; a LoRA must be F64, F32, F16, BF16"):
        read_adapter(path, tiny.CONFIG)


def test_a_student_is_no_lora(path):
    save_student(path, tiny.network().state_dict(), tiny.CONFIG, RolloutSettings(), stage="ode")
    with pytest.raises(CheckpointError, match=r"is no LoRA; it holds .* and \d+ more\. Choose a LoRA"):
        read_adapter(path, tiny.CONFIG)
    save(path, {})
    with pytest.raises(CheckpointError, match="is no LoRA; it holds nothing"):
        read_adapter(path, tiny.CONFIG)


def test_a_lora_of_another_model_is_refused(path):
    save(path, {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 8)})
    with pytest.raises(CheckpointError, match="belong to no parameter of a Wan"):
        read_adapter(path, tiny.CONFIG)


def test_missing_and_damaged_files_are_named(path, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_adapter(path, tiny.CONFIG)
    with pytest.raises(CheckpointError, match="without weights"):
        read_adapter(tmp_path, tiny.CONFIG)
    save(path, good())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        read_adapter(path, tiny.CONFIG)


def test_a_checkpoint_of_longlive_with_anything_else_in_it_is_refused(tmp_path):
    path = tmp_path / "lora.pt"
    torch.save({"generator_lora": good(), "generator": {"x": torch.ones(1)}}, path)
    with pytest.raises(CheckpointError, match=r"no parameter of a Wan.*: generator\.x"):
        read_adapter(path, tiny.CONFIG)


PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            PEFT | {"r": 8},
            rf"adapter_config\.json says that {Q} has rank 8, its tensors have 4; the two do not",
        ),
        (PEFT | {"rank_pattern": {"self_attn.q": 2}}, r"has rank 2, its tensors have 4"),
        (PEFT | {"alpha_pattern": {".*q": 2}}, r"alpha_pattern has '\.\*q'; only plain names are understood"),
        (PEFT | {"alpha_pattern": [1]}, "alpha_pattern is not a table"),
        (PEFT | {"lora_alpha": None}, "lora_alpha is None, not a number"),
        (PEFT | {"lora_alpha": True}, "lora_alpha is True, not a number"),
        (PEFT | {"use_dora": True}, "use_dora is set; a DoRA cannot be merged"),
        (PEFT | {"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA can be merged"),
        ([], "is not a JSON table"),
        ("not json", "cannot be read"),
    ],
)
def test_a_configuration_of_peft_that_does_not_fit_is_refused(tmp_path, config, message):
    save(tmp_path / "adapter_model.safetensors", written(factors([Q]), lambda m: f"base_model.model.{m}"))
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path, tiny.CONFIG)
