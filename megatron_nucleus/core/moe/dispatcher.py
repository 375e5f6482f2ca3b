"""Moves the chosen tokens to their experts and the experts' rows back.

Expert choice gives every expert the same number of rows of every image, so all shapes are known before the router
has run: one gather in destination order, an all-to-all with equal splits, no counts, no host sync, no padding.

A dispatcher has four methods, in the order in which a layer needs them:

    dispatch    tokens -> rows in destination order, sent off, in one or more pieces
    arrive      one piece, complete, as the experts on this rank take it: [e, N, D]
    give_back   the experts' output of that piece, sent off
    combine     all pieces, back on their tokens, weighted

`LocalDispatcher` is the case of one rank. Another transport is another class with these four methods;
`core/parallelize.py` puts it in place.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nucleus.core import collectives
from megatron_nucleus.core.kernels import Kernels
from megatron_nucleus.core.recompute import forget
from megatron_nucleus.types import Routing


class LocalDispatcher:
    """All experts on this rank."""

    def __init__(self, kernels: Kernels):
        self.kernels = kernels

    def dispatch(self, x_BSD: Tensor, routing: Routing) -> tuple[Tensor, ...]:
        """One piece: rows in destination order [E, B*C, D], expert-major, then image, then the score's rank."""
        return (self._gather(x_BSD, routing.index_BEC, 0),)

    def arrive(self, piece: Tensor) -> Tensor:
        """[E, B*C, D], as dispatched."""
        return piece

    def give_back(self, rows_END: Tensor) -> Tensor:
        """[E, B*C, D], as computed."""
        return rows_END

    def combine(self, base_BSD: Tensor, pieces: tuple[Tensor, ...], routing: Routing) -> Tensor:
        """base + the sum over experts of weight * row, back on the tokens. Weights are applied on the token side."""
        (rows_END,) = pieces
        return self._scatter(base_BSD, rows_END, routing)

    def _gather(self, x_BSD: Tensor, index_BEC: Tensor, first_image: int) -> Tensor:
        _, S, D = x_BSD.shape
        rows = self.kernels.moe_gather(x_BSD.reshape(-1, D), _flat_index(index_BEC, S, first_image))
        return rows.view(index_BEC.shape[1], -1, D)

    def _scatter(self, base_BSD: Tensor, rows_END: Tensor, routing: Routing) -> Tensor:
        D = base_BSD.shape[-1]
        weight = routing.weight_BEC.transpose(0, 1).reshape(-1)
        index = _flat_index(routing.index_BEC, base_BSD.shape[1], 0)
        out = self.kernels.moe_combine(base_BSD.reshape(-1, D), rows_END.reshape(-1, D), weight, index)
        return out.view_as(base_BSD)


class AllToAllDispatcher(LocalDispatcher):
    """E/EP experts on each of the EP ranks of a group; every rank brings the same (B, S).

    Per layer and micro-batch each rank sends E*B*C*D values to the experts and gets as many back, in the forward
    and again in the backward pass; (EP-1)/EP of them leave the rank.

    Args:
        group: the ranks that share the experts, in the order of the experts they hold.
        chunks: pieces that a micro-batch is cut into, along its images: the exchange of one piece runs beside the
            experts' work on another.
        overlap: let the exchange run while the shared expert computes; without it, dispatch waits.
    """

    def __init__(self, kernels: Kernels, group: dist.ProcessGroup, *, chunks: int = 1, overlap: bool = True):
        super().__init__(kernels)
        self.group, self.ranks = group, group.size()
        self.chunks, self.overlap = chunks, overlap
        self.traffic = collectives.Traffic()

    def dispatch(self, x_BSD: Tensor, routing: Routing) -> tuple[Tensor, ...]:
        """Pieces [E, b*C, D] of b images each, on their way.

        Raises:
            ValueError: fewer images than chunks, or a number of experts that the ranks do not divide.
        """
        index_BEC = routing.index_BEC
        B, E, _ = index_BEC.shape
        if self.chunks > B or E % self.ranks:
            raise ValueError(
                f"{B} images and {E} experts cannot be cut into {self.chunks} chunks over {self.ranks} ranks; "
                "lower --moe-overlap-chunks to the micro-batch size at most"
            )
        pieces, first = [], 0
        for chunk_bEC in index_BEC.tensor_split(self.chunks):
            rows_END = self._gather(x_BSD, chunk_bEC, first)
            pieces.append(collectives.depart(rows_END, self.group, self.traffic))
            first += chunk_bEC.shape[0]
        if not self.overlap:
            for piece in pieces:
                collectives.settle(piece)
        return tuple(pieces)

    def arrive(self, piece: Tensor) -> Tensor:
        """[E, b*C, D] from here -> [e, EP*b*C, D] from all ranks, for the experts on this one."""
        rows = collectives.arrive(piece, self.group, self.traffic)
        rows = rows.unflatten(0, (self.ranks, -1))  # [EP, e, b*C, D]
        return rows.transpose(0, 1).flatten(1, 2)  # a view where e == 1

    def give_back(self, rows_eND: Tensor) -> Tensor:
        """[e, EP*b*C, D] -> [E, b*C, D] of this rank's own tokens, on its way."""
        forget(rows_eND)  # weights are applied behind the way back: no gradient reads these rows
        rows = rows_eND.unflatten(1, (self.ranks, -1)).transpose(0, 1).flatten(0, 1)
        return collectives.depart(rows, self.group, self.traffic)

    def combine(self, base_BSD: Tensor, pieces: tuple[Tensor, ...], routing: Routing) -> Tensor:
        """As `LocalDispatcher.combine`, once every piece is back."""
        rows = [collectives.arrive(piece, self.group, self.traffic) for piece in pieces]
        rows_END = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        return self._scatter(base_BSD, rows_END, routing)


def _flat_index(index_BEC: Tensor, tokens: int, first_image: int) -> Tensor:
    """[E*B*C] positions in flattened tokens [.., S], of the images from ``first_image`` on."""
    images = torch.arange(first_image, first_image + index_BEC.shape[0], device=index_BEC.device)
    return (index_BEC + images.view(-1, 1, 1) * tokens).transpose(0, 1).reshape(-1)
