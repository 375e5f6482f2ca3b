"""torch's attention with the kernel named: refusals in torch's words, lengths in place of masks."""

from __future__ import annotations

import warnings

import pytest
import torch

from megatron_nucleus.backends import sdpa
from megatron_nucleus.ops import attention, registry
from tests.backends import stand_ins
from tests.ops.op_cases import CASES, Inputs, outputs_and_gradients
from tests.ops.test_parity import assert_near

SIZES = registry.Sizes(width=2048, query_heads=16, kv_heads=4, head_width=128, experts=64, expert_width=1344)


def test_what_torch_takes_on_a_cpu_keeps_no_scores():
    """The row `torch` here: grouped heads, with and without a mask, never plain products."""
    for dtype in (torch.float32, torch.bfloat16):
        for masked in (False, True):
            assert sdpa.torch_takes(SIZES, dtype, "cpu", masked=masked) == "flash"


@pytest.mark.parametrize("masked", [False, True])
def test_a_mask_that_no_kernel_takes_shows_as_plain_products(masked):
    """fp64 grouped heads of unequal value width do not exist in this model; odd dtypes stand for what is refused."""
    assert sdpa.torch_takes(SIZES, torch.complex64, "cpu", masked=masked) == "math"


def test_a_refusal_is_in_torchs_words(monkeypatch):
    asked = []

    def refuse(params, debug):
        asked.append((params.query.shape, params.key.shape, params.attn_mask is not None, params.enable_gqa))
        if params.attn_mask is None:
            return True
        warnings.warn("cuDNN is in a mood. (Triggered internally at sdp_utils.cpp:1)", stacklevel=1)
        return False

    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", refuse)
    monkeypatch.setattr(sdpa, "why_no_gpu", lambda device_type: None)
    request = registry.Request("attention", "sdpa_cudnn", "cpu", torch.bfloat16, SIZES)
    assert sdpa.why_unfit(request) == "does not take text masks here: cuDNN is in a mood."
    assert [masked for _, _, masked, _ in asked] == [False, True]
    assert asked[0][:2] == ((1, 16, 64, 128), (1, 4, 64, 128))
    assert asked[0][3]


def test_without_sizes_only_the_machine_is_asked():
    request = registry.Request("attention", "sdpa_efficient", "cuda", None, None)
    expected = None if torch.cuda.is_available() else "needs an NVIDIA GPU, none is visible"
    assert sdpa.why_unfit(request) == expected


@pytest.mark.parametrize("case", CASES["attention"])
@pytest.mark.parametrize("asks_for_groups", [False, True])
def test_flash_runs_masks_over_lengths(monkeypatch, case, asks_for_groups):
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    seen = []

    def varlen(*values, **grouped):
        seen.append(grouped)
        return stand_ins.variable(dict(zip(names, values, strict=True)))

    monkeypatch.setattr(sdpa, "varlen_attn", varlen)
    monkeypatch.setattr(sdpa, "_VARLEN_ASKS_FOR_GROUPS", asks_for_groups)
    args = CASES["attention"][case](Inputs(torch.float32))
    outputs, gradients = outputs_and_gradients(sdpa.flash, args)
    expected, expected_gradients = outputs_and_gradients(attention.attention, args)
    for got, want in zip(outputs + gradients, expected + expected_gradients, strict=True):
        assert_near(got, want, attention.TOLERANCES[torch.float32], case)
    grouped = args[0].shape[2] != args[1].shape[2]
    assert seen == ([] if args[3] is None else [{"enable_gqa": grouped} if asks_for_groups else {}])
