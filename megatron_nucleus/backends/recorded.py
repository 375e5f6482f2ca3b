"""The calls that the adapters beside this file make of optional libraries, as they were when they were written.

None of these libraries is a dependency and none is installed where this project is tested, so nothing would notice
that one has changed. Here stands what was read in its source: tests build stand-ins with exactly these signatures and
run the adapters against them, an adapter refuses a library that no longer takes its calls (`drift`), and
tools/doctor.py compares what is installed with the record (`changes`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import re
from types import ModuleType
from typing import Any, NamedTuple

from megatron_nucleus.ops.registry import missing


class Call(NamedTuple):
    """One function or method.

    name: dotted path inside the module. signature: all parameters in order, with ``=`` behind those that have a
    default and * before those that go by keyword alone. used: what the adapter passes: keywords, or the number of
    positions where the function is compiled and has no names.
    """

    name: str
    signature: str
    used: str


class Library(NamedTuple):
    """One importable module of one library.

    name: what this project calls it. module: import path. package: distribution whose version is shown; None = it
    has none of its own. read: where and when the record was read.
    """

    name: str
    module: str
    package: str | None
    read: str
    calls: tuple[Call, ...]


_FLASH = "github.com/Dao-AILab/flash-attention"
LIBRARIES = (
    Library(
        "flash_attn_2",
        "flash_attn.flash_attn_interface",
        "flash-attn",
        f"{_FLASH} 2.8.4 (commit 0251105a), August 2026; returns a tensor",
        (
            Call(
                "flash_attn_func",
                "q k v dropout_p= softmax_scale= causal= window_size= softcap= alibi_slopes= deterministic= "
                "return_attn_probs=",
                "q k v deterministic",
            ),
            Call(
                "flash_attn_varlen_func",
                "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p= softmax_scale= causal= "
                "window_size= softcap= alibi_slopes= deterministic= return_attn_probs= block_table=",
                "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k deterministic",
            ),
        ),
    ),
    Library(
        "flash_attn_3",
        "flash_attn_interface",
        "flash_attn_3",
        f"{_FLASH}/hopper (commit 0251105a), August 2026; returns a tensor, before August 2025 (tensor, lse)",
        (
            Call(
                "flash_attn_func",
                "q k v softmax_scale= causal= qv= q_descale= k_descale= v_descale= window_size= attention_chunk= "
                "softcap= num_splits= pack_gqa= deterministic= sm_margin= return_attn_probs=",
                "q k v deterministic",
            ),
            Call(
                "flash_attn_varlen_func",
                "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q= seqused_k= softmax_scale= "
                "causal= qv= q_descale= k_descale= v_descale= window_size= attention_chunk= softcap= num_splits= "
                "pack_gqa= deterministic= sm_margin= return_attn_probs=",
                "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k deterministic",
            ),
        ),
    ),
    Library(
        "flash_attn_4",
        "flash_attn.cute",
        "flash-attn-4",
        "the package flash-attn-4 4.0.0b36, November 2026; returns (tensor, lse or None)",
        (
            Call(
                "flash_attn_func",
                "q k v qv= gather_kv_indices= softmax_scale= causal= window_size= learnable_sink= softcap= "
                "num_splits= pack_gqa= deterministic= score_mod= score_mod_bwd= mask_mod= aux_tensors= aux_scalars= "
                "block_sparse_tensors= block_sparse_tensors_bwd= return_lse= gather_bwd_recompute_p= "
                "gather_bwd_token_chunk=",
                "q k v deterministic",
            ),
            Call(
                "flash_attn_varlen_func",
                "q k v qv= cu_seqlens_q= cu_seqlens_k= max_seqlen_q= max_seqlen_k= min_seqlen_k= seqused_q= "
                "seqused_k= gather_kv_indices= page_table= softmax_scale= causal= window_size= learnable_sink= "
                "softcap= num_splits= pack_gqa= deterministic= score_mod= score_mod_bwd= mask_mod= "
                "block_sparse_tensors= aux_tensors= aux_scalars= return_lse= scheduler_metadata= "
                "seqlen_k_per_split= disable_scheduler_metadata= gather_bwd_recompute_p= gather_bwd_token_chunk=",
                "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k deterministic",
            ),
        ),
    ),
    Library(
        "transformer_engine attention",
        "transformer_engine.pytorch",
        "transformer-engine",
        "github.com/NVIDIA/TransformerEngine 2.20.0.dev0 (commit d0067d0d), August 2026; returns [B, S, H*K]",
        (
            Call(
                "DotProductAttention.__init__",
                "self num_attention_heads kv_channels num_gqa_groups= attention_dropout= qkv_format= attn_mask_type= "
                "window_size= bottom_right_diagonal= sequence_parallel= tp_size= get_rng_state_tracker= tp_group= "
                "layer_number= attention_type= cp_group= cp_global_ranks= cp_stream= cp_comm_type= softmax_scale= "
                "softmax_type= return_max_logit= name=",
                "num_attention_heads kv_channels num_gqa_groups attention_dropout qkv_format attn_mask_type "
                "attention_type",
            ),
            Call(
                "DotProductAttention.forward",
                "self query_layer= key_layer= value_layer= attention_mask= qkv_format= cu_seqlens_q= cu_seqlens_kv= "
                "cu_seqlens_q_padded= cu_seqlens_kv_padded= max_seqlen_q= max_seqlen_kv= attn_mask_type= "
                "window_size= bottom_right_diagonal= checkpoint_core_attention= core_attention_bias_type= "
                "core_attention_bias= alibi_slopes= fast_zero_fill= inference_params= pad_between_seqs= fp8_output= "
                "bf16_backward= num_splits= score_mod= score_mod_bprop= score_mod_tensors= score_mod_bprop_tensors= "
                "qkv_layer= kv_layer= qkv_interleave_dim=",
                "query_layer key_layer value_layer cu_seqlens_q cu_seqlens_kv max_seqlen_q max_seqlen_kv "
                "attn_mask_type",
            ),
        ),
    ),
    Library(
        "torchao float8",
        "torchao.float8",
        "torchao",
        "the package torchao 0.18.0, November 2026",
        (
            Call(
                "convert_to_float8_training",
                "module *module_filter_fn= *config=",
                "module module_filter_fn config",
            ),
            Call("Float8LinearConfig.from_recipe_name", "recipe_name", "recipe_name"),
        ),
    ),
    Library(
        "torchao grouped product",
        "torchao.prototype.moe_training.fp8_grouped_mm",
        "torchao",
        "the package torchao 0.18.0, November 2026; a prototype",
        (
            Call(
                "_to_fp8_rowwise_then_scaled_grouped_mm",
                "A B_t offs out_dtype= float8_dtype= pad_token_groups_for_grouped_mm=",
                "A B_t offs out_dtype pad_token_groups_for_grouped_mm",
            ),
        ),
    ),
    Library(
        "transformer_engine fp8",
        "transformer_engine.pytorch",
        "transformer-engine",
        "github.com/NVIDIA/TransformerEngine 2.20.0.dev0 (commit d0067d0d), August 2026",
        (
            Call("autocast", "enabled= calibrating= recipe= amax_reduction_group= _graph=", "enabled recipe"),
            Call(
                "Linear.__init__",
                "self in_features out_features sequence_parallel= fuse_wgrad_accumulation= tp_group= tp_size= "
                "get_rng_state_tracker= rng_tracker_name= init_method= bias= return_bias= params_dtype= "
                "parallel_mode= parameters_split= device= ub_overlap_ag= ub_overlap_rs= ub_overlap_rs_dgrad= "
                "ub_bulk_dgrad= ub_bulk_wgrad= ub_name= delay_wgrad_compute= symmetric_ar_type= "
                "save_original_input= name=",
                "in_features out_features bias params_dtype device",
            ),
            Call("Linear.forward", "self inp is_first_microbatch= fp8_output= fp8_grad=", "inp"),
            Call("is_fp8_available", "return_reason=", "return_reason"),
            Call("is_fp8_block_scaling_available", "return_reason=", "return_reason"),
            Call("is_mxfp8_available", "return_reason=", "return_reason"),
        ),
    ),
    Library(
        "apex",
        "amp_C",
        None,  # the package of that name in public registries is another project
        "github.com/NVIDIA/apex csrc/amp_C_frontend.cpp (commit 6424da3b), July 2026; compiled, by position alone",
        (
            # chunk_size, noop_flag, [grads, params, first averages, second averages], lr, beta1, beta2, epsilon, step,
            # mode (1 = decoupled decay), bias_correction, weight_decay
            Call("multi_tensor_adam", "/ / / / / / / / / / /", "11"),
            # chunk_size, noop_flag, [tensors], per_tensor -> (norm of all, norms of each)
            Call("multi_tensor_l2norm", "/ / / /", "4"),
        ),
    ),
)


def library(name: str) -> Library:
    """The record of `Library.name`."""
    return next(entry for entry in LIBRARIES if entry.name == name)


def signature_of(function: Any) -> str:
    """A signature in the words of `Call`; a compiled function's from the first line of its docstring.

    Raises:
        ValueError: a compiled function that does not say what it takes.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        listed = re.match(r"\w+\((.*?)\) ->", function.__doc__ or "", re.DOTALL)  # as pybind11 writes it
        if listed is None:
            raise ValueError(f"{function} does not say what it takes") from None
        return " ".join("/" for _ in re.findall(r"\barg\d+:", listed[1]))
    words = []
    for parameter in parameters:
        star = "*" if parameter.kind is parameter.KEYWORD_ONLY else ""
        words.append(f"{star}{parameter.name}{'' if parameter.default is parameter.empty else '='}")
    return " ".join(words)


