"""Near pairs -> clusters, each around one row that stays.

Going through the rows from the best to the worst, a row is kept unless it is near a better row that is kept; then it
joins the best such row. So every dropped row is itself near the row that stands for it: there are no chains, in which
A is near B and B is near C, and C is dropped for an A that it does not resemble.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megatron_nucleus.data.curation.near_duplicates.verify import Check
from megatron_nucleus.utils.errors import ConfigError

_CHUNK_PAIRS = 1 << 20  # looked at at once; own choice, about 60 MB
_DISTANCE_BITS = 3  # 0..4 of `PAIR`
_UNDECIDED = np.iinfo(np.int64).max


class Clusters(NamedTuple):
    """Rows that are near others, ascending, and what stands for each; arrays of one length.

    row: int32. representative: int32, the row itself where it is kept. distance: uint8, between the two 64-bit
    hashes, in bits.
    """

    row: np.ndarray
    representative: np.ndarray
    distance: np.ndarray

    def for_all(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Representative (int32 [rows]) and distance (uint8 [rows]) of every row of a corpus; a row that is near no
        other one stands for itself."""
        representative = np.arange(rows, dtype=np.int32)
        distance = np.zeros(rows, np.uint8)
        representative[self.row] = self.representative
        distance[self.row] = self.distance
        return representative, distance


def star_clusters(pairs: np.ndarray, best_first: np.ndarray, check: Check | None = None) -> Clusters:
    """Choose the rows that stay, and for every other one the row that stands for it.

    Equal hashes: of rows with one hash the search pairs only the lowest with the others (`search.Found`). Here each
    of them counts as near all that the lowest is near, and they as near each other. The result is that of the plain
    rule on all these pairs, of which only those of a row with a kept one are ever looked at.

    Args:
        pairs: `PAIR` [m] of a search, in any order.
        best_first: integers, every row of ``pairs`` once, best first; rows that are in no pair are passed over.
        check: what else must hold between a row and the one that stands for it; None: nothing.

    Raises:
        ConfigError: best_first lacks a row of a pair or names one twice.
    """
    rows = np.unique(np.concatenate([pairs["low"], pairs["high"]]))
    graph = _graph(pairs, rows, _order(rows, best_first))
    best = np.full(len(rows), _UNDECIDED)  # by rank: (rank of the representative, distance) in one number
    head = graph.members[graph.member_start[:-1]].astype(
        np.int64
    )  # best undecided rank of a node, or len(rows)
    candidates = np.arange(len(head))
    while len(candidates):
        leading = _leading(graph, head, candidates)
        best[head[leading]] = head[leading] << _DISTANCE_BITS
        touched = _absorb(graph, leading, head, best, check)
        touched = touched[head[touched] < len(rows)]
        heads = _heads(graph, touched, best)
        changed = touched[heads != head[touched]]
        head[touched] = heads
        # A node that waits is still waiting unless a row beside it was decided.
        candidates = np.unique(graph.near[_spans(graph.near_start, changed)[0]])
        candidates = candidates[head[candidates] < len(rows)]
    mine = best[graph.rank]
    standing = graph.row_of_rank[mine >> _DISTANCE_BITS]
    return Clusters(rows, standing, (mine & (1 << _DISTANCE_BITS) - 1).astype(np.uint8))


def _order(rows: np.ndarray, best_first: np.ndarray) -> np.ndarray:
    """Positions in ascending ``rows``, best first."""
    place = np.searchsorted(rows, best_first)
    inside = place < len(rows)
    inside[inside] = rows[place[inside]] == np.asarray(best_first)[inside]
    order = place[inside]
    seen = np.bincount(order, minlength=len(rows))
    if (seen != 1).any():
        wrong = int(np.flatnonzero(seen != 1)[0])
        raise ConfigError(
            f"best_first names row {rows[wrong]} {seen[wrong]} times; every row of a pair must be once"
        )
    return order


class _Graph(NamedTuple):
    """Rows by rank (0: best) in nodes of equal hashes, and which nodes are near.

    rank: of each row; row_of_rank: its inverse. members[member_start[i]:member_start[i + 1]]: ranks in node i,
    ascending. near, distance, near_start: in the same way the nodes near node i, and itself. reach: rows in all
    nodes near node i.
    """

    rank: np.ndarray
    row_of_rank: np.ndarray
    members: np.ndarray
    member_start: np.ndarray
    near: np.ndarray
    distance: np.ndarray
    near_start: np.ndarray
    reach: np.ndarray


