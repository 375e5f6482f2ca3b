"""The operations a model is built from, chosen once at build time and stored as callables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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


def resolve_kernels(config: KernelConfig | None = None, device_type: str = "cpu") -> Kernels:
    """Resolve every operation for one device type.

    Raises:
        ConfigError: a named backend cannot be used here; the message says why and what can.
    """
    config = config or KernelConfig()
    return Kernels(
        **{
            field.name: registry.resolve(
                field.name, getattr(config, f"{field.name}_backend"), device_type=device_type
            )
            for field in dataclasses.fields(Kernels)
        }
    )
