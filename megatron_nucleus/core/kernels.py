"""The operations a model is built from, chosen once at build time and stored as callables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from megatron_nucleus.ops import registry
from megatron_nucleus.utils.config import knob


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Which backend runs each operation: a name from tools/doctor.py, or auto."""

    attention_backend: str = knob("auto", "softmax attention of image queries over image and text keys")
    norm_backend: str = knob("auto", "LayerNorm with modulation, RMSNorm")
    moe_backend: str = knob("auto", "row gather and weighted scatter-add around the experts")
    expert_backend: str = knob("auto", "batched SwiGLU of the experts, and token selection")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """One callable per operation of `megatron_nucleus.ops`; signatures are documented there."""

    attention: Callable
    modulated_layer_norm: Callable
    rms_norm: Callable
    swiglu: Callable
    gather_rows: Callable
    combine_rows: Callable
    select_tokens: Callable
    expert_ffn: Callable


def resolve_kernels(config: KernelConfig | None = None, device_type: str = "cpu") -> Kernels:
    """Resolve every operation for one device type.

    Raises:
        ConfigError: a named backend cannot be used here; the message says why and what can.
    """
    config = config or KernelConfig()

    def pick(op: str, backend: str) -> Callable:
        return registry.resolve(op, backend, device_type=device_type)

    return Kernels(
        attention=pick("attention", config.attention_backend),
        modulated_layer_norm=pick("modulated_layer_norm", config.norm_backend),
        rms_norm=pick("rms_norm", config.norm_backend),
        swiglu=pick("swiglu", config.expert_backend),
        gather_rows=pick("moe_gather", config.moe_backend),
        combine_rows=pick("moe_combine", config.moe_backend),
        select_tokens=pick("expert_choice", config.expert_backend),
        expert_ffn=pick("expert_ffn", config.expert_backend),
    )
