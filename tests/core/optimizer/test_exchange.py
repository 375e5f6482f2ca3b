"""The integers of the exchange: who owns what, and how rows are cut."""

import itertools
import random

import torch

from megatron_nucleus.core.optimizer.exchange import assign_owners, rows_of_block


def test_owners_by_hand():
    """Largest first, each to the least loaded: 7 | 5 | 4, then 3 to the rank with 4, 2 to that with 5."""
    assert assign_owners([2, 7, 3, 5, 4], 3) == [1, 0, 2, 1, 2]
    assert assign_owners([1, 1, 1, 1, 1], 2) == [0, 1, 0, 1, 0], "equal costs go in order"
    assert assign_owners([3], 4) == [0]
    assert assign_owners([], 4) == []


def test_owners_equal_work_and_need_only_the_arguments():
    generator = random.Random(0)
    for _ in range(200):
        ranks = generator.randint(1, 9)
        costs = [generator.randint(1, 1000) for _ in range(generator.randint(0, 40))]
        owners = assign_owners(costs, ranks)
        assert owners == assign_owners(list(costs), ranks)
        loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(ranks)]
        assert sum(loads) == sum(costs)
        assert max(loads) <= sum(costs) / ranks + max(costs, default=0)


def test_blocks_are_those_of_torch_chunk():
    for rows, blocks in itertools.product(range(1, 30), range(1, 12)):
        chunks = [len(chunk) for chunk in torch.arange(rows).chunk(blocks)]
        assert [rows_of_block(rows, blocks, b) for b in range(blocks)] == chunks + [0] * (
            blocks - len(chunks)
        )
