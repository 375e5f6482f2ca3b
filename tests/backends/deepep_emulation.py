"""A stand-in for the package deep_ep in plain torch over gloo: the same signatures and, as documented, the same values.

It is stricter than the library where a mistake would show late: rows behind what arrived hold NaN, and numbers that
no one may read are nonsense. It takes any floating dtype, so that sums can be compared tightly.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types

import torch
import torch.distributed as dist
from torch import Tensor

NONSENSE = 12345


def install(*names: str) -> types.ModuleType:
    """Make ``deep_ep`` this stand-in, with the named classes alone, and import the backend over it."""
    library = types.ModuleType("deep_ep")
    library.topk_idx_t = torch.int64
    for name in names:
        setattr(library, name, globals()[name])
    sys.modules["deep_ep"] = library
    sys.modules.pop("megatron_nucleus.backends.deepep", None)
    return importlib.import_module("megatron_nucleus.backends.deepep")


@dataclasses.dataclass
class Handle:
    """source [n] of every arrived row: rank * tokens + token. size: rows returned, arrived or not.

    expert: of each row among those here, where rows are sorted by expert.
    """

    source: Tensor
    size: int
    tokens: int
    expert: Tensor | None = None


@dataclasses.dataclass
class Ranks:
    """A group, and what its ranks say to one another. calls: names of the calls that talked, in order."""

    group: dist.ProcessGroup
    calls: list[str] = dataclasses.field(default_factory=list)

    def everyone(self, what: str, *tensors: Tensor | None) -> list[tuple]:
        self.calls.append(what)
        found: list = [None] * self.group.size()
        dist.all_gather_object(found, (what, tensors), group=self.group)
        assert {name for name, _ in found} == {what}, f"ranks call different things: {found}"
        return [tensors for _, tensors in found]


def _dispatch(
    ranks: Ranks, x, topk_idx, topk_weights, experts: int, size: int | None, tail_idx: int, shuffle
):
    """One row for every (rank, token) of which an expert here is wanted, by rank, then token (or in any order)."""
    assert x.is_contiguous()
    assert topk_idx.is_contiguous()
    assert topk_weights.is_contiguous()
    assert topk_idx.dtype == torch.int64
    assert 0 < topk_idx.shape[1] <= 32
    assert experts % ranks.group.size() == 0
    local = experts // ranks.group.size()
    first, tokens = ranks.group.rank() * local, x.shape[0]
    everyone = ranks.everyone("dispatch", x, topk_idx, topk_weights)
    xs, idx, weights = (torch.cat([one[i] for one in everyone]) for i in range(3))
    assert len({one[0].shape for one in everyone}) == 1
    assert int(idx.min()) >= -1
    assert int(idx.max()) < experts
    here = (first <= idx) & (idx < first + local)
    source = here.any(1).nonzero().flatten()
    if shuffle:
        source = source[torch.randperm(len(source), generator=torch.Generator().manual_seed(first))]
    size = len(source) if size is None else size
    assert len(source) <= size, f"{len(source)} tokens arrive where {size} rows are reserved"
    recv_idx = torch.where(here, idx - first, -1)[source]
    recv_x = _tailed(xs[source], size, torch.nan)
    recv_idx = _tailed(recv_idx, size, tail_idx)
    recv_weights = _tailed(weights[source], size, torch.nan)
    return recv_x, recv_idx, recv_weights, Handle(source, size, tokens)


def _tailed(rows: Tensor, size: int, value: float) -> Tensor:
    tail = torch.full((size - len(rows), *rows.shape[1:]), value, dtype=rows.dtype)
    return torch.cat([rows, tail])


def _again(ranks: Ranks, x: Tensor, handle: Handle) -> Tensor:
    assert x.is_contiguous()
    assert x.shape[0] == handle.tokens
    xs = torch.cat([one[0] for one in ranks.everyone("dispatch again", x)])
    return _tailed(xs[handle.source], handle.size, torch.nan)


def _combine(ranks: Ranks, x: Tensor, handle: Handle, topk_weights: Tensor | None):
    """Rows and weights of every rank added to the tokens they came from, without weights, rounded once."""
    assert x.shape[0] == handle.size
    assert x.is_contiguous()
    n = len(handle.source)
    weights = None if topk_weights is None else topk_weights[:n]
    wide = torch.promote_types(x.dtype, torch.float32)
    total = ranks.group.size() * handle.tokens
    out = torch.zeros(total, x.shape[1], dtype=wide)
    out_weights = None if weights is None else torch.zeros(total, weights.shape[1], dtype=weights.dtype)
    for source, rows, w in ranks.everyone("combine", handle.source, x[:n], weights):
        out.index_add_(0, source, rows.to(wide))
        if w is not None:
            out_weights.index_add_(0, source, w)
    mine = slice(ranks.group.rank() * handle.tokens, (ranks.group.rank() + 1) * handle.tokens)
    return out[mine].to(x.dtype), None if weights is None else out_weights[mine]


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes, num_ranks):
        return hidden_bytes * num_ranks


class Buffer:
    """V1: returns as many rows as arrived, or ``num_worst_tokens`` with -1 behind them."""

    def __init__(
        self, group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=24,
        allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, explicitly_destroy=False, enable_shrink=False,
        comm=None,
    ):  # fmt: skip
        assert num_nvl_bytes > 0
        self.ranks = Ranks(group)

    @staticmethod
    def get_dispatch_config(num_ranks):
        return Config()

    @staticmethod
    def get_combine_config(num_ranks):
        return Config()

    def get_dispatch_layout(
        self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ):
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        owner = torch.where(topk_idx >= 0, topk_idx // (num_experts // self.ranks.group.size()), -1)
        in_rank = torch.stack([(owner == r).any(1) for r in range(self.ranks.group.size())], dim=1)
        return in_rank.sum(0).int(), None, per_expert, in_rank, None

    def dispatch(
        self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None,
        num_tokens_per_expert=None, topk_idx=None, topk_weights=None, expert_alignment=1, num_worst_tokens=0,
        config=None, previous_event=None, async_finish=False, allocate_on_comm_stream=False,
    ):  # fmt: skip
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            return _again(self.ranks, x, handle[0]), None, None, None, None, None
        assert num_tokens_per_rank is not None
        assert is_token_in_rank is not None
        experts, size = len(num_tokens_per_expert), num_worst_tokens or None
        got = _dispatch(self.ranks, x, topk_idx, topk_weights, experts, size, -1, False)
        return *got[:3], [], (got[3],), None

    def combine(
        self, x, handle, topk_weights=None, bias=None, config=None, previous_event=None, async_finish=False,
        allocate_on_comm_stream=False,
    ):  # fmt: skip
        return *_combine(self.ranks, x, handle[0], topk_weights), None


class ElasticBuffer:
    """V2: without a wait for the counts it returns ranks * num_max_tokens_per_rank rows; in any order."""

    def __init__(
        self, group, num_bytes=None, num_cpu_bytes=0, num_max_tokens_per_rank=0, hidden=0, num_topk=0,
        use_fp8_dispatch=False, deterministic=False, allow_hybrid_mode=True, allow_multiple_reduction=True,
        prefer_overlap_with_compute=True, sl_idx=3, num_allocated_qps=0, num_cpu_timeout_secs=300,
        num_gpu_timeout_secs=100, explicitly_destroy=False,
    ):  # fmt: skip
        self.ranks, self.tokens = Ranks(group), num_max_tokens_per_rank
        self.hidden, self.topk, self.deterministic = hidden, num_topk, deterministic

    def dispatch(
        self, x, topk_idx=None, topk_weights=None, cumulative_local_expert_recv_stats=None, num_experts=None,
        num_max_tokens_per_rank=None, expert_alignment=None, num_sms=0, num_qps=0, previous_event=None,
        previous_event_before_epilogue=None, async_with_compute_stream=False, allocate_on_comm_stream=False,
        handle=None, do_handle_copy=True, do_cpu_sync=None, do_expand=False, do_zero_padding=False,
        use_tma_aligned_col_major_sf=False,
    ):  # fmt: skip
        assert x.shape[0] <= self.tokens
        assert x.shape[1] == self.hidden
        assert num_sms or num_experts, "the library counts its blocks from num_experts, with a handle, too"
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            assert not do_cpu_sync
            return _again(self.ranks, x, handle), None, None, handle, None
        assert x.shape[0] <= num_max_tokens_per_rank <= self.tokens
        assert topk_idx.shape[1] <= self.topk
        size = (
            None if do_cpu_sync or do_cpu_sync is None else self.ranks.group.size() * num_max_tokens_per_rank
        )
        tail = NONSENSE  # what stands behind the arrived rows is undefined
        order = not self.deterministic
        return *_dispatch(self.ranks, x, topk_idx, topk_weights, num_experts, size, tail, order), None

    def combine(
        self, x, handle, topk_weights=None, bias=None, num_sms=0, num_qps=0, previous_event=None,
        previous_event_before_epilogue=None, async_with_compute_stream=False, allocate_on_comm_stream=False,
    ):  # fmt: skip
        return *_combine(self.ranks, x, handle, topk_weights), None


class HybridEPBuffer:
    """Takes a map of tokens and experts; rows arrive sorted by expert, rank and token."""

    def __init__(
        self, group, hidden_dim, max_num_of_tokens_per_rank, num_local_experts, use_fp8=False,
        num_sms_dispatch_api=None, num_sms_combine_api=None, num_sms_preprocessing_api=None,
        num_blocks_permute=None, num_blocks_unpermute=None, load_cached_kernels=False, use_shared_buffer=True,
        enable_custom_allgather=False, num_of_hybrid_ep_ranks_per_nvlink_domain=None, use_mnnvl=None,
    ):  # fmt: skip
        self.ranks, self.hidden, self.tokens = Ranks(group), hidden_dim, max_num_of_tokens_per_rank
        self.local = num_local_experts

    def dispatch_with_permute(
        self, *, hidden, topk_idx=None, topk_weights=None, num_of_experts_per_rank=None, num_of_experts=None,
        use_fp8=None, routing_map=None, probs=None, scaling_factor=None, num_permuted_tokens=None,
        pad_multiple=None, handle=None, non_blocking=False, fuse_permute_dispatch=False,
        num_dispatched_tokens=None, use_host_meta=None,
    ):  # fmt: skip
        assert hidden.is_contiguous()
        assert hidden.shape[0] <= self.tokens
        assert hidden.shape[1] == self.hidden
        assert not non_blocking or num_permuted_tokens is not None
        if handle is not None:
            assert num_permuted_tokens == handle[0].size
            return _again(self.ranks, hidden, handle[0]), None, None, None, handle
        assert routing_map.dtype == torch.bool
        assert routing_map.shape == probs.shape
        everyone = self.ranks.everyone("dispatch", hidden, routing_map, probs)
        xs, taken, weights = (torch.cat([one[i] for one in everyone]) for i in range(3))
        first = self.ranks.group.rank() * self.local
        mine = slice(first, first + self.local)
        expert, source = taken[:, mine].t().nonzero(as_tuple=True)
        assert len(source) <= num_permuted_tokens
        out = _tailed(xs[source], num_permuted_tokens, torch.nan)
        out_weights = _tailed(weights[:, mine][source, expert], num_permuted_tokens, torch.nan)
        kept = Handle(source, num_permuted_tokens, len(hidden), expert)
        return out, out_weights, None, torch.bincount(expert, minlength=self.local), (kept,)

    def combine_with_unpermute(
        self, *, hidden, probs=None, handle=None, pad_multiple=None, fuse_unpermute_combine=False,
        num_dispatched_tokens=None,
    ):  # fmt: skip
        kept, placed = handle[0], None
        if probs is not None:  # each in its own expert's column of [T, E]
            size, first = self.ranks.group.size(), self.ranks.group.rank() * self.local
            placed = torch.zeros(kept.size, self.local * size, dtype=probs.dtype)
            placed[torch.arange(len(kept.source)), first + kept.expert] = probs[: len(kept.source)]
        return _combine(self.ranks, hidden, kept, placed)
