"""training/ablation/statistics.py against numpy, and the words it finds."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_nucleus.training.ablation.statistics import (
    NO_DIFFERENCE,
    T_975,
    Difference,
    paired_difference,
    spread,
    verdict,
)


def test_spread_is_numpys():
    values = [0.31, 0.29, 0.35, 0.30]
    found = spread(values)
    assert found == (4, pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
    assert spread([0.5]) == (1, 0.5, None)
    assert spread([]) is None


def test_paired_difference_takes_common_seeds_alone():
    rng = np.random.default_rng(0)
    base = dict(enumerate(rng.normal(size=6)))
    arm = {seed: value + rng.normal(0.2, 0.1) for seed, value in base.items() if seed != 3} | {9: 100.0}
    found = paired_difference(base, arm)
    differences = np.array([arm[s] - base[s] for s in (0, 1, 2, 4, 5)])
    error = differences.std(ddof=1) / np.sqrt(5)
    assert found.n == 5
    assert found.mean == pytest.approx(differences.mean())
    assert found.standard_error == pytest.approx(error)
    assert found.half_width_95 == pytest.approx(2.776 * error)
    assert paired_difference({1: 0.0}, {2: 0.0}) is None
    assert paired_difference({1: 1.0}, {1: 3.0}) == (1, 2.0, None, None)


def test_quantiles_of_t():
    """The distribution function at the table's values, by numerical integration of Student's density."""
    x = np.linspace(0, 1, 2_000_001)[1:-1]
    for degrees, quantile in enumerate(T_975, start=1):
        t = quantile * x
        weight = (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
        whole = np.tan(np.pi / 2 * x)  # 0 to infinity
        total = (
            (1 + whole**2 / degrees) ** (-(degrees + 1) / 2) * np.pi / 2 / np.cos(np.pi / 2 * x) ** 2
        ).mean()
        assert 0.5 + 0.5 * weight.mean() * quantile / total == pytest.approx(0.975, abs=2e-5)
        if degrees == 10:
            break


@pytest.mark.parametrize(
    ("mean", "error", "half", "lower", "words"),
    [
        (-0.019, 0.01, 0.043, True, NO_DIFFERENCE),
        (-0.05, 0.01, 0.043, True, "better"),
        (0.05, 0.01, 0.043, True, "worse"),
        (0.05, 0.01, 0.043, False, "better"),
        (-0.03, 0.01, 0.043, False, "worse by more than 2 standard errors, but within the 95 % interval of 3 seeds"),
        (0.0, 0.0, 0.0, True, NO_DIFFERENCE),
        (0.1, None, None, True, "too few seeds"),
    ],
)  # fmt: skip
def test_verdicts(mean, error, half, lower, words):
    assert verdict(Difference(3, mean, error, half), lower) == words
    assert verdict(None, lower) == "too few seeds"
