"""FP8 products of torchao: linear layers by its `Float8Linear`, experts by its scaled grouped product.

Linear layers are tested on a CPU against torchao's own emulation. NOT RUN ON A GPU. The experts' product exists on a
GPU only; what is tested is that the call gets the layouts, offsets and sizes that its documentation asks for.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
import torchao.float8
from torch import Tensor, nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

from megatron_nucleus.backends import recorded
from megatron_nucleus.backends.gpu import why_no_gpu
from megatron_nucleus.ops.registry import missing
from megatron_nucleus.ops.swiglu import swiglu

_RECIPES = {"current": "tensorwise", "rowwise": "rowwise"}
# Rows of a group must be a multiple of this (documentation of the grouped product).
GROUP_ROWS = 16
_LEAST = {"current": (8, 9), "rowwise": (9, 0)}  # compute capability, documentation of torchao.float8
# torch's scaled grouped product, below torchao's, takes generations 9 and 10 (aten/native/cuda/GroupedBlas.cpp).
_EXPERTS_RUN_ON = ((9, 0), (10, 9))


def why_unavailable(device_type: str, recipe: str | None, experts: bool) -> str | None:
    """Why torchao cannot multiply in FP8 here, in one line; None when it may.

    recipe: None = any. experts: whether experts are to be multiplied, too.
    """
    reason = why_no_gpu(device_type, _LEAST.get(recipe, _LEAST["current"]))
    if reason is None:
        reason = recorded.drift(torchao.float8, recorded.library("torchao float8").calls)
    return _why_no_experts(device_type) if reason is None and experts else reason


def _why_no_experts(device_type: str) -> str | None:
    reason = why_no_gpu(device_type, *_EXPERTS_RUN_ON)
    if reason is not None:
        return f"{reason} (for experts)"
    try:
        return recorded.drift(*_grouped_module())
    except Exception as error:  # a prototype with Triton kernels of its own
        return f"{missing(error)} (for experts)"


def convert_linears(model: nn.Module, names: frozenset[str], recipe: str, *, emulate: bool = False) -> None:
    """Replace the linear layers of these names by `Float8Linear`; their parameters stay the same objects.

    The number of tokens is free: torchao fills sums up to a multiple of 16. emulate: torchao's own emulation.
    """
    config = Float8LinearConfig.from_recipe_name(recipe_name=_RECIPES[recipe])
    config = dataclasses.replace(config, emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(module=model, module_filter_fn=lambda _, name: name in names, config=config)
    for name in names:
        layer = model.get_submodule(name)
        layer.forward = functools.partial(_in_bf16, layer.forward)


def _in_bf16(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Outside of autocast, as in previews of fp32 weights: products with scales per row come out in bfloat16 alone."""
    if torch.is_autocast_enabled(x.device.type):
        return forward(x)
    return forward(x.to(torch.bfloat16)).to(x.dtype)


def expert_ffn(rows_END: Tensor, gate_up_EDF2: Tensor, down_EFD: Tensor, *, recipe: str) -> Tensor:
    """`ops.experts.expert_ffn` with both products in FP8, rowwise; computes in bfloat16.

    An expert's rows are filled up with zeros to a multiple of 16, which changes nothing but the time. Autograd keeps
    a bfloat16 copy of this rank's matrices, column by column, until the layer's backward pass.
    """
    E, N, _ = rows_END.shape
    dtype = rows_END.dtype
    if torch.is_autocast_enabled(rows_END.device.type):
        dtype = torch.get_autocast_dtype(rows_END.device.type)
    rows_END = F.pad(rows_END.to(torch.bfloat16), (0, 0, 0, -N % GROUP_ROWS))
    rows_ND = rows_END.flatten(0, 1).contiguous()
    # Positions behind each expert's rows. Sizes are equal, so nothing is read back from the device.
    ends_E = torch.arange(1, E + 1, device=rows_ND.device, dtype=torch.int32) * rows_END.shape[1]
    hidden_NF = swiglu(_product(rows_ND, gate_up_EDF2, ends_E))
    out_ND = _product(hidden_NF, down_EFD, ends_E)
    return out_ND.unflatten(0, (E, -1))[:, :N].to(dtype)


def _product(rows_NK: Tensor, weight_EKM: Tensor, ends_E: Tensor) -> Tensor:
    weight_EKM = weight_EKM.to(torch.bfloat16).mT.contiguous().mT  # column by column, as it must be
    return _grouped_product()(
        A=rows_NK,
        B_t=weight_EKM,
        offs=ends_E,
        out_dtype=torch.bfloat16,
        pad_token_groups_for_grouped_mm=False,
    )


def _grouped_product() -> Callable:
    module, calls = _grouped_module()
    return recorded.find(module, calls[0].name)


@functools.cache
def _grouped_module() -> tuple[ModuleType, tuple[recorded.Call, ...]]:
    """Loaded with the first experts: a prototype, whose absence must not hide the linear layers."""
    entry = recorded.library("torchao grouped product")
    return importlib.import_module(entry.module), entry.calls
