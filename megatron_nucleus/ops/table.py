"""Every built-in backend of every operation, one row of strings each.

A row brings its own tests: ``tests/ops/test_parity.py`` is parametrised over this table. A new backend is one
file in ``megatron_nucleus/backends/`` and one row here.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One backend of one operation.

    op: operation name, as in ``resolve(op, ...)``. backend: name a user can ask for.
    target: ``module:function``; the module is imported when the row is first looked at, never before.
    devices: torch device types it computes on. dtypes: torch dtype names it takes.
    note: one line for ``tools/doctor.py``.
    """

    op: str
    backend: str
    target: str
    devices: str
    dtypes: str
    note: str


_ANY_DEVICE = "cpu cuda meta"
_ANY_DTYPE = "float64 float32 bfloat16 float16"
_OPS = "megatron_nucleus.ops"
_EXTENSION = "megatron_nucleus.backends.extension"

ROWS = (
    Row("moe_gather", "torch", f"{_OPS}.moe_rows:gather_rows", _ANY_DEVICE, _ANY_DTYPE, "index_select"),
    Row("moe_combine", "torch", f"{_OPS}.moe_rows:combine_rows", _ANY_DEVICE, _ANY_DTYPE, "index_add"),
    Row(
        "modulated_layer_norm",
        "torch",
        f"{_OPS}.norm:modulated_layer_norm",
        _ANY_DEVICE,
        _ANY_DTYPE,
        "layer_norm",
    ),
    Row("rms_norm", "torch", f"{_OPS}.norm:rms_norm", _ANY_DEVICE, _ANY_DTYPE, "elementwise"),
    Row("swiglu", "torch", f"{_OPS}.swiglu:swiglu", _ANY_DEVICE, _ANY_DTYPE, "elementwise"),
    Row("attention", "torch", f"{_OPS}.attention:attention", _ANY_DEVICE, _ANY_DTYPE, "SDPA, grouped heads"),
    Row(
        "expert_choice", "torch", f"{_OPS}.expert_choice:select", _ANY_DEVICE, _ANY_DTYPE, "softmax and topk"
    ),
    Row("expert_ffn", "torch", f"{_OPS}.experts:expert_ffn", _ANY_DEVICE, _ANY_DTYPE, "batched matmul"),
    Row("moe_combine", "extension", f"{_EXTENSION}:combine_rows", "cpu meta", _ANY_DTYPE, "C++, one pass"),
    Row(
        "modulated_layer_norm",
        "extension",
        f"{_EXTENSION}:modulated_layer_norm",
        "cpu meta",
        _ANY_DTYPE,
        "C++, fused",
    ),
    Row("rms_norm", "extension", f"{_EXTENSION}:rms_norm", "cpu meta", _ANY_DTYPE, "C++, fused"),
    Row("swiglu", "extension", f"{_EXTENSION}:swiglu", "cpu meta", _ANY_DTYPE, "C++, fused"),
    Row(
        "expert_ffn",
        "extension",
        f"{_EXTENSION}:expert_ffn",
        "cpu meta",
        _ANY_DTYPE,
        "bmm with the C++ swiglu",
    ),
)

# What `auto` tries, first to last. A backend that is not listed for a device runs there only when named.
AUTO_ORDER = {"cuda": ("triton", "torch"), "cpu": ("extension", "torch")}
