"""Operations in CUDA (csrc/cuda), for a GPU of SM80 or newer. This project has run them on a CPU only, emulated.

So ``auto`` does not choose them; `tools/bench_ops.py` on a GPU says whether they earn their place.
"""

from __future__ import annotations

import torch
from torch import Tensor

import megatron_nucleus._C_cuda  # noqa: F401  registers torch.ops.megatron_nucleus.*
from megatron_nucleus.backends import extension  # schemas and shapes of what both libraries serve
from megatron_nucleus.ops.registry import Request

_ops = torch.ops.megatron_nucleus
MAX_EXPERTS = 256  # csrc/cuda/expert_choice.cuh: a lane of a warp keeps its experts' scores in registers


def why_unavailable(device_type: str) -> str | None:
    """The registry's probe: a GPU that the library has code for."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU and a CUDA build of torch"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs an SM80 GPU or newer"
    return None


def why_unfit(request: Request) -> str | None:
    """The registry's check of a model."""
    if request.op == "expert_choice" and request.sizes is not None and request.sizes.experts > MAX_EXPERTS:
        return f"takes up to {MAX_EXPERTS} experts, the model has {request.sizes.experts}"
    return None


def expert_choice(
    logits_BSE: Tensor, capacity: int, use_sigmoid: bool, route_scale: float
) -> tuple[Tensor, Tensor]:
    """`ops.expert_choice.select`; of equal scores the earlier token is taken."""
    extension.refuse_forward_mode("expert_choice")
    index, weight, _, _ = _ops.expert_choice(logits_BSE.contiguous(), capacity, use_sigmoid, route_scale)
    return index, weight


def square_sum(*tensors: Tensor) -> Tensor:
    """`ops.grad_norm.square_sum`, two launches for up to 96 tensors; sums in fp64, the same bits every time."""
    return _ops.square_sum([t.detach().contiguous() for t in tensors])


def scale_(factor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`ops.grad_norm.scale_`; a factor of 1, which is what clipping mostly gives, reads and writes no tensor.

    Raises:
        ValueError: a tensor is not contiguous.
    """
    if not all(t.is_contiguous() for t in tensors):
        raise ValueError("scale_ backend 'extension_cuda' takes contiguous tensors")
    _ops.scale_tensors_([t.detach() for t in tensors], factor.float())
    return tensors


def _choice_shapes(
    logits: Tensor, capacity: int, use_sigmoid: bool, route_scale: float
) -> tuple[Tensor, ...]:
    B, S, E = logits.shape
    return (
        logits.new_empty(B, E, capacity, dtype=torch.int64),
        logits.new_empty(B, E, capacity),
        logits.new_empty(B, E, 2, dtype=torch.int32),
        logits.new_empty(B, S),
    )


def _choice_save(ctx, inputs, output) -> None:
    logits, _, ctx.use_sigmoid, ctx.route_scale = inputs
    index, _, cut, total = output
    ctx.mark_non_differentiable(index, cut, total)
    ctx.save_for_backward(logits, index, cut, total)


def _choice_backward(ctx, _index, grad_BEC: Tensor, _cut, _total):
    grad = _ops.expert_choice_backward(
        grad_BEC.contiguous(), *ctx.saved_tensors, ctx.use_sigmoid, ctx.route_scale
    )
    return grad, None, None, None


torch.library.register_fake("megatron_nucleus::expert_choice", _choice_shapes)
torch.library.register_fake(
    "megatron_nucleus::expert_choice_backward",
    lambda grad, logits, index, cut, total, use_sigmoid, route_scale: torch.empty_like(logits),
)
torch.library.register_autograd(
    "megatron_nucleus::expert_choice", _choice_backward, setup_context=_choice_save
)
torch.library.register_autograd("megatron_nucleus::expert_choice_backward", extension.no_second_derivative)
