"""What is made of a mask is made once for all layers, and never of a mask that has changed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_nucleus.backends import key_lengths
from megatron_nucleus.backends.key_lengths import as_sequences, of_each_mask
from megatron_nucleus.core.kernels import resolve_kernels
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.recompute import recomputing
from megatron_nucleus.ops import attention
from megatron_nucleus.types import TextFeatures
from tests.shapes import TINY


@pytest.fixture
def counted(monkeypatch):
    """Numbers of rows of the masks that lengths were counted of."""
    rows, count = [], key_lengths.key_lengths
    monkeypatch.setattr(key_lengths, "key_lengths", lambda mask: rows.append(len(mask)) or count(mask))
    return rows


def padded(*lengths: int, keys: int = 6) -> torch.Tensor:
    return torch.arange(keys) < torch.tensor(lengths)[:, None]


def test_a_mask_is_counted_once_and_an_equal_one_again(counted):
    mask = padded(6, 2)
    first = as_sequences(mask, 4)
    assert as_sequences(mask, 4) is first
    assert counted == [2]
    other = as_sequences(padded(6, 2), 4)
    assert counted == [2, 2]
    assert torch.equal(other.key_bounds, first.key_bounds)


def test_another_number_of_queries_is_another_result():
    mask = padded(6, 2)
    assert [as_sequences(mask, n).query_bounds[-1].item() for n in (4, 3, 4)] == [8, 6, 8]


def test_a_mask_that_was_written_to_is_counted_again():
    mask = padded(6, 2)
    assert as_sequences(mask, 4).key_bounds.tolist() == [0, 6, 6, 8, 12]
    mask.copy_(padded(1, 5))
    assert as_sequences(mask, 4).key_bounds.tolist() == [0, 1, 6, 11, 12]


def test_nothing_is_kept_while_a_graph_is_recorded(counted, monkeypatch):
    """A replay must follow the values that the mask has then."""
    mask = padded(6, 2)
    as_sequences(mask, 4)
    monkeypatch.setattr(key_lengths, "_is_recorded", lambda mask: True)
    as_sequences(mask, 4)
    assert counted == [2, 2]
    with torch.inference_mode():
        frozen = padded(3, 3)
    monkeypatch.undo()
    assert as_sequences(frozen, 4).key_bounds.tolist() == [0, 3, 6, 9, 12]


def test_compiled_code_follows_the_mask():
    @of_each_mask
    def total(mask, factor):
        return mask.sum() * factor

    compiled = torch.compile(lambda mask: total(mask, 3), backend="eager", fullgraph=True)
    mask = padded(6, 2)
    assert total(mask, 3) == compiled(mask) == 24
    mask.copy_(padded(1, 1))
    assert compiled(mask) == 6


@pytest.mark.parametrize("recompute", [False, True], ids=("kept", "recomputed"))
def test_all_layers_of_a_model_share_it(counted, recompute):
    """Forward, and the forward that the backward pass repeats."""

    def attend(q, k, v, mask):
        assert as_sequences(mask, q.shape[1]).longest_key == k.shape[1]
        return attention.attention(q, k, v, mask)

    kernels = dataclasses.replace(resolve_kernels(device_type="cpu"), attention=attend)
    model = NucleusTransformer(TINY, kernels)
    if recompute:
        for block in model.blocks:
            block.forward = recomputing(block.forward, "full")
    for _ in range(2):
        text = TextFeatures(torch.randn(2, 3, TINY.text_dim), padded(3, 1, keys=3))
        latents = torch.randn(2, 16, TINY.patch_channels)
        model(latents, torch.rand(2), text, (4, 4)).square().sum().backward()
    assert counted == [2, 2]
