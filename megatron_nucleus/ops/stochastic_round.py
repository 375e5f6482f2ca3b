"""Stochastic rounding of fp32 to bf16: up or down at random, so that the mean of the result is the value.

A bf16 weight has 8 significant bits. An update below half of their spacing, 0.2 % to 0.4 % of the weight, is lost in
rounding to nearest, every time alike; rounded stochastically it arrives on average (Gupta et al., arXiv 1502.02551).

Random bits are a pure function of (key, position), the same on every device, in any order and cut into any pieces:
position n takes half n % 2 of the 32-bit hash of n // 2. The hash is twice the integer mixer ``lowbias32`` (Chris
Wellons, "hash-prospector"), a half of the key before each.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

TOLERANCES = {torch.float64: (0.0, 0.0), torch.float32: (0.0, 0.0)}  # bit patterns are equal or wrong
# Values rounded at once, which bounds the temporary memory (12 bytes a value): in the cache of a CPU, and on a GPU
# enough to hide the launches.
PIECE_VALUES = {"cpu": 1 << 16, "cuda": 1 << 25}
_NAN = 0x7FC0  # bits of bf16's quiet NaN
_SPAN = 1 << 33  # positions whose pairs have the same upper 32 bits
_HIGH = 0x9E3779B9  # 2^32 / golden ratio: spreads those bits over the second half of the key
# Multipliers of lowbias32 as signed 32-bit numbers: torch multiplies those modulo 2^32.
_MULTIPLY = (0x7FEB352D, 0x846CA68B - (1 << 32))
_SHIFTS = (16, 15, 16)


def stochastic_round(values: Tensor, key: int, first: int = 0, out: Tensor | None = None) -> Tensor:
    """Round to one of the two neighbours in bf16, to the upper one with the probability of the value's place between.

    Exactly representable values stay as they are, infinities too; NaN stays NaN. Values beyond the largest finite
    bf16 number may become infinite, as they do in rounding to nearest.

    Args:
        values: [N], fp32 (other floating dtypes are converted to it).
        key: 63-bit number that names the draw (`utils.rng.key64`).
        first: position of ``values[0]``, 0 or more; the others follow.
        out: int16 [N], contiguous, to write into; None = a new tensor.

    Returns:
        Bit patterns of the bf16 results, int16 [N]; ``.view(torch.bfloat16)`` reads them.

    Raises:
        ValueError: ``values`` or ``out`` is not one row of numbers, or ``first`` is negative.
    """
    check(values, first, out)
    out = values.new_empty(values.shape, dtype=torch.int16) if out is None else out
    piece = PIECE_VALUES["cpu" if values.device.type == "cpu" else "cuda"]
    for low in range(0, values.numel(), piece):
        part, target = values[low : low + piece].float().contiguous(), out[low : low + piece]
        # Random bits below the 16 that are kept carry into them as often as the part cut off says.
        total = part.view(torch.int32) + random_bits(key, first + low, part.numel(), part.device)
        total.add_(1 << 15)  # the random bits are signed
        target.copy_(total.view(torch.int16)[1::2])  # the upper halves: torch is little-endian
        target.masked_fill_(part.isnan(), _NAN)  # the carry may run over a NaN's bits
    return out


def check(values: Tensor, first: int, out: Tensor | None) -> None:
    """Raise ValueError unless the arguments are as `stochastic_round` says."""
    if values.ndim != 1 or not values.is_floating_point():
        raise ValueError(
            f"stochastic_round: values must be [N], floating, got {list(values.shape)} {values.dtype}"
        )
    if first < 0:
        raise ValueError(f"stochastic_round: first must be 0 or more, got {first}")
    if out is not None and (out.dtype, out.shape) != (torch.int16, values.shape):
        raise ValueError(
            f"stochastic_round: out must be int16 {list(values.shape)}, got {out.dtype} {list(out.shape)}"
        )


def random_bits(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """Uniform 16-bit numbers of the positions ``first`` to ``first + count``, int16 (signed)."""
    pieces = []
    for low, high in spans(first, count):
        before, after = halves(key, low)
        start = low // 2
        pairs = torch.arange((high + 1) // 2 - start, dtype=torch.int32, device=device)
        pairs.add_(_signed(start)).bitwise_xor_(before)
        bits = _mix(_mix(pairs).add_(after))
        pieces.append(bits.view(torch.int16)[low % 2 :][: high - low])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def spans(first: int, count: int) -> list[tuple[int, int]]:
    """The positions ``first`` to ``first + count``, cut where the upper bits of `halves` change."""
    cuts = range((first // _SPAN + 1) * _SPAN, first + count, _SPAN)
    edges = [first, *cuts, first + count]
    return list(itertools.pairwise(edges))


def halves(key: int, position: int) -> tuple[int, int]:
    """What the hash takes in before its first and its second mixing, signed 32-bit numbers."""
    return _signed(key), _signed((key >> 32) + (position // _SPAN) * _HIGH)


def _signed(number: int) -> int:
    """Its lower 32 bits as a signed number."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def _mix(x: Tensor) -> Tensor:
    """lowbias32, in place; int32."""
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLY, None), strict=True):
        # A signed shift copies the sign; the mask puts zeros in its place.
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << 32 - shift) - 1))
        if multiplier is not None:
            x.mul_(multiplier)
    return x
