"""LoRA files: every layout gives the same weights, which others compute too; what does not fit is named."""

import json
import math

import pytest
import tiny
import torch
from test_student import DIFFUSERS_NAMES
from torch import nn

from sfpp_core import weights_file
from sfpp_core.checkpoint import parameter_shapes
from sfpp_core.errors import CheckpointError, SettingsError
from sfpp_core.lora import parse_lora_option, read_adapter
from sfpp_core.student import CausalStudent

SHAPES = parameter_shapes(tiny.CONFIG)
RANK, ALPHA = 4, 10.0
IN_A_LAYER = (*(f"{kind}_attn.{leaf}" for kind in ("self", "cross") for leaf in "qkvo"), "ffn.0", "ffn.2")
ALL_LAYERS = tuple(f"blocks.{layer}.{module}" for layer in range(tiny.CONFIG.layers) for module in IN_A_LAYER)
AROUND = ("text_embedding.0", "time_embedding.2", "time_projection.1", "head.head", "patch_embedding")
MODULES = (*(f"blocks.{layer}.{module}" for layer in (0, 2) for module in IN_A_LAYER), *AROUND)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lora.safetensors"


def factors(modules=MODULES, *, rank=RANK, seed=0, shapes=SHAPES):
    """Return random up and down factors by module; those of the convolution keep its shape."""
    generator, pairs = torch.Generator().manual_seed(seed), {}
    for module in modules:
        rows, *rest = shapes[f"{module}.weight"]
        up = torch.randn(rows, rank, *[1] * (len(rest) - 1), generator=generator)
        pairs[module] = (up, torch.randn(rank, *rest, generator=generator))
    return pairs


def differences(pairs, *, scale=ALPHA / RANK):
    """Return what the factors add to each weight, in float64."""
    return {
        f"{module}.weight": (scale * up.double().flatten(1) @ down.double().flatten(1)).view(
            SHAPES[f"{module}.weight"]
        )
        for module, (up, down) in pairs.items()
    }


def of_diffusers(module):
    """Return the name diffusers has for a module of Wan."""
    name = f"{module}."
    for ours, theirs in DIFFUSERS_NAMES:
        name = name.replace(ours, theirs)
    return name.removesuffix(".")


def written(pairs, name, *, down=".lora_A.weight", up=".lora_B.weight", alpha=None):
    """Return the tensors of a file: ``name`` renames modules; without an alpha, the factor is in ``down``."""
    tensors = {}
    for module, (first, second) in pairs.items():
        tensors[name(module) + up] = first
        tensors[name(module) + down] = second if alpha else second * (ALPHA / RANK)
        if alpha:
            tensors[name(module) + ".alpha"] = torch.tensor(alpha)
    return tensors