def find(module: Any, name: str) -> Any | None:
    """What ``name`` (dotted) is in ``module``, or None."""
    return functools.reduce(lambda owner, part: getattr(owner, part, None), name.split("."), module)


def drift(module: ModuleType, calls: tuple[Call, ...]) -> str | None:
    """Why ``module`` no longer takes one of ``calls``, in one line; None when it takes them all.

    Keywords that were added with a default or that changed places do no harm. A compiled function that does not say
    what it takes is let through.
    """
    for call in calls:
        function, full = find(module, call.name), f"{module.__name__}.{call.name}"
        if function is None:
            return f"needs {full}, which this version does not have"
        try:
            words = signature_of(function).split()
        except ValueError:
            continue
        if call.used.isdigit():
            if len(words) != int(call.used):
                return f"calls {full} with {call.used} values, this version takes {len(words)}"
            continue
        used, names = call.used.split(), {word.strip("*=") for word in words}
        gone = [name for name in used if name not in names]
        if gone and not _takes_any_keyword(function):
            return f"needs {full} with {', '.join(gone)}, which this version does not take"
        required = {w.strip("*") for w in words if not w.endswith("=")} - {"self", "args", "kwargs"}
        if required - set(used):
            new = ", ".join(sorted(required - set(used)))
            return f"calls {full} without {new}, which this version requires"
    return None


