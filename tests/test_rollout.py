"""The rollout, with a student small enough to reason about."""

import torch

from sfpp_core.kv_cache import CacheShape, GradientKVCache, RollingKVCache
from sfpp_core.noise import ChunkNoise
from sfpp_core.rollout import denoise_chunk, rollout
from sfpp_core.schedule import FewStepSchedule

LIKE = torch.zeros(1, 2, 3, 4, 4)
SCHEDULE = FewStepSchedule.uniform(4)
SHAPE = CacheShape(layers=1, heads=1, head_dim=2, tokens_per_chunk=2, latent_frames_per_chunk=3, window=3)


class Recorder:
    """Student of zero velocity that notes each call and fills the cache with ``sigma``."""

    def __init__(self):
        self.gain = torch.nn.Parameter(torch.zeros(()))
        self.sigmas, self.inputs = [], []

    def __call__(self, noisy, sigma, cache):
        self.sigmas.append(sigma)
        self.inputs.append(noisy)
        keys = torch.full((1, 1, 2, 2), float(sigma))
        self.seen, _ = cache.opened.write(0, keys, keys)
        return self.gain * noisy

    @torch.no_grad()
    def remember(self, clean, cache):
        self(clean, 0.0, cache)


def cache():
    return RollingKVCache(SHAPE, batch=1, like=LIKE)


def run(chunks, *, student=None, start=0, memory=None):
    student = student or Recorder()
    return list(
        rollout(student, ChunkNoise(7), SCHEDULE, memory or cache(), chunks=chunks, like=LIKE, start=start)
    )


def test_each_chunk_is_denoised_then_remembered_clean_but_the_last():
    student = Recorder()
    assert len(run(5, student=student)) == 5
    assert student.sigmas == [*SCHEDULE.sigmas, 0.0] * 4 + list(SCHEDULE.sigmas)


def test_noise_between_steps_is_fresh():
    student = Recorder()
    run(1, student=student)
    first, second = student.inputs[:2]
    fresh = (second - (1 - SCHEDULE.sigmas[1]) * first) / SCHEDULE.sigmas[1]
    assert not torch.allclose(fresh, first, atol=0.1)


def test_a_longer_rollout_begins_with_the_shorter_one():
    for short, long in zip(run(3), run(6), strict=False):
        torch.testing.assert_close(short, long, rtol=0, atol=0)


def test_a_rollout_can_start_in_the_middle():
    memory = cache()
    for chunk in range(3):
        memory.open(chunk)
        Recorder().remember(LIKE, memory)
        memory.close()
    for resumed, whole in zip(run(6, start=3, memory=memory), run(6)[3:], strict=True):
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_only_the_exit_step_keeps_a_gradient():
    student, memory = Recorder(), GradientKVCache(SHAPE)
    memory.open(0)
    denoise_chunk(student, ChunkNoise(0), SCHEDULE, memory, chunk=0, like=LIKE, exit_step=2).sum().backward()
    assert student.sigmas == list(SCHEDULE.sigmas[:3])
    assert not student.inputs[2].requires_grad
    torch.testing.assert_close(student.gain.grad, -(SCHEDULE.sigmas[2] * student.inputs[2]).sum())
