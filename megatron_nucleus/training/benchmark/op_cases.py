"""Every operation as the model calls it: its arguments, and the least work that it can be done with.

A cost counts every value that has to come in or go out once, at the width it is stored in, and nothing that stays
inside of an operation (an expert's hidden rows, attention's scores): what a perfect kernel moves. FLOPs of matrix
products are exact, a multiply-add is two; those of elementwise work are nominal, one per operator in the formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_nucleus.core.models.presets import PRESETS
from megatron_nucleus.core.moe.router import capacity

EPS = 1e-6
INDEX_BYTES = 8  # int64
ROTATION_BYTES = 8  # complex64
NS_STEPS = 5  # of Newton-Schulz, the default of training


class Dims(NamedTuple):
    """Sizes of one layer and its batch: the legend of `types.py`, T = S + L."""

    B: int
    S: int
    L: int
    D: int
    E: int
    F: int
    C: int
    H: int
    G: int
    K: int
    U: int

    @property
    def T(self) -> int:
        """Keys of an image."""
        return self.S + self.L

    @property
    def rows(self) -> int:
        """Rows of all experts."""
        return self.E * self.B * self.C


class Cost(NamedTuple):
    """FLOPs and bytes of one call. The backward pass's are None for an operation without gradients."""

    forward_flops: int
    forward_bytes: int
    backward_flops: int | None
    backward_bytes: int | None


class Case(NamedTuple):
    """arguments: (sizes, maker) -> what the operation is called with. cost: (sizes, bytes of a value) -> `Cost`."""

    arguments: Callable[[Dims, Maker], tuple]
    cost: Callable[[Dims, int], Cost]


