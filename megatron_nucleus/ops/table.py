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


_OPS = "megatron_nucleus.ops."
_TRITON = "megatron_nucleus.backends.triton:"
_CPP = "megatron_nucleus.backends.extension:"
_CUDA = "megatron_nucleus.backends.extension_cuda:"
_SDPA = "megatron_nucleus.backends.sdpa:"
_FLASH = "megatron_nucleus.backends.flash_attn:"
_TE = "megatron_nucleus.backends.transformer_engine:"
_ALL = "cpu cuda meta"
_CPU = "cpu meta"
_GPU = "cuda cpu"  # on a CPU only under triton's interpreter
_FLOATS = "float64 float32 bfloat16 float16"
_SHORT = "float32 bfloat16 float16"
_HALF = "bfloat16 float16"
_UNRUN = "never run by this project"

# Operations of the optimizer: they see weights and gradients in the dtypes these are stored in, not activations.
OF_THE_OPTIMIZER = ("orthogonalize", "stochastic_round", "square_sum", "scale_")

# fmt: off
ROWS = (
    Row("moe_gather",           "torch",     _OPS + "moe_rows:gather_rows",      _ALL, _FLOATS, "index_select"),
    Row("moe_gather",           "triton",    _TRITON + "gather_rows",            _GPU, _SHORT,  "no atomics"),
    Row("moe_combine",          "torch",     _OPS + "moe_rows:combine_rows",     _ALL, _FLOATS, "index_add"),
    Row("moe_combine",          "triton",    _TRITON + "combine_rows",           _GPU, _SHORT,  "no atomics"),
    Row("moe_combine",          "extension", _CPP + "combine_rows",              _CPU, _FLOATS, "C++, one pass"),
    Row("modulated_layer_norm", "torch",     _OPS + "norm:modulated_layer_norm", _ALL, _FLOATS, "layer_norm"),
    Row("modulated_layer_norm", "triton",    _TRITON + "modulated_layer_norm",   _GPU, _SHORT,  "one pass"),
    Row("modulated_layer_norm", "extension", _CPP + "modulated_layer_norm",      _CPU, _FLOATS, "C++, one pass"),
    Row("gated_residual_norm",  "torch",     _OPS + "norm:gated_residual_norm",  _ALL, _FLOATS, "addcmul, layer_norm"),
    Row("gated_residual_norm",  "triton",    _TRITON + "gated_residual_norm",    _GPU, _SHORT,  "one pass"),
    Row("gated_residual_norm",  "extension", _CPP + "gated_residual_norm",       _CPU, _FLOATS, "C++, one pass"),
    Row("rms_norm",             "torch",     _OPS + "norm:rms_norm",             _ALL, _FLOATS, "elementwise"),
    Row("rms_norm",             "extension", _CPP + "rms_norm",                  _CPU, _FLOATS, "C++, one pass"),
    Row("norm_rope",            "torch",     _OPS + "norm_rope:norm_rope",       _ALL, _FLOATS, "complex product"),
    Row("norm_rope",            "triton",    _TRITON + "norm_rope",              _GPU, _SHORT,  "one pass"),
    Row("norm_rope",            "extension", _CPP + "norm_rope",                 _CPU, _FLOATS, "C++, one pass"),
    Row("swiglu",               "torch",     _OPS + "swiglu:swiglu",             _ALL, _FLOATS, "elementwise"),
    Row("swiglu",               "triton",    _TRITON + "swiglu",                 _GPU, _SHORT,  "one pass"),
    Row("swiglu",               "extension", _CPP + "swiglu",                    _CPU, _FLOATS, "C++, one pass"),
    Row("attention",            "torch",     _OPS + "attention:attention",       _ALL, _FLOATS, "SDPA, grouped heads"),
    Row("attention",            "sdpa_flash",     _SDPA + "flash",       "cuda", _HALF,  "torch's FlashAttention"),
    Row("attention",            "sdpa_cudnn",     _SDPA + "cudnn",       "cuda", _HALF,  "torch's cuDNN kernel"),
    Row("attention",            "sdpa_efficient", _SDPA + "efficient",   "cuda", _SHORT, "torch's efficient kernel"),
    Row("attention",            "flash_attn",     _FLASH + "attention",   "cuda", _HALF, _UNRUN),
    Row("attention",            "flash_attn_2",   _FLASH + "attention_2", "cuda", _HALF, _UNRUN),
    Row("attention",            "flash_attn_3",   _FLASH + "attention_3", "cuda", _HALF, _UNRUN),
    Row("attention",            "flash_attn_4",   _FLASH + "attention_4", "cuda", _HALF, _UNRUN),
    Row("attention",            "transformer_engine", _TE + "attention",  "cuda", _HALF, _UNRUN),
    Row("expert_choice",        "torch",     _OPS + "expert_choice:select",      _ALL, _FLOATS, "softmax and topk"),
    Row("expert_choice",        "extension_cuda", _CUDA + "expert_choice", "cuda", _SHORT, _UNRUN),
    Row("expert_ffn",           "torch",     _OPS + "experts:expert_ffn",        _ALL, _FLOATS, "bmm"),
    Row("expert_ffn",           "triton",    _TRITON + "expert_ffn",             _GPU, _SHORT,  "bmm, one-pass swiglu"),
    Row("expert_ffn",           "triton_fused", _TRITON + "expert_ffn_fused",    _GPU, _SHORT,  "fused, not timed"),
    Row("expert_ffn",           "extension", _CPP + "expert_ffn",                _CPU, _FLOATS, "bmm, C++ swiglu"),
    Row("orthogonalize",        "torch",     _OPS + "orthogonalize:orthogonalize", _ALL, _FLOATS, "bmm"),
    Row("orthogonalize",        "triton",    _TRITON + "orthogonalize",          _GPU, _SHORT,  "half of each Gram"),
    Row("stochastic_round",     "torch",     _OPS + "stochastic_round:stochastic_round", _ALL, "float32", "a hash"),
    Row("stochastic_round",     "triton",    _TRITON + "stochastic_round",       _GPU, "float32", "one pass"),
    Row("square_sum",           "torch",     _OPS + "grad_norm:square_sum",      _ALL, _FLOATS, "foreach_norm"),
    Row("square_sum",           "extension", _CPP + "square_sum",                _CPU, _FLOATS, "C++, one pass"),
    Row("square_sum",           "extension_cuda", _CUDA + "square_sum",    "cuda", _SHORT, _UNRUN),
    Row("scale_",               "torch",     _OPS + "grad_norm:scale_",          _ALL, _FLOATS, "foreach_mul"),
    Row("scale_",               "extension_cuda", _CUDA + "scale_",        "cuda", _SHORT, _UNRUN),
)
# fmt: on

# What `auto` tries, first to last. A backend that is not listed for a device runs there only when named.
AUTO_ORDER = {"cuda": ("triton", "torch"), "cpu": ("extension", "torch")}
