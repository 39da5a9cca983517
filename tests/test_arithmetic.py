"""Fast products are as exact as slow ones, or not used."""

import pytest
import torch

from sfpp_core import arithmetic
from sfpp_core.arithmetic import fast_products
from sfpp_core.config import DEMO

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def before():
    """The setting outside, which no test may leave changed."""
    setting = torch.get_float32_matmul_precision()
    yield setting
    assert torch.get_float32_matmul_precision() == setting


def test_fast_products_keep_single_precision():
    a, b = torch.randn(2, 300, 300)
    with fast_products(CPU):
        fast = torch.nn.functional.linear(a, b)
    exact = a.double() @ b.double().T
    assert (fast - exact).abs().max() / exact.abs().max() < 2e-6


def test_the_faster_way_is_taken_where_it_is_exact(monkeypatch):
    monkeypatch.setattr(arithmetic, "_product_error", lambda: 1e-7)
    with fast_products(CPU):
        assert torch.get_float32_matmul_precision() == "medium"


def test_products_that_lose_precision_are_not_used(monkeypatch, before):
    monkeypatch.setattr(arithmetic, "_product_error", lambda: 1e-3)
    with fast_products(CPU):
        assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("inputs", [DEMO.dim, DEMO.ffn_dim])
def test_the_demos_own_products_are_compared_too(monkeypatch, before, inputs):
    """A back end may choose another way for another shape."""

    def linear(x, weight):
        if x.dtype == torch.float32 and x.shape == (48, inputs):
            return torch.nn.functional.linear(x.bfloat16(), weight.bfloat16()).float()
        return torch.nn.functional.linear(x, weight)

    monkeypatch.setattr(arithmetic, "linear", linear)
    with fast_products(CPU):
        assert torch.get_float32_matmul_precision() == before


def test_the_setting_is_restored_after_an_error():
    with pytest.raises(KeyError), fast_products(CPU):
        raise KeyError


def test_the_setting_is_restored_if_the_comparison_itself_fails(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(arithmetic, "_product_error", interrupted)
    with pytest.raises(KeyboardInterrupt), fast_products(CPU):
        pass


def test_other_devices_are_left_alone(before):
    with fast_products(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == before
