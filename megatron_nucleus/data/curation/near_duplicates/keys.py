"""Hash -> keys: which bits of two near-equal hashes must agree, so that sorting brings the two together.

A hash of w bits is cut into d + 3 blocks, as even as possible, where d is the largest Hamming distance that counts as
near. A *table* is a choice of 3 blocks; its *key* is their bits. For 64 bits and d = 4 there are 7 blocks (six of 9
bits, one of 10) and C(7, 3) = 35 tables with keys of 27 or 28 bits.

Recall is full: d changed bits lie in at most d blocks, so at least 3 blocks are unchanged, and the table of those 3
sees equal keys. Cost is low: two random hashes share a key of b bits with probability 2^-b only. Values are of type
uint64 throughout, and block 0 holds the highest bits.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np

from megatron_nucleus.utils.errors import ConfigError

HASH_BITS = 64
KEY_BLOCKS = 3  # fewer make keys too short for a billion rows, more need hundreds of tables; own choice
LARGEST_DISTANCE = 4  # 5 would need 56 tables of 24 bits: 16 times the random candidates
_CHUNK_ROWS = 1 << 15  # 256 KB: moving bits stays in the second-level cache


@dataclasses.dataclass(frozen=True)
class Layout:
    """Blocks and tables of a hash; made by `layout`.

    Attributes:
        width_bits: of the hash; higher bits of its values are 0.
        blocks: (shift, width) in bits of each block, highest first.
        tables: the blocks of each table, in ascending order; tables in lexicographic order.
        first: uint8 [2^blocks]: for a set of changed blocks (bit i: block i) the first table that has none of them,
            or the number of tables where none is left.
    """

    width_bits: int
    blocks: tuple[tuple[int, int], ...]
    tables: tuple[tuple[int, ...], ...]
    first: np.ndarray

    def key_bits(self, table: int) -> int:
        """Length of the table's key in bits."""
        return sum(self.blocks[block][1] for block in self.tables[table])

    def block_values(self, values: np.ndarray, block: int) -> np.ndarray:
        """The block's bits as a number, int64 of the shape of ``values``."""
        shift, width = self.blocks[block]
        return ((values >> np.uint64(shift)) & np.uint64((1 << width) - 1)).astype(np.int64)

    def to_front(self, values: np.ndarray, table: int) -> np.ndarray:
        """``values`` [n] with the table's key moved to the highest of the ``width_bits``; no bit is lost, so that
        Hamming distances stay as they are."""
        return _move(values, _moves(self, table))

    def from_front(self, values: np.ndarray, table: int) -> np.ndarray:
        """Inverse of `to_front`."""
        back = [((mask << by if by >= 0 else mask >> -by), -by) for mask, by in _moves(self, table)]
        return _move(values, back)

    def first_table(self, differences: np.ndarray) -> np.ndarray:
        """For the exclusive or [n] of two hashes: the first table whose keys agree, uint8 [n]."""
        changed = np.zeros(len(differences), np.int64)
        for block, (shift, width) in enumerate(self.blocks):
            mask = np.uint64(((1 << width) - 1) << shift)
            changed |= ((differences & mask) != 0).astype(np.int64) << block
        return self.first[changed]

    def random_candidates(self, rows: int) -> float:
        """Expected number of (pair, table) with equal keys among ``rows`` random hashes: a pair agrees in a table
        with probability 2^-key_bits."""
        chance = sum(2.0 ** -self.key_bits(table) for table in range(len(self.tables)))
        return rows * (rows - 1) / 2 * chance


@functools.cache
def layout(max_distance: int = LARGEST_DISTANCE, width_bits: int = HASH_BITS) -> Layout:
    """Blocks and tables that bring together all pairs within ``max_distance``.

    Raises:
        ConfigError: max_distance outside 0..4.
    """
    if not 0 <= max_distance <= LARGEST_DISTANCE:
        raise ConfigError(
            f"max_distance {max_distance}: must be 0 to {LARGEST_DISTANCE} bits of {HASH_BITS}; pairs further apart "
            "cannot be found by keys at an acceptable cost"
        )
    count = max_distance + KEY_BLOCKS
    edges = [width_bits * i // count for i in range(count + 1)]
    blocks = tuple((width_bits - high, high - low) for low, high in itertools.pairwise(edges))
    tables = tuple(itertools.combinations(range(count), KEY_BLOCKS))
    first = np.full(1 << count, len(tables), np.uint8)
    for number, table in reversed(list(enumerate(tables))):
        untouched = sum(1 << block for block in table)
        first[(np.arange(1 << count) & untouched) == 0] = number
    first.setflags(write=False)  # shared through the cache
    return Layout(width_bits, blocks, tables, first)


def _moves(of: Layout, table: int) -> list[tuple[int, int]]:
    """(mask, left shift): blocks that move by the same number of bits move together."""
    chosen = of.tables[table]
    order = [*chosen, *(b for b in range(len(of.blocks)) if b not in chosen)]
    moves: dict[int, int] = {}
    top = of.width_bits
    for block in order:
        shift, width = of.blocks[block]
        top -= width
        moves[top - shift] = moves.get(top - shift, 0) | ((1 << width) - 1) << shift
    return [(mask, by) for by, mask in moves.items()]


def _move(values: np.ndarray, moves: list[tuple[int, int]]) -> np.ndarray:
    out = np.empty_like(values)
    for start in range(0, len(values), _CHUNK_ROWS):
        chunk = values[start : start + _CHUNK_ROWS]
        moved = np.zeros_like(chunk)
        for mask, by in moves:
            part = chunk & np.uint64(mask)
            if by > 0:
                part <<= np.uint64(by)
            elif by < 0:
                part >>= np.uint64(-by)
            moved |= part
        out[start : start + _CHUNK_ROWS] = moved
    return out
