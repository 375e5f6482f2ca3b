"""Initial weights of a from-scratch run. The paper does not give them; every choice here is ours.

| weights | start at | why |
|---|---|---|
| modulation, out_modulation, image_out | 0 | every block is the identity and the output 0 at step 0 (adaLN-zero) |
| router | normal, std 0.1/sqrt(2D) | near-uniform scores, yet no ties: top-C must choose by something |
| experts, per expert | normal, std 1/sqrt(fan_in) | upstream leaves them uninitialised (torch.empty) |
| every other matrix | normal, std 1/sqrt(fan_in) | unit variance in, unit variance out |
| biases / norm weights | 0 / 1 | |

Attention and FFN output matrices are *not* zero: behind a gate of zero neither they nor the gate would ever move.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron_nucleus.utils import rng

ZERO = ("modulation.", "out_modulation.", "image_out.")
ROUTER_GAIN = 0.1


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Fill every parameter in place; each one's values depend on (seed, its name, its shape) alone."""
    for name, parameter in model.named_parameters():
        init_rows(name, parameter, seed, parameter.shape, 0)


@torch.no_grad()
def init_rows(name: str, out: Tensor, seed: int, shape: torch.Size, first_row: int) -> None:
    """Fill rows ``first_row ...`` of one parameter according to the table above, on whatever device it is.

    Args:
        out: [n, ...], rows of the parameter along its first axis; none where n is 0.
        shape: of the whole parameter. Every expert has a stream of its own, so that a rank draws only the
            experts it holds; of other matrices the whole is drawn and the rows kept.
    """
    last_row = first_row + out.shape[0]
    if name.endswith("norm.weight"):
        out.fill_(1.0)
    elif name.endswith(".bias") or any(part in f"{name}" for part in ZERO):
        out.zero_()
    elif len(shape) == 3:
        for row, expert in zip(out, range(first_row, last_row), strict=True):
            values = torch.randn(shape[1:], generator=rng.generator(seed, expert, f"init:{name}"))
            row.copy_(values.mul_(1.0 / math.sqrt(shape[1])))
    elif out.shape[0]:
        gain = ROUTER_GAIN if name.endswith("router.weight") else 1.0
        values = torch.randn(shape, generator=rng.generator(seed, 0, f"init:{name}"))
        out.copy_(values[first_row:last_row].mul_(gain / math.sqrt(shape[1])))
