"""Names the parts of a training step, forward and backward, without a line of the model knowing of it.

`named_regions` wraps the methods where the parts begin and end. What happens at these places is a `Sink`: a
profiler's range, an NVTX range (`ranges.py`) or a clock (`clock.py`). The backward pass has the same names: an
identity in the graph stands before and behind each part, and the gradient passes them in the opposite order.

    attention    projections, norms, rotations and softmax attention
    router       scores and the experts' choice
    dispatch     tokens to the experts' rows and on their way; with several ranks also their arrival
    experts      the batched products
    combine      the experts' rows back; with several ranks also the way
    shared_expert, dense_ffn

Who runs a step names its outer parts itself: `STEP_PARTS`.
Regions nest: with several ranks rows arrive (dispatch) and leave (combine) inside of ``experts``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.moe.dispatcher import LocalDispatcher

# Outermost parts, entered by who runs the step; they follow each other and never nest in one another.
STEP_PARTS = ("data", "forward", "backward", "optimizer")
MOE_REGIONS = ("router", "dispatch", "experts", "combine", "shared_expert")
REGIONS = ("attention", *MOE_REGIONS, "dense_ffn")


class Sink(Protocol):
    """What hears of regions. Calls are balanced and nested; backward passes of a GPU call from another thread."""

    def enter(self, name: str) -> None:
        """The region begins."""

    def leave(self, name: str) -> None:
        """The region ends."""


class Silent:
    """A sink that does nothing."""

    def enter(self, name: str) -> None:
        """Nothing."""

    def leave(self, name: str) -> None:
        """Nothing."""


SILENT = Silent()


@contextmanager
def region(sink: Sink, name: str) -> Iterator[None]:
    """Name what runs inside the block."""
    sink.enter(name)
    try:
        yield
    finally:
        sink.leave(name)


@contextmanager
def named_regions(model: NucleusTransformer, sink: Sink, *, compiled: bool = False) -> Iterator[None]:
    """Report `REGIONS` of ``model`` to ``sink`` inside the block.

    Values and gradients stay the same bits. The model's graphs of the block must run backward inside of it, too.

    Args:
        compiled: the blocks are compiled (``parallel.compile_blocks``): only `MOE_REGIONS` without the shared expert
            are named, which run outside of the compiled code.
    """
    places = [place for block in model.blocks for place in _places_of(block, compiled)]
    before = [vars(owner).get(method) for owner, method, _ in places]
    for owner, method, name in places:
        # An instance's own attribute hides the class's method, also from `nn.Module.__call__`.
        object.__setattr__(owner, method, _reporting(getattr(owner, method), name, sink))
    try:
        yield
    finally:
        for (owner, method, _), own in zip(places, before, strict=True):
            object.__delattr__(owner, method)
            if own is not None:  # another wrapper stood here, such as a compiled forward
                object.__setattr__(owner, method, own)


def _places_of(block: nn.Module, compiled: bool) -> list[tuple[Any, str, str]]:
    """(owner, method, region) of one block."""
    places: list[tuple[Any, str, str]] = [] if compiled else [(block.attention, "forward", "attention")]
    if not block.is_moe:
        return places if compiled else [*places, (block.feed_forward, "forward", "dense_ffn")]
    moe = block.moe
    places += [
        (moe.router, "forward", "router"),
        (moe.dispatcher, "dispatch", "dispatch"),
        (moe.experts, "forward", "experts"),
        (moe.dispatcher, "combine", "combine"),
    ]
    if type(moe.dispatcher) is not LocalDispatcher:  # whose rows are there already
        places += [(moe.dispatcher, "arrive", "dispatch"), (moe.dispatcher, "give_back", "combine")]
    return places if compiled else [*places, (moe.shared_expert, "forward", "shared_expert")]


def _reporting(function: Callable, name: str, sink: Sink) -> Callable:
    """``function`` that reports itself and its backward pass."""

    @functools.wraps(function)
    def reporting(*args: Any, **kwargs: Any) -> Any:
        marked = False
        if torch.is_grad_enabled():
            args, marked = _mark(args, functools.partial(sink.leave, name))
        with region(sink, name):
            out = function(*args, **kwargs)
        # Without an input that wants a gradient nothing would tell where the backward pass ends.
        return _mark(out, functools.partial(sink.enter, name))[0] if marked else out

    return reporting


class _Edge(torch.autograd.Function):
    """Identity of some tensors; calls ``action`` in the backward pass, when all their gradients are there."""

    @staticmethod
    def forward(ctx, action: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.action = action
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        ctx.action()
        return None, *grads


def _mark(tree: Any, action: Callable[[], None]) -> tuple[Any, bool]:
    """``tree`` with an `_Edge` around all tensors that want a gradient, and whether there were any."""
    leaves, structure = tree_flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not where:
        return tree, False
    for i, tensor in zip(where, _Edge.apply(action, *(leaves[i] for i in where)), strict=True):
        leaves[i] = tensor
    return tree_unflatten(leaves, structure), True
