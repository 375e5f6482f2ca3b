"""Transformer Engine's calls that the FP8 adapter makes, in plain torch on a CPU: same signatures, our emulated FP8."""

from __future__ import annotations

import sys
import types

import torch
from torch import nn

from megatron_nucleus.ops import fp8


class _State:
    """ended: how often an outermost context ended, which moves the history of delayed scaling on."""

    depth = 0
    recipe = None
    ended = 0


class autocast:
    def __init__(self, enabled=True, calibrating=False, recipe=None, amax_reduction_group=None, _graph=False):
        self.enabled, self.recipe = enabled, recipe

    def __enter__(self):
        self.before = (_State.depth, _State.recipe)
        _State.depth, _State.recipe = _State.depth + 1, self.recipe if self.enabled else None

    def __exit__(self, *_):
        _State.depth, _State.recipe = self.before
        _State.ended += self.enabled and _State.depth == 0


class DelayedScaling:
    emulated = "current"

    def __init__(
        self, margin=0, fp8_format=None, amax_history_len=1024, amax_compute_algo="max",
        scaling_factor_compute_algo=None, reduce_amax=True, fp8_dpa=False, fp8_mha=False, backward_override=None,
    ):  # fmt: skip
        self.reduce_amax = reduce_amax


class Linear(nn.Module):
    """Parameter ``weight`` like the library's, an extra state like the library's, checks of sizes like its own."""

    def __init__(
        self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None,
        tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True, return_bias=False,
        params_dtype=None, parallel_mode=None, parameters_split=None, device="cuda", ub_overlap_ag=False,
        ub_overlap_rs=False, ub_overlap_rs_dgrad=False, ub_bulk_dgrad=False, ub_bulk_wgrad=False, ub_name=None,
        delay_wgrad_compute=False, symmetric_ar_type=None, save_original_input=False, name=None,
    ):  # fmt: skip
        super().__init__()
        assert not bias
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))

    def get_extra_state(self):
        return torch.zeros(1)

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        assert inp.ndim == 2
        if torch.is_autocast_enabled(inp.device.type):
            inp = inp.to(torch.get_autocast_dtype(inp.device.type))
        elif inp.dtype is not self.weight.dtype:
            raise TypeError("Data types for parameters must match when outside of autocasted region.")
        if _State.recipe is None:
            return inp @ self.weight.to(inp.dtype).t()
        name = _State.recipe.emulated
        assert inp.shape[0] % {"current": 16, "blockwise": 128, "mxfp8": 32}[name] == 0
        return fp8.linear(inp, self.weight, name)


def install(monkeypatch) -> types.ModuleType:
    """Put the stand-in where the library would be."""
    top, common, recipe, pytorch = (
        types.ModuleType(f"transformer_engine{part}")
        for part in ("", ".common", ".common.recipe", ".pytorch")
    )
    for name, emulated in (
        ("Float8CurrentScaling", "current"),
        ("Float8BlockScaling", "blockwise"),
        ("MXFP8BlockScaling", "mxfp8"),
    ):
        setattr(recipe, name, type(name, (), {"emulated": emulated}))
    recipe.DelayedScaling = DelayedScaling
    pytorch.autocast, pytorch.Linear = autocast, Linear
    pytorch.is_fp8_available = lambda return_reason=False: (True, "")
    pytorch.is_fp8_block_scaling_available = lambda return_reason=False: (True, "")
    pytorch.is_mxfp8_available = lambda return_reason=False: (
        False,
        "Device compute capability 10.0 required.",
    )
    top.common, top.pytorch, common.recipe = common, pytorch, recipe
    for module in (top, common, recipe, pytorch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return pytorch
