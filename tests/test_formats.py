"""Wan transformers as people have them: every layout is known by its content and gives the same student."""

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace

import layouts
import pytest
import tiny
import torch
from layouts import CONFIG, write, write_pickle, write_shards

from sfpp_core import cli
from sfpp_core.checkpoint import load_student, parameter_shapes, save
from sfpp_core.config import WAN_1_3B, WAN_5B, WAN_14B, RolloutSettings
from sfpp_core.errors import CheckpointError
from sfpp_core.inspection import inspect
from sfpp_core.lora import read_adapter
from sfpp_core.naming import find_layout
from sfpp_core.presets import of_family
from sfpp_core.student import CausalStudent

BF16 = torch.bfloat16
ANY_NAME = "model"
"""No name says what is inside."""


def training_state(state):
    """Return what the trainers of Self-Forcing write: three networks, of which one is averaged."""
    other = layouts.tensors(seed=7)
    return {
        "generator": layouts.prefixed(other, "model."),
        "critic": layouts.prefixed(other, "model."),
        "generator_ema": layouts.wrapped(state),
        "step": 600,
    }


def bfloat16(state):
    return {name: tensor.to(BF16) for name, tensor in state.items()}


LAYOUTS = {
    # name: (write it, what `info` calls it, family, causal)
    "official": (lambda f, s: write(f / ANY_NAME, s), "Wan, safetensors", "", False),
    "official, sharded": (lambda f, s: write_shards(f, s), "Wan, safetensors, 3 shards", "", False),
    "official, folder": (lambda f, s: write_shards(f, s).parent, "Wan, safetensors, 3 shards", "", False),
    "diffusers": (
        lambda f, s: write(f / ANY_NAME, layouts.in_diffusers(s)), "diffusers, safetensors", "", False,
    ),
    "diffusers, pipeline folder": (
        lambda f, s: write_shards(f / "transformer", layouts.in_diffusers(s)).parent.parent,
        "diffusers, safetensors, 3 shards", "", False,
    ),
    "diffusers, sharded pickles": (
        lambda f, s: write_shards(f, layouts.in_diffusers(s), save=write_pickle, suffix="bin"),
        "diffusers, PyTorch pickle, 3 shards", "", False,
    ),
    "ComfyUI": (
        lambda f, s: write(f / ANY_NAME, layouts.prefixed(s, "model.diffusion_model.")),
        "Wan under model.diffusion_model., safetensors", "", False,
    ),
    "ComfyUI, causal": (
        lambda f, s: write(f / ANY_NAME, s, {"config": '{"transformer": {"causal_ar": true}}'}),
        "Wan, safetensors", "", True,
    ),
    "ComfyUI, all in one": (
        lambda f, s: write(
            f / ANY_NAME,
            layouts.prefixed(s, "model.diffusion_model.")
            | dict.fromkeys(("vae.decoder.x", "text_encoders.t5.y"), torch.ones(2)),
        ),
        "Wan under model.diffusion_model., safetensors", "", False,
    ),
    "Self-Forcing": (
        lambda f, s: write_pickle(f / ANY_NAME, training_state(s)),
        "Self-Forcing, PyTorch pickle, generator_ema", "self-forcing", True,
    ),
    "LongLive, CausVid": (
        lambda f, s: write_pickle(f / ANY_NAME, {"generator": layouts.prefixed(s, "model.")}),
        "Self-Forcing, PyTorch pickle, generator", "self-forcing", True,
    ),
    "Self-Forcing, old pickle": (
        lambda f, s: write_pickle(f / ANY_NAME, {"generator": layouts.wrapped(s)}, old=True),
        "Self-Forcing, old PyTorch pickle, generator", "self-forcing", True,
    ),
    "Self-Forcing, initialisation": (
        lambda f, s: write_pickle(f / ANY_NAME, {"model": layouts.prefixed(s, "model.")}),
        "Wan under model.model., PyTorch pickle", "", False,
    ),
    "Self-Forcing, as safetensors": (
        lambda f, s: write(f / ANY_NAME, layouts.prefixed(s, "generator_ema.model.")),
        "Self-Forcing, safetensors, generator_ema", "self-forcing", True,
    ),
    "a bare state": (lambda f, s: write_pickle(f / ANY_NAME, s), "Wan, PyTorch pickle", "", False),
    "flat, as Krea": (
        lambda f, s: write(f / ANY_NAME, layouts.prefixed(s, "model.")),
        "Wan under model., safetensors", "", False,
    ),
}  # fmt: skip


