"""fp32 to bf16, stochastically rounded: reads each value once, writes its 16 bits once, draws in registers.

The random bits are those of `megatron_nucleus.ops.stochastic_round`, which says what they are a function of.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PAIRS, WARPS = (
    1024,
    8,
)  # values that share a hash, of one program: 8 values per thread (own choice, not tuned)


@triton.jit(do_not_specialize=["start", "odd", "before", "after"])
def round_kernel(values, bits, N, start, odd, before, after, PAIRS: tl.constexpr):
    """bits[n] = upper 16 bits of (values[n] + random bits), whose pair is start + (n + odd) // 2."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    x = (start + pair).to(tl.uint32) ^ before.to(tl.uint32)
    for mixing in tl.static_range(2):
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        x = x ^ (x >> 16)
        if mixing == 0:
            x += after.to(tl.uint32)
    side = tl.arange(0, 2)
    random = (x[:, None] >> (16 * side)[None, :].to(tl.uint32)) & 0xFFFF
    n = pair[:, None] * 2 + side[None, :] - odd
    inside = (n >= 0) & (n < N)
    value = tl.load(values + n, mask=inside, other=0.0)
    # The reference takes its random bits as signed numbers and adds 2^15: the same as turning their upper bit.
    total = value.to(tl.uint32, bitcast=True) + (random ^ 0x8000)
    rounded = tl.where(value != value, 0x7FC0, total >> 16)  # the carry may run over a NaN's bits
    tl.store(bits + n, rounded.to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)


def launch(values: Tensor, bits: Tensor, position: int, before: int, after: int) -> None:
    """Fill ``bits``, int16 [N], from ``values``, fp32 [N]; both contiguous, not empty.

    Args:
        position: of the first value, whose pairs all have the same upper 32 bits.
        before, after: what the hash takes in, signed 32-bit numbers.
    """
    N, odd = values.numel(), position % 2
    start = (position // 2 + (1 << 31)) % (1 << 32) - (1 << 31)
    grid = (triton.cdiv(N + odd, 2 * PAIRS),)
    round_kernel[grid](values, bits, N, start, odd, before, after, PAIRS=PAIRS, num_warps=WARPS)
