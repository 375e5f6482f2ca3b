"""How many bytes a ledger's tensors take, from the first operation to the last and back.

The counts follow autograd: a tensor lives while something still reads it or while it is saved; a gradient from the
operation that makes it to the one that uses it up.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_nucleus.training.planning.ledger import Ledger

GRANULARITIES = ("none", "selective", "full")  # of `core/parallel_state.py`, least recomputation first


class Peak(NamedTuple):
    """Bytes at the fullest moment: activations and their gradients, and gradients of weights made so far."""

    activations: int
    weight_gradients: int

    @property
    def total(self) -> int:
        """Both."""
        return self.activations + self.weight_gradients


def saved(ledger: Ledger) -> set[str]:
    """Names of what autograd keeps of a forward pass, without what is counted elsewhere."""
    return {name for op in ledger.ops for name in op.saves} - ledger.outside


def kept(ledger: Ledger, granularity: str) -> set[str]:
    """Names of what lies in memory between a block's forward and its backward pass.

    Args:
        granularity: of `GRANULARITIES`, see `core/recompute.py`.
    """
    if granularity == "none":
        return saved(ledger)
    recorded = ("kept", "costly") if granularity == "selective" else ("kept",)
    names = {"x"}
    for op in ledger.ops:
        if op.name == "expert_choice":
            # Its `topk` is recorded; the routing is held by those who asked for it, until the losses are formed.
            names.update({"taken_score"}, op.writes, set(op.saves) & {"logits", "logits_fp32"})
        elif op.result in recorded:
            names.update(op.writes if op.recorded is None else op.recorded)
    return names - ledger.outside


def size(ledger: Ledger, names: set[str]) -> int:
    """Bytes of some of the ledger's tensors."""
    return sum(ledger.bytes[name] for name in names)


def forward_peak(ledger: Ledger, stays: set[str], before: set[str] = frozenset()) -> int:
    """Most bytes at any moment of a forward pass, the input and all results so far included.

    Args:
        stays: what outlives its last reader (`saved` or `kept`).
        before: what is there at the start beside the input: results that a recomputation finds recorded.
    """
    last_read = {name: i for i, op in enumerate(ledger.ops) for name in (*op.writes, *op.inner, *op.reads)}
    live = {"x", *before} & ledger.bytes.keys()
    most = 0
    for i, op in enumerate(ledger.ops):
        live.update(name for name in (*op.writes, *op.inner, *op.reads) if name not in ledger.outside)
        most = max(most, size(ledger, live))
        live = {name for name in live if name in stays or last_read.get(name, i) > i}
    return most


def backward_peak(ledger: Ledger, grad_bytes: int, transient_bytes: int = 0) -> Peak:
    """The fullest moment of a backward pass, beginning with all that `saved` names and the output's gradient.

    Args:
        grad_bytes: per trained weight value, for gradients that stay once they are made.
        transient_bytes: per trained weight value, for what is freed again behind each operation.
    """
    last_saver: dict[str, int] = {}
    for i, op in reversed(list(enumerate(ledger.ops))):
        for name in op.saves:
            last_saver[name] = i  # the first operation of the forward pass that saves it lets go of it last
    held = saved(ledger)
    grads = {name: ledger.bytes[name] for name in ledger.ops[-1].writes}
    weights, best = 0, Peak(0, 0)
    for i, op in reversed(list(enumerate(ledger.ops))):
        wanted = [r for r in op.reads if r not in op.constant and not (r in op.same_grad and r not in grads)]
        made = sum(ledger.bytes[r] for r in wanted)
        weights += op.weight_values * grad_bytes
        now = (
            size(ledger, held)
            + sum(grads.values())
            + made
            + op.weight_values * transient_bytes
            + op.grad_bytes
        )
        best = max(best, Peak(now, weights), key=lambda peak: peak.total)
        for name in op.same_grad:
            if name not in grads and op.writes:
                grads[name] = ledger.bytes[name]
        for name in wanted:
            grads[name] = ledger.bytes[name]
        for name in op.writes:
            grads.pop(name, None)
        held = {name for name in held if last_saver[name] < i}
    return best
