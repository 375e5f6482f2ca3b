"""Measures candidate tiles on this machine's GPU for `tuning`; tools/tune_ops.py is its program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from triton_ops import expert_ffn, swiglu, symmetric
from triton_ops.tuning import Tile

# A tile's results against the default tile's: sums in another order, rounded once. |error| <= this * max|default's|.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Work(NamedTuple):
    """One operation on one shape class. run: launches with a tile and gives all results."""

    op: str
    shape: str
    candidates: tuple[Tile, ...]
    default: Tile
    run: Callable[[Tile], tuple[Tensor, ...]]


class Outcome(NamedTuple):
    """What `choose` found. refused: reason by tile, of those that do not run here or are wrong."""

    op: str
    shape: str
    tile: Tile
    seconds: float
    default_seconds: float
    refused: dict[Tile, str]


def median_seconds(call: Callable[[], object]) -> float:
    """Median time of a launch on the GPU, with its L2 cache emptied before each."""
    return triton.testing.do_bench(call, warmup=25, rep=100, return_mode="median") * 1e-3


def choose(work: Work, measure: Callable[[Callable[[], object]], float] = median_seconds) -> Outcome:
    """The fastest candidate whose results agree with the default tile's.

    Raises:
        RuntimeError: the default tile does not run here, so nothing can be compared.
    """
    try:
        expected = [t.clone() for t in work.run(work.default)]
        default_seconds = measure(lambda: work.run(work.default))
    except Exception as error:  # as below
        reason = " ".join(str(error).split())[:200]
        raise RuntimeError(
            f"{work.op}, {work.shape}: the default tile does not run here: {reason}"
        ) from error
    best, seconds, refused = work.default, default_seconds, {}
    for tile in work.candidates:
        if tile == work.default:
            continue
        try:
            results = work.run(tile)
            error = max(_error(got, want) for got, want in zip(results, expected, strict=True))
            if not error <= AGREEMENT[expected[0].dtype]:
                refused[tile] = f"results differ by {error:.2g} of the largest"
                continue
            taken = measure(lambda tile=tile: work.run(tile))
            if taken < seconds:
                best, seconds = tile, taken
        except Exception as error:  # too much shared memory or registers: triton has types of its own
            refused[tile] = " ".join(str(error).split())[:200]
    return Outcome(work.op, work.shape, best, seconds, default_seconds, refused)


def works(
    dtype: torch.dtype,
    device: torch.device,
    *,
    experts: int,
    rows: Iterable[int],
    width: int,
    hidden: int,
    matrices: Iterable[tuple[int, int]],
    stack_values: int,
) -> Iterator[Work]:
    """Everything tunable for one model, one after the other: each has tensors of gigabytes at published widths.

    Args:
        experts: E on one GPU. rows: numbers of rows per expert, N. width: D. hidden: F.
        matrices: (R, C) of the stacks that the optimizer orthogonalises, R <= C. stack_values: in one stack.
    """
    for N in rows:
        yield _expert_work(dtype, device, experts, N, width, hidden)
        yield _swiglu_work(dtype, device, experts * N, hidden)
    pairs = set(matrices)
    for R, C in sorted(pairs | {(R, R) for R, _ in pairs}):  # a Gram matrix is multiplied by itself, too
        yield _symmetric_work(dtype, device, max(1, stack_values // (R * C)), R, C)


def _error(got: Tensor, want: Tensor) -> float:
    largest = want.float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((got.float() - want.float()).abs().max() / largest)


def _random(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    """Values of unit variance over the last dimension, so that products stay near 1."""
    return (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype)


def _expert_work(dtype: torch.dtype, device: torch.device, E: int, N: int, D: int, F: int) -> Work:
    x, weight = _random(dtype, device, E, N, D), torch.randn(E, D, 2 * F, device=device).to(dtype)
    hidden, gate_up = x.new_empty(E, N, F), x.new_empty(E, N, 2 * F)

    def run(tile: Tile) -> tuple[Tensor, ...]:
        expert_ffn.launch(x, weight, hidden, gate_up, tile)
        return hidden, gate_up

    shape, default = expert_ffn.shape_of(x, F), expert_ffn.default_tile(dtype)
    return Work("expert_ffn", shape, expert_ffn.CANDIDATES, default, run)


def _swiglu_work(dtype: torch.dtype, device: torch.device, N: int, F: int) -> Work:
    gate_up, grad = torch.randn(N, 2 * F, device=device).to(dtype), torch.randn(N, F, device=device).to(dtype)
    out, grad_gate_up = torch.empty_like(grad), torch.empty_like(gate_up)

    def run(tile: Tile) -> tuple[Tensor, ...]:
        swiglu.launch_forward(gate_up, out, tile)
        swiglu.launch_backward(grad, gate_up, grad_gate_up, out, tile)
        return out, grad_gate_up

    return Work("swiglu", swiglu.shape_of(gate_up), swiglu.CANDIDATES, swiglu.DEFAULT, run)


def _symmetric_work(dtype: torch.dtype, device: torch.device, n: int, R: int, C: int) -> Work:
    x = _random(dtype, device, n, R, C)
    out = x.new_empty(n, R, R)

    def run(tile: Tile) -> tuple[Tensor, ...]:
        symmetric.launch(x, None, 1.0, 0.0, out, tile)
        return (out,)

    shape, default = symmetric.shape_of(x), symmetric.default_tile(dtype)
    return Work("symmetric_product", shape, symmetric.CANDIDATES, default, run)
