"""The time convention, against closed forms and diffusers' scheduler."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_nucleus.core import flow

PUBLISHED = flow.FlowConfig()


def test_ends_of_the_path_and_the_clean_estimate():
    clean, noise = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    assert torch.equal(flow.add_noise(clean, noise, torch.zeros(4)), clean)
    assert torch.equal(flow.add_noise(clean, noise, torch.ones(4)), noise)
    sigma = torch.tensor([0.1, 0.4, 0.7, 0.95])
    noisy = flow.add_noise(clean, noise, sigma)
    velocity = flow.velocity_target(clean, noise)
    torch.testing.assert_close(flow.clean_estimate(noisy, velocity, sigma), clean)


def test_euler_steps_with_the_true_velocity_end_at_the_clean_latent():
    clean, noise = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    x, sigmas = noise, flow.sampling_sigmas(7)
    for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        x = flow.euler_step(x, flow.velocity_target(clean, noise), now, after)
    torch.testing.assert_close(x, clean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (4, 1.0), (50, 1.0), (20, 3.0)])
def test_sampling_sigmas_are_those_of_diffusers_scheduler(steps, shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    import numpy as np

    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    torch.testing.assert_close(
        flow.sampling_sigmas(steps, shift).float(), scheduler.sigmas, rtol=1e-6, atol=1e-7
    )


def test_mean_follows_the_published_anchors():
    assert flow.sigma_mean(PUBLISHED, 256) == pytest.approx(0.5)
    assert flow.sigma_mean(PUBLISHED, 4096) == pytest.approx(1.15)
    assert flow.sigma_mean(PUBLISHED, 1024) == pytest.approx(0.5 + 0.65 * 768 / 3840)


def test_sigma_is_logit_normal_with_a_uniform_tenth():
    """Quantiles of 20,000 draws against the exact mixture distribution."""
    n, tokens = 20_000, 1024
    sigma = flow.sample_sigma(PUBLISHED, 3, tuple(range(n)), tokens).double()
    mean = flow.sigma_mean(PUBLISHED, tokens)
    for x in (0.05, 0.3, 0.5, 0.7, 0.9, 0.97):
        normal = 0.5 * (1 + math.erf((math.log(x / (1 - x)) - mean) / math.sqrt(2)))
        expected = 0.9 * normal + 0.1 * x
        assert (sigma < x).double().mean().item() == pytest.approx(expected, abs=4 * math.sqrt(0.25 / n))


def test_draws_do_not_depend_on_their_neighbours():
    whole = flow.sample_sigma(PUBLISHED, 1, (5, 6, 7, 8), 16)
    assert torch.equal(whole[1:3], flow.sample_sigma(PUBLISHED, 1, (6, 7), 16))
    assert not torch.equal(whole, flow.sample_sigma(PUBLISHED, 2, (5, 6, 7, 8), 16))
    noise = flow.sample_noise(1, (5, 6, 7), (4, 3))
    assert torch.equal(noise[2:], flow.sample_noise(1, (7,), (4, 3)))
    assert abs(flow.sample_noise(0, tuple(range(200)), (16, 16)).std().item() - 1) < 0.01


def test_noise_levels_far_from_one_half_do_not_overflow():
    """The same limit as everywhere: 1e-6 from either end."""
    for mean, expected in ((-1000.0, 1e-6), (1000.0, 1 - 1e-6)):
        config = flow.FlowConfig(sigma_mean_low=mean, sigma_mean_high=mean, sigma_uniform_frac=0.0)
        sigma = flow.sample_sigma(config, 0, (0, 1, 2), 256)
        assert torch.equal(sigma, torch.full((3,), expected, dtype=torch.float64).float())
