"""Inputs of every operation: ordinary, odd, smallest, empty and non-contiguous ones, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


class Inputs:
    """Random tensors of one dtype and device; those made by `__call__` want gradients."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return values.to(self.device, self.dtype).requires_grad_()

    def plain(self, *shape: int) -> Tensor:
        """The same without a gradient."""
        return self(*shape).detach()

    def spread(self, *shape: int) -> Tensor:
        """The same, as a view with a gap between neighbours of every dimension."""
        wide = self(*(2 * n for n in shape)).detach()
        return wide[tuple(slice(None, None, 2) for _ in shape)].requires_grad_()

    def index(self, high: int, count: int) -> Tensor:
        return torch.randint(0, high, (count,), generator=self.generator).to(self.device)

    def rotation(self, *shape: int) -> Tensor:
        """Unit complex numbers, complex64."""
        angle = torch.rand(*shape, generator=self.generator, dtype=torch.float32) * 6.28
        return torch.polar(torch.ones_like(angle), angle).to(self.device)

    def flat(self, *shape: int) -> Tensor:
        """Matrices whose singular values lie within a factor of two; without a gradient.

        The first Newton-Schulz steps multiply the rounding errors of small singular values by hundreds.
        """
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        u, s, vt = torch.linalg.svd(values, full_matrices=False)
        return (u * s.clamp(min=0.5 * s.amax(-1, keepdim=True)).unsqueeze(-2) @ vt).to(
            self.device, self.dtype
        )

    def extremes(self) -> Tensor:
        """NaN, infinity, zero and a number that half precision does not hold."""
        return torch.tensor([torch.nan, torch.inf, 0.0, 1e-30]).to(self.device, self.dtype)

    def first(self, *shape: int) -> Tensor:
        """A mask of the keys that stand first: at least one; in the first row all of them."""
        counts = torch.randint(1, shape[-1] + 1, shape[:-1], generator=self.generator)
        counts[0] = shape[-1]
        return (torch.arange(shape[-1]) < counts.unsqueeze(-1)).to(self.device)

    def mask(self, *shape: int) -> Tensor:
        """True where a key counts; the first key always does."""
        mask = torch.rand(*shape, generator=self.generator) < 0.6
        mask[..., 0] = True
        return mask.to(self.device)


