"""Positions: Wan's frequencies, and no end to them."""

import math

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sfpp_core import rope, student
from sfpp_core.network import WanNetwork
from sfpp_core.rope import axis_dims, exact_device, move_in_time, rotate, rotation

LIKE = torch.zeros(1)


def test_a_head_of_128_gives_44_42_42_channels_to_time_height_and_width():
    assert axis_dims(128) == (44, 42, 42)


def test_each_axis_starts_its_own_frequencies():
    turns = rotation(128, 5, (1, 3, 4), like=LIKE)
    h, w = 2, 1
    row = turns[h * 4 + w]
    for position, first, dim in ((5, 0, 44), (h, 22, 42), (w, 43, 42)):
        for j in (0, 1, dim // 2 - 1):
            angle = position * 10_000 ** (-2 * j / dim)
            expected = complex(math.cos(angle), math.sin(angle))
            assert abs(row[first + j].item() - expected) < 1e-6


def test_neighbouring_channels_turn_together():
    x = torch.zeros(1, 1, 1, 128)
    x[..., 0] = 1
    out = rotate(x, rotation(128, 1, (1, 1, 1), like=LIKE)).flatten()
    torch.testing.assert_close(out[:3], torch.tensor([math.cos(1), math.sin(1), 0.0]))


def test_positions_beyond_a_million_are_exact():
    turns = rotation(128, 10**6 + 7, (1, 1, 1), like=LIKE)[0, :22]
    for j in range(22):
        angle = math.fmod((10**6 + 7) * 10_000 ** (-2 * j / 44), 2 * math.pi)
        assert abs(turns[j].item() - complex(math.cos(angle), math.sin(angle))) < 1e-6


def test_moving_keys_in_time_equals_rotating_them_there():
    torch.manual_seed(0)
    raw = torch.randn(1, 2, 12, 48)
    there = rotate(raw, rotation(48, 40, (3, 2, 2), like=raw))
    moved = move_in_time(rotate(raw, rotation(48, 4, (3, 2, 2), like=raw)), 36)
    torch.testing.assert_close(moved, there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("device", "where"), [("cpu", "cpu"), ("cuda:1", "cuda:1"), ("mps", "cpu")])
def test_angles_are_computed_where_float64_exists(device, where):
    assert exact_device(torch.device(device)) == torch.device(where)


class WithoutFloat64(TorchDispatchMode):
    """Lets nothing be float64 on ``meta``, which stands in for MPS."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                assert tensor.dtype != torch.float64, func
        return out


@pytest.fixture
def like_mps(monkeypatch):
    for module in (rope, student):
        monkeypatch.setattr(module, "exact_device", lambda device: torch.device("cpu"))


def test_positions_need_no_float64_on_the_device(like_mps):
    with WithoutFloat64():
        keys = torch.empty(1, 2, 12, 48, device="meta")
        turns = rotation(48, 40, (3, 2, 2), like=keys)
        assert turns.is_meta
        assert move_in_time(rotate(keys, turns), 3).is_meta


def test_sigma_needs_no_float64_on_the_device(like_mps):
    network = WanNetwork(tiny.CONFIG, device="meta")
    with WithoutFloat64():
        shift, _ = student.CausalStudent(network, tiny.CONFIG).modulation(torch.tensor([[0.5]])).head
    assert shift.is_meta and shift.dtype == torch.float32
