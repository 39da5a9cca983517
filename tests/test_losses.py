"""The losses, by their gradients."""

import pytest
import tiny
import torch

from sfpp_core.kv_cache import CacheShape
from sfpp_core.schedule import clean_from_velocity
from training.losses import dmd_loss, guide, overall_loss, velocity_loss
from training.scores import CausalScores, Levels

LEVELS = Levels(shift=5.0, least=0.02, largest=0.98)


def test_the_dmd_gradient_is_the_normalised_score_difference():
    clean = torch.randn(2, 4, 3, 2, 2, requires_grad=True)
    real, fake = torch.randn(2, 2, 4, 3, 2, 2)
    dmd_loss(clean, real, fake).backward()
    scale = (clean - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(clean.grad, (fake - real) / scale / clean.numel())


def test_what_is_masked_gets_no_gradient_and_does_not_weigh_down_the_rest():
    clean = torch.randn(2, 4, 3, 2, 2, requires_grad=True)
    real, fake = torch.randn(2, 2, 4, 3, 2, 2)
    mask = torch.tensor([0.0, 1.0, 1.0]).view(1, 1, 3, 1, 1)
    dmd_loss(clean, real, fake, mask).backward()
    scale = (clean - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(clean.grad, mask * (fake - real) / scale / (clean.numel() * 2 / 3))


def test_a_mask_of_zeros_moves_nothing():
    clean = torch.randn(1, 4, 3, 2, 2, requires_grad=True)
    dmd_loss(
        clean, torch.randn(1, 4, 3, 2, 2), torch.zeros(1, 4, 3, 2, 2), torch.zeros(1, 1, 3, 1, 1)
    ).backward()
    assert clean.grad.abs().max() == 0


def test_chunks_judged_apart_are_normalised_apart():
    """With a sigma per chunk each has errors of its own size; none may drown another."""
    shape = CacheShape(layers=1, heads=1, head_dim=2, tokens_per_chunk=1, latent_frames_per_chunk=3, window=7)
    scores = CausalScores(LEVELS, shape)
    clean = tiny.latents(2, batch=2).requires_grad_(True)
    real = clean.detach() + torch.randn_like(clean)
    real[:, :, 3:] += 99 * (real[:, :, 3:] - clean[:, :, 3:].detach())
    dmd_loss(*(scores.pieces(x) for x in (clean, real, clean.detach()))).backward()
    first, second = clean.grad.split(3, dim=2)
    torch.testing.assert_close(first.abs().mean(), second.abs().mean(), rtol=1e-4, atol=0)


def test_a_student_that_agrees_with_its_teacher_gets_no_wild_gradient():
    clean = torch.randn(1, 4, 3, 2, 2, requires_grad=True)
    dmd_loss(clean, clean.detach(), clean.detach()).backward()
    assert clean.grad.abs().max() == 0


def test_the_critic_is_right_when_it_predicts_noise_minus_clean():
    clean, noise = torch.randn(2, 2, 4)
    assert velocity_loss(noise - clean, clean, noise) == 0
    assert velocity_loss(noise, clean, noise) > 0


def test_what_a_clip_has_in_common_can_weigh_more_in_the_dmd_gradient():
    clean = torch.randn(2, 4, 3, 2, 2, requires_grad=True)
    real, fake = torch.randn(2, 2, 4, 3, 2, 2)
    mask = torch.tensor([0.0, 1.0, 1.0]).view(1, 1, 3, 1, 1)
    plain, more = (
        torch.autograd.grad(dmd_loss(clean, real, fake, mask, overall=w), clean)[0] for w in (0, 3)
    )
    common = plain[:, :, 1:].mean((2, 3, 4), keepdim=True)
    torch.testing.assert_close(more[:, :, 1:], plain[:, :, 1:] + 3 * common)
    assert more[:, :, 0].abs().max() == 0


def test_the_overall_loss_is_that_of_the_means_and_has_the_same_minimum():
    clean, noise, velocity = torch.randn(3, 2, 4, 3, 2, 2)
    means = [x.mean((2, 3, 4)) for x in (velocity, noise - clean)]
    torch.testing.assert_close(overall_loss(velocity, clean, noise), (means[0] - means[1]).square().mean())
    assert overall_loss(noise - clean, clean, noise) < 1e-12


def test_a_guidance_of_four_is_what_self_forcings_trainer_writes_as_three():
    conditional, unconditional, noisy = torch.randn(3, 2, 4, dtype=torch.float64)
    c, u = (clean_from_velocity(noisy, v, 0.7) for v in (conditional, unconditional))
    ours = clean_from_velocity(noisy, guide(conditional, unconditional, 4.0), 0.7)
    torch.testing.assert_close(ours, c + 3 * (c - u))
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)


@pytest.mark.parametrize(("uniform", "sigma"), [(0.1, 0.3571), (0.5, 0.8333), (0.001, 0.02), (0.999, 0.98)])
def test_noise_levels_are_uniform_then_warped_then_clamped(uniform, sigma):
    assert LEVELS.of(uniform) == pytest.approx(sigma, abs=1e-4)


def test_the_opening_chunk_counts_as_often_as_it_is_told_to():
    shape = CacheShape(layers=1, heads=1, head_dim=2, tokens_per_chunk=1, latent_frames_per_chunk=3, window=7)
    scores, clean = CausalScores(LEVELS, shape, opening=4.0), tiny.latents(3)
    assert scores.weights(clean).flatten().tolist() == [4] * 3 + [1] * 6
    assert CausalScores(LEVELS, shape).weights(clean) is None
    velocity, noise = torch.zeros_like(clean).requires_grad_(True), torch.ones_like(clean)
    velocity_loss(velocity, torch.zeros_like(clean), noise, scores.weights(clean)).backward()
    first, second, third = velocity.grad.split(3, dim=2)
    torch.testing.assert_close(first, 4 * second)
    torch.testing.assert_close(second, third)
    torch.testing.assert_close(velocity.grad.sum(), torch.tensor(-2.0))
