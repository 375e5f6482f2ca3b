"""Keyed permutations of [0, count) for any count, one position at a time and without an array of that length.

A 4-round Feistel network on the next power of two, walked until it lands inside (cycle walking): a bijection.
"""

from __future__ import annotations

import numpy as np

from megatron_nucleus.utils.rng import key64

ROUNDS = 4


def permute(positions: np.ndarray, count: int, key: int) -> np.ndarray:
    """Image of ``positions`` (int64, in [0, count)) under the keyed permutation of [0, count)."""
    if count == 1:
        return np.zeros_like(positions)
    bits = max(2, (count - 1).bit_length())
    keys = [np.uint64(key64(key, i, "feistel")) for i in range(ROUNDS)]
    out = _feistel(positions.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(out >= count)
    while len(outside):
        out[outside] = _feistel(out[outside], bits, keys)
        outside = outside[out[outside] >= count]
    return out.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, keys: list[np.uint64]) -> np.ndarray:
    """Unbalanced Feistel network on ``bits`` bits: the halves are masked by each other in turn."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for number, key in enumerate(keys):
        if number % 2 == 0:
            high = high ^ (_mix(low ^ key) & high_mask)
        else:
            low = low ^ (_mix(high ^ key) & low_mask)
    return (high << low_bits) | low


def _mix(values: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
