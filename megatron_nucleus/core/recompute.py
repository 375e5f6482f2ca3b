"""Activation checkpointing that keeps the router's choices and never repeats an all-to-all.

torch's selective checkpointing counts every operation of a region; FSDP's own work inside the region, which
differs between forward and recomputation, upsets the count. Here only the kept operations are recorded.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional
# Never computed twice: a recomputed choice could flip a tie unnoticed, and an all-to-all costs what it did before.
KEPT = {_aten.topk.default, _c10d.all_to_all_single.default, _c10d.wait_tensor.default}
# `selective` also keeps what costs much for its size; norms, rotations, gathers and SwiGLU are repeated.
COSTLY = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


# The same of optional libraries, whose operations exist only once they are loaded: by name.
COSTLY_NAMES = {
    "aten::_scaled_grouped_mm",
    "triton_ops::expert_gate_up",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::_flash_attn_forward",
}


class _Record(TorchDispatchMode):
    """Forward: remember the results of the kept operations, in order."""

    def __init__(self, kept: set, results: deque):
        super().__init__()
        self.kept, self.results = kept, results

    def keeps(self, op: Any) -> bool:
        """Whether the results of ``op`` are kept: an operation of `kept`, or one whose name is in it."""
        return op in self.kept or op._schema.name in self.kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if self.keeps(op):
            self.results.append((op, tree_map_only(torch.Tensor, torch.Tensor.detach, out)))
        return out


class _Replay(_Record):
    """Recomputation: the kept operations give what they gave before."""

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not self.keeps(op):
            return op(*args, **(kwargs or {}))
        recorded, out = self.results.popleft()
        if recorded is not op:
            raise RuntimeError(f"recomputation calls {op} where the forward pass called {recorded}")
        return out.stand_in() if isinstance(out, _Forgotten) else out


class _Forgotten:
    """What is left of a result that nothing reads again."""

    def __init__(self, tensor: Tensor):
        self.shape, self.one = tensor.shape, tensor.new_full((), math.nan)

    def stand_in(self) -> Tensor:
        """Of the same shape, without memory of its own; NaN, so that a reader would not go unnoticed."""
        return self.one.expand(self.shape)


def forget(tensor: Tensor) -> None:
    """Keep no values of a kept result that goes into a kept operation alone, which is not repeated.

    Does nothing outside of a forward pass that will be recomputed, or where ``tensor`` is no kept operation's result.
    """
    modes = _get_current_dispatch_mode_stack()
    mode = next((m for m in reversed(modes) if isinstance(m, _Record)), None)
    if mode is None or isinstance(mode, _Replay) or not tensor.numel():
        return
    for i in reversed(range(len(mode.results))):
        op, out = mode.results[i]
        if isinstance(out, Tensor) and out.data_ptr() == tensor.data_ptr() and out.shape == tensor.shape:
            mode.results[i] = (op, _Forgotten(out))
            return


def replaying() -> bool:
    """Whether this thread is recomputing, so that kept operations are answered from memory."""
    return any(isinstance(mode, _Replay) for mode in _get_current_dispatch_mode_stack())


def recomputing(forward: Callable, granularity: str) -> Callable:
    """``forward`` that drops its activations and computes them again in the backward pass.

    Args:
        granularity: ``full`` keeps `KEPT`, ``selective`` also `COSTLY`.
    """
    kept = KEPT | COSTLY | COSTLY_NAMES if granularity == "selective" else KEPT

    def contexts() -> tuple[_Record, _Replay]:
        results: deque = deque()
        return _Record(kept, results), _Replay(kept, results)

    def run(*args: Any) -> Any:
        # Nothing in a block is random, so there is no generator state to restore.
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)

    return run
