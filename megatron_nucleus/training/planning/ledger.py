"""A training step's operations written down: what each reads, writes, keeps for the backward pass and multiplies.

One list serves all of the planner: memory is who holds a tensor and for how long (`liveness.py`), arithmetic is the
sum of the products, time is both over a device's rates. Nothing is run to make it.

What an operation keeps depends on the backend that runs it. A fused one keeps its inputs and forms the rest again; a
plain torch one keeps what each of its steps needs. tests/training/planning holds both kinds against what autograd
really saves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from megatron_nucleus.ops.table import AUTO_ORDER, ROWS
from megatron_nucleus.utils.errors import ConfigError, nearest

FP32_BYTES, BF16_BYTES, INDEX_BYTES, COMPLEX_BYTES, FP8_BYTES = 4, 2, 8, 8, 1

# Bytes that move for each value of an FP8 product's operand: read for the largest one, read again, written in 8 bits.
CAST_BYTES = 2 * BF16_BYTES + FP8_BYTES

# Operations whose plain torch version keeps more than its inputs; of all others every backend keeps the same.
FUSABLE = ("modulated_layer_norm", "gated_residual_norm", "norm_rope", "swiglu", "expert_ffn", "moe_combine")


class MicroBatch(NamedTuple):
    """What one forward pass of a rank takes: B images of S image tokens and L text tokens each."""

    images: int
    tokens: int
    text_tokens: int


class Op(NamedTuple):
    """One operation of the forward pass and its gradient.

    kind: ``matmul``, ``matmul8`` (of 8-bit operands), ``attention``, ``memory`` (bound by bytes) or ``exchange``
        (between ranks).
    reads, writes: tensors by name. saves: of these and of ``inner``, what its gradient needs.
    inner: tensors that it makes for itself alone. constant: of ``reads``, what needs no gradient.
    same_grad: of ``reads``, what takes over the gradient of what is written, without a copy.
    result: what `core/recompute.py` does with it: ``kept`` (never repeated), ``costly``, ``passing`` (not repeated by
        ``selective`` either, but without keeping the values, `recompute.forget`) or ``cheap``.
    recorded: what is recorded of a ``kept`` or ``costly`` one; None = what it writes.
    flops, grad_flops: of the matrix products, a multiply-add is two.
    cast_bytes, grad_cast_bytes: moved to make 8-bit operands, apart from the product.
    grad_bytes: what the gradient makes for itself alone, beside ``saves`` and the gradients.
    weight_values: trained weights that it multiplies with, whose gradients it makes.
    """

    name: str
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    saves: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    same_grad: tuple[str, ...] = ()
    result: str = "cheap"
    flops: int = 0
    grad_flops: int = 0
    weight_values: int = 0
    recorded: tuple[str, ...] | None = None
    cast_bytes: int = 0
    grad_cast_bytes: int = 0
    grad_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Numerics:
    """In what a model computes.

    bf16: activations are bf16 (autocast), else fp32. gathered: FSDP hands the weights over in the activations'
    dtype; without it autocast makes a copy of each. plain: operations of `FUSABLE` that run as plain torch.
    ep: ranks that share the experts. chunks: pieces of a micro-batch in the all-to-all.
    exchange: what carries tokens, of `ParallelConfig.moe_token_dispatcher_type`.
    fp8: who multiplies in 8 bits, of `PrecisionConfig.fp8`; fp8_layers: where.
    """

    bf16: bool
    gathered: bool
    plain: frozenset[str] = frozenset()
    ep: int = 1
    chunks: int = 1
    exchange: str = "alltoall"
    fp8: str = "none"
    fp8_layers: frozenset[str] = frozenset()

    @property
    def bytes(self) -> int:
        """Of an activation."""
        return BF16_BYTES if self.bf16 else FP32_BYTES

    @property
    def norm_bytes(self) -> int:
        """Of a query or key behind its norm, which takes the dtype of the norm's weight."""
        return self.bytes if self.gathered else FP32_BYTES

    @property
    def copies_weights(self) -> bool:
        """Whether autocast makes a bf16 copy of every weight for a forward pass."""
        return self.bf16 and not self.gathered


