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
        init_parameter(name, parameter, seed)


@torch.no_grad()
def init_parameter(name: str, parameter: Tensor, seed: int) -> None:
    """Fill one parameter according to the table above, on whatever device it is."""
    if name.endswith("norm.weight"):
        parameter.fill_(1.0)
    elif name.endswith(".bias") or any(part in f"{name}" for part in ZERO):
        parameter.zero_()
    else:
        # Linear weights are (out, in), packed experts (E, in, out): fan_in is the same axis counted from the back.
        fan_in = parameter.shape[1]
        gain = ROUTER_GAIN if name.endswith("router.weight") else 1.0
        values = torch.randn(parameter.shape, generator=rng.generator(seed, 0, f"init:{name}"))
        parameter.copy_(values.mul_(gain / math.sqrt(fan_in)))