CASES = {
    "moe_gather": {
        "repeats": lambda x: (x(10, 16), x.index(10, 33)),
        "odd": lambda x: (x(7, 13), x.index(7, 5)),
        "wide": lambda x: (x(5, 300), x.index(5, 9)),
        "one": lambda x: (x(1, 1), x.index(1, 1)),
        "no rows": lambda x: (x(3, 4), x.index(1, 0)),
        "spread": lambda x: (x.spread(6, 5), x.index(6, 8)),
    },
    "moe_combine": {
        "repeats": lambda x: (x(10, 16), x(33, 16), x(33), x.index(10, 33)),
        "odd": lambda x: (x(7, 13), x(5, 13), x(5), x.index(7, 5)),
        "wide": lambda x: (x(5, 300), x(9, 300), x(9), x.index(5, 9)),
        "one": lambda x: (x(1, 1), x(1, 1), x(1), x.index(1, 1)),
        "no rows": lambda x: (x(3, 4), x(0, 4), x(0), x.index(1, 0)),
        "no tokens": lambda x: (x(0, 4), x(0, 4), x(0), x.index(1, 0)),
        "all on one token": lambda x: (x(4, 8), x(20, 8), x(20), 2 + 0 * x.index(4, 20)),
        "spread": lambda x: (x.spread(6, 5), x.spread(8, 5), x.spread(8), x.index(6, 8)),
    },
    "modulated_layer_norm": {
        "plain": lambda x: (x(2, 5, 16), x(2, 16), 1e-6, True),
        "modulated only": lambda x: (x(2, 5, 16), x(2, 16), 1e-6, False),
        "odd": lambda x: (x(3, 67, 33), x(3, 33), 1e-6, True),
        "wide": lambda x: (x(1, 3, 700), x(1, 700), 1e-5, True),
        "no images": lambda x: (x(0, 5, 16), x(0, 16), 1e-6, True),
        "no tokens": lambda x: (x(2, 0, 16), x(2, 16), 1e-6, True),
        "spread": lambda x: (x.spread(2, 3, 8), x.spread(2, 8), 1e-6, True),
    },
    "gated_residual_norm": {
        "plain": lambda x: (x(2, 5, 16), x(2, 5, 16), x(2, 16), x(2, 16), 1e-6, True),
        "modulated only": lambda x: (x(2, 5, 16), x(2, 5, 16), x(2, 16), x(2, 16), 1e-6, False),
        "odd": lambda x: (x(3, 67, 33), x(3, 67, 33), x(3, 33), x(3, 33), 1e-6, True),
        "wide": lambda x: (x(1, 3, 700), x(1, 3, 700), x(1, 700), x(1, 700), 1e-5, True),
        "no images": lambda x: (x(0, 5, 16), x(0, 5, 16), x(0, 16), x(0, 16), 1e-6, True),
        "no tokens": lambda x: (x(2, 0, 16), x(2, 0, 16), x(2, 16), x(2, 16), 1e-6, True),
        "spread": lambda x: (
            x.spread(2, 3, 8),
            x.spread(2, 3, 8),
            x.spread(2, 8),
            x.spread(2, 8),
            1e-6,
            True,
        ),
    },
    "rms_norm": {
        "heads": lambda x: (x(2, 5, 4, 32), x(32), 1e-6),
        "odd": lambda x: (x(3, 7, 13), x(13), 1e-6),
        "many rows": lambda x: (x(1100, 8), x(8), 1e-6),
        "wide": lambda x: (x(2, 700), x(700), 1e-5),
        "empty": lambda x: (x(0, 4, 8), x(8), 1e-6),
        "spread": lambda x: (x.spread(3, 4, 8), x.spread(8), 1e-6),
    },
    "norm_rope": {
        "heads": lambda x: (x(2, 5, 4, 32), x(32), x.rotation(5, 16), 1e-6),
        "odd": lambda x: (x(3, 7, 3, 10), x(10), x.rotation(7, 5), 1e-6),
        "one pair": lambda x: (x(1, 3, 2, 2), x(2), x.rotation(3, 1), 1e-2),
        "many rows": lambda x: (x(2, 130, 5, 8), x(8), x.rotation(130, 4), 1e-6),
        "wide": lambda x: (x(1, 2, 1, 700), x(700), x.rotation(2, 350), 1e-5),
        "empty": lambda x: (x(0, 4, 2, 8), x(8), x.rotation(4, 4), 1e-6),
        "spread": lambda x: (x.spread(3, 4, 2, 8), x.spread(8), x.rotation(4, 4), 1e-6),
    },
    "swiglu": {
        "even": lambda x: (x(4, 6, 32),),
        "odd": lambda x: (x(5, 34),),
        "one": lambda x: (x(1, 2),),
        "empty": lambda x: (x(0, 3, 8),),
        "spread": lambda x: (x.spread(3, 4, 6),),
    },
    "attention": {
        "grouped": lambda x: (x(2, 9, 4, 8), x(2, 14, 2, 8), x(2, 14, 2, 8), x.first(2, 14)),
        "heads of 16": lambda x: (x(3, 17, 4, 16), x(3, 21, 2, 16), x(3, 21, 2, 16), x.first(3, 21)),
        "no mask": lambda x: (x(2, 9, 4, 8), x(2, 14, 2, 8), x(2, 14, 2, 8), None),
        "not grouped": lambda x: (x(2, 3, 3, 5), x(2, 7, 3, 5), x(2, 7, 3, 5), x.first(2, 7)),
        "one kv head": lambda x: (x(1, 5, 4, 8), x(1, 6, 1, 8), x(1, 6, 1, 8), x.first(3, 6)[1:2]),
        "spread": lambda x: (x.spread(2, 3, 4, 8), x.spread(2, 5, 2, 8), x.spread(2, 5, 2, 8), x.first(2, 5)),
    },
    "expert_choice": {
        "softmax": lambda x: (x(3, 16, 4), 8, False, 2.5),
        "sigmoid": lambda x: (x(3, 16, 4), 8, True, 1.0),
        "one token each": lambda x: (x(2, 5, 8), 1, False, 2.5),
        "all tokens": lambda x: (x(2, 5, 3), 5, False, 2.5),
        "one expert": lambda x: (x(2, 5, 1), 3, True, 2.5),
        "no images": lambda x: (x(0, 5, 3), 2, False, 2.5),
        "spread": lambda x: (x.spread(2, 6, 4), 3, False, 2.5),
    },
    "orthogonalize": {
        "wide": lambda x: (x.flat(3, 8, 24), 5),
        "square": lambda x: (x.flat(2, 16, 16), 5),
        "odd": lambda x: (x.flat(2, 19, 33), 3),
        "one": lambda x: (x.flat(1, 1, 1), 4),
        "zeros": lambda x: (0 * x.flat(2, 4, 8), 5),
        "no matrices": lambda x: (x.flat(0, 4, 8), 5),
        "spread": lambda x: (x.flat(2, 8, 12).mT.contiguous().mT, 5),
    },
    "stochastic_round": {  # values, key, position of the first
        "several programs": lambda x: (x(5000).detach(), 0x0123456789ABCDEF, 0),
        "odd": lambda x: (x(33).detach(), 5, 7),
        "far": lambda x: (x(40).detach(), (1 << 63) - 1, (1 << 33) - 11),
        "extremes": lambda x: (x(4).detach() * x.extremes(), 1, 1),
        "one": lambda x: (x(1).detach(), 0, 1),
        "none": lambda x: (x(0).detach(), 0, 0),
        "spread": lambda x: (x.spread(9).detach(), 3, 2),
    },
    "square_sum": {
        "several": lambda x: (x.plain(5, 7), x.plain(3), x.plain(1, 2, 3)),
        "one": lambda x: (x.plain(70_000),),
        "some empty": lambda x: (x.plain(0), x.plain(4), x.plain(2, 0)),
        "scalar": lambda x: (x.plain(1).squeeze(), x.plain(2)),
        "spread": lambda x: (x.spread(3, 4).detach(), x.plain(5).mul(1e3)),
    },
    "scale_": {
        "smaller": lambda x: (torch.tensor(0.3, device=x.device), x.plain(5, 7), x.plain(3)),
        "one": lambda x: (torch.tensor(1.0, device=x.device), x.plain(5)),
        "zero": lambda x: (torch.tensor(0.0, device=x.device), x.plain(5), x.plain(0)),
    },
    "expert_ffn": {
        "even": lambda x: (x(3, 8, 16), x(3, 16, 24), x(3, 12, 16)),
        "odd": lambda x: (x(2, 5, 7), x(2, 7, 6), x(2, 3, 7)),
        "several tiles": lambda x: (x(1, 130, 70), x(1, 70, 2 * 150), x(1, 150, 5)),
        "no rows": lambda x: (x(2, 0, 8), x(2, 8, 8), x(2, 4, 8)),
        "spread": lambda x: (x.spread(2, 3, 8), x.spread(2, 8, 8), x.spread(2, 4, 8)),
    },
}


def outputs_and_gradients(function, args: tuple, grads: list[Tensor] | None = None) -> tuple[list, list]:
    """Differentiable outputs, and the gradients of all inputs that want them.

    grads: gradients of the outputs; None = random ones from a fixed seed.
    """
    result = function(*args)
    outputs = [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]
    smooth = [t for t in outputs if t.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    if grads is None:
        grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in smooth]
    wanted = [t for t in args if isinstance(t, Tensor) and t.requires_grad]
    if not wanted:
        return outputs, []
    return outputs, list(
        torch.autograd.grad(smooth, wanted, [g.to(t) for g, t in zip(grads, smooth, strict=True)])
    )
