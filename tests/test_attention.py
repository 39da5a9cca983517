"""Attention: every back end gives what the formula gives, in one layout."""

import importlib.machinery
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from sfpp_core import attention
from sfpp_core.attention import choose, matmul, sdpa
from sfpp_core.errors import SettingsError

LIKE = torch.empty(0)
ON_A_GPU = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
"""All that is asked of the tensor of a student on a GPU, whether there is one or not."""
SHAPE = (1, 2, 12, 16)


def formula(q, k, v):
    scores = torch.einsum("bnld,bnmd->bnlm", q.double(), k.double()) / q.shape[-1] ** 0.5
    return torch.einsum("bnlm,bnmd->bnld", scores.softmax(-1), v.double())


def inputs(shape=SHAPE, visible=30, dtype=torch.float32):
    batch, heads, _, dim = shape
    q = torch.randn(shape, dtype=dtype)
    k, v = torch.randn(2, batch, heads, visible, dim, dtype=dtype)
    return q, k, v


@pytest.mark.parametrize("attend", [sdpa, matmul])
@pytest.mark.parametrize("visible", [12, 30, 84])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_back_ends_give_what_the_formula_gives(attend, visible, dtype, tolerance):
    q, k, v = inputs((2, 2, 12, 16), visible, dtype)
    out = attend(q, k, v)
    assert out.dtype == dtype
    assert torch.allclose(out.double(), formula(q, k, v), atol=tolerance)


def test_back_ends_take_views_of_a_cache():
    q, k, v = inputs(visible=40)
    seen = k[:, :, :24], v[:, :, :24]
    for attend in (sdpa, matmul):
        assert torch.allclose(attend(q, *seen), attend(q, *(x.contiguous() for x in seen)), atol=1e-6)


def test_named_back_ends_are_given_as_named():
    assert choose("sdpa", shape=SHAPE, visible=30, like=LIKE) is sdpa
    assert choose("matmul", shape=SHAPE, visible=30, like=LIKE) is matmul


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, sdpa), (torch.bfloat16, matmul)])
def test_auto_is_a_fixed_rule(monkeypatch, dtype, expected):
    """A rule that measured could choose differently in two runs that must give the same video."""
    monkeypatch.setattr(attention, "_cpu_seconds", lambda *_: pytest.fail("auto must not measure"))
    assert choose("auto", shape=SHAPE, visible=30, like=LIKE.to(dtype)) is expected


@pytest.mark.parametrize("name", ["auto", "probe"])
def test_huge_scores_are_never_held(name):
    like = LIKE.to(torch.bfloat16)
    assert choose(name, shape=(1, 12, 4680, 128), visible=32760, like=like) is sdpa


@pytest.mark.parametrize(("faster", "slower"), [(matmul, sdpa), (sdpa, matmul)])
def test_a_probe_takes_the_faster(monkeypatch, faster, slower):
    cost = {faster: 1.0, slower: 2.0}
    monkeypatch.setattr(attention, "_cpu_seconds", lambda attend, *_: cost[attend])
    assert choose("probe", shape=SHAPE, visible=31, like=LIKE) is faster


def test_a_probe_measures_both():
    assert choose("probe", shape=SHAPE, visible=30, like=LIKE) in (sdpa, matmul)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(SettingsError, match="attention is 'fast'; use one of auto, probe, sdpa"):
        choose("fast", shape=SHAPE, visible=30, like=LIKE)


@pytest.mark.parametrize(
    ("name", "package"), [("sage", "sageattention"), ("flash", "flash_attn"), ("xformers", "xformers")]
)
def test_a_back_end_that_is_not_installed_is_named(monkeypatch, name, package):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=f"attention '{name}' needs the package {package}"):
        choose(name, shape=SHAPE, visible=30, like=ON_A_GPU)


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        ("flash", "bfloat16 or float16"),
        ("sage", "bfloat16 or float16"),
        ("xformers", "bfloat16, float16 or float32"),
    ],
)
@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.bfloat16), ("cpu", torch.float32), ("cuda", torch.float64)]
)
def test_a_back_end_that_cannot_compute_here_is_refused(monkeypatch, name, dtypes, device, dtype):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda _: True)
    like = SimpleNamespace(device=torch.device(device), dtype=dtype)
    with pytest.raises(SettingsError, match=f"attention '{name}' needs a CUDA GPU and {dtypes}; use 'auto'"):
        choose(name, shape=SHAPE, visible=30, like=like)


def heads_last(q, k, v):
    return sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def heads_first(q, k, v, *, tensor_layout):
    assert tensor_layout == "HND"
    return sdpa(q, k, v)


@pytest.mark.parametrize(
    ("name", "modules", "function", "body"),
    [
        ("flash", ["flash_attn"], "flash_attn_func", heads_last),
        ("xformers", ["xformers", "xformers.ops"], "memory_efficient_attention", heads_last),
        ("sage", ["sageattention"], "sageattn", heads_first),
    ],
)
def test_optional_back_ends_are_called_in_their_own_layout(monkeypatch, name, modules, function, body):
    for module in modules:
        stub = types.ModuleType(module)
        stub.__spec__ = importlib.machinery.ModuleSpec(module, None)
        monkeypatch.setitem(sys.modules, module, stub)
    setattr(stub, function, body)
    q, k, v = inputs()
    attend = choose(name, shape=SHAPE, visible=30, like=ON_A_GPU)
    assert torch.allclose(attend(q, k, v), sdpa(q, k, v), atol=1e-6)
