"""Transformer Engine's attention behind `ops.attention.attention`.

NOT RUN WITH THE LIBRARY: the calls follow its source (`recorded.py`); a stand-in in plain torch with the same
signatures is what the arithmetic is tested against (tests/backends/test_transformer_engine.py).

The library chooses among cuDNN, FlashAttention and plain matrix products by itself, on every call and also by
variables of its own (``NVTE_FUSED_ATTN``, ``NVTE_FLASH_ATTN``): ``NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=1`` shows what it took.
Text padding goes in as lengths, keys and values stay where they are.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from torch import Tensor, nn

from megatron_nucleus.backends import recorded
from megatron_nucleus.backends.gpu import why_no_gpu, why_no_heads
from megatron_nucleus.backends.key_lengths import computed_dtype, key_lengths, of_each_mask
from megatron_nucleus.ops.registry import Request


def why_unfit(request: Request) -> str | None:
    """Why the library cannot serve this model on this GPU; None when it can. Ampere and newer (its documentation)."""
    calls = recorded.library("transformer_engine attention").calls
    reason = recorded.drift(te, calls) or why_no_gpu(request.device_type, (8, 0))
    return reason or why_no_heads(request, 256)


def attention(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """`ops.attention.attention`."""
    q_BSHK, k_BTGK, v_BTGK = computed_dtype(q_BSHK.device.type, q_BSHK, k_BTGK, v_BTGK)
    _, S, H, K = q_BSHK.shape
    T, G = k_BTGK.shape[1:3]
    attend = _module(H, K, G, torch.are_deterministic_algorithms_enabled())
    if mask_BT is None:
        return attend(
            query_layer=q_BSHK, key_layer=k_BTGK, value_layer=v_BTGK, attn_mask_type="no_mask"
        ).flatten(2)
    k_BTGK, v_BTGK = _NoPaddingGradient.apply(k_BTGK, v_BTGK, mask_BT)
    query_bounds, key_bounds = _bounds(mask_BT, S)
    return attend(
        query_layer=q_BSHK,
        key_layer=k_BTGK,
        value_layer=v_BTGK,
        attn_mask_type="padding",
        cu_seqlens_q=query_bounds,
        cu_seqlens_kv=key_bounds,
        max_seqlen_q=S,
        max_seqlen_kv=T,
    ).flatten(2)


@of_each_mask
def _bounds(mask_BT: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Where the queries and the keys that count begin in each row, as if nothing else were there: [B + 1] int32."""
    lengths_B = key_lengths(mask_BT)
    rows = torch.arange(len(lengths_B) + 1, dtype=torch.int32, device=mask_BT.device)
    return rows * queries, F.pad(lengths_B.cumsum(0, dtype=torch.int32), (1, 0))


@functools.cache
def _module(query_heads: int, head_width: int, kv_heads: int, deterministic: bool) -> nn.Module:
    """It has no parameters. deterministic: it reads torch's switch when it is made, so each setting has its own."""
    return te.DotProductAttention(
        num_attention_heads=query_heads,
        kv_channels=head_width,
        num_gqa_groups=kv_heads,
        attention_dropout=0.0,
        qkv_format="bshd",
        attn_mask_type="no_mask",
        attention_type="cross",  # more keys than queries: the text's
    )


class _NoPaddingGradient(torch.autograd.Function):
    """Keys and values as they are; their gradient at padding is zero, whatever the library leaves there.

    Its documentation promises nothing about padded positions, and zero times a NaN would be a NaN.
    """

    @staticmethod
    def forward(ctx, k_BTGK: Tensor, v_BTGK: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mask_BT)
        return k_BTGK.view_as(k_BTGK), v_BTGK.view_as(v_BTGK)

    @staticmethod
    def backward(ctx, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor, None]:
        padding = ~ctx.saved_tensors[0][:, :, None, None]
        return grad_k.masked_fill(padding, 0), grad_v.masked_fill(padding, 0), None