def _graph(pairs: np.ndarray, rows: np.ndarray, order: np.ndarray) -> _Graph:
    rank = np.empty(len(rows), np.int32)
    rank[order] = np.arange(len(rows), dtype=np.int32)
    low = np.searchsorted(rows, pairs["low"]).astype(np.int32)
    high = np.searchsorted(rows, pairs["high"]).astype(np.int32)
    equal = pairs["distance"] == 0
    first = np.arange(len(rows), dtype=np.int32)
    first[high[equal]] = low[equal]
    node = (np.cumsum(first == np.arange(len(rows))) - 1)[first].astype(np.int32)
    nodes = int(node.max(initial=-1)) + 1
    by_node = np.lexsort((rank, node))
    sizes = np.bincount(node, minlength=nodes)
    left, right = node[low[~equal]], node[high[~equal]]
    itself = np.arange(nodes, dtype=np.int32)
    source = np.concatenate([itself, left, right])
    by_source = np.argsort(source, kind="stable")
    near = np.concatenate([itself, right, left])[by_source]
    apart = pairs["distance"][~equal]
    distance = np.concatenate([np.zeros(nodes, np.uint8), apart, apart])[by_source]
    near_start = _starts(np.bincount(source, minlength=nodes))
    reach = np.add.reduceat(sizes[near], near_start[:-1]) if nodes else np.zeros(0, np.int64)
    row_of_rank = rows[order]
    return _Graph(rank, row_of_rank, rank[by_node], _starts(sizes), near, distance, near_start, reach)


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _spans(starts: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions start..stop of each of ``which``, one after the other, and how many each has."""
    sizes = starts[which + 1] - starts[which]
    shift = starts[which] - (np.cumsum(sizes) - sizes)
    return np.arange(int(sizes.sum())) + np.repeat(shift, sizes), sizes


def _pieces(nodes: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """``nodes`` cut so that the sizes in a piece add up to about `_CHUNK_PAIRS`."""
    return np.split(nodes, np.flatnonzero(np.diff(np.cumsum(sizes) // _CHUNK_PAIRS)) + 1)


def _leading(graph: _Graph, head: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Those of ``nodes`` whose best undecided row is better than all undecided rows near it."""
    leading = []
    for piece in _pieces(nodes, graph.near_start[nodes + 1] - graph.near_start[nodes]):
        entries, sizes = _spans(graph.near_start, piece)
        lowest = np.minimum.reduceat(head[graph.near[entries]], _starts(sizes)[:-1])
        leading.append(piece[lowest == head[piece]])
    return np.concatenate(leading)


def _absorb(
    graph: _Graph, leading: np.ndarray, head: np.ndarray, best: np.ndarray, check: Check | None
) -> np.ndarray:
    """Let the rows near the heads of ``leading`` join them, unless they have a better one; the nodes near them."""
    touched = []
    for nodes in _pieces(leading, graph.reach[leading]):
        entries, sizes = _spans(graph.near_start, nodes)
        near, distance = graph.near[entries], graph.distance[entries]
        touched.append(np.unique(near))
        entries, members = _spans(graph.member_start, near)
        row = graph.members[entries]
        join = np.repeat(np.repeat(head[nodes], sizes) << _DISTANCE_BITS | distance, members)
        better = (row > join >> _DISTANCE_BITS) & (join < best[row])
        row, join = row[better], join[better]
        if check is not None:
            holds = check(graph.row_of_rank[join >> _DISTANCE_BITS], graph.row_of_rank[row])
            row, join = row[holds], join[holds]
        np.minimum.at(best, row, join)
    return np.unique(np.concatenate(touched))


def _heads(graph: _Graph, nodes: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Best undecided rank of each node, or the number of rows where all are decided."""
    entries, sizes = _spans(graph.member_start, nodes)
    ranks = graph.members[entries].astype(np.int64)
    ranks[best[ranks] != _UNDECIDED] = len(best)
    return np.minimum.reduceat(ranks, _starts(sizes)[:-1]) if len(nodes) else ranks


def components(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Lowest member of the connected component of each of ``count`` nodes, int32 [count]: 4 GB for a billion.

    Union-find over whole arrays: the roots of all edges are hooked to lower roots at once, then all paths are
    halved until they are flat; edges inside one component drop out.

    Args:
        a, b: integers [m], ends of the edges, in 0..count - 1.
    """
    parent = np.arange(count, dtype=np.int32)
    while True:
        a, b = parent[a], parent[b]
        apart = a != b
        a, b = a[apart], b[apart]
        if not len(a):
            return parent
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        _flatten(parent)


def _flatten(parent: np.ndarray) -> None:
    changed = True
    while changed:
        changed = False
        for start in range(
            0, len(parent), _CHUNK_PAIRS
        ):  # in place, piece by piece: no second array of that size
            piece = parent[start : start + _CHUNK_PAIRS]
            above = parent[piece]
            changed |= not np.array_equal(above, piece)
            piece[:] = above