KOHYA = {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": ALPHA}
OLD = {"down": ".lora.down.weight", "up": ".lora.up.weight"}
NAMED = {"down": ".lora_A.default.weight", "up": ".lora_B.default.weight"}


def flat(module):
    return module.replace(".", "_")


LAYOUTS = {
    "wan": lambda p: written(p, lambda m: m),
    "comfyui": lambda p: written(p, lambda m: f"diffusion_model.{m}"),
    "comfyui, kohya's factors": lambda p: written(p, lambda m: f"diffusion_model.{m}", **KOHYA),
    "diffsynth": lambda p: written(p, lambda m: m, **NAMED),
    "diffsynth, pipeline": lambda p: written(p, lambda m: f"pipe.dit.{m}", **NAMED),
    "kohya": lambda p: written(p, lambda m: f"lora_unet_{flat(m)}", **KOHYA),
    "wan fun": lambda p: written(p, lambda m: f"lora_unet__{flat(m)}", **KOHYA),
    "onetrainer": lambda p: written(p, lambda m: f"lora_transformer_{flat(of_diffusers(m))}", **KOHYA),
    "diffusers": lambda p: written(p, lambda m: f"transformer.{of_diffusers(m)}"),
    "diffusers, old": lambda p: written(p, lambda m: f"transformer.{of_diffusers(m)}", **OLD),
    "diffusers, bare": lambda p: written(p, of_diffusers),
    "peft": lambda p: written(p, lambda m: f"base_model.model.{m}", **NAMED),
    "peft over diffusers": lambda p: written(p, lambda m: f"base_model.model.{of_diffusers(m)}"),
    "peft, fsdp, compiled": lambda p: written(
        p, lambda m: f"base_model.model._orig_mod.{m.replace('.', '._fsdp_wrapped_module.', 1)}"
    ),
    "differences": lambda p: {
        f"diffusion_model.{name.removesuffix('.weight')}.diff": change.float()
        for name, change in differences(p).items()
    },
}


def save(path, tensors, metadata=None):
    weights_file.write(path, {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata or {})


def merged(adapters, weights):
    """Return the weights with every adapter in them."""
    result = dict(weights)
    for adapter in adapters:
        for name in adapter.changed:
            result[name] = adapter.merged(name, result[name])
    return result


def check(adapters, *changes, rtol=1e-6, atol=1e-5):
    """Compare merged weights with the sum of ``(strength, differences)``, all others with themselves."""
    before = tiny.network().state_dict()
    after = merged(adapters, before)
    for name, weight in before.items():
        added = [strength * change[name] for strength, change in changes if name in change]
        expected = weight.double() + sum(added)
        if added:
            torch.testing.assert_close(after[name].double(), expected, rtol=rtol, atol=atol)
            assert after[name].dtype == torch.float32
        else:
            assert after[name] is before[name]


# --- layouts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(path, layout):
    pairs = factors()
    save(path, LAYOUTS[layout](pairs))
    adapter = read_adapter(path, tiny.CONFIG, strength=0.7)
    assert adapter.changed == set(differences(pairs))
    check([adapter], (0.7, differences(pairs)))


def test_longlive_applies_its_student_and_says_that_it_leaves_the_critic(tmp_path, caplog):
    path, pairs = tmp_path / "lora.pt", factors(rank=8)
    student = written(pairs, lambda m: f"base_model.model.{m.replace('.', '._fsdp_wrapped_module.', 1)}")
    critic = written(factors(seed=1), lambda m: f"base_model.model.{m}")
    torch.save({"generator_lora": student, "critic_lora": critic, "step": 3000}, path)
    check([read_adapter(path, tiny.CONFIG)], (1, differences(pairs)))
    (record,) = caplog.records
    assert "critic_lora (50 tensors) is not applied" in record.getMessage()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_of_any_floating_dtype_are_merged_in_float32(path, dtype):
    pairs = {name: (up.to(dtype), down.to(dtype)) for name, (up, down) in factors().items()}
    save(path, written(pairs, lambda m: m, **KOHYA))
    check([read_adapter(path, tiny.CONFIG)], (1, differences(pairs)))


def test_whole_differences_reach_biases_norms_and_modulations(path):
    names = {
        "blocks.1.self_attn.q.diff_b": "blocks.1.self_attn.q.bias",
        "blocks.1.self_attn.norm_k.diff": "blocks.1.self_attn.norm_k.weight",
        "blocks.1.norm3.diff": "blocks.1.norm3.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm3.bias",
        "blocks.1.diff_m": "blocks.1.modulation",
        "blocks.0.modulation.diff": "blocks.0.modulation",
        "head.diff_m": "head.modulation",
        "patch_embedding.diff": "patch_embedding.weight",
    }
    changes = {name: torch.randn(SHAPES[name]) for name in names.values()}
    save(path, {f"diffusion_model.{name}": changes[ours] for name, ours in names.items()})
    check([read_adapter(path, tiny.CONFIG, strength=-0.5)], (-0.5, changes))


def test_flat_factors_of_the_convolution_are_the_same_as_shaped_ones(path):
    pairs = factors(["patch_embedding"])
    ((up, down),) = pairs.values()
    save(path, written({"patch_embedding": (up.flatten(1), down.flatten(1))}, lambda m: m, **KOHYA))
    check([read_adapter(path, tiny.CONFIG)], (1, differences(pairs)))


def test_an_alpha_may_be_a_whole_number_in_a_list(path):
    pairs = factors(["blocks.0.ffn.0"])
    alone, by_name = path.with_name("a.pt"), written(pairs, lambda m: m, **KOHYA)
    torch.save(by_name | {"blocks.0.ffn.0.alpha": torch.tensor([10])}, alone)
    check([read_adapter(alone, tiny.CONFIG)], (1, differences(pairs)))


# --- strengths --------------------------------------------------------------------------------------------


def test_several_are_summed_in_any_order(tmp_path):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    pairs = [factors(seed=seed) for seed in range(3)]
    for file, layout, pair in zip(paths, ("comfyui", "kohya", "differences"), pairs, strict=True):
        save(file, LAYOUTS[layout](pair))
    strengths = (0.8, -0.3, 1.5)
    adapters = [read_adapter(file, tiny.CONFIG, strength=s) for file, s in zip(paths, strengths, strict=True)]
    changes = [(s, differences(pair)) for s, pair in zip(strengths, pairs, strict=True)]
    check(adapters, *changes)
    check(adapters[::-1], *changes)


def test_strength_0_changes_nothing_but_is_checked(path):
    save(path, LAYOUTS["kohya"](factors()))
    adapter = read_adapter(path, tiny.CONFIG, strength=0)
    weight = torch.randn(48, 48)
    assert adapter.changed == frozenset()
    assert adapter.merged("blocks.0.self_attn.q.weight", weight) is weight
    save(path, {"blocks.0.self_attn.q.lora_A.weight": torch.zeros(1, 48)})
    with pytest.raises(CheckpointError, match="incomplete"):
        read_adapter(path, tiny.CONFIG, strength=0)


def test_the_weights_given_are_not_written_to(path):
    save(path, LAYOUTS["differences"](factors()))
    weight = torch.randn(48, 48)
    before = weight.clone()
    read_adapter(path, tiny.CONFIG).merged("blocks.0.self_attn.q.weight", weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("strength", [math.nan, math.inf])
def test_a_strength_must_be_finite(path, strength):
    with pytest.raises(SettingsError, match=f"strength of the LoRA is {strength}"):
        read_adapter(path, tiny.CONFIG, strength=strength)


@pytest.mark.parametrize(
    ("text", "file", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-2", "a.safetensors", -2),
        ("a.safetensors:0", "a.safetensors", 0),
        ("some/folder:1e-1", "some/folder", 0.1),
        ("C:\\loras\\a.safetensors", "C:\\loras\\a.safetensors", 1),
        ("C:\\loras\\a.safetensors:0.5", "C:\\loras\\a.safetensors", 0.5),
        ("C:/a.safetensors:.5", "C:/a.safetensors", 0.5),
        ("C:a.safetensors", "C:a.safetensors", 1),
        ("C:a.safetensors:2", "C:a.safetensors", 2),
        ("style:2.safetensors:1", "style:2.safetensors", 1),
        ("at:12/a", "at:12/a", 1),
    ],
)
def test_the_option_of_the_command_line(text, file, strength):
    found, number = parse_lora_option(text)
    assert (str(found), number) == (file, strength)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a.safetensors:0,8",
            r"the strength in 'a\.safetensors:0,8' is '0,8'; .* e\.g\. a\.safetensors:0\.8",
        ),
        ("ab:c.safetensors", r"add a strength: ab:c\.safetensors:1"),
        ("a.safetensors:", "is ''; it must be a number"),
        ("a.safetensors:nan", "is nan; it must be a finite number"),
        (":0.5", "names no LoRA"),
        ("", "names no LoRA"),
    ],
)
def test_an_impossible_option_is_explained(text, message):
    with pytest.raises(SettingsError, match=message):
        parse_lora_option(text)