class Ledger:
    """Operations in forward order and the bytes of their tensors.

    Args:
        numerics: of all of them.
        outside: tensors that other parts of the model hold; they are read and saved here, but counted there.
    """

    def __init__(self, numerics: Numerics, outside: tuple[str, ...] = ()):
        self.numerics, self.outside = numerics, frozenset(outside)
        self.ops: list[Op] = []
        self.bytes: dict[str, int] = {}

    def tensor(self, name: str, values: int, bytes_each: int | None = None) -> str:
        """Name a tensor; without ``bytes_each`` it has the activations' dtype."""
        self.bytes[name] = values * (self.numerics.bytes if bytes_each is None else bytes_each)
        return name

    def add(self, name: str, kind: str, reads: tuple, writes: tuple, **rest) -> None:
        """Append an operation."""
        self.ops.append(Op(name, kind, reads, writes, **rest))

    def linear(
        self, name: str, source: str, target: str, rows: int, k: int, n: int, layer: str | None = None, **rest
    ) -> None:
        """[rows, k] @ [k, n]: the product, and one each for the gradients of input and weight.

        layer: of `precision.LAYERS`.
        """
        product = 2 * rows * k * n
        rest = {"saves": (source,), "result": "costly", "weight_values": k * n} | rest
        grads = 1 if source in rest.get("constant", ()) else 2
        self.tensor(target, rows * n)
        kind = "matmul"
        if self.numerics.fp8 != "none" and layer in self.numerics.fp8_layers:
            kind = "matmul8"
            rest |= self._in_8_bits(name, source, layer == "experts", rows, k, n, rest)
        self.add(name, kind, (source,), (target,), flops=product, grad_flops=grads * product, **rest)

    def _in_8_bits(
        self, name: str, source: str, of_experts: bool, rows: int, k: int, n: int, rest: dict
    ) -> dict:
        """How a product of 8-bit operands differs: in what is kept of it, and by the work on its operands.

        Kept, by what each library saves for its gradient: torchao both operands as they came (of experts, padded rows
        and weights column by column: copies); Transformer Engine both in 8 bits, weights in two layouts; ours what
        torch's own product keeps. Only ours and torchao's linear layers are operations that `core/recompute.py` knows.
        """
        operands = rows * k + rest["weight_values"]
        library, out = self.numerics.fp8, {}
        out["cast_bytes"] = CAST_BYTES * operands
        out["grad_cast_bytes"] = CAST_BYTES * (
            rows * n + (0 if library == "transformer_engine" else operands)
        )
        values = self.tensor(f"{name}_8", rows * k, FP8_BYTES)
        weights = self.tensor(f"{name}_weights_8", rest["weight_values"], 2 * FP8_BYTES)
        out["inner"] = (values, weights)
        if library == "transformer_engine":
            out |= {"saves": (values, weights), "result": "cheap"}
        elif library == "torchao" and of_experts:
            copies = (
                self.tensor(f"{name}_rows", rows * k, BF16_BYTES),
                self.tensor(f"{name}_weights", rest["weight_values"], BF16_BYTES),
            )
            out |= {"saves": copies, "inner": (values, weights, *copies), "result": "cheap"}
        elif library == "emulated":  # its products are formed in fp32, and recorded so
            wide = self.tensor(f"{name}_wide", rows * n, FP32_BYTES)
            rounded = self.tensor(f"{name}_rounded", operands, FP32_BYTES)
            out |= {"inner": (wide, rounded)}
            if rest["result"] != "passing":
                out["recorded"] = (wide,)
        return out

    def fused(self, op: str) -> bool:
        """Whether ``op`` runs as one kernel that keeps its inputs."""
        return op not in self.numerics.plain

    @property
    def flops(self) -> int:
        """Of the forward pass."""
        return sum(op.flops for op in self.ops)

    @property
    def grad_flops(self) -> int:
        """Of the backward pass, without recomputation."""
        return sum(op.grad_flops for op in self.ops)


def plain_operations(choices: Mapping[str, str], device_type: str, usable: frozenset[str]) -> frozenset[str]:
    """Which operations of `FUSABLE` run as plain torch.

    Args:
        choices: backend of each operation, a name or ``auto`` (`core/kernels.py`).
        device_type: of the planned run. usable: backends that are installed there.

    Raises:
        ConfigError: a backend that an operation does not have, or has not on that device.
    """
    plain = set()
    for op in FUSABLE:
        rows = {r.backend: r for r in ROWS if r.op == op}
        choice = choices.get(op, "auto")
        if choice == "auto":
            order = [b for b in AUTO_ORDER.get(device_type, ("torch",)) if b in usable or b == "torch"]
            choice = next(b for b in order if b in rows and device_type in rows[b].devices.split())
        if choice not in rows or device_type not in rows[choice].devices.split():
            there = [b for b, row in rows.items() if device_type in row.devices.split()]
            raise ConfigError(
                f"--{op.replace('_', '-')}-backend {choice}: not on {device_type}{nearest(choice, there)}; "
                f"one of: auto, {', '.join(there)}"
            )
        if choice == "torch":
            plain.add(op)
    return frozenset(plain)
