"""Noise levels and the identities of flow matching."""

import pytest
import torch

from sfpp_core.errors import SettingsError
from sfpp_core.schedule import FewStepSchedule, add_noise, clean_from_velocity, warp


def test_four_steps_at_shift_5_are_the_timesteps_of_self_forcing():
    steps = [1000 * sigma for sigma in FewStepSchedule.uniform(4, shift=5).sigmas]
    assert steps == pytest.approx([1000, 937.5, 833.3333333, 625], abs=1e-6)


def test_48_euler_steps_at_shift_5_pass_through_them():
    fine = [warp(1 - step / 48, 5.0) for step in range(48)]
    assert [fine[i] for i in (0, 12, 24, 36)] == pytest.approx(FewStepSchedule.uniform(4).sigmas)


@pytest.mark.parametrize("sigma", [1.0, 0.9375, 0.3])
def test_the_velocity_leads_back_to_the_clean_sample(sigma):
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 5)
    noisy = add_noise(clean, noise, sigma)
    torch.testing.assert_close(clean_from_velocity(noisy, noise - clean, sigma), clean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sigmas", [(), (0.9,), (1.0, 1.0), (1.0, 0.0), (1.0, 0.5, 0.7)])
def test_schedules_that_do_not_fall_from_1_are_refused(sigmas):
    with pytest.raises(SettingsError, match="sigmas must fall from 1 and stay above 0"):
        FewStepSchedule(sigmas)