# --- what others compute ----------------------------------------------------------------------------------


def save_with_peft(folder, **settings):
    """Save a random LoRA of PEFT; return the weights that PEFT merges."""
    from peft import LoraConfig, get_peft_model

    targets = ["q", "o", "ffn.0", "ffn.2", "head.head", "patch_embedding"]
    model = get_peft_model(tiny.network(), LoraConfig(target_modules=targets, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model.merge_and_unload().state_dict()


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes the biases of its own factors for damage
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 10},
        {"r": 4, "lora_alpha": 10, "use_rslora": True},
        {"r": 4, "lora_alpha": 10, "rank_pattern": {"ffn.0": 6, "^head.head": 2}, "alpha_pattern": {"o": 3}},
        {"r": 4, "lora_alpha": 10, "lora_bias": True},
    ],
    ids=["plain", "rank-stabilised", "patterns", "biases"],
)
def test_a_folder_of_peft_gives_what_peft_merges(tmp_path, settings):
    expected = save_with_peft(tmp_path, **settings)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        adapter = read_adapter(path, tiny.CONFIG)
        after = merged([adapter], tiny.network().state_dict())
        assert len(adapter.changed) >= 20
        for name, weight in expected.items():
            torch.testing.assert_close(after[name], weight, rtol=1e-5, atol=1e-6)


