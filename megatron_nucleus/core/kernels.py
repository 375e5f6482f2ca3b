"""The operations a model is built from, chosen once at build time and stored as callables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.ops import registry
from megatron_nucleus.utils.config import knob


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Which backend runs each operation: a name that tools/doctor.py lists, or auto."""

    attention_backend: str = knob("auto", "softmax attention of image queries over image and text keys")
    modulated_layer_norm_backend: str = knob("auto", "LayerNorm times (1 + scale)")
    gated_residual_norm_backend: str = knob("auto", "x + gate * branch, then LayerNorm times (1 + scale)")
    rms_norm_backend: str = knob("auto", "RMSNorm of text and time embedding")
    norm_rope_backend: str = knob("auto", "RMSNorm and rotary positions of queries and keys")
    swiglu_backend: str = knob("auto", "SwiGLU of dense and shared feed-forwards")
    moe_gather_backend: str = knob("auto", "tokens to the experts' rows")
    moe_combine_backend: str = knob("auto", "experts' rows back to the tokens, weighted")
    expert_choice_backend: str = knob("auto", "each expert's best tokens and their weights")
    expert_ffn_backend: str = knob("auto", "the experts' batched matrix products")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """One callable per operation of `megatron_nucleus.ops`; signatures are documented there."""

    attention: Callable
    modulated_layer_norm: Callable
    gated_residual_norm: Callable
    rms_norm: Callable
    norm_rope: Callable
    swiglu: Callable
    moe_gather: Callable
    moe_combine: Callable
    expert_choice: Callable
    expert_ffn: Callable


def resolve_kernels(
    config: KernelConfig | None = None,
    device_type: str = "cpu",
    shape: ModelShape | None = None,
    dtype: torch.dtype | None = None,
) -> Kernels:
    """Resolve every operation for one device type.

    Args:
        shape: the model that the operations will serve; None = do not check whether a backend takes its sizes.
        dtype: what it computes in (bfloat16 under autocast); None = do not check.

    Raises:
        ConfigError: a named backend cannot be used here; the message says why and what can.
    """
    config = config or KernelConfig()
    sizes = None if shape is None else sizes_of(shape)
    return Kernels(
        **{
            field.name: registry.resolve(
                field.name,
                getattr(config, f"{field.name}_backend"),
                device_type=device_type,
                dtype=dtype,
                sizes=sizes,
            )
            for field in dataclasses.fields(Kernels)
        }
    )


def sizes_of(shape: ModelShape) -> registry.Sizes:
    """What of an architecture a backend may refuse."""
    return registry.Sizes(
        width=shape.width,
        query_heads=shape.num_attention_heads,
        kv_heads=shape.num_key_value_heads,
        head_width=shape.attention_head_dim,
        experts=shape.num_experts,
        expert_width=shape.moe_intermediate_dim,
    )
