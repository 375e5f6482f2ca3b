"""The loss by noise level: means in bins, against sums written out."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_nucleus.training.sigma_curve import SigmaCurve


def values_of(curve: SigmaCurve) -> list[float | None]:
    return list(curve.report(curve.sums()).values())


def test_means_by_bin_with_edges():
    """A bin holds its lower edge, the last one also 1."""
    curve = SigmaCurve(bins=4)
    curve.add(torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([0.0, 0.25, 0.2, 0.5]))
    curve.add(torch.tensor([7.0, 9.0]), torch.tensor([1.0, 0.75]))
    assert curve.report(curve.sums()) == {"0.0-0.25": 2.0, "0.25-0.5": 2.0, "0.5-0.75": 5.0, "0.75-1.0": 8.0}
    assert curve.sums().tolist() == [4.0, 2.0, 5.0, 16.0, 2.0, 1.0, 1.0, 2.0]
    assert curve.sums().dtype == torch.float64


def test_names_of_ten_bins_and_none_where_there_is_no_image():
    curve = SigmaCurve()
    curve.add(torch.tensor([0.5]), torch.tensor([0.35]))
    assert curve.report(curve.sums()) == {
        "0.0-0.1": None, "0.1-0.2": None, "0.2-0.3": None, "0.3-0.4": 0.5, "0.4-0.5": None, "0.5-0.6": None,
        "0.6-0.7": None, "0.7-0.8": None, "0.8-0.9": None, "0.9-1.0": None,
    }  # fmt: skip


def test_equals_a_plain_loop_and_adds_up_over_ranks():
    generator = torch.Generator().manual_seed(0)
    losses, sigma = torch.rand(2, 500, generator=generator)
    whole, ranks = SigmaCurve(bins=7), [SigmaCurve(bins=7) for _ in range(3)]
    whole.add(losses, sigma)
    for part, curve in enumerate(ranks):
        for start in range(part, 500, 30):  # every rank adds several times
            curve.add(losses[start : start + 30 : 3], sigma[start : start + 30 : 3])
    summed = whole.report(sum(curve.sums() for curve in ranks))
    expected = [[] for _ in range(7)]
    for loss, level in zip(losses.tolist(), sigma.tolist(), strict=True):
        expected[int(level * 7)].append(loss)
    for got, also, images in zip(values_of(whole), summed.values(), expected, strict=True):
        assert got == pytest.approx(math.fsum(images) / len(images), rel=1e-12)
        assert also == pytest.approx(got, rel=1e-12)


def test_the_largest_sigma_below_one_is_in_the_last_bin():
    """In fp32, 10 * (1 - 2^-24) rounds to 10."""
    curve = SigmaCurve()
    curve.add(torch.tensor([3.0]), torch.tensor([1.0]).nextafter(torch.tensor(0.0)))
    assert values_of(curve)[-1] == 3.0


@pytest.mark.parametrize("sigma", [-0.01, 1.01, math.nan])
def test_a_sigma_out_of_range_is_an_error(sigma):
    with pytest.raises((RuntimeError, IndexError)):
        SigmaCurve().add(torch.tensor([1.0]), torch.tensor([sigma]))


def test_losses_that_are_not_finite_leave_the_rest_of_their_bin_readable():
    curve = SigmaCurve(bins=2)
    curve.add(torch.tensor([1.0, math.nan, 3.0, math.inf]), torch.tensor([0.1, 0.1, 0.2, 0.9]))
    assert values_of(curve) == [2.0, None]


def test_sums_are_a_copy_and_reset_starts_again():
    curve = SigmaCurve(bins=2)
    losses = torch.tensor([4.0], requires_grad=True)
    curve.add(losses, torch.tensor([0.2]))
    sums = curve.sums()
    assert not sums.requires_grad
    sums.fill_(100.0)
    assert values_of(curve) == [4.0, None]
    curve.reset()
    assert values_of(curve) == [None, None]


def test_low_precision_losses_are_summed_in_fp64():
    curve = SigmaCurve(bins=1)
    for _ in range(3000):  # in bf16 the sum would stop at 256
        curve.add(torch.ones(1, dtype=torch.bfloat16), torch.tensor([0.5]))
    assert curve.sums().tolist() == [3000.0, 3000.0]


def test_a_curve_needs_a_bin():
    with pytest.raises(ValueError, match="at least 1 bin"):
        SigmaCurve(bins=0)
