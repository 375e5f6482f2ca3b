"""A whole model on the Triton kernels equals the same model in plain torch: output and every gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from megatron_nucleus.core.kernels import KernelConfig, Kernels, resolve_kernels
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import PRESETS
from megatron_nucleus.ops import registry
from megatron_nucleus.types import TextFeatures

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One dense and one MoE block.
SHAPE = dataclasses.replace(
    PRESETS["demo"], num_layers=2, text_dim=16, moe_intermediate_dim=16, capacity_factors=(0, 2)
)
OPS = [field.name for field in dataclasses.fields(Kernels)]


def config(wanted: str) -> KernelConfig:
    """The backend ``wanted`` of every operation that has it, or triton's, or torch."""
    chosen = {}
    for op in OPS:
        names = [row.backend for row in registry.backends(op)]
        order = ("torch",) if wanted == "torch" else (wanted, "triton", "torch")
        chosen[f"{op}_backend"] = next(name for name in order if name in names)
    return KernelConfig(**chosen)


def run(wanted: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = NucleusTransformer(SHAPE, resolve_kernels(config(wanted), DEVICE))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        latents = torch.randn(2, 6, SHAPE.patch_channels)
        text = TextFeatures(torch.randn(2, 3, SHAPE.text_dim))
        out = model(latents, torch.tensor([0.3, 0.7]), text, (2, 3))
    out.square().mean().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("wanted", ["triton", "triton_fused"])
def test_a_model_on_triton_kernels_equals_plain_torch(wanted):
    used = {getattr(config(wanted), f"{op}_backend") for op in OPS}
    assert wanted in used
    (out, gradients), (expected, expected_gradients) = run(wanted), run("torch")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, want in expected_gradients.items():
        error = float((gradients[name] - want).abs().max())
        assert error <= 1e-4 * float(want.abs().max()) + 1e-7, name
