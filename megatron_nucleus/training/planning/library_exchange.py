"""What `core/moe/exchange_dispatcher.py` and the adapters of `backends/deepep.py` allocate, as ledger operations.

The libraries' own communication buffers are not in it: their sizes are the libraries' secret until they run. DeepEP is
planned with its ``ElasticBuffer``, which returns a row for every token of the group, whatever arrives; ``Buffer``
within a node returns no more rows than the experts of a rank take.
"""

from __future__ import annotations

from megatron_nucleus.training.planning.ledger import BF16_BYTES, FP32_BYTES, INDEX_BYTES, Ledger

MOST_COLUMNS = 32  # experts of one of DeepEP's rounds (`backends/deepep_rounds.py`)


def dispatch(out: Ledger, tokens: int, rows: int, D: int, E: int) -> str:
    """Tokens and weights to their experts; ``rows`` arrive, as many as leave."""
    n = out.numerics
    # A map of tokens and experts: whether and with which weight, and both again with the token first.
    maps = out.tensor("routing_map", 2 * tokens * E, FP32_BYTES + 1)
    out.tensor("arrived", rows * D)
    out.tensor("arrived_weight", rows, FP32_BYTES)
    inner = (maps, out.tensor("arrived_index", rows, INDEX_BYTES))
    if n.exchange == "deepep":
        inner += (out.tensor("whole_group", _alive(E) * n.ep * tokens * D // n.chunks),)
        inner += (out.tensor("choices", tokens * min(E, MOST_COLUMNS), INDEX_BYTES + FP32_BYTES),)
        if _rounds(E) > 1:  # rows of the rounds, before they are one tensor
            inner += (out.tensor("parts", rows * D // n.chunks),)
    out.add(
        "dispatch", "exchange", ("m2", "weight"), ("arrived", "arrived_weight"), result="kept",
        saves=("arrived_index",), inner=inner, recorded=("arrived", "arrived_weight", "arrived_index"),
        grad_bytes=_way_back_bytes(out, tokens, rows, D),
    )  # fmt: skip
    return "arrived"


def give_back(out: Ledger, tokens: int, rows: int, D: int, E: int) -> None:
    """The experts' rows, weighted, home to their tokens and onto the shared expert's output."""
    n = out.numerics
    out.tensor("returned", tokens * D)
    out.tensor("way_back", 1, _way_back_bytes(out, tokens, rows, D))
    # Backward: gradients come as they left, then twice in fp32: weighted, and beside the rows for the weights' own.
    again = _alive(E) * n.ep * tokens * D * n.bytes if n.exchange == "deepep" else 0
    out.add(
        "return", "exchange", ("expert_out", "arrived_weight"), ("returned",), result="kept",
        saves=("expert_out", "arrived_weight"), inner=("way_back",),
        grad_bytes=(again + rows * D * (n.bytes + 2 * FP32_BYTES)) // n.chunks,
    )  # fmt: skip
    out.tensor("out", tokens * D)
    out.tensor("sum", 2 * tokens * D, FP32_BYTES)
    out.add(
        "combine", "memory", ("shared_out", "returned"), ("out",), inner=("sum",),
        same_grad=("shared_out", "returned"),
    )  # fmt: skip


def _way_back_bytes(out: Ledger, tokens: int, rows: int, D: int) -> int:
    """Made on the way home: rows in fp32, scaled, and with DeepEP added up by token, of which the group has many."""
    n = out.numerics
    wide = 2 * FP32_BYTES * rows * D
    if n.exchange == "hybridep":
        return (wide + BF16_BYTES * rows * D) // n.chunks
    return (wide + (FP32_BYTES + BF16_BYTES) * n.ep * tokens * D) // n.chunks


def _rounds(experts: int) -> int:
    return -(-experts // MOST_COLUMNS)


def _alive(experts: int) -> int:
    """Rounds whose rows exist at once: one is let go of when the next has arrived."""
    return min(2, _rounds(experts))
