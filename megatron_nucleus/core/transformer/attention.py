"""Attention of image queries over image and text keys; text has keys and values only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_nucleus.core.kernels import Kernels
from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.transformer.norm import EPS, RMSNorm


class Attention(nn.Module):
    """Grouped-query attention with per-head RMSNorm on queries and keys, no biases.

    ``text_q_norm`` (norm_added_q upstream) is in every released checkpoint and is used by nothing: text has no
    queries. It is kept, frozen, so that weights convert back bit for bit.
    """

    def __init__(self, shape: ModelShape, kernels: Kernels):
        super().__init__()
        D, K = shape.width, shape.attention_head_dim
        self.query_heads, self.kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        self.kernels = kernels
        self.q = nn.Linear(D, self.query_heads * K, bias=False)
        self.k = nn.Linear(D, self.kv_heads * K, bias=False)
        self.v = nn.Linear(D, self.kv_heads * K, bias=False)
        self.out = nn.Linear(self.query_heads * K, D, bias=False)
        self.text_k = nn.Linear(D, self.kv_heads * K, bias=False)
        self.text_v = nn.Linear(D, self.kv_heads * K, bias=False)
        self.q_norm = RMSNorm(K, kernels)
        self.k_norm = RMSNorm(K, kernels)
        self.text_k_norm = RMSNorm(K, kernels)
        self.text_q_norm = RMSNorm(K, kernels).requires_grad_(False)

    def text_rows(self) -> Tensor:
        """[2*G*K, D]: the weights that make a text token's keys, then those of its values."""
        return torch.cat([self.text_k.weight, self.text_v.weight])

    def split_text(self, kv_BLM: Tensor, rotation_LK: Tensor) -> tuple[Tensor, Tensor]:
        """What `text_rows` gave -> text keys (normalised, rotated) and values, [B, L, G, K] each."""
        k_BLGK, v_BLGK = kv_BLM.unflatten(-1, (2 * self.kv_heads, -1)).chunk(2, dim=2)
        return self._norm_rope(k_BLGK, self.text_k_norm, rotation_LK), v_BLGK

    def forward(
        self, x_BSD: Tensor, text_kv: tuple[Tensor, Tensor], mask_BT: Tensor | None, rotation_SK: Tensor
    ) -> Tensor:
        """x_BSD: modulated image tokens. mask_BT: True where a key counts, over [image ; text]; None = all do."""
        q_BSHK = self.q(x_BSD).unflatten(-1, (self.query_heads, -1))
        k_BSGK = self.k(x_BSD).unflatten(-1, (self.kv_heads, -1))
        v_BSGK = self.v(x_BSD).unflatten(-1, (self.kv_heads, -1))
        q_BSHK = self._norm_rope(q_BSHK, self.q_norm, rotation_SK)
        k_BSGK = self._norm_rope(k_BSGK, self.k_norm, rotation_SK)
        k_BTGK = torch.cat([k_BSGK, text_kv[0]], dim=1)
        v_BTGK = torch.cat([v_BSGK, text_kv[1]], dim=1)
        return self.out(self.kernels.attention(q_BSHK, k_BTGK, v_BTGK, mask_BT))

    def _norm_rope(self, x_BTHK: Tensor, norm: RMSNorm, rotation_TK: Tensor) -> Tensor:
        return self.kernels.norm_rope(x_BTHK, norm.weight, rotation_TK, EPS)
