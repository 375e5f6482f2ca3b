"""The dispatcher over a library's exchange (`core/moe/exchange.py`): autograd, checkpointing and streams around it.

Weights are applied on the experts' side, because the libraries add up without weights. With y_t = sum over e of
w_te * f_e(x_t) and g_t the gradient of y_t, for a row n of token t at expert e

    forward    y    = combine(w_n * f_n)         gradient of f_n  =  w_n * dispatch(g)_n
                                                 gradient of w_n  =  <dispatch(g)_n, f_n>, sent home by combine
    backward   of x = combine(gradient of x_n)

so the gradient of a weight is formed where f_n is, and returns to its own place: no two rows share one. The other
way, every (token, expert) pair as a token of its own and the weights at home, would send a token as often as experts
picked it; sending it once to a rank is all that these libraries have over an equal-split all-to-all.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map_only

from megatron_nucleus.core import recompute
from megatron_nucleus.core.collectives import Traffic
from megatron_nucleus.core.moe.exchange import Exchange
from megatron_nucleus.types import Routing


class Piece(NamedTuple):
    """Rows at the experts: values [e, n, D], weights [e, n] in fp32, and the way back. tokens: (images, tokens)."""

    rows_eND: Tensor
    weight_eN: Tensor
    route: _Route
    tokens: tuple[int, int]


class _Route:
    """The exchange of one piece and what it needs for the way back, set when the tokens have left."""

    def __init__(self, exchange: Exchange, traffic: Traffic):
        self.exchange, self.traffic = exchange, traffic
        self.trip: Any = None


class ExchangeDispatcher:
    """The four methods of `core/moe/dispatcher.py`, over any `Exchange`.

    Args:
        exchange: of the ranks that share the experts; all layers share it.
        ranks: how many they are. experts: E.
        chunks, overlap: as of `AllToAllDispatcher`.
        dtype: what travels; None = tokens as they are.
    """

    def __init__(
        self,
        exchange: Exchange,
        ranks: int,
        *,
        chunks: int = 1,
        overlap: bool = True,
        dtype: torch.dtype | None = None,
    ):
        self.exchange, self.ranks, self.dtype = exchange, ranks, dtype
        self.chunks, self.overlap = chunks, overlap
        self.traffic = Traffic()
        self._arrived: deque[Piece] = deque()  # at the experts; `give_back` takes them in this order

    def dispatch(self, x_BSD: Tensor, routing: Routing) -> tuple[Piece, ...]:
        """Pieces of b images each, on their way.

        Raises:
            ValueError: fewer images than chunks, or a number of experts that the ranks do not divide.
        """
        B, E, C = routing.index_BEC.shape
        if self.chunks > B or E % self.ranks:
            raise ValueError(
                f"{B} images and {E} experts cannot be cut into {self.chunks} chunks over {self.ranks} ranks; "
                "lower --moe-overlap-chunks to the micro-batch size at most"
            )
        self._arrived.clear()
        x_BSD = x_BSD if self.dtype is None else x_BSD.to(self.dtype)
        taken_BSE, weight_BSE = _map(routing, x_BSD.shape[1])
        pieces = []
        for x, taken, weight in zip(
            *(t.tensor_split(self.chunks) for t in (x_BSD, taken_BSE, weight_BSE)), strict=True
        ):
            route = _Route(self.exchange, self.traffic)
            args = (t.flatten(0, 1) for t in (x, weight, taken))
            with _aside(self.overlap, x, weight, taken):
                rows, weights = _Dispatch.apply(*args, self.ranks * x.shape[0] * C, E // self.ranks, route)
            pieces.append(Piece(rows, weights, route, tuple(x.shape[:2])))
        return tuple(pieces)

    def arrive(self, piece: Piece) -> Tensor:
        """[e, EP*b*C, D] from all ranks, for the experts on this one, in the exchange's order."""
        _wait(self.overlap, piece.rows_eND, piece.weight_eN)
        self._arrived.append(piece)
        return piece.rows_eND

    def give_back(self, rows_eND: Tensor) -> Tensor:
        """[e, EP*b*C, D] of the first piece not yet given back -> [b, S, D] of this rank's own tokens, on its way."""
        piece = self._arrived.popleft()
        with _aside(self.overlap, rows_eND, piece.weight_eN):
            out_TD = _Combine.apply(rows_eND, piece.weight_eN, piece.route)
        return out_TD.unflatten(0, piece.tokens)

    def combine(self, base_BSD: Tensor, pieces: tuple[Tensor, ...], routing: Routing) -> Tensor:
        """base + what the experts gave, added in fp32 and rounded once."""
        for piece in pieces:
            _wait(self.overlap, piece)
        out_BSD = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        wide = torch.promote_types(base_BSD.dtype, torch.float32)
        return (base_BSD.to(wide) + out_BSD).to(base_BSD.dtype)


