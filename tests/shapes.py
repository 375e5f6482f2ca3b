"""The architecture that tests are made of: small enough for seconds, with every part of the real one."""

from __future__ import annotations

from megatron_nucleus.core.models.presets import ModelShape

TINY = ModelShape(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=16,
    num_key_value_heads=1,
    text_dim=24,
    latent_channels=4,
    patch_size=2,
    axes_dims_rope=(4, 6, 6),
    mlp_ratio=8.0,
    dense_moe_strategy="leave_first_block_dense",
    num_experts=4,
    moe_intermediate_dim=16,
    capacity_factors=(0.0, 2.0),
    use_sigmoid=False,
    route_scale=2.5,
)
