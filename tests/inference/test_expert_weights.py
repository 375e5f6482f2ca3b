"""Pictures from experts in 8 bits beside those from the stored weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_nucleus.core.kernels import resolve_kernels
from megatron_nucleus.core.precision.expert_weights import Float8Experts, weight_bytes
from megatron_nucleus.inference import pipeline
from megatron_nucleus.inference.pipeline import load_pipeline
from megatron_nucleus.utils.errors import ConfigError

PROMPTS = ["a red circle", "two blue squares", "a green triangle"]


def draw(pipeline, seeds=(0, 1, 2)) -> np.ndarray:
    images = pipeline.generate(PROMPTS, seeds=list(seeds), steps=6, progress=False)
    return np.stack([np.asarray(image, np.float64) for image in images])


@pytest.fixture(scope="module")
def low(checkpoint):
    return load_pipeline(checkpoint, device="cpu", expert_weights="fp8")


def test_pictures_stay_near_those_of_the_stored_weights(checkpoint, low):
    """In grey levels of 255, against what another seed changes."""
    stored = load_pipeline(checkpoint, device="cpu")
    plain, rounded = draw(stored), draw(low)
    difference = np.abs(rounded - plain).mean()
    other_seed = np.abs(draw(stored, seeds=(3, 4, 5)) - plain).mean()
    assert 0 < difference < 0.15 * other_seed


def test_every_moe_layer_is_rounded_and_nothing_else(checkpoint, low):
    stored = load_pipeline(checkpoint, device="cpu").model
    routed = [block for block in low.model.blocks if block.is_moe]
    assert routed
    assert all(isinstance(block.moe.experts, Float8Experts) for block in routed)
    rest = dict(low.model.named_parameters())
    assert rest.keys() == {n for n, _ in stored.named_parameters() if ".experts." not in n}
    assert all(torch.equal(value, rest[n]) for n, value in stored.named_parameters() if n in rest)
    experts = [p for n, p in stored.named_parameters() if ".experts." in n]
    channels = sum(p.shape[0] * p.shape[2] for p in experts)
    saved = (
        sum(3 * p.numel() for p in experts) - 4 * channels
    )  # of four bytes a weight, less an fp32 scale a channel
    assert weight_bytes(low.model) == weight_bytes(stored) - saved


def test_untrained_weights_are_rounded_too(checkpoint):
    model = load_pipeline(checkpoint, device="cpu", untrained=True, expert_weights="fp8").model
    assert any(isinstance(module, Float8Experts) for module in model.modules())


def test_bad_choices_are_named(checkpoint):
    with pytest.raises(ConfigError, match="--expert-weights fp4: one of stored, fp8"):
        load_pipeline(checkpoint, device="cpu", expert_weights="fp4")
    with pytest.raises(ConfigError, match="tpu"):
        load_pipeline(checkpoint, device="cpu", text_encoder_device="tpu")


def test_a_model_without_experts_has_none_to_round(checkpoint, monkeypatch):
    """Said before a weight is read."""
    described = pipeline.read_description(checkpoint)
    dense = dataclasses.replace(
        described, shape=dataclasses.replace(described.shape, dense_moe_strategy="all_dense")
    )
    monkeypatch.setattr(pipeline, "read_description", lambda path: dense)
    monkeypatch.setattr(pipeline, "load_model", None)
    with pytest.raises(ConfigError, match="--expert-weights fp8: .* has no routed experts"):
        load_pipeline(checkpoint, device="cpu", expert_weights="fp8")


def test_operations_are_chosen_for_the_models_widths(checkpoint, monkeypatch):
    """A kernel that cannot take them must not be found out in the first step."""
    asked = []
    monkeypatch.setattr(
        pipeline, "resolve_kernels", lambda **kwargs: asked.append(kwargs) or resolve_kernels(**kwargs)
    )
    for weights in ("stored", "fp8"):
        load_pipeline(checkpoint, device="cpu", expert_weights=weights, dtype=torch.bfloat16)
    shape = pipeline.read_description(checkpoint).shape
    assert asked == [{"device_type": "cpu", "shape": shape, "dtype": torch.bfloat16}] * 2


def test_the_text_encoder_may_run_elsewhere(checkpoint, low):
    apart = load_pipeline(checkpoint, device="cpu", expert_weights="fp8", text_encoder_device="cpu")
    assert np.array_equal(draw(apart), draw(low))
