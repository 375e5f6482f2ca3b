"""Routed experts stored in 8 bits for sampling: nine tenths of the weights in half the memory of bfloat16.

Each output channel of each expert has a scale of its own, a power of two, so that bfloat16 holds the stored values
exactly and the one error is the rounding to 8 bits when the model is loaded (at most 1/16 of a weight, `ops/fp8.py`).
A few experts at a time are unpacked and multiplied as ever: any GPU can do it, and no matrix product is in FP8.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_nucleus.core.kernels import Kernels
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.moe.dispatcher import LocalDispatcher
from megatron_nucleus.core.moe.experts import Experts
from megatron_nucleus.ops import fp8

CHOICES = ("stored", "fp8")
# Unpacked weights that exist at once; eight experts of the 17B model are 132 MB. Own choice.
UNPACKED_BYTES = 1 << 27
_COLUMN = (0, 1)  # one scale per output channel of an [in, out] matrix


class Float8Experts(nn.Module):
    """`Experts` that can only compute forward.

    gate_up [E, D, 2F] and down [E, F, D] as the bits of e4m3 in uint8, so that converting the module to another dtype
    leaves them alone; ``*_scale`` [E, 1, 2F] and [E, 1, D] in fp32. No parameters.
    """

    def __init__(self, experts: Experts, device: torch.device):
        super().__init__()
        self.kernels: Kernels = experts.kernels
        for name in ("gate_up", "down"):
            values, scale = _quantise(getattr(experts, name).detach(), device)
            self.register_buffer(name, values)
            self.register_buffer(f"{name}_scale", scale)

    @torch.no_grad()
    def forward(self, pieces: tuple[Tensor, ...], dispatcher: LocalDispatcher) -> tuple[Tensor, ...]:
        """As `Experts.forward`."""
        return tuple(dispatcher.give_back(self._compute(dispatcher.arrive(piece))) for piece in pieces)

    def weights(self, name: str, experts: slice, dtype: torch.dtype) -> Tensor:
        """``gate_up`` or ``down`` of some experts, unpacked."""
        values = getattr(self, name)[experts].view(fp8.E4M3)
        return values.to(dtype).mul_(getattr(self, f"{name}_scale")[experts].to(dtype))

    def _compute(self, rows_END: Tensor) -> Tensor:
        matrices = self.gate_up[0].numel() + self.down[0].numel()
        step = max(1, UNPACKED_BYTES // (matrices * rows_END.element_size()))
        parts = []
        for first in range(0, len(rows_END), step):
            part = slice(first, first + step)
            gate_up, down = (self.weights(name, part, rows_END.dtype) for name in ("gate_up", "down"))
            parts.append(self.kernels.expert_ffn(rows_END[part], gate_up, down))
        return torch.cat(parts)


def _quantise(weights: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Expert by expert, so that fp32 copies stay small. Returns uint8 bits and scales [E, 1, columns]."""
    values = torch.empty(weights.shape, dtype=torch.uint8, device=device)
    scales = torch.empty(len(weights), 1, weights.shape[2], device=device)
    for matrix, value, scale in zip(weights, values, scales, strict=True):
        rounded, of_columns = fp8.quantise(matrix.to(device), _COLUMN)
        value.copy_(rounded.view(torch.uint8))
        scale.copy_(of_columns)
    return values, scales


def quantise_experts(model: NucleusTransformer, device: torch.device | None = None) -> NucleusTransformer:
    """Replace the routed experts of ``model``, in place and layer by layer, by 8-bit ones. For sampling alone.

    Args:
        device: where the 8-bit experts go; None = where they are. The rest of the model stays where it is.
    """
    for block in model.blocks:
        if block.is_moe:
            experts = block.moe.experts
            block.moe.experts = Float8Experts(experts, device or experts.gate_up.device)
    return model


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)