def output(network, config=CONFIG):
    """Return the velocity of a clip of two latent frames."""
    student = CausalStudent(network, config).bind(torch.ones(1, 3, config.text_dim))
    return student.whole(tiny.latents(2, chunk=1), torch.full((1, 1), 0.7))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_student(tmp_path, layout, caplog):
    write_it, told, family, causal = LAYOUTS[layout]
    state = layouts.tensors()
    path = write_it(tmp_path, state)
    info = inspect(path)
    assert (info.format, info.family, info.causal) == (told, family, causal)
    network, config, settings = load_student(path)
    assert (config, settings) == (CONFIG, RolloutSettings())
    assert ("not trained to generate chunk by chunk" in caplog.text) is not causal
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(output(network), output(tiny.network(CONFIG)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_can_be_in_half_precision(tmp_path, layout):
    state = bfloat16(layouts.tensors())
    network, _, _ = load_student(LAYOUTS[layout][0](tmp_path, state), dtype=torch.float32)
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in network.state_dict().items())


FP8 = {
    "old": (layouts.old_fp8, {}, "fp8 e4m3 with scales"),
    "new": (layouts.new_fp8, {}, "fp8 e4m3 with scales"),
    "new, told by the metadata": (
        lambda state: layouts.quantised(state, scale="weight_scale"),
        {"_quantization_metadata": json.dumps({"layers": {"blocks.0.ffn.0": {"format": "float8_e4m3fn"}}})},
        "fp8 e4m3 with scales",
    ),
    "a scale for each row": (
        lambda state: layouts.quantised(state, per_row=True),
        {},
        "fp8 e4m3 with scales",
    ),
    "e5m2": (lambda state: layouts.quantised(state, dtype=torch.float8_e5m2), {}, "fp8 e5m2 with scales"),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("scheme", FP8)
def test_fp8_becomes_what_it_was_made_from(tmp_path, scheme, prefix):
    quantise, metadata, told = FP8[scheme]
    kept, meant = quantise(layouts.tensors())
    path = write(tmp_path / ANY_NAME, layouts.prefixed(kept, prefix), metadata)
    assert inspect(path).quantisation.scheme == told
    network, _, _ = load_student(path, dtype=torch.float32)
    assert network.state_dict().keys() == meant.keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, meant[name]), name
    network, _, _ = load_student(path)
    assert {parameter.dtype for parameter in network.parameters()} == {BF16}


def test_fp8_without_scales_is_read_as_it_is(tmp_path):
    state = {name: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for name, t in layouts.tensors().items()}
    path = write(tmp_path / ANY_NAME, state)
    assert inspect(path).quantisation.scheme == "fp8 e4m3 without scales"
    network, _, _ = load_student(path, dtype=torch.float32)
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in network.state_dict().items())


# --- diffusers itself -------------------------------------------------------------------------------------


