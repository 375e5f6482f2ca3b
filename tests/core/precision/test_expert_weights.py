"""Experts in 8 bits: exactly the rounded weights, the error they bring, and the memory they leave."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_nucleus.core.kernels import resolve_kernels
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import PRESETS
from megatron_nucleus.core.moe.dispatcher import LocalDispatcher
from megatron_nucleus.core.moe.experts import Experts
from megatron_nucleus.core.precision import expert_weights
from megatron_nucleus.core.precision.expert_weights import Float8Experts, quantise_experts, weight_bytes
from megatron_nucleus.ops import fp8
from megatron_nucleus.ops.experts import expert_ffn

E, D, F = 5, 32, 24
GIB = 2**30


def made(seed: int = 0) -> Experts:
    experts = Experts(E, D, F, resolve_kernels(device_type="cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            parameter.mul_(torch.linspace(0.01, 100, parameter.shape[2]))  # channels of very different size
    return experts


def compute(experts, rows_END: torch.Tensor) -> torch.Tensor:
    return experts((rows_END,), LocalDispatcher(experts.kernels))[0]


def test_weights_are_the_nearest_8_bit_values_of_each_output_channel():
    experts = made()
    low = Float8Experts(experts, torch.device("cpu"))
    for name in ("gate_up", "down"):
        want, got = getattr(experts, name).detach(), low.weights(name, slice(None), torch.float32)
        columns = want.mT  # one row per channel
        expected = fp8.dequantise(*fp8.quantise(columns, (1, 0)), (1, 0)).mT
        assert torch.equal(got, expected)
        step = torch.maximum(want.abs() / 16, want.abs().amax(1, keepdim=True) / 224 * 2.0**-10)
        assert ((got - want).abs() <= step).all()
        assert torch.equal(low.weights(name, slice(1, 3), torch.bfloat16).float(), expected[1:3])


@pytest.mark.parametrize("unpacked", [1, 2 * 4 * D * F * 3, 1 << 30], ids=("one", "two", "all"))
def test_outputs_are_those_of_the_rounded_weights_however_many_are_unpacked(unpacked, monkeypatch):
    monkeypatch.setattr(expert_weights, "UNPACKED_BYTES", unpacked)
    low = Float8Experts(made(), torch.device("cpu"))
    rows = torch.randn(E, 7, D, generator=torch.Generator().manual_seed(1))
    expected = expert_ffn(rows, *(low.weights(n, slice(None), torch.float32) for n in ("gate_up", "down")))
    torch.testing.assert_close(compute(low, rows), expected, rtol=1e-5, atol=1e-4)


def test_a_layer_is_off_by_what_rounding_to_three_bits_brings():
    """2.6 % of a weight in the root mean square; two products in a row and a product of gate and up add in squares."""
    experts = Experts(E, D, F, resolve_kernels(device_type="cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    rows = torch.randn(E, 64, D, generator=generator)
    want, got = compute(experts, rows), compute(Float8Experts(experts, torch.device("cpu")), rows)
    error = ((got - want).norm() / want.norm()).item()
    assert 0.025 < error < 0.065


def test_converting_the_module_to_another_dtype_leaves_the_stored_bits_alone():
    low = Float8Experts(made(), torch.device("cpu"))
    before = low.weights("gate_up", slice(None), torch.float32)
    low.to(torch.bfloat16)
    assert low.gate_up.dtype is torch.uint8
    assert torch.equal(low.weights("gate_up", slice(None), torch.float32), before)  # scales are powers of two


def test_the_published_model_fits_a_card_of_24_gb():
    """Transformer alone: 29 layers of 64 experts in 8 bits, the rest in bfloat16."""
    shape = PRESETS["nucleus_image_17b"]
    with torch.device("meta"):
        model = NucleusTransformer(shape, resolve_kernels(device_type="cpu")).to(torch.bfloat16)
    stored = weight_bytes(model)
    layers = sum(shape.is_moe(i) for i in range(shape.num_layers))
    values = layers * 64 * 3 * 2048 * 1344
    scales = layers * 64 * (2 * 1344 + 2048) * 4
    short = dataclasses.replace(shape, num_layers=4, capacity_factors=(0.0, 0.0, 0.0, 4.0))
    with torch.device("meta"):
        one = NucleusTransformer(short, resolve_kernels(device_type="cpu")).to(torch.bfloat16)
    before = weight_bytes(one)
    saved = before - weight_bytes(quantise_experts(one))
    assert saved == (values - scales) // layers
    assert values / (stored / 2) > 0.89  # nine tenths of the weights
    after = stored - layers * saved
    print(f"stored {stored / GIB:.2f} GiB, with 8-bit experts {after / GIB:.2f} GiB")
    assert 31 < stored / GIB < 33
    assert 17 < after / GIB < 18
    # Weights being unpacked, and text and image of two 1024 px samples, stay far below what is left of 24e9 bytes.
    assert 24e9 - after - expert_weights.UNPACKED_BYTES > 4e9
