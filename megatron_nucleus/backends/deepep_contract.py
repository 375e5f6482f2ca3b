"""The calls of DeepEP that `backends/deepep.py` makes, as they were when it was written.

Read from github.com/deepseek-ai/DeepEP: ``Buffer`` and ``ElasticBuffer`` from version 2.1.0 (commit dd758ca, July
2026), ``HybridEPBuffer`` from its branch hybrid-ep (commit 94a9f8f, July 2026). Every argument goes by its keyword,
so a call still fits when arguments are added with a default or change places; it does not when one that is used is
gone or a new one is required. `drift` says so before the first step.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import NamedTuple


class Call(NamedTuple):
    """``signature``: all parameters, in order, with ``=`` behind those that have a default and * before those that
    go by keyword alone. ``used``: the keywords that are passed."""

    name: str
    signature: str
    used: str


LEGACY = (
    Call(
        "Buffer.__init__",
        "self group num_nvl_bytes= num_rdma_bytes= low_latency_mode= num_qps_per_rank= "
        "allow_nvlink_for_low_latency_mode= allow_mnnvl= explicitly_destroy= enable_shrink= comm=",
        "group num_nvl_bytes num_rdma_bytes",
    ),
    Call("Buffer.get_dispatch_config", "num_ranks", "num_ranks"),
    Call("Buffer.get_combine_config", "num_ranks", "num_ranks"),
    Call(
        "Buffer.get_dispatch_layout",
        "self topk_idx num_experts previous_event= async_finish= allocate_on_comm_stream=",
        "topk_idx num_experts",
    ),
    Call(
        "Buffer.dispatch",
        "self x handle= num_tokens_per_rank= num_tokens_per_rdma_rank= is_token_in_rank= num_tokens_per_expert= "
        "topk_idx= topk_weights= expert_alignment= num_worst_tokens= config= previous_event= async_finish= "
        "allocate_on_comm_stream=",
        "x handle num_tokens_per_rank num_tokens_per_rdma_rank is_token_in_rank num_tokens_per_expert topk_idx "
        "topk_weights num_worst_tokens",
    ),
    Call(
        "Buffer.combine",
        "self x handle topk_weights= bias= config= previous_event= async_finish= allocate_on_comm_stream=",
        "x handle topk_weights",
    ),
)
ELASTIC = (
    Call(
        "ElasticBuffer.__init__",
        "self group num_bytes= num_cpu_bytes= num_max_tokens_per_rank= hidden= num_topk= use_fp8_dispatch= "
        "deterministic= allow_hybrid_mode= allow_multiple_reduction= prefer_overlap_with_compute= sl_idx= "
        "num_allocated_qps= num_cpu_timeout_secs= num_gpu_timeout_secs= explicitly_destroy=",
        "group num_max_tokens_per_rank hidden num_topk deterministic",
    ),
    Call(
        "ElasticBuffer.dispatch",
        "self x topk_idx= topk_weights= cumulative_local_expert_recv_stats= num_experts= num_max_tokens_per_rank= "
        "expert_alignment= num_sms= num_qps= previous_event= previous_event_before_epilogue= "
        "async_with_compute_stream= allocate_on_comm_stream= handle= do_handle_copy= do_cpu_sync= do_expand= "
        "do_zero_padding= use_tma_aligned_col_major_sf=",
        "x topk_idx topk_weights num_experts num_max_tokens_per_rank handle do_cpu_sync",
    ),
    Call(
        "ElasticBuffer.combine",
        "self x handle topk_weights= bias= num_sms= num_qps= previous_event= previous_event_before_epilogue= "
        "async_with_compute_stream= allocate_on_comm_stream=",
        "x handle topk_weights",
    ),
)
HYBRID = (
    Call(
        "HybridEPBuffer.__init__",
        "self group hidden_dim max_num_of_tokens_per_rank num_local_experts use_fp8= num_sms_dispatch_api= "
        "num_sms_combine_api= num_sms_preprocessing_api= num_blocks_permute= num_blocks_unpermute= "
        "load_cached_kernels= use_shared_buffer= enable_custom_allgather= num_of_hybrid_ep_ranks_per_nvlink_domain= "
        "use_mnnvl=",
        "group hidden_dim max_num_of_tokens_per_rank num_local_experts",
    ),
    Call(
        "HybridEPBuffer.dispatch_with_permute",
        "self *hidden *topk_idx= *topk_weights= *num_of_experts_per_rank= *num_of_experts= *use_fp8= *routing_map= "
        "*probs= *scaling_factor= *num_permuted_tokens= *pad_multiple= *handle= *non_blocking= "
        "*fuse_permute_dispatch= *num_dispatched_tokens= *use_host_meta=",
        "hidden routing_map probs num_permuted_tokens handle non_blocking",
    ),
    Call(
        "HybridEPBuffer.combine_with_unpermute",
        "self *hidden *probs= *handle= *pad_multiple= *fuse_unpermute_combine= *num_dispatched_tokens=",
        "hidden probs handle",
    ),
)


def signature_of(function: object) -> str:
    """A signature in the words of `Call`."""
    words = []
    for parameter in inspect.signature(function).parameters.values():
        star = "*" if parameter.kind is parameter.KEYWORD_ONLY else ""
        words.append(f"{star}{parameter.name}{'' if parameter.default is parameter.empty else '='}")
    return " ".join(words)


def drift(library: ModuleType, calls: tuple[Call, ...]) -> str | None:
    """Why ``library`` no longer takes one of ``calls``, in one line; None when it takes them all."""
    for call in calls:
        owner, method = call.name.split(".")
        cls = getattr(library, owner, None)
        function = None if cls is None else getattr(cls, method, None)
        if function is None:
            return f"needs {library.__name__}.{call.name}, which this version does not have"
        parameters = inspect.signature(function).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue  # it takes every keyword; whether it understands them the self-test shows
        gone = [name for name in call.used.split() if name not in parameters]
        if gone:
            return f"needs {library.__name__}.{call.name} with {', '.join(gone)}, which this version does not take"
        required = {
            name
            for name, p in parameters.items()
            if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and name != "self"
        }
        new = sorted(required - set(call.used.split()))
        if new:
            return (
                f"calls {library.__name__}.{call.name} without {', '.join(new)}, which this version requires"
            )
    return None