def test_without_its_configuration_a_file_of_peft_is_taken_at_alpha_equal_to_rank(tmp_path, caplog):
    expected = save_with_peft(tmp_path, r=4, lora_alpha=4)
    (tmp_path / "adapter_config.json").unlink()
    after = merged([read_adapter(tmp_path, tiny.CONFIG)], tiny.network().state_dict())
    assert "lies beside no adapter_config.json, so its alpha is not known" in caplog.text
    for name, weight in expected.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-5, atol=1e-6)


def transformer_of_diffusers():
    """Return the tiny student as diffusers has it."""
    transformer = tiny.transformer_of_diffusers()
    transformer.load_state_dict(
        {of_diffusers(name): weight for name, weight in tiny.network().state_dict().items()}
    )
    return transformer


@pytest.mark.parametrize("layout", ["comfyui", "comfyui, kohya's factors", "kohya", "diffusers", "metadata"])
def test_diffusers_fuses_the_same_weights(path, layout):
    from diffusers import WanPipeline

    pairs, metadata = factors(ALL_LAYERS), {}
    tensors = LAYOUTS["diffusers" if layout == "metadata" else layout](pairs)
    if layout == "metadata":  # an alpha that the factors do not have in them
        settings = {"r": RANK, "lora_alpha": 2.5, "target_modules": [of_diffusers(m) for m in ALL_LAYERS]}
        table = {f"transformer.{key}": value for key, value in settings.items()}
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(table)}
    save(path, tensors, metadata)
    state, table = WanPipeline.lora_state_dict(
        str(path.parent), weight_name=path.name, return_lora_metadata=True
    )
    transformer = transformer_of_diffusers()
    transformer.load_lora_adapter(state, prefix="transformer", metadata=table)
    transformer.fuse_lora()
    transformer.unload_lora()
    expected = transformer.state_dict()
    after = merged([read_adapter(path, tiny.CONFIG)], tiny.network().state_dict())
    for name, weight in after.items():
        torch.testing.assert_close(weight, expected[of_diffusers(name)], rtol=1e-5, atol=1e-5)
    assert (
        after["blocks.1.ffn.2.weight"] - tiny.network().state_dict()["blocks.1.ffn.2.weight"]
    ).abs().max() > 1


def test_a_merged_student_computes_what_the_low_rank_path_beside_it_does(path):
    pairs, strength = factors(ALL_LAYERS), 0.05
    save(path, LAYOUTS["kohya"](pairs))
    clip, sigma, text = tiny.latents(2), torch.tensor([[0.7]]), tiny.text()
    network = tiny.network()
    before = CausalStudent(network, tiny.CONFIG).bind(text).whole(clip, sigma)

    def beside(up, down):
        return lambda module, inputs, output: output + strength * ALPHA / RANK * (inputs[0] @ down.T) @ up.T

    handles = [network.get_submodule(m).register_forward_hook(beside(*pair)) for m, pair in pairs.items()]
    expected = CausalStudent(network, tiny.CONFIG).bind(text).whole(clip, sigma)
    for handle in handles:
        handle.remove()
    adapter = read_adapter(path, tiny.CONFIG, strength=strength)
    for module in pairs:
        linear = network.get_submodule(module)
        assert isinstance(linear, nn.Linear)
        linear.weight.copy_(adapter.merged(f"{module}.weight", linear.weight))
    after = CausalStudent(network, tiny.CONFIG).bind(text).whole(clip, sigma)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 0.1
