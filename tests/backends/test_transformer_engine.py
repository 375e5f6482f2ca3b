"""Transformer Engine's attention against the reference, through a stand-in with the recorded signatures."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from megatron_nucleus.ops import attention
from tests.backends import stand_ins
from tests.ops.op_cases import CASES, Inputs, outputs_and_gradients
from tests.ops.test_parity import assert_near

ADAPTER = "megatron_nucleus.backends.transformer_engine"


def make(arguments: dict) -> None:
    vars(arguments["self"]).update(arguments)


def attend(a: dict) -> torch.Tensor:
    """Rows of [B, S, H, K] and lengths beside them; leaves NaN where it promises nothing, as a library may."""
    module, q, k, v = a["self"], a["query_layer"], a["key_layer"], a["value_layer"]
    assert (module.num_attention_heads, module.kv_channels) == q.shape[2:]
    assert (module.num_gqa_groups, module.qkv_format, module.attention_type) == (k.shape[2], "bshd", "cross")
    lengths = [k.shape[1]] * k.shape[0]
    if a["attn_mask_type"] == "padding":
        assert a["cu_seqlens_q"].dtype == a["cu_seqlens_kv"].dtype == torch.int32
        assert a["cu_seqlens_q"].tolist() == [b * q.shape[1] for b in range(q.shape[0] + 1)]
        assert (a["max_seqlen_q"], a["max_seqlen_kv"]) == (q.shape[1], k.shape[1])
        lengths = a["cu_seqlens_kv"].diff().tolist()
        padding = (torch.arange(k.shape[1]) >= torch.tensor(lengths)[:, None])[:, :, None, None]
        k, v = k.clone(), v.clone()
        for t in (k, v):
            t.register_hook(lambda grad: grad.masked_fill(padding, float("nan")))
    else:
        assert a["attn_mask_type"] == "no_mask"
    rows = [stand_ins.attend(q[b], k[b, :n], v[b, :n]) for b, n in enumerate(lengths)]
    return torch.stack(rows).flatten(2)


@pytest.fixture
def adapter(monkeypatch):
    """The adapter over the stand-in, imported for one test."""
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    bodies = {"DotProductAttention.__init__": make, "DotProductAttention.forward": attend}
    stand_ins.install(monkeypatch, stand_ins.module_of("transformer_engine attention", bodies))
    te = sys.modules["transformer_engine.pytorch"]
    te.DotProductAttention.__call__ = te.DotProductAttention.forward
    yield importlib.import_module(ADAPTER)
    sys.modules.pop(ADAPTER, None)


@pytest.mark.parametrize("case", CASES["attention"])
def test_equals_the_reference_and_padding_has_no_gradient(adapter, case):
    args = CASES["attention"][case](Inputs(torch.float32))
    outputs, gradients = outputs_and_gradients(adapter.attention, args)
    expected, expected_gradients = outputs_and_gradients(attention.attention, args)
    for got, want in zip(outputs + gradients, expected + expected_gradients, strict=True):
        assert_near(got, want, attention.TOLERANCES[torch.float32], case)


def test_a_module_is_made_once_for_each_shape_of_heads(adapter):
    x = Inputs(torch.float32)
    for tokens in (3, 4):
        adapter.attention(x(1, tokens, 4, 8), x(1, 6, 2, 8), x(1, 6, 2, 8))
    assert adapter._module.cache_info().misses == 1
    adapter.attention(x(1, 3, 4, 8), x(1, 6, 1, 8), x(1, 6, 1, 8))
    assert adapter._module.cache_info().misses == 2
