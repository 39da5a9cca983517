"""Noise depends on seed, chunk and step, and on nothing else."""

import pytest
import torch

from sfpp_core.noise import ChunkNoise


def draw(seed, chunk, step):
    return ChunkNoise(seed).draw((8,), chunk=chunk, step=step, like=torch.zeros(()))


def test_every_key_has_its_own_noise():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0)]
    assert len({tuple(draw(*key).tolist()) for key in keys}) == len(keys)


def test_the_same_key_repeats():
    torch.testing.assert_close(draw(3, 4, 5), draw(3, 4, 5), rtol=0, atol=0)


def test_noise_for_a_gpu_is_drawn_into_pinned_memory(monkeypatch):
    """From any other memory the copy would make the caller wait, non-blocking or not."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    pinned, draw_plain = [], torch.randn

    def randn(*size, pin_memory=False, **options):
        pinned.append(pin_memory)
        return draw_plain(*size, **options)

    monkeypatch.setattr(torch, "randn", randn)
    for like in (torch.zeros(()), torch.zeros(()).as_subclass(OnGPU)):
        ChunkNoise(0).draw((8,), chunk=0, step=0, like=like)
    assert pinned == [False, True]


@pytest.mark.gpu
def test_a_gpu_gets_the_noise_of_the_cpu():
    like = torch.zeros((), device="cuda")
    there = ChunkNoise(3).draw((8,), chunk=4, step=5, like=like)
    assert there.is_cuda
    assert torch.equal(there.cpu(), draw(3, 4, 5))


def test_a_source_may_start_at_a_later_chunk():
    later = ChunkNoise(3, first=4).draw((8,), chunk=1, step=2, like=torch.zeros(()))
    torch.testing.assert_close(later, draw(3, 5, 2), rtol=0, atol=0)
