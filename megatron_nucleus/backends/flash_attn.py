"""FlashAttention 2, 3 and 4 behind one signature: `ops.attention.attention`.

NOT RUN WITH THE LIBRARIES: the calls follow their sources (`recorded.py`), and stand-ins in plain torch with the same
signatures are what the arithmetic is tested against (tests/backends/test_flash_attn.py); tests/ops/test_parity.py
judges the real ones on a GPU.

Grouped heads go in as they are. Without a mask the dense function is called; with one the function of variable length
over `key_lengths.Sequences`. Both are looked up before the model is built, so the first text with padding is no
surprise. Each library documents or codes for sequences without queries: FlashAttention 2 in
csrc/flash_attn/src/flash_bwd_kernel.h ("actual_seqlen_q == 0"), 3 in hopper/flash_bwd_kernel_sm90.h (``store_zero``),
4 in flash_bwd_sm90.py and flash_bwd_sm100.py ("writes zeros", ``should_zero_dKV``).
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from megatron_nucleus.backends import recorded
from megatron_nucleus.backends.gpu import why_no_gpu, why_no_heads
from megatron_nucleus.backends.key_lengths import as_sequences, computed_dtype
from megatron_nucleus.ops.registry import Request, missing

# Compute capabilities (README of each) and widest head. 2: Ampere and newer. 3: H100 / H800, kernels of Hopper alone.
# 4: its backward refuses 8.x (flash_attn/cute/interface.py); `_why_not_4` knows the rest.
_FITS = {2: ((8, 0), (99, 9), 256), 3: ((9, 0), (9, 0), 256), 4: ((9, 0), (12, 9), 256)}
# What `flash_attn` without a number takes, first to last: the version that was written for the GPU's generation.
_ORDER = {8: (2,), 9: (3, 4, 2)}
_ORDER_NEWER = (4, 2)


@functools.cache
def _import(version: int) -> ModuleType | str:
    """The library, or why it cannot be imported."""
    name = recorded.library(f"flash_attn_{version}").module
    try:
        return importlib.import_module(name)
    except Exception as error:  # a kernel built for another torch raises ImportError or OSError
        return missing(error)


def why_unfit(request: Request) -> str | None:
    """Why the version that ``request.backend`` names cannot serve this model on this GPU; None when it can."""
    named = request.backend.removeprefix("flash_attn").strip("_")
    if named:
        return _why_not(int(named), request)
    reason = why_no_gpu(request.device_type, (8, 0))
    if reason is not None:
        return reason
    reasons = {version: _why_not(version, request) for version in _order()}
    if None in reasons.values():
        return None
    return "; ".join(f"version {version} {reason}" for version, reason in reasons.items())


def _order() -> tuple[int, ...]:
    return _ORDER.get(torch.cuda.get_device_capability()[0], _ORDER_NEWER)


def _why_not(version: int, request: Request) -> str | None:
    """Reasons that need no library come last: a missing one is what most people meet."""
    library = _import(version)
    if isinstance(library, str):
        return library
    reason = recorded.drift(library, recorded.library(f"flash_attn_{version}").calls)
    if reason is not None:
        return reason
    lowest, highest, widest = _FITS[version]
    reason = why_no_gpu(request.device_type, lowest, highest) or why_no_heads(request, widest)
    return reason or (_why_not_4(request) if version == 4 else None)


def _why_not_4(request: Request) -> str | None:
    """Limits of FlashAttention 4 beyond Hopper (``_validate_head_dims`` and ``_flash_attn_bwd`` in its source)."""
    generation = torch.cuda.get_device_capability()[0]
    if generation >= 12 and torch.are_deterministic_algorithms_enabled():
        return f"has no deterministic backward on compute capability {generation}.x"
    if generation >= 10 and request.sizes is not None and 128 < request.sizes.head_width != 256:
        width = request.sizes.head_width
        return f"takes heads of up to 128 or of 256 channels on this GPU, the model's have {width}"
    return None


@functools.cache
def _chosen() -> int:
    """The version behind `attention`: the first of `_order` that can be imported and takes our calls."""
    request = Request("attention", "flash_attn", "cuda", None, None)
    return next(version for version in _order() if _why_not(version, request) is None)


def attention(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """`ops.attention.attention` by the version written for this GPU; name one with a number to be sure."""
    return _attend(_chosen(), q_BSHK, k_BTGK, v_BTGK, mask_BT)


def attention_2(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """`ops.attention.attention` by FlashAttention 2."""
    return _attend(2, q_BSHK, k_BTGK, v_BTGK, mask_BT)


def attention_3(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """`ops.attention.attention` by FlashAttention 3."""
    return _attend(3, q_BSHK, k_BTGK, v_BTGK, mask_BT)


def attention_4(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """`ops.attention.attention` by FlashAttention 4."""
    return _attend(4, q_BSHK, k_BTGK, v_BTGK, mask_BT)


def _attend(version: int, q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask_BT: Tensor | None) -> Tensor:
    library = _import(version)
    q_BSHK, k_BTGK, v_BTGK = computed_dtype(q_BSHK.device.type, q_BSHK, k_BTGK, v_BTGK)
    deterministic = torch.are_deterministic_algorithms_enabled()
    if mask_BT is None:
        out = library.flash_attn_func(q=q_BSHK, k=k_BTGK, v=v_BTGK, deterministic=deterministic)
        return _tensor(out).flatten(2)
    sequences = as_sequences(mask_BT, q_BSHK.shape[1])
    out = library.flash_attn_varlen_func(
        q=q_BSHK.flatten(0, 1),
        k=k_BTGK.flatten(0, 1),
        v=v_BTGK.flatten(0, 1),
        cu_seqlens_q=sequences.query_bounds,
        cu_seqlens_k=sequences.key_bounds,
        max_seqlen_q=sequences.longest_query,
        max_seqlen_k=sequences.longest_key,
        deterministic=deterministic,
    )
    return _tensor(out).view_as(q_BSHK).flatten(2)


def _tensor(out: Tensor | tuple) -> Tensor:
    """Version 4 and old builds of 3 return the log-sum-exp beside the output."""
    return out[0] if isinstance(out, tuple) else out
