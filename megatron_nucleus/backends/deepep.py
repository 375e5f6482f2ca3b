"""DeepEP's transports of tokens between GPUs (`core/moe/exchange.py` says what an exchange does).

NOT RUN WITH THE LIBRARY: the calls follow its documentation, and a stand-in in plain torch with the same signatures
(tests/backends/deepep_emulation.py) is what the arithmetic is tested against. The self-test at start-up
(`core/moe/exchange.py`) judges the real one.

The library sends a token to a rank once, with the weights of that rank's experts beside it, and on the way back adds
one row of each rank WITHOUT weights. So the weights are applied where the experts are: each rank adds up its experts'
weighted rows in fp32 and sends one row per token.
"""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

import deep_ep
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import cpp_extension

from megatron_nucleus.backends import recorded
from megatron_nucleus.backends.deepep_rounds import arrived_rows, local_columns, round_choices, split_rounds
from megatron_nucleus.backends.gpu import why_no_gpu

# Sizes of a group that the kernels of `Buffer` are built for (documentation of DeepEP 1.x and CONTRACTS of `Buffer`).
LEGACY_RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
NODE_RANKS = 8  # `Buffer` reaches these over NVLink; only there it can leave out the wait for the counts
ELASTIC = hasattr(deep_ep, "ElasticBuffer")


def why_unavailable(device_type: str) -> str | None:
    """Why no transport of the library can run here, whatever the model; None when one may."""
    reason = why_no_gpu(device_type, (9, 0))
    if reason is not None:
        return reason
    if cpp_extension.CUDA_HOME is None and shutil.which("nvcc") is None:
        return "compiles its kernels when they are first used and finds no nvcc (install the CUDA toolkit)"
    return None


def why_deepep_unavailable(ranks: int, experts: int, width: int) -> str | None:
    """Why `RoundsExchange` cannot serve this model; `why_unavailable` first."""
    reason = _drift("deepep" if ELASTIC else "deepep Buffer")
    if reason is not None:
        return reason
    if not ELASTIC:
        if ranks not in LEGACY_RANKS:
            allowed = ", ".join(map(str, LEGACY_RANKS))
            return f"is built for groups of {allowed} ranks, not of {ranks} (--expert-model-parallel-size)"
        return _uneven(width, 8)
    torch_version = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
    if torch_version < (2, 10):
        return f"needs torch 2.10 or newer, this is {torch.__version__}"
    nccl = torch.cuda.nccl.version()
    if nccl < (2, 30, 4):
        return f"needs NCCL 2.30.4 or newer, this is {'.'.join(map(str, nccl))}"
    return _uneven(width, 256)


def why_hybridep_unavailable(ranks: int, experts: int, width: int) -> str | None:
    """Why `RoutingMapExchange` cannot serve this model; `why_unavailable` first."""
    return _drift("hybridep") or _uneven(width, 16)


def _drift(library: str) -> str | None:
    return recorded.drift(deep_ep, recorded.library(library).calls)


def _uneven(width: int, multiple: int) -> str | None:
    return f"needs a model width divisible by {multiple}, this is {width}" if width % multiple else None


@dataclasses.dataclass(frozen=True)
class _Round:
    """One round on its way: the library's handle, and which arrived rows each expert on this rank takes.

    columns: those of this rank's experts. index_cN: `arrived_rows`. arrived: M, rows that the library returned.
    """

    handle: Any
    columns: range
    index_cN: Tensor
    arrived: int


@dataclasses.dataclass(frozen=True)
class _Trip:
    """What `RoundsExchange` needs to send anything back. dtype: what travels."""

    rounds: tuple[_Round, ...]
    dtype: torch.dtype