def test_a_model_of_diffusers_says_the_same_here(tmp_path):
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    theirs = WanTransformer3DModel(
        num_attention_heads=CONFIG.heads, attention_head_dim=CONFIG.head_dim, text_dim=CONFIG.text_dim,
        ffn_dim=CONFIG.ffn_dim, num_layers=CONFIG.layers,
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "transformer")
    network, config, _ = load_student(tmp_path)
    assert config == CONFIG
    text = torch.zeros(1, config.text_length, config.text_dim)
    text[:, :3] = 1
    latents = tiny.latents(2, chunk=1)
    with torch.no_grad():
        expected = theirs(latents, torch.tensor([700.0]), text).sample
    torch.testing.assert_close(output(network), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


# --- what is chosen, and what is said ---------------------------------------------------------------------


def test_averaged_weights_are_preferred_and_both_can_be_had(tmp_path):
    state = layouts.tensors()
    path = write_pickle(tmp_path / ANY_NAME, training_state(state))
    info = inspect(path)
    assert (info.choices, info.part, info.others) == (
        ("generator", "generator_ema"),
        "generator_ema",
        ("critic",),
    )
    for choice, expected in (("ema", state), ("live", layouts.tensors(seed=7))):
        network, _, _ = load_student(path, choice=choice)
        assert torch.equal(network.head.modulation, expected["head.modulation"])


def test_weights_that_are_not_there_cannot_be_chosen(tmp_path):
    path = write_pickle(tmp_path / ANY_NAME, {"generator": layouts.tensors()})
    with pytest.raises(CheckpointError, match="has no ema weights; it has generator"):
        load_student(path, choice="ema")


@pytest.mark.parametrize("config", [WAN_1_3B, WAN_14B, WAN_5B])
@pytest.mark.parametrize("part", ["generator.model.", "model.", "model.diffusion_model."])
def test_published_sizes_are_seen(tmp_path, config, part):
    with torch.device("meta"):
        state = {name: torch.zeros(shape, dtype=BF16) for name, shape in parameter_shapes(config).items()}
    path = tmp_path / ANY_NAME
    write_sparse(path, layouts.prefixed(state, part))
    info = inspect(path)
    assert info.config == config
    krea = config == WAN_14B and part == "model."
    assert info.family == ("krea" if krea else "self-forcing" if part == "generator.model." else "")
    assert not krea or (info.causal and of_family("krea").window == 6)


def write_sparse(path, state):
    """Write a safetensors file of zeros that takes no room."""
    table, end = {}, 0
    for name, tensor in state.items():
        start, end = end, end + 2 * tensor.numel()
        table[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + end)


def test_a_wan_of_another_task_is_refused_in_any_naming(tmp_path):
    config = replace(CONFIG, channels=36)
    state = tiny.network(config).state_dict() | {"head.head.weight": torch.zeros(64, 128)}
    with pytest.raises(CheckpointError, match="takes 36 latent channels and gives 16"):
        load_student(write(tmp_path / ANY_NAME, layouts.in_diffusers(state)))


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (
            "Self-Forcing",
            ("generator, generator_ema; generator_ema is taken", "unused     critic", "causal     yes"),
        ),
        ("diffusers, pipeline folder", ("diffusers, safetensors, 3 shards", "not as far as it says")),
    ],
)
def test_info_explains_every_layout(tmp_path, capsys, layout, expected):
    path = LAYOUTS[layout][0](tmp_path, layouts.tensors())
    assert cli.main(["info", str(path)]) == 0
    said = capsys.readouterr().out
    for part in (
        *expected,
        "4 steps, shift 5, chunk 3, window 21, sink 0",
        "dim 128, 1 heads of 128, 2 layers",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("names", "model"),
    [
        (
            (
                "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
                "diffusion_model.blocks.0.ffn.2.lora_A.weight",
            ),
            0,
        ),
        (("lora_unet_blocks_0_self_attn_q.lora_down.weight", "lora_unet_blocks_0_ffn_2.lora_down.weight"), 1),
    ],
)
def test_info_says_which_model_a_lora_is_for(tmp_path, capsys, names, model):
    config, name = ((WAN_1_3B, "Wan2.1-T2V-1.3B"), (WAN_14B, "Wan2.1-T2V-14B"))[model]
    state = {names[0]: torch.zeros(4, config.dim), names[1]: torch.zeros(8, config.ffn_dim)}
    assert cli.main(["info", str(write(tmp_path / ANY_NAME, state))]) == 0
    assert f"a LoRA of rank 4 to 8 for {name}" in capsys.readouterr().out


# --- adapters ---------------------------------------------------------------------------------------------


class Doubling:
    """An adapter that doubles one weight and says in which dtype it got it."""

    def __init__(self, name):
        self.changed = frozenset([name])
        self.seen = []

    def merged(self, name, weight):
        self.seen.append((name, weight.dtype))
        return weight * 2


