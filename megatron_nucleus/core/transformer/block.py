"""One transformer block: modulated attention, then a modulated feed-forward, each behind a bounded gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_nucleus.core.kernels import Kernels
from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.moe.moe_layer import MoELayer
from megatron_nucleus.core.transformer.attention import Attention
from megatron_nucleus.core.transformer.feed_forward import FeedForward
from megatron_nucleus.core.transformer.norm import EPS
from megatron_nucleus.core.transformer.text import project
from megatron_nucleus.types import NormalisedText, Routing

GATE_LIMIT = 2.0  # gates are clamped to [-2, 2] before tanh (diffusers source)


class TransformerBlock(nn.Module):
    """x += tanh(g1) * Attn(LN(x)*(1+s1));  x += tanh(g2) * FFN(LN(x)*(1+s2)). Scale only, no shift."""

    def __init__(self, shape: ModelShape, layer: int, kernels: Kernels):
        super().__init__()
        D = shape.width
        self.kernels = kernels
        self.decoupled_routing = shape.decoupled_routing
        self.modulation = nn.Linear(D, 4 * D)  # rows: scale1, gate1, scale2, gate2
        self.text_in = nn.Linear(shape.text_dim, D)
        self.attention = Attention(shape, kernels)
        if shape.is_moe(layer):
            self.moe = MoELayer(shape, layer, kernels)
        else:
            self.feed_forward = FeedForward(D, shape.dense_hidden, kernels)

    @property
    def is_moe(self) -> bool:
        """Whether this block routes."""
        return hasattr(self, "moe")

    def project_text(self, text: NormalisedText, rotation_LK: Tensor) -> tuple[Tensor, Tensor]:
        """This block's text keys and values, [B, L, G, K] each. They do not depend on time."""
        return self._project_text(text, rotation_LK)

    def _project_text(self, text: NormalisedText, rotation_LK: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.attention.text_rows()
        kv_BLM = project(text.features_BLU, text.weight_U, self.text_in.weight, self.text_in.bias, rows)
        return self.attention.split_text(kv_BLM, rotation_LK)

    def forward(
        self,
        x_BSD: Tensor,
        temb_BD: Tensor,
        act_BD: Tensor,
        text: NormalisedText | tuple[Tensor, Tensor],
        mask_BT: Tensor | None,
        rotations: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Routing | None]:
        """act_BD: silu(temb). text: normalised features, or this block's own (keys, values).

        rotations: rotary tables of the image tokens and of the text tokens.
        """
        scale1, gate1, scale2, gate2 = self.modulation(act_BD).chunk(4, dim=-1)
        text_kv = self._project_text(text, rotations[1]) if isinstance(text, NormalisedText) else text
        modulated_BSD, _ = self.kernels.modulated_layer_norm(x_BSD, scale1, EPS)
        branch_BSD = self.attention(modulated_BSD, text_kv, mask_BT, rotations[0])
        x_BSD, modulated_BSD, plain_BSD = self.kernels.gated_residual_norm(
            x_BSD, branch_BSD, _gate(gate1), scale2, EPS, with_plain=self.is_moe and self.decoupled_routing
        )
        if self.is_moe:
            judged_BSD = plain_BSD if self.decoupled_routing else modulated_BSD
            out_BSD, routing = self.moe(modulated_BSD, judged_BSD, temb_BD)
        else:
            out_BSD, routing = self.feed_forward(modulated_BSD), None
        return torch.addcmul(x_BSD, _gate(gate2).unsqueeze(1), out_BSD), routing


def _gate(gate_BD: Tensor) -> Tensor:
    return gate_BD.clamp(-GATE_LIMIT, GATE_LIMIT).tanh()
