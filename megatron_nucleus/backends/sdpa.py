"""torch's own attention with the kernel named: `ops.attention.attention` by FlashAttention, cuDNN or the efficient one.

The row ``torch`` leaves the choice to torch, which takes the first kernel that fits and, where none does, plain matrix
products with every score in memory. These rows take the one kernel or refuse, before the model is built. torch's
FlashAttention takes no mask: with padding it runs over lengths (`key_lengths`), as the library of that name does.
"""

from __future__ import annotations

import inspect
import warnings

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_nucleus.backends.gpu import why_no_gpu, why_no_heads
from megatron_nucleus.backends.key_lengths import as_sequences, computed_dtype
from megatron_nucleus.ops.attention import attention
from megatron_nucleus.ops.registry import Request, Sizes

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

_TOKENS = 64  # of the tensors that kernels are asked about; no rule depends on how many beyond one


def why_unfit(request: Request) -> str | None:
    """Why the kernel that ``request.backend`` names cannot serve this model on this GPU, in torch's own words."""
    kernel = request.backend.removeprefix("sdpa_")
    reason = why_no_gpu(request.device_type)
    if reason is None and kernel == "flash":
        reason = why_no_heads(request, 256)
        if varlen_attn is None:
            reason = f"needs torch.nn.attention.varlen for text masks, which torch {torch.__version__} lacks"
    if reason is not None or request.sizes is None or request.dtype is None:
        return reason
    masks = (False,) if kernel == "flash" else (False, True)
    reasons = (
        _refusal(kernel, request.sizes, request.dtype, request.device_type, masked) for masked in masks
    )
    return next((reason for reason in reasons if reason is not None), None)


def flash(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """`ops.attention.attention` by torch's FlashAttention."""
    if mask_BT is None:
        return _attend(SDPBackend.FLASH_ATTENTION, q_BSHK, k_BTGK, v_BTGK, None)
    q_BSHK, k_BTGK, v_BTGK = computed_dtype(q_BSHK.device.type, q_BSHK, k_BTGK, v_BTGK)
    sequences = as_sequences(mask_BT, q_BSHK.shape[1])
    grouped = {"enable_gqa": q_BSHK.shape[2] != k_BTGK.shape[2]} if _VARLEN_ASKS_FOR_GROUPS else {}
    out = varlen_attn(
        q_BSHK.flatten(0, 1),
        k_BTGK.flatten(0, 1),
        v_BTGK.flatten(0, 1),
        sequences.query_bounds,
        sequences.key_bounds,
        sequences.longest_query,
        sequences.longest_key,
        **grouped,
    )
    return out.view_as(q_BSHK).flatten(2)


def cudnn(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """`ops.attention.attention` by cuDNN."""
    return _attend(SDPBackend.CUDNN_ATTENTION, q_BSHK, k_BTGK, v_BTGK, mask_BT)


def efficient(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """`ops.attention.attention` by the memory-efficient kernel (xFormers')."""
    return _attend(SDPBackend.EFFICIENT_ATTENTION, q_BSHK, k_BTGK, v_BTGK, mask_BT)


def torch_takes(sizes: Sizes, dtype: torch.dtype, device_type: str, *, masked: bool) -> str:
    """Which kernel the row ``torch`` runs on: ``flash``, ``cudnn``, ``efficient`` or ``math`` (every score in memory).

    masked: with a mask, as texts of several lengths have.
    """
    q, k, v, mask = _example(sizes, dtype, device_type, masked)
    grouped = sizes.query_heads != sizes.kv_heads
    choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, False, scale=None, enable_gqa=grouped)
    return SDPBackend(choice).name.removesuffix("_ATTENTION").lower()


def _attend(
    kernel: SDPBackend, q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask_BT: Tensor | None
) -> Tensor:
    with sdpa_kernel(kernel):
        return attention(q_BSHK, k_BTGK, v_BTGK, mask_BT)


def _example(sizes: Sizes, dtype: torch.dtype, device_type: str, masked: bool) -> tuple:
    """Tensors with the model's heads and gradients, as rules look at both."""
    shape = (1, _TOKENS, sizes.query_heads, sizes.head_width)
    q = torch.empty(shape, dtype=dtype, device=device_type, requires_grad=True).transpose(1, 2)
    k = torch.empty(1, _TOKENS, sizes.kv_heads, sizes.head_width, dtype=dtype, device=device_type)
    k = k.requires_grad_().transpose(1, 2)
    mask = torch.ones(1, 1, 1, _TOKENS, dtype=torch.bool, device=device_type) if masked else None
    return q, k, k.detach().requires_grad_(), mask


def _refusal(kernel: str, sizes: Sizes, dtype: torch.dtype, device_type: str, masked: bool) -> str | None:
    q, k, v, mask = _example(sizes, dtype, device_type, masked)
    params = torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, False, sizes.query_heads != sizes.kv_heads)
    takes = getattr(torch.backends.cuda, f"can_use_{kernel}_attention")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if takes(params, True):
            return None
    words = (
        " ".join(str(said[0].message).split()).split(" (Triggered")[0] if said else "torch gives no reason"
    )
    case = "text masks" if masked else "this model"
    return f"does not take {case} here: {words}"


_VARLEN_ASKS_FOR_GROUPS = (
    varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters
)
