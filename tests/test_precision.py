"""What networks compute in: bfloat16 only where the device has it, and Muon the same step either way."""

import pytest
import torch
from torch import nn

from training import precision
from training.muon import Muon
from training.precision import narrow_on, region

CPU = torch.device("cpu")


@pytest.fixture
def wide(monkeypatch):
    """Return nothing; this machine's CPU has no bfloat16 products for the time of a test."""
    monkeypatch.setattr(precision, "_cpu_multiplies_bfloat16", lambda: False)


@pytest.fixture
def narrow(monkeypatch):
    """Return nothing; this machine's CPU has bfloat16 products for the time of a test."""
    monkeypatch.setattr(precision, "_cpu_multiplies_bfloat16", lambda: True)


def test_a_cpu_without_bfloat16_products_computes_in_float32(wide):
    assert narrow_on(CPU) == torch.float32
    with region(CPU, narrow_on(CPU)):
        assert nn.Linear(4, 4)(torch.ones(2, 4)).dtype == torch.float32


def test_a_cpu_with_them_computes_in_bfloat16(narrow):
    assert narrow_on(CPU) == torch.bfloat16
    with region(CPU, narrow_on(CPU)):
        assert nn.Linear(4, 4)(torch.ones(2, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["cuda", "meta"])
def test_a_gpu_and_a_dry_run_compute_in_bfloat16(wide, name):
    assert narrow_on(torch.device(name)) == torch.bfloat16


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_muon_in_float32_makes_the_same_steps(wide, shape):
    """PyTorch's own rounds to bfloat16, three digits; a step is as long as the learning rate."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.02, "weight_decay": 0.1}
    pairs = [(ours, Muon([ours], **options)), (theirs, torch.optim.Muon([theirs], **options))]
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        before = ours.detach().clone()
        for matrix, optimiser in pairs:
            matrix.grad = gradient.clone()
            optimiser.step()
        moved = (ours - before).norm()
        assert (ours - theirs).norm() < 0.1 * moved
        assert moved > 0.01
    torch.testing.assert_close(
        pairs[0][1].state_dict()["state"], pairs[1][1].state_dict()["state"], rtol=0, atol=0
    )


def test_muon_is_pytorchs_own_where_bfloat16_is_there(narrow):
    start = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    for matrix, optimiser in ((ours, Muon([ours])), (theirs, torch.optim.Muon([theirs]))):
        matrix.grad = torch.ones_like(start)
        optimiser.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
