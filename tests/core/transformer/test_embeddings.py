"""The time embedding's sinusoid against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_nucleus.core.kernels import resolve_kernels
from megatron_nucleus.core.transformer.embeddings import TimeEmbedding, sinusoid


def test_cosines_then_sines_of_a_thousand_times_sigma():
    sigma = torch.tensor([0.0, 0.001, 0.25, 1.0])
    got = sinusoid(sigma, 8)
    assert got.dtype == torch.float32
    for row, s in zip(got.tolist(), sigma.tolist(), strict=True):
        angles = [1000.0 * s * 10000.0 ** (-i / 4) for i in range(4)]
        want = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert row == pytest.approx(want, abs=2e-4)  # 1000 in fp32 has steps of 6e-5
    assert got[0].tolist() == [1.0] * 4 + [0.0] * 4
    assert got[1, [0, 4]].tolist() == pytest.approx([math.cos(1), math.sin(1)], abs=1e-6)


def test_sigma_is_rounded_to_the_working_precision_first():
    embedding = TimeEmbedding(16, resolve_kernels()).bfloat16()
    sigma = torch.tensor([0.3, 0.9001])
    assert not torch.equal(sigma.bfloat16().float(), sigma)
    rounded = embedding(sigma.bfloat16().float(), torch.bfloat16)
    assert torch.equal(embedding(sigma, torch.bfloat16), rounded)
