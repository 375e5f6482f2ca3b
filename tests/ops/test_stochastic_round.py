"""Stochastic rounding: its random bits against a plain loop, the mean, what must stay as it is."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_nucleus.ops.stochastic_round import random_bits, stochastic_round

CPU = torch.device("cpu")
KEY = 0x0123456789ABCDEF
FAR = 1 << 33  # positions from which the upper bits of a pair change


def mixed(x: int) -> int:
    """lowbias32 on Python's integers."""
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def bits_at(key: int, position: int) -> int:
    high, low = divmod(position // 2, 1 << 32)
    hashed = mixed((mixed(low ^ key % 2**32) + (key >> 32) + high * 0x9E3779B9) % 2**32)
    return hashed >> 16 * (position % 2) & 0xFFFF


def rounded(values: torch.Tensor, key: int = KEY, first: int = 0) -> torch.Tensor:
    return stochastic_round(values, key, first).view(torch.bfloat16)


@pytest.mark.parametrize("key", [0, KEY, (1 << 63) - 1])
@pytest.mark.parametrize("first", [0, 1, 6, FAR - 5, 3 * FAR - 4])
def test_random_bits_equal_a_plain_loop(key, first):
    got = random_bits(key, first, 12, CPU)
    assert [int(n) % 2**16 for n in got] == [bits_at(key, first + n) for n in range(12)]


def test_random_bits_are_uniform_and_unrelated():
    count = 1 << 20
    draws = [random_bits(key, 0, count, CPU).double() + 2**15 for key in (KEY, KEY + 1, KEY + (1 << 32))]
    for draw in draws:
        tallies = torch.bincount(draw.long() >> 6, minlength=1024).double()
        chi2 = ((tallies - 1024).square() / 1024).sum()
        assert abs(chi2 - 1023) < 4 * math.sqrt(2 * 1023)
    pairs = [
        (draws[0], draws[1]),
        (draws[0], draws[2]),
        *((d[:-lag], d[lag:]) for d in draws for lag in (1, 2)),
    ]
    for a, b in pairs:
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / math.sqrt(count)


@pytest.mark.parametrize("place", [0.01, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_is_the_value(place, sign):
    spacing, count = 2**-7, 1 << 18
    value = torch.tensor(sign * (1 + place * spacing))
    got = rounded(value.expand(count).contiguous()).double()
    assert set(got.unique().tolist()) == {sign * 1.0, sign * (1 + spacing)}
    sigma = spacing * math.sqrt(place * (1 - place) / count)
    assert abs(got.mean() - value.double()) < 3 * sigma


def test_representable_values_infinities_and_nan_stay():
    exact = torch.randn(1000).to(torch.bfloat16)
    assert torch.equal(rounded(exact.float()), exact)
    odd = torch.tensor([math.inf, -math.inf, 0.0, -0.0, 3.3895313892515355e38, 1e-45])
    got = rounded(odd.repeat(100)).view(100, 6)
    assert torch.equal(got[:, :5].float(), odd[:5].expand(100, 5))
    assert torch.equal(got[:, 2:4].signbit(), torch.tensor([False, True]).expand(100, 2))
    assert (got[:, 5].abs() <= 1e-40).all()
    # Patterns that a carry would turn into zero: GPUs write NaN as 0x7FFFFFFF.
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert rounded(nans.repeat(100)).isnan().all()


def test_cut_in_any_place_the_bits_are_the_same(monkeypatch):
    values = torch.randn(1001)
    whole = rounded(values, first=3)
    parts = [rounded(values[low : low + 77], first=3 + low) for low in range(0, 1001, 77)]
    assert torch.equal(torch.cat(parts), whole)
    monkeypatch.setitem(stochastic_round.__globals__["PIECE_VALUES"], "cpu", 10)
    assert torch.equal(rounded(values, first=3), whole)
    assert not torch.equal(rounded(values, key=KEY + 1, first=3), whole)


def test_writes_into_what_it_is_given():
    values, out = torch.randn(10), torch.zeros(10, dtype=torch.int16)
    assert stochastic_round(values, KEY, 0, out) is out
    assert torch.equal(out, stochastic_round(values, KEY))


@pytest.mark.parametrize(
    ("values", "first", "out", "message"),
    [
        (torch.zeros(2, 2), 0, None, r"must be \[N\], floating, got \[2, 2\]"),
        (torch.zeros(2, dtype=torch.int32), 0, None, r"got \[2\] torch.int32"),
        (torch.zeros(2), -1, None, "first must be 0 or more, got -1"),
        (torch.zeros(2), 0, torch.zeros(2), r"out must be int16 \[2\], got torch.float32 \[2\]"),
        (torch.zeros(2), 0, torch.zeros(3, dtype=torch.int16), r"got torch.int16 \[3\]"),
    ],
)
def test_bad_arguments_are_refused(values, first, out, message):
    with pytest.raises(ValueError, match=message):
        stochastic_round(values, KEY, first, out)