def changes(module: ModuleType, calls: tuple[Call, ...]) -> list[str]:
    """One line for each call whose signature is not the recorded one, harmful or not: ``name: + new - gone``."""
    found = []
    for call in calls:
        function = find(module, call.name)
        try:
            now = None if function is None else signature_of(function).split()
        except ValueError:
            now = ["(unreadable)"]
        then = call.signature.split()
        if now is None:
            found.append(f"{call.name}: gone")
        elif now != then:
            parts = [f"+ {w}" for w in now if w not in then] + [f"- {w}" for w in then if w not in now]
            found.append(f"{call.name}: {' '.join(parts) or 'other order'}")
    return found


def states() -> list[dict]:
    """Every recorded library beside what is installed, for tools/doctor.py. Imports what it finds.

    Returns:
        rows of {library, module, version, read, reason, changes}: reason says why it cannot be used (None = its
        calls fit), changes as in `changes`.
    """
    rows = []
    for entry in LIBRARIES:
        row = {"library": entry.name, "module": entry.module, "version": _version(entry.package)}
        row |= {"read": entry.read, "reason": None, "changes": []}
        try:
            module = importlib.import_module(entry.module)
        except Exception as error:  # such libraries raise RuntimeError, AssertionError and OSError at import
            row["reason"] = missing(error)
        else:
            row |= {"reason": drift(module, entry.calls), "changes": changes(module, entry.calls)}
        rows.append(row)
    return rows


def _version(package: str | None) -> str | None:
    try:
        return None if package is None else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _takes_any_keyword(function: Any) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
