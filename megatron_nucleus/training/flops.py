"""How much arithmetic and how many weights a model has, and what share of a device's peak a run reaches.

Model FLOPs count matrix products (a multiply-add is two) and nothing else: no elementwise work, no
recomputation of activations, no optimizer. They follow from the architecture alone and do not change when
a kernel gets faster. They agree with `torch.utils.flop_counter` on diffusers' module (tests).

Hardware FLOPs are the products that this code really forms: fewer than the model's where it saves some (the router's
half for the time embedding once per image, text matrices multiplied first where that is less, inputs without
gradients), more where activations are recomputed and for the optimizer. They agree with the counter on our module.
MFU is always of model FLOPs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.moe.router import capacity
from megatron_nucleus.export.hf_keys import count_parameters

if TYPE_CHECKING:
    from megatron_nucleus.training.planning.memory import Work

# Dense matmul peaks in TFLOP/s by a part of torch.cuda.get_device_name(): (name, bf16, fp32). The first row
# whose name occurs wins. fp32 is the CUDA-core rate, torch's default (TF32 off). Source: NVIDIA data sheets.
DEVICE_PEAKS_TFLOPS: tuple[tuple[str, float, float], ...] = (
    ("H100 PCIe", 756.0, 51.0),
    ("H100 NVL", 835.0, 60.0),
    ("H200 NVL", 835.0, 60.0),
    ("H100", 989.0, 67.0),
    ("H200", 989.0, 67.0),
    ("H800 PCIe", 756.0, 51.0),
    ("H800", 989.0, 67.0),
    ("H20", 148.0, 44.0),
    ("GB200", 2500.0, 80.0),
    ("B200", 2250.0, 80.0),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 30.3),
)


def forward_flops_per_image(shape: ModelShape, tokens: int, text_tokens: int) -> dict[str, int]:
    """FLOPs of one forward pass over one image, by part of the model; their sum is the whole pass.

    Args:
        shape: architecture.
        tokens: S, image tokens.
        text_tokens: L, padded text tokens. The text's share (``text``) is what cached text K/V save.

    Raises:
        ValueError: a capacity factor asks for more tokens than the image has.
    """
    D, S, L = shape.width, tokens, text_tokens
    kv_width = shape.num_key_value_heads * shape.attention_head_dim
    parts = {
        "time_and_modulation": 2 * D * (8 * D + 4 * D * shape.num_layers + 2 * D),
        "patch_embed_and_head": 2 * S * 2 * D * shape.patch_channels,
        "text": 2 * L * (shape.text_dim * D + 2 * D * kv_width) * shape.num_layers,
        "attention_projections": 2 * S * (2 * D * D + 2 * D * kv_width) * shape.num_layers,
        "attention": 2 * 2 * S * (S + L) * D * shape.num_layers,
        "dense_ffn": 0,
        "router": 0,
        "shared_expert": 0,
        "routed_experts": 0,
    }
    F, E = shape.moe_intermediate_dim, shape.num_experts
    for layer in range(shape.num_layers):
        if shape.is_moe(layer):
            rows = E * capacity(shape.capacity_factors[layer], S, E)
            parts["router"] += 2 * S * 2 * D * E
            parts["shared_expert"] += 2 * S * 3 * D * F
            parts["routed_experts"] += 2 * rows * 3 * D * F
        else:
            parts["dense_ffn"] += 2 * S * 3 * D * shape.dense_hidden
    return parts


def training_flops_per_image(shape: ModelShape, tokens: int, text_tokens: int) -> int:
    """FLOPs of forward and backward over one image: three times the forward pass, the field's convention.

    The true figure is slightly lower, because inputs (latents, text features, noise level) need no gradient.
    """
    return 3 * sum(forward_flops_per_image(shape, tokens, text_tokens).values())


def hardware_flops(work: Work) -> dict[str, int]:
    """Products that a rank forms in a training step: ``forward``, ``backward``, ``recompute`` and ``optimizer``.

    Selective recomputation repeats no product; full recomputation repeats those of every block.
    """
    parts = [work.stem(), *work.blocks(), work.head()]
    repeated = work.blocks() if work.recompute == "full" else []
    n = work.accumulation
    return {
        "forward": n * sum(part.flops for part in parts),
        "backward": n * sum(part.grad_flops for part in parts),
        "recompute": n * sum(part.flops for part in repeated),
        "optimizer": work.muon().flops,
    }


def expert_parameter_count(shape: ModelShape) -> int:
    """Parameters of one expert (the shared expert has as many)."""
    return 3 * shape.width * shape.moe_intermediate_dim


def active_parameter_count(shape: ModelShape) -> int:
    """Parameters that an average image token's prediction touches: all but the experts that did not pick it.

    An expert-choice token is picked by ``capacity factor`` experts on average, not by a fixed number.
    """
    idle = sum(
        shape.num_experts - shape.capacity_factors[layer]
        for layer in range(shape.num_layers)
        if shape.is_moe(layer)
    )
    return count_parameters(shape) - round(idle * expert_parameter_count(shape))


def device_peak_flops(
    device: torch.device | str, dtype: torch.dtype = torch.bfloat16, name: str | None = None
) -> float | None:
    """Peak of a device in FLOP/s from the table above; None where the table has no figure, as for every CPU.

    Args:
        device: a torch device.
        dtype: arithmetic, bfloat16 or float32.
        name: device name to look up instead of asking CUDA.
    """
    device = torch.device(device)
    if name is None:
        if device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(device)
    for known, bf16, fp32 in DEVICE_PEAKS_TFLOPS:
        if known in name:
            return {torch.bfloat16: bf16 * 1e12, torch.float32: fp32 * 1e12}.get(dtype)
    return None
