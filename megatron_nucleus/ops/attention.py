"""Attention of the image queries over image and text keys, with grouped key/value heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# (rtol, atol) of every backend against the reference in fp64: |error| <= rtol * max|reference| + atol.
TOLERANCES = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (2e-5, 1e-5),
    torch.bfloat16: (1.6e-2, 2e-2),
    torch.float16: (2e-3, 3e-3),
}


def attention(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Softmax attention, scaled by ``1/sqrt(K)``; query head h reads key/value head ``h // (H/G)``.

    Args:
        q_BSHK: queries. k_BTGK, v_BTGK: keys and values, T = image tokens + text tokens; G divides H.
        mask_BT: bool, True where a key may be attended to; None = every key. No row may be all False. The keys
            that count stand first in every row, as in [image ; text ; padding]: backends without masks turn that
            into lengths, and refuse another order. This one takes any order.

    Returns:
        [B, S, H*K] in the dtype of ``q_BSHK``.
    """
    out_BHSK = F.scaled_dot_product_attention(
        q_BSHK.transpose(1, 2),
        k_BTGK.transpose(1, 2),
        v_BTGK.transpose(1, 2),
        attn_mask=None if mask_BT is None else mask_BT[:, None, None, :],
        enable_gqa=q_BSHK.shape[2] != k_BTGK.shape[2],
    )
    return out_BHSK.transpose(1, 2).flatten(2)