class Maker:
    """Random tensors from a fixed seed; `__call__`'s want gradients."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype).requires_grad_()

    def index(self, d: Dims) -> Tensor:
        """[E*B*C]: every expert takes C distinct tokens of every image, expert-major."""
        order_EBC = torch.rand(d.E, d.B, d.S, generator=self.generator).argsort(-1)[..., : d.C]
        return (order_EBC + d.S * torch.arange(d.B).view(1, d.B, 1)).flatten().to(self.device)

    def rotation(self, d: Dims) -> Tensor:
        """[S, K/2] unit complex numbers."""
        angle = torch.rand(d.S, d.K // 2, generator=self.generator) * 2 * math.pi
        return torch.polar(torch.ones_like(angle), angle).to(self.device)

    def mask(self, d: Dims) -> Tensor:
        """[B, T]: image keys and at least a sixth of the text's count, padding stands at the end."""
        real = torch.randint(max(1, d.L // 6), d.L + 1, (d.B, 1), generator=self.generator)
        return (torch.arange(d.T)[None] < d.S + real).to(self.device)


def _gather(d: Dims, b: int) -> Cost:
    tokens, rows = d.B * d.S, d.rows
    read = min(tokens, rows) * d.D * b + rows * INDEX_BYTES  # a token that several experts take comes in once
    return Cost(0, read + rows * d.D * b, rows * d.D, rows * (d.D * b + INDEX_BYTES) + tokens * d.D * b)


def _combine(d: Dims, b: int) -> Cost:
    values, rows = d.B * d.S * d.D, d.rows
    row_bytes = rows * (d.D * b + b + INDEX_BYTES)  # row, weight, index
    # The base's gradient is the incoming one itself: nothing is written.
    return Cost(
        2 * rows * d.D,
        2 * values * b + row_bytes,
        3 * rows * d.D,
        values * b + row_bytes + rows * (d.D + 1) * b,
    )


def _layer_norm(d: Dims, b: int) -> Cost:
    """Out: modulated and plain tokens. Backward: tokens and both gradients in, two gradients out."""
    values, scales = d.B * d.S * d.D, d.B * d.D
    return Cost(
        7 * values,  # mean 1, variance 3, normalise 2, scale 1
        (3 * values + scales) * b,
        12 * values,
        (4 * values + 2 * scales) * b,
    )


def _gated_norm(d: Dims, b: int) -> Cost:
    """In: stream and branch; out: stream, modulated and plain. Backward: sum, branch and three gradients in."""
    values, scales = d.B * d.S * d.D, d.B * d.D
    return Cost(9 * values, (5 * values + 2 * scales) * b, 16 * values, (7 * values + 4 * scales) * b)


def _rms_norm(d: Dims, b: int) -> Cost:
    """Of the text features, [B, L, U]."""
    values = d.B * d.L * d.U
    return Cost(4 * values, (2 * values + d.U) * b, 9 * values, (3 * values + 2 * d.U) * b)


def _norm_rope(d: Dims, b: int) -> Cost:
    values, rotation = d.B * d.S * d.H * d.K, d.S * d.K // 2 * ROTATION_BYTES
    return Cost(
        7 * values, (2 * values + d.K) * b + rotation, 12 * values, (3 * values + 2 * d.K) * b + rotation
    )


def _swiglu(d: Dims, b: int) -> Cost:
    """Of the shared expert, [B, S, 2F] -> [B, S, F]."""
    values = d.B * d.S * d.F
    return Cost(5 * values, 3 * values * b, 10 * values, 5 * values * b)


def _attention(d: Dims, b: int) -> Cost:
    """Products alone: two forward, four backward (scores that are formed again are not counted). No pair is masked
    away, as the shapes are those of padded text."""
    product = 2 * d.B * d.H * d.S * d.T * d.K
    queries, keys = d.B * d.S * d.H * d.K, 2 * d.B * d.T * d.G * d.K
    mask = d.B * d.T
    return Cost(
        2 * product,
        (2 * queries + keys) * b + mask,
        4 * product,
        (4 * queries + 2 * keys) * b
        + mask,  # queries, output, two gradients; keys, values and their gradients
    )


def _expert_choice(d: Dims, b: int) -> Cost:
    logits, chosen = d.B * d.S * d.E, d.B * d.E * d.C
    return Cost(
        4 * logits,
        logits * b + chosen * (b + INDEX_BYTES),
        6 * logits,
        2 * logits * b + chosen * (b + INDEX_BYTES),
    )


def _expert_ffn(d: Dims, b: int) -> Cost:
    weights = 3 * d.E * d.D * d.F
    flops = 2 * d.rows * 3 * d.D * d.F
    return Cost(
        flops,
        (2 * d.rows * d.D + weights) * b,
        2 * flops,
        (3 * d.rows * d.D + 2 * weights) * b,
    )


def _orthogonalize(d: Dims, b: int) -> Cost:
    r, c = sorted((d.D, d.F))
    return Cost(d.E * NS_STEPS * (4 * r * r * c + 2 * r**3), 2 * d.E * r * c * b, None, None)


def _stochastic_round(d: Dims, b: int) -> Cost:
    values = d.E * d.D * d.F
    return Cost(values, values * (b + 2), None, None)  # a result has 2 bytes


def _weights(d: Dims) -> int:
    """Values of a layer's routed experts."""
    return 3 * d.E * d.D * d.F


def _square_sum(d: Dims, b: int) -> Cost:
    return Cost(2 * _weights(d), _weights(d) * b + 8, None, None)


def _scale(d: Dims, b: int) -> Cost:
    return Cost(_weights(d), 2 * _weights(d) * b + 4, None, None)


def _gradients(d: Dims, x: Maker) -> tuple[Tensor, Tensor]:
    return x(d.E, d.D, 2 * d.F).detach(), x(d.E, d.F, d.D).detach()


def _kv(d: Dims, x: Maker) -> tuple[Tensor, Tensor]:
    return x(d.B, d.T, d.G, d.K), x(d.B, d.T, d.G, d.K)


CASES: dict[str, Case] = {
    "moe_gather": Case(lambda d, x: (x(d.B * d.S, d.D), x.index(d)), _gather),
    "moe_combine": Case(lambda d, x: (x(d.B * d.S, d.D), x(d.rows, d.D), x(d.rows), x.index(d)), _combine),
    "modulated_layer_norm": Case(lambda d, x: (x(d.B, d.S, d.D), x(d.B, d.D), EPS, True), _layer_norm),
    "gated_residual_norm": Case(
        lambda d, x: (x(d.B, d.S, d.D), x(d.B, d.S, d.D), x(d.B, d.D), x(d.B, d.D), EPS, True), _gated_norm
    ),
    "rms_norm": Case(lambda d, x: (x(d.B, d.L, d.U), x(d.U), EPS), _rms_norm),
    "norm_rope": Case(lambda d, x: (x(d.B, d.S, d.H, d.K), x(d.K), x.rotation(d), EPS), _norm_rope),
    "swiglu": Case(lambda d, x: (x(d.B, d.S, 2 * d.F),), _swiglu),
    "attention": Case(lambda d, x: (x(d.B, d.S, d.H, d.K), *_kv(d, x), x.mask(d)), _attention),
    "expert_choice": Case(lambda d, x: (x(d.B, d.S, d.E), d.C, False, 2.5), _expert_choice),
    "expert_ffn": Case(
        lambda d, x: (x(d.E, d.B * d.C, d.D), x(d.E, d.D, 2 * d.F), x(d.E, d.F, d.D)), _expert_ffn
    ),
    "orthogonalize": Case(lambda d, x: (x(d.E, *sorted((d.D, d.F))).detach(), NS_STEPS), _orthogonalize),
    "stochastic_round": Case(lambda d, x: (x(d.E * d.D * d.F).detach(), 1, 0), _stochastic_round),
    "square_sum": Case(_gradients, _square_sum),
    # -1, so that values that are timed often neither vanish nor grow.
    "scale_": Case(lambda d, x: (torch.tensor(-1.0, device=x.device), *_gradients(d, x)), _scale),
}

# name: (preset, capacity factor, images, image tokens, text tokens). A layer of the published model at 1024 px;
# the factor is that of its deeper layers. Batch sizes and text lengths are our own choice.
SHAPES: dict[str, tuple[str, float, int, int, int]] = {
    "demo": ("demo", 2.0, 64, 64, 24),
    "17b-layer": ("nucleus_image_17b", 2.0, 1, 4096, 256),
}


def dims(name: str, images: int | None = None, tokens: int | None = None) -> Dims:
    """Sizes of ``SHAPES[name]``, its images and image tokens replaced where given."""
    preset, factor, default_images, default_tokens, L = SHAPES[name]
    shape = PRESETS[preset]
    B, S, E = images or default_images, tokens or default_tokens, shape.num_experts
    C = capacity(factor, S, E)
    heads = (shape.num_attention_heads, shape.num_key_value_heads, shape.attention_head_dim)
    return Dims(B, S, L, shape.width, E, shape.moe_intermediate_dim, C, *heads, shape.text_dim)
