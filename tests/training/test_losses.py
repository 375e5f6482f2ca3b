"""Every loss against an independent reference in float64: plain loops, finite differences, dense matrices."""

from __future__ import annotations

import dataclasses
import logging
import math

import numpy as np
import pytest
import torch

from megatron_nucleus.core import flow
from megatron_nucleus.core.patches import pack
from megatron_nucleus.training.losses import (
    BANDS,
    LossConfig,
    check_losses,
    flow_loss_per_image,
    haar,
    router_z_loss,
    wavelet_loss,
)
from megatron_nucleus.types import Routing
from megatron_nucleus.utils import config as config_lib
from megatron_nucleus.utils.errors import ConfigError

GRID, PATCH, CHANNELS, IMAGES = (2, 3), 2, 3, 4
EQUAL = (1.0, 1.0, 1.0, 1.0)
UNEQUAL = (0.3, 1.1, 0.7, 1.9)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient_by_differences(function, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences of a scalar function in every entry."""
    out = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        out[index] = (function(up) - function(down)) / (2 * step)
    return out


# Velocity


def test_flow_loss_is_the_mean_square_of_each_image():
    velocity, target = normal(3, 4, 5), normal(3, 4, 5, seed=1)
    expected = [
        math.fsum(float(velocity[b, s, p] - target[b, s, p]) ** 2 for s in range(4) for p in range(5)) / 20
        for b in range(3)
    ]
    per_image = flow_loss_per_image(velocity, target)
    assert per_image.dtype == torch.float32
    assert per_image.tolist() == pytest.approx(expected, rel=1e-6)
    assert float(flow_loss_per_image(velocity, target).mean()) == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_flow_loss_of_bf16_is_computed_in_fp32():
    velocity = torch.full((1, 64, 64), 1.0078125, dtype=torch.bfloat16)  # 1 + 2^-7
    assert float(flow_loss_per_image(velocity, torch.zeros(1, 64, 64))) == 1.0078125**2


# Router z-loss


def z_loss_by_loops(logits: np.ndarray) -> float:
    """logits [layers, B, S, E]: mean over tokens of log(sum(exp))^2, summed over layers."""
    total = 0.0
    for layer in logits:
        squares = [
            math.log(math.fsum(math.exp(x) for x in token)) ** 2
            for token in layer.reshape(-1, layer.shape[-1])
        ]
        total += math.fsum(squares) / len(squares)
    return total


def routing(logits_BSE: torch.Tensor) -> Routing:
    return Routing(torch.empty(0), torch.empty(0), logits_BSE)


def test_z_loss_equals_plain_loops_and_finite_differences():
    logits = (3 * normal(2, 2, 3, 4)).numpy()
    layers = [torch.tensor(layer, requires_grad=True) for layer in logits]
    loss = router_z_loss([routing(layer) for layer in layers])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(z_loss_by_loops(logits), rel=1e-6)
    gradients = torch.stack(torch.autograd.grad(loss, layers)).numpy()
    np.testing.assert_allclose(
        gradients, gradient_by_differences(z_loss_by_loops, logits), rtol=1e-5, atol=1e-6
    )


def test_z_loss_of_large_logits_and_of_a_dense_model():
    """A plain exp would overflow."""
    assert float(router_z_loss([routing(torch.full((1, 2, 4), 500.0))])) == pytest.approx(
        (500 + math.log(4)) ** 2
    )
    assert float(router_z_loss([])) == 0.0


# Wavelet loss


def haar_matrix(n: int) -> np.ndarray:
    """Orthonormal one-level Haar in one dimension: n/2 averages, then n/2 differences."""
    matrix = np.zeros((n, n))
    for i in range(n // 2):
        matrix[i, 2 * i : 2 * i + 2] = 1 / math.sqrt(2), 1 / math.sqrt(2)
        matrix[n // 2 + i, 2 * i : 2 * i + 2] = 1 / math.sqrt(2), -1 / math.sqrt(2)
    return matrix


def bands_by_matrix(image_HW: np.ndarray) -> dict[str, np.ndarray]:
    H, W = image_HW.shape
    both = haar_matrix(H) @ image_HW @ haar_matrix(W).T
    rows, columns = {"L": slice(H // 2), "H": slice(H // 2, H)}, {"L": slice(W // 2), "H": slice(W // 2, W)}
    return {name: both[rows[name[0]], columns[name[1]]] for name in BANDS}


def wavelet_by_matrix(error_BCHW: np.ndarray, weights) -> float:
    """Sum of weight * mean square of each band."""
    squares = {name: [] for name in BANDS}
    for image in error_BCHW:
        for channel in image:
            for name, band in bands_by_matrix(channel).items():
                squares[name] += list((band**2).ravel())
    return math.fsum(w * math.fsum(squares[n]) / len(squares[n]) for n, w in zip(BANDS, weights, strict=True))


def latents(seed: int) -> torch.Tensor:
    return normal(IMAGES, CHANNELS, GRID[0] * PATCH, GRID[1] * PATCH, seed=seed)


def packed(latents_BCHW: torch.Tensor) -> torch.Tensor:
    return pack(latents_BCHW, PATCH)[0]


def test_haar_equals_a_dense_orthogonal_matrix():
    x = latents(0)
    for n in (4, 6):
        np.testing.assert_allclose(haar_matrix(n) @ haar_matrix(n).T, np.eye(n), atol=1e-15)
    for name, band in zip(BANDS, haar(x), strict=True):
        for b in range(IMAGES):
            for c in range(CHANNELS):
                expected = bands_by_matrix(x[b, c].numpy())[name]
                np.testing.assert_allclose(band[b, c].numpy(), expected, rtol=1e-12, atol=1e-14)


def test_bands_are_named_by_what_they_see():
    """LH: differences along the width, as of vertical stripes; HL: along the height; HH: a chessboard."""
    one = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    stripe = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    pictures = {
        "LL": one,
        "LH": one * stripe,
        "HL": one * stripe[:, None],
        "HH": one * stripe * stripe[:, None],
    }
    for name, picture in pictures.items():
        for band_name, band in zip(BANDS, haar(picture), strict=True):
            assert torch.equal(band, torch.full_like(band, 2.0 if band_name == name else 0.0)), (
                name,
                band_name,
            )


@pytest.mark.parametrize("weights", [EQUAL, UNEQUAL, LossConfig().wavelet_band_weights, (0.0, 0.0, 0.0, 1.0)])
def test_wavelet_loss_equals_the_dense_matrix_forward_and_backward(weights):
    estimate, clean = latents(1).requires_grad_(), latents(2)
    loss = wavelet_loss(packed(estimate), packed(clean), GRID, PATCH, weights)
    assert loss.dtype == torch.float32
    error = (estimate - clean).detach().numpy()
    assert loss.item() == pytest.approx(wavelet_by_matrix(error, weights), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, estimate)
    by_differences = gradient_by_differences(lambda e: wavelet_by_matrix(e, weights), error[:1], step=1e-4)
    # The reference's mean is over one image, the loss's over all.
    np.testing.assert_allclose(IMAGES * gradient[:1].numpy(), by_differences, rtol=1e-5, atol=1e-6)


def flow_case(sigma_B: torch.Tensor):
    """(estimate, clean, velocity, target) of a network that predicts at random."""
    clean, noise, velocity = (packed(latents(seed)) for seed in (3, 4, 5))
    noisy = flow.add_noise(clean, noise, sigma_B)
    return flow.clean_estimate(noisy, velocity, sigma_B), clean, velocity, flow.velocity_target(clean, noise)


def test_equal_bands_are_four_sigma_squared_times_the_velocity_loss_of_every_image():
    """Parseval: such a loss only re-weights noise levels, image by image, in value and in gradient."""
    sigma = torch.tensor([0.05, 0.3, 0.8, 1.0], dtype=torch.float64)
    estimate, clean, velocity, target = flow_case(sigma)
    mse = flow_loss_per_image(velocity, target)
    for b in range(IMAGES):
        one = slice(b, b + 1)
        wavelet = wavelet_loss(estimate[one], clean[one], GRID, PATCH, EQUAL)
        assert float(wavelet) == pytest.approx(4 * float(sigma[b]) ** 2 * float(mse[b]), rel=2e-6)

    velocity.requires_grad_()
    noisy = estimate - sigma.view(-1, 1, 1) * velocity.detach()
    wavelet = wavelet_loss(flow.clean_estimate(noisy, velocity, sigma), clean, GRID, PATCH, EQUAL)
    weighted = (4 * sigma.square() * flow_loss_per_image(velocity, target)).mean()
    gradients = [torch.autograd.grad(x, velocity)[0] for x in (wavelet, weighted)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_unequal_bands_tell_errors_of_equal_size_apart():
    """A flat error and a chessboard of the same mean square: alike to equal bands, 1 to 3 to the defaults."""
    flat = torch.full((1, CHANNELS, 4, 6), 0.5)
    rows, columns = torch.arange(4)[:, None], torch.arange(6)
    board = flat * (1 - 2 * ((rows + columns) % 2))
    zero = torch.zeros_like(packed(flat))
    assert [float(flow_loss_per_image(packed(x), zero)) for x in (flat, board)] == [0.25, 0.25]

    def loss(error, weights):
        return float(wavelet_loss(packed(error), zero, GRID, PATCH, weights))

    assert loss(flat, EQUAL) == loss(board, EQUAL) == 1.0
    weights = LossConfig().wavelet_band_weights
    assert loss(flat, weights) == pytest.approx(weights[0])
    assert loss(board, weights) == pytest.approx(weights[3])
    assert loss(board, weights) == pytest.approx(3 * loss(flat, weights))


def test_defaults_are_off_unequal_and_weigh_as_much_as_equal_bands():
    config = LossConfig()
    assert config.wavelet_loss_coeff == 0.0
    assert sum(config.wavelet_band_weights) == pytest.approx(4.0)
    assert config.wavelet_band_weights[0] < min(config.wavelet_band_weights[1:])


def test_odd_latents_are_refused():
    tokens = torch.zeros(1, 6, 4)
    with pytest.raises(ConfigError, match=r"wavelet_loss_coeff.*2 x 3.*patch_size: 1"):
        wavelet_loss(tokens, tokens, (2, 3), 1, EQUAL)
    assert float(wavelet_loss(tokens, tokens, (6, 1), 2, EQUAL)) == 0.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("wavelet_band_weights", [1.0, -0.1, 1.0, 1.0]),
        ("wavelet_band_weights", [0.0, 0.0, 0.0, 0.0]),
        ("wavelet_band_weights", [1.0, math.nan, 1.0, 1.0]),
        ("wavelet_band_weights", [1.0, 1.0, 1.0]),
        ("wavelet_loss_coeff", -0.1),
        ("wavelet_loss_coeff", math.inf),
        ("moe_z_loss_coeff", -1e-7),
        ("moe_z_loss_coeff", math.nan),
    ],
)
def test_bad_settings_name_the_key(key, value):
    run_config = dataclasses.make_dataclass("Run", [("losses", LossConfig)], frozen=True)
    with pytest.raises(ConfigError, match=f"losses.{key}"):
        config_lib.from_dict(run_config, {"losses": {key: value}})
    if key == "wavelet_band_weights":
        with pytest.raises(ConfigError, match=f"losses.{key}"):
            LossConfig(wavelet_band_weights=tuple(value))


def test_odd_patches_are_refused_before_training_where_the_loss_is_on():
    with pytest.raises(ConfigError, match=r"losses\.wavelet_loss_coeff: 0\.1 .*model\.patch_size: 3"):
        check_losses(LossConfig(wavelet_loss_coeff=0.1), patch_size=3)
    check_losses(LossConfig(), patch_size=3)


@pytest.mark.parametrize(
    ("config", "warnings"),
    [
        (LossConfig(wavelet_loss_coeff=0.1, wavelet_band_weights=(0.5,) * 4), 1),
        (LossConfig(wavelet_loss_coeff=0.1), 0),
        (LossConfig(wavelet_band_weights=EQUAL), 0),
    ],
)
def test_equal_bands_are_named_for_what_they_are(config, warnings, caplog):
    with caplog.at_level(logging.WARNING, "megatron_nucleus.training.losses"):
        check_losses(config, patch_size=2)
    assert len(caplog.records) == warnings
    if warnings:
        assert "2 * sigma^2 times each image's velocity MSE" in caplog.text
        assert "losses.wavelet_band_weights" in caplog.text
