"""Noise depends on seed, chunk and step, and on nothing else."""

import torch

from sfpp_core.noise import ChunkNoise


def draw(seed, chunk, step):
    return ChunkNoise(seed).draw((8,), chunk=chunk, step=step, like=torch.zeros(()))


def test_every_key_has_its_own_noise():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0)]
    assert len({tuple(draw(*key).tolist()) for key in keys}) == len(keys)


def test_the_same_key_repeats():
    torch.testing.assert_close(draw(3, 4, 5), draw(3, 4, 5), rtol=0, atol=0)
