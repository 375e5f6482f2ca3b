"""Expert choice as lists of experts per token, and where arrived rows stand: against loops over numbers."""

from __future__ import annotations

import pytest
import torch

from megatron_nucleus.backends.deepep_rounds import arrived_rows, local_columns, round_choices, split_rounds


@pytest.mark.parametrize("experts", [1, 4, 31, 32, 33, 40, 48, 64, 65, 68, 100, 256])
def test_rounds_hold_every_expert_once_in_order(experts):
    rounds = split_rounds(experts)
    assert [e for r in rounds for e in r] == list(range(experts))
    assert len(rounds) == -(-experts // 32)
    assert max(map(len, rounds)) <= 32


def test_sixty_four_experts_are_two_rounds_of_thirty_two():
    assert split_rounds(64) == (range(0, 32), range(32, 64))
    assert split_rounds(48) == (range(0, 24), range(24, 48))  # EP = 2: one rank's experts in each


@pytest.mark.parametrize("experts", [5, 40, 64])
def test_choices_name_the_experts_that_picked_a_token(experts):
    g = torch.Generator().manual_seed(experts)
    taken = torch.rand(9, experts, generator=g) < 0.4
    taken[0], taken[1] = True, False
    weight = torch.rand(9, experts, generator=g) * taken
    found: list[dict[int, float]] = [{} for _ in range(9)]
    for one in split_rounds(experts):
        topk_idx, topk_weights = round_choices(taken, weight, one)
        assert topk_idx.dtype == torch.int64
        assert topk_idx.is_contiguous()
        assert topk_weights.is_contiguous()
        assert topk_idx.shape == topk_weights.shape == (9, len(one))
        for token in range(9):
            for expert, w in zip(topk_idx[token].tolist(), topk_weights[token].tolist(), strict=True):
                if expert >= 0:
                    found[token][expert] = w
                else:
                    assert expert == -1
                    assert w == 0
    for token in range(9):
        wanted = {e: weight[token, e].item() for e in range(experts) if taken[token, e]}
        assert found[token] == wanted


@pytest.mark.parametrize(("experts", "ranks"), [(64, 4), (68, 4), (48, 2), (64, 64), (40, 1)])
def test_local_columns_give_every_rank_its_experts_once(experts, ranks):
    local = experts // ranks
    for rank in range(ranks):
        held = []
        for one in split_rounds(experts):
            columns = local_columns(one, rank * local, local)
            assert 0 <= columns.start <= columns.stop <= len(one)
            held += [one[c] for c in columns]
        assert held == list(range(rank * local, (rank + 1) * local))


@pytest.mark.parametrize("tail", [0, 5])
def test_arrived_rows_are_found_in_order(tail):
    """Each column of experts 1..3 has exactly 4 rows; what stands behind them does not count."""
    g = torch.Generator().manual_seed(0)
    M, K, rows = 11, 5, 4
    chosen = torch.full((M, K), -1)
    for column in range(K):
        chosen[torch.randperm(M, generator=g)[:rows], column] = column
    index = arrived_rows(chosen, range(1, 4), rows)
    wanted = [[m for m in range(M) if chosen[m, c] >= 0] for c in (1, 2, 3)]
    assert index.tolist() == wanted
    behind = torch.cat([chosen, torch.full((tail, K), 12345)])
    assert arrived_rows(behind, range(1, 4), rows).tolist() == wanted


def test_no_expert_here_takes_no_row():
    assert arrived_rows(torch.full((3, 2), -1), range(1, 1), 4).numel() == 0