class RoundsExchange:
    """``ElasticBuffer``, or ``Buffer`` where the library has none, in ceil(E / 32) rounds.

    Args:
        group: ranks that share the experts, in the order of the experts they hold.
        experts: E of a layer. width: D.
    """

    def __init__(self, group: dist.ProcessGroup, experts: int, width: int):
        self.ranks, self.local = group.size(), experts // group.size()
        self.first = group.rank() * self.local
        self.rounds = split_rounds(experts)
        columns = max(map(len, self.rounds))
        self.library = (_Elastic if ELASTIC else _Legacy)(group, experts, width, columns)

    def dispatch(
        self, x_TD: Tensor, taken_TE: Tensor, weight_TE: Tensor, rows: int
    ) -> tuple[Tensor, Tensor, _Trip]:
        """`core.moe.exchange.Exchange.dispatch`."""
        x_TD = x_TD.contiguous()
        arrived, weights, trip = [], [], []
        for experts in self.rounds:
            topk_idx, topk_weights = round_choices(taken_TE, weight_TE, experts)
            columns = local_columns(experts, self.first, self.local)
            # No rank gets more tokens than there are, nor more than its experts take; 0 would mean "unknown".
            most = max(1, min(self.ranks * x_TD.shape[0], len(columns) * rows))
            x_MD, idx_MK, weight_MK, handle = self.library.dispatch(x_TD, topk_idx, topk_weights, most)
            index_cN = arrived_rows(idx_MK, columns, rows)
            weight_cM = weight_MK[:, columns.start : columns.stop].t()
            arrived.append(x_MD.index_select(0, index_cN.flatten()))
            weights.append(weight_cM.gather(1, index_cN).flatten())
            trip.append(_Round(handle, columns, index_cN, x_MD.shape[0]))
        return _joined(arrived), _joined(weights), _Trip(tuple(trip), x_TD.dtype)

    def dispatch_again(self, x_TD: Tensor, trip: _Trip) -> Tensor:
        """`core.moe.exchange.Exchange.dispatch_again`."""
        x_TD = x_TD.to(trip.dtype).contiguous()
        rows = (
            self.library.dispatch_again(x_TD, r.handle).index_select(0, r.index_cN.flatten())
            for r in trip.rounds
        )
        return _joined(list(rows))

    def combine(
        self, rows_ND: Tensor, trip: _Trip, scale_N: Tensor | None = None, weight_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`core.moe.exchange.Exchange.combine`."""
        out_TD, weights, first = None, [], 0
        for step, experts in zip(trip.rounds, self.rounds, strict=True):
            mine = slice(first, first + step.index_cN.numel())
            first = mine.stop
            x_MD = _summed(rows_ND[mine], None if scale_N is None else scale_N[mine], step)
            weight_MK = None if weight_N is None else _placed(weight_N[mine], step, len(experts))
            part_TD, part_TK = self.library.combine(x_MD.to(trip.dtype), step.handle, weight_MK)
            wide_TD = part_TD.to(torch.promote_types(trip.dtype, torch.float32))
            out_TD = wide_TD if out_TD is None else out_TD + wide_TD
            weights.append(part_TK)
        return out_TD.to(trip.dtype), None if weight_N is None else torch.cat(weights, dim=1)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _summed(rows_ND: Tensor, scale_N: Tensor | None, step: _Round) -> Tensor:
    """[M, D] in fp32 (fp64 for fp64): each arrived token's rows of the experts here, scaled and added; else zeros."""
    wide_ND = rows_ND.to(torch.promote_types(rows_ND.dtype, torch.float32))
    if scale_N is not None:
        wide_ND = wide_ND * scale_N.unsqueeze(-1)
    return wide_ND.new_zeros(step.arrived, rows_ND.shape[1]).index_add_(0, step.index_cN.flatten(), wide_ND)


def _placed(weight_N: Tensor, step: _Round, width: int) -> Tensor:
    """[M, K]: each row's weight in its token's line and its expert's column; zeros elsewhere, as they are added up."""
    weight_MK = weight_N.new_zeros(step.arrived, width)
    at = slice(step.columns.start, step.columns.stop)
    weight_MK[:, at] = weight_MK[:, at].t().scatter(1, step.index_cN, weight_N.view_as(step.index_cN)).t()
    return weight_MK


class _Elastic:
    """Calls of ``ElasticBuffer``. It never waits for counts, for which it returns EP*T rows, whatever arrives.

    The buffer is made for the most tokens seen so far; all ranks of the group come with the same number.
    """

    def __init__(self, group: dist.ProcessGroup, experts: int, width: int, columns: int):
        self.group, self.experts = group, experts
        self.width, self.columns = width, columns
        self.index_dtype = getattr(deep_ep, "topk_idx_t", torch.int64)
        self.buffer, self.tokens = None, 0

    def dispatch(self, x_TD: Tensor, topk_idx: Tensor, topk_weights: Tensor, most: int) -> tuple:
        tokens = x_TD.shape[0]
        if tokens > self.tokens:
            self.buffer, self.tokens = None, tokens  # the old one goes first: it may be gigabytes
            self.buffer = deep_ep.ElasticBuffer(
                group=self.group,
                num_max_tokens_per_rank=tokens,
                hidden=self.width,
                num_topk=self.columns,
                deterministic=torch.are_deterministic_algorithms_enabled(),
            )
        x_MD, idx_MK, weight_MK, handle, _ = self.buffer.dispatch(
            x=x_TD,
            topk_idx=topk_idx.to(self.index_dtype),
            topk_weights=topk_weights,
            num_experts=self.experts,
            num_max_tokens_per_rank=tokens,
            do_cpu_sync=False,
        )
        return x_MD, idx_MK, weight_MK, handle

    def dispatch_again(self, x_TD: Tensor, handle: Any) -> Tensor:
        # With a handle, too, the library counts its blocks from num_experts, before it looks into the handle.
        return self.buffer.dispatch(x=x_TD, handle=handle, num_experts=self.experts)[0]

    def combine(self, x_MD: Tensor, handle: Any, weight_MK: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.buffer.combine(x=x_MD, handle=handle, topk_weights=weight_MK)[:2]


class _Legacy:
    """Calls of ``Buffer``. Beyond one node it waits for the counts in every dispatch: the library has no other way."""

    def __init__(self, group: dist.ProcessGroup, experts: int, width: int, columns: int):
        self.experts, self.in_node = experts, group.size() <= NODE_RANKS
        self.index_dtype = getattr(deep_ep, "topk_idx_t", torch.int64)
        ranks, row_bytes = group.size(), width * torch.bfloat16.itemsize
        configs = [
            deep_ep.Buffer.get_dispatch_config(num_ranks=ranks),
            deep_ep.Buffer.get_combine_config(num_ranks=ranks),
        ]
        rdma_bytes = 0
        if not self.in_node:
            rdma_bytes = max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs)
        self.buffer = deep_ep.Buffer(
            group=group,
            num_nvl_bytes=max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs),
            num_rdma_bytes=rdma_bytes,
        )

    def dispatch(self, x_TD: Tensor, topk_idx: Tensor, topk_weights: Tensor, most: int) -> tuple:
        topk_idx = topk_idx.to(self.index_dtype)
        layout = self.buffer.get_dispatch_layout(topk_idx=topk_idx, num_experts=self.experts)
        per_rank, per_rdma_rank, per_expert, in_rank, _ = layout
        x_MD, idx_MK, weight_MK, _, handle, _ = self.buffer.dispatch(
            x=x_TD,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_worst_tokens=most if self.in_node else 0,
        )
        return x_MD, idx_MK, weight_MK, handle

    def dispatch_again(self, x_TD: Tensor, handle: Any) -> Tensor:
        return self.buffer.dispatch(x=x_TD, handle=handle)[0]

    def combine(self, x_MD: Tensor, handle: Any, weight_MK: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.buffer.combine(x=x_MD, handle=handle, topk_weights=weight_MK)[:2]


@dataclasses.dataclass(frozen=True)
class _MapTrip:
    """What `RoutingMapExchange` needs to send anything back. rows: of all experts on this rank."""

    handle: Any
    rows: int
    dtype: torch.dtype


class RoutingMapExchange:
    """``HybridEPBuffer``: takes the whole map of tokens and experts and returns rows sorted by expert.

    With the number of rows known beforehand nothing waits for the device. Arguments as of `RoundsExchange`.
    """

    def __init__(self, group: dist.ProcessGroup, experts: int, width: int):
        self.group, self.local, self.width = group, experts // group.size(), width
        self.buffer, self.tokens = None, 0

    def dispatch(
        self, x_TD: Tensor, taken_TE: Tensor, weight_TE: Tensor, rows: int
    ) -> tuple[Tensor, Tensor, _MapTrip]:
        """`core.moe.exchange.Exchange.dispatch`."""
        if x_TD.shape[0] > self.tokens:
            self.buffer, self.tokens = None, x_TD.shape[0]
            self.buffer = deep_ep.HybridEPBuffer(
                group=self.group,
                hidden_dim=self.width,
                max_num_of_tokens_per_rank=self.tokens,
                num_local_experts=self.local,
            )
        total = self.local * rows
        rows_ND, weight_N, _, _, handle = self.buffer.dispatch_with_permute(
            hidden=x_TD.contiguous(),
            routing_map=taken_TE.contiguous(),
            probs=weight_TE.contiguous(),
            num_permuted_tokens=total,
            non_blocking=True,
        )
        return rows_ND, weight_N, _MapTrip(handle, total, x_TD.dtype)

    def dispatch_again(self, x_TD: Tensor, trip: _MapTrip) -> Tensor:
        """`core.moe.exchange.Exchange.dispatch_again`."""
        return self.buffer.dispatch_with_permute(
            hidden=x_TD.to(trip.dtype).contiguous(),
            handle=trip.handle,
            num_permuted_tokens=trip.rows,
            non_blocking=True,
        )[0]

    def combine(
        self, rows_ND: Tensor, trip: _MapTrip, scale_N: Tensor | None = None, weight_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`core.moe.exchange.Exchange.combine`. Scaled rows are rounded before the library adds them up."""
        if scale_N is not None:
            wide = torch.promote_types(rows_ND.dtype, torch.float32)
            rows_ND = rows_ND.to(wide) * scale_N.unsqueeze(-1)
        if weight_N is not None:
            weight_N = weight_N.contiguous()
        return self.buffer.combine_with_unpermute(
            hidden=rows_ND.to(trip.dtype).contiguous(), probs=weight_N, handle=trip.handle
        )