class _Dispatch(torch.autograd.Function):
    """Tokens and weights to the experts; their gradients come back on the same trip."""

    @staticmethod
    def forward(
        ctx, x_TD: Tensor, weight_TE: Tensor, taken_TE: Tensor, rows: int, experts: int, route: _Route
    ) -> tuple[Tensor, Tensor]:
        def send() -> tuple[Tensor, Tensor, Any]:
            sent = route.exchange.dispatch(x_TD, taken_TE, weight_TE, rows)
            _count(route, sent[0])
            return sent

        rows_ND, weight_N, route.trip = _once("dispatch", send)
        ctx.route, ctx.dtypes = route, (x_TD.dtype, weight_TE.dtype)
        return rows_ND.unflatten(0, (experts, rows)), weight_N.unflatten(0, (experts, rows))

    @staticmethod
    def backward(ctx, grad_eND: Tensor, grad_eN: Tensor):
        route, (x_dtype, weight_dtype) = ctx.route, ctx.dtypes
        rows_ND = grad_eND.flatten(0, 1)
        x_TD, weight_TE = route.exchange.combine(rows_ND, route.trip, weight_N=grad_eN.flatten())
        _count(route, rows_ND)
        return x_TD.to(x_dtype), weight_TE.to(weight_dtype), None, None, None, None


class _Combine(torch.autograd.Function):
    """Weighted rows back to their tokens, where they add up."""

    @staticmethod
    def forward(ctx, rows_eND: Tensor, weight_eN: Tensor, route: _Route) -> Tensor:
        def send() -> Tensor:
            rows_ND = rows_eND.flatten(0, 1)
            _count(route, rows_ND)
            return route.exchange.combine(rows_ND, route.trip, weight_eN.flatten())[0]

        ctx.save_for_backward(rows_eND, weight_eN)
        ctx.route = route
        return _once("combine", send)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        rows_eND, weight_eN = ctx.saved_tensors
        grad_ND = ctx.route.exchange.dispatch_again(grad_TD, ctx.route.trip)
        _count(ctx.route, grad_ND)
        wide_eND = grad_ND.view_as(rows_eND).to(weight_eN.dtype)
        grad_rows = (wide_eND * weight_eN.unsqueeze(-1)).to(rows_eND.dtype)
        return grad_rows, (wide_eND * rows_eND).sum(-1), None


def _map(routing: Routing, tokens: int) -> tuple[Tensor, Tensor]:
    """(taken bool, weight fp32 or wider) [B, S, E]; an expert takes a token of an image once."""
    index_BEC, weight_BEC = routing.index_BEC, routing.weight_BEC
    weight_BEC = weight_BEC.to(torch.promote_types(weight_BEC.dtype, torch.float32))
    shape = (*index_BEC.shape[:2], tokens)
    taken_BES = torch.zeros(shape, dtype=torch.bool, device=index_BEC.device).scatter(2, index_BEC, True)
    weight_BES = weight_BEC.new_zeros(shape).scatter(2, index_BEC, weight_BEC)
    return taken_BES.transpose(1, 2), weight_BES.transpose(1, 2)


def _once(what: str, send: Callable[[], Any]) -> Any:
    """``send()``, or in recomputation what it gave in the forward pass (`core/recompute.py`, for calls that are no
    operation of torch). ``send`` itself must use no operation that is kept."""
    modes = _get_current_dispatch_mode_stack()
    mode = next((m for m in reversed(modes) if isinstance(m, recompute._Record)), None)
    if isinstance(mode, recompute._Replay):
        recorded, out = mode.results.popleft()
        if recorded != what:
            raise RuntimeError(f"recomputation calls {what} where the forward pass called {recorded}")
        return out
    out = send()
    if mode is not None:
        mode.results.append((what, tree_map_only(Tensor, Tensor.detach, out)))
    return out


def _count(route: _Route, rows_ND: Tensor) -> None:
    """Bytes of one crossing if no token shared its way with another expert's: the library sends these or fewer."""
    route.traffic.bytes += rows_ND.nbytes


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _aside(overlap: bool, *used: Tensor):
    """Beside the computation: on a GPU, on a stream of its own that starts with what is computed so far.

    Autograd runs a backward pass on the stream of its forward pass, so that overlaps, too.
    """
    if not (overlap and used[0].is_cuda):
        yield
        return
    side = _side_stream(used[0].device)
    side.wait_stream(torch.cuda.current_stream(used[0].device))
    for tensor in used:
        tensor.record_stream(side)
    with torch.cuda.stream(side):
        yield


def _wait(overlap: bool, *made: Tensor) -> None:
    """Before the computation uses what was made aside."""
    if overlap and made[0].is_cuda:
        current = torch.cuda.current_stream(made[0].device)
        current.wait_stream(_side_stream(made[0].device))
        for tensor in made:
            tensor.record_stream(current)
