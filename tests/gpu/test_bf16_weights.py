"""bf16 weights on a GPU: the kernel draws the reference's bits, and an update never makes the host wait."""

from __future__ import annotations

import pytest
import torch

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig, build_optimizer
from megatron_nucleus.ops import registry
from megatron_nucleus.ops.stochastic_round import stochastic_round
from tests.gpu.test_no_sync import sync_mode
from tests.shapes import TINY

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("first", [0, 7, (1 << 33) - 1000])
def test_bits_are_those_of_the_cpu(backend, first):
    values = torch.randn(100_001, generator=torch.Generator().manual_seed(0))
    function = registry.resolve("stochastic_round", backend, device_type="cuda", dtype=torch.float32)
    assert torch.equal(function(values.cuda(), 5, first).cpu(), stochastic_round(values, 5, first))


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_an_update_never_waits_and_repeats_bit_for_bit(kind):
    def trained() -> list[torch.Tensor]:
        model = NucleusTransformer(TINY, seed=0).to("cuda", torch.bfloat16)
        config = OptimizerConfig(optimizer=kind, master_weights="bf16", state_dtype="bf16")
        optimizer = build_optimizer(model, config, seed=3)
        for step in range(3):
            for p in optimizer.params.values():
                p.grad = torch.ones_like(p)
            with sync_mode("error" if step else "default"):  # the first compiles kernels
                optimizer.step(1e-3)
        return [*model.parameters(), *optimizer.tensors().values()]

    assert all(torch.equal(a, b) for a, b in zip(trained(), trained(), strict=True))