@pytest.mark.parametrize("quantise", [lambda state: (bfloat16(state), state), layouts.old_fp8])
def test_adapters_are_merged_in_single_precision(tmp_path, quantise):
    kept, meant = quantise(layouts.tensors(dtype=BF16))
    name = "blocks.1.ffn.0.weight"
    adapters = [Doubling(name), Doubling(name)]
    network, _, _ = load_student(write(tmp_path / ANY_NAME, kept), dtype=BF16, adapters=adapters)
    assert [adapter.seen for adapter in adapters] == [[(name, torch.float32)]] * 2
    assert torch.equal(network.state_dict()[name], (4 * meant[name].float()).to(BF16))
    assert torch.equal(network.state_dict()["head.modulation"], meant["head.modulation"].to(BF16))


def test_the_base_of_longlive_takes_its_lora(tmp_path):
    state, name = layouts.tensors(), "blocks.0.self_attn.q"
    down, up = torch.randn(4, CONFIG.dim), torch.randn(CONFIG.dim, 4)
    path = write_pickle(tmp_path / ANY_NAME, {"generator": layouts.prefixed(state, "model.")})
    peft = {f"base_model.model.model.{name}.lora_{side}.weight": t for side, t in (("A", down), ("B", up))}
    adapter = read_adapter(write_pickle(tmp_path / "lora", {"generator_lora": peft}), CONFIG)
    network, _, _ = load_student(path, adapters=[adapter])
    changed = network.state_dict()[f"{name}.weight"]
    torch.testing.assert_close(changed, state[f"{name}.weight"] + up @ down)
    assert torch.equal(network.head.modulation, state["head.modulation"])


def test_an_adapter_for_another_model_is_refused(tmp_path):
    path = write(tmp_path / ANY_NAME, layouts.tensors())
    with pytest.raises(
        CheckpointError, match=r"an adapter changes blocks\.2\.ffn\.0\.weight, which .* lacks"
    ):
        load_student(path, adapters=[Doubling("blocks.2.ffn.0.weight")])


# --- memory, and our own files ----------------------------------------------------------------------------


PEAKS = """
import ctypes, gc, sys, torch
from pathlib import Path
from sfpp_core.checkpoint import load_student
from sfpp_core.machine import peak_memory

small, *large = map(Path, sys.argv[1:])
for path in (small, *large):
    for dtype in (torch.bfloat16, torch.float32):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = peak_memory()
        load_student(path, dtype=dtype)
        if path != small:  # the first load also imports and compiles
            sys.stdout.write(f"{peak_memory() - before} ")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process forget its peak")
def test_a_load_takes_no_more_than_a_fifth_above_the_file(tmp_path):
    config = replace(CONFIG, dim=512, heads=4, ffn_dim=1024, layers=12)
    state = {name: torch.zeros(shape) for name, shape in parameter_shapes(config).items()}
    size = sum(4 * tensor.numel() for tensor in state.values())
    small = write_pickle(tmp_path / "small", layouts.tensors())
    paths = (
        write(tmp_path / "one", state),
        write_pickle(tmp_path / "pickle", {"generator": state, "critic": state}),
        write_shards(tmp_path / "shards", state).parent,
    )
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, small, *paths], capture_output=True, text=True, check=True
    )
    shutil.rmtree(tmp_path)
    peaks = [int(peak) / size for peak in done.stdout.split()]
    assert len(peaks) == 6
    assert max(peaks) < 1.2, peaks


def test_our_own_files_carry_the_mark_and_stay_ours(tmp_path, caplog):
    settings = RolloutSettings(window=9, sink=3, sigmas=(1.0, 0.9, 0.5), steps=3)
    path = tmp_path / ANY_NAME
    save(path, layouts.tensors(), CONFIG, settings, stage="dmd")
    info = inspect(path)
    assert (info.kind, info.settings, info.family) == ("student", settings, "")
    assert load_student(path)[2] == settings
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_stored_name_may_carry_wrappers_anywhere(tmp_path):
    names = ["_orig_mod.model.patch_embedding.weight", "_orig_mod.model.head._fsdp_wrapped_module.modulation"]
    layout = find_layout(tmp_path, names)
    assert (layout.prefix, layout.names) == ("model.", {
        "patch_embedding.weight": names[0], "head.modulation": names[1],
    })  # fmt: skip
