"""The FP8 pass: which layers change, that parameters do not, recipe checks, and a short training run in FP8."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from torch import nn

from megatron_nucleus.core.kernels import resolve_kernels
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import PRESETS
from megatron_nucleus.core.parallel_state import ParallelConfig, single_process
from megatron_nucleus.core.parallelize import materialise, parallelize
from megatron_nucleus.core.precision import precision
from megatron_nucleus.core.precision.emulated import EmulatedLinear
from megatron_nucleus.core.precision.precision import LAYERS, PrecisionConfig, apply_precision
from megatron_nucleus.ops import fp8
from megatron_nucleus.types import TextFeatures
from megatron_nucleus.utils.errors import ConfigError
from tests.shapes import TINY

GRID = (4, 4)
# Every width a multiple of 16.
SMALL = dataclasses.replace(TINY, num_layers=3, capacity_factors=(0.0, 2.0, 2.0))


def on_meta(shape=SMALL) -> NucleusTransformer:
    with torch.device("meta"):
        return NucleusTransformer(shape, resolve_kernels(device_type="cpu"))


def random_model(seed: int = 0, shape=SMALL) -> NucleusTransformer:
    model = NucleusTransformer(shape, resolve_kernels(device_type="cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.normal_(
                    0.0, parameter.shape[-2] ** -0.5 if parameter.ndim > 1 else 0.1, generator=generator
                )
    return model


def config(recipe: str = "rowwise", layers=tuple(LAYERS), fp8_backend: str = "emulated") -> PrecisionConfig:
    return PrecisionConfig(fp8=fp8_backend, fp8_recipe=recipe, fp8_layers=tuple(layers))


def apply(model, settings, *, bf16=False, **kwargs):
    return apply_precision(model, settings, device_type="cpu", bf16=bf16, **kwargs)


def inputs(images: int = 2):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(images, 16, SMALL.patch_channels, generator=generator)
    text = TextFeatures(torch.randn(images, 5, SMALL.text_dim, generator=generator))
    return latents, torch.linspace(0.2, 0.9, images), text, GRID


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_name_changes_its_layers_alone(layer):
    model = apply(on_meta(), config(layers=[layer]))
    changed = {name for name, module in model.named_modules() if isinstance(module, EmulatedLinear)}
    both = ("gate_up", "down")
    assert (
        changed
        == {
            "attention": {f"blocks.{i}.attention.{p}" for i in range(3) for p in ("q", "k", "v", "out")},
            "ffn": {f"blocks.0.feed_forward.{p}" for p in both},
            "shared_experts": {f"blocks.{i}.moe.shared_expert.{p}" for i in (1, 2) for p in both},
            "experts": set(),
        }[layer]
    )
    plain = on_meta()
    for ours, theirs in zip(model.blocks, plain.blocks, strict=True):
        if ours.is_moe:
            same = ours.moe.experts.kernels.expert_ffn is theirs.moe.experts.kernels.expert_ffn
            assert same == (layer != "experts")


def test_parameters_keep_names_shapes_and_identity():
    model = random_model()
    before = dict(model.named_parameters())
    state = {name: value.shape for name, value in model.state_dict().items()}
    apply(model, config())
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert {name: value.shape for name, value in model.state_dict().items()} == state


def test_none_changes_nothing():
    model = random_model()
    modules = dict(model.named_modules())
    assert dict(apply(model, PrecisionConfig()).named_modules()) == modules


def test_a_linear_layer_keeps_its_bias():
    linear = nn.Linear(32, 16)
    out = EmulatedLinear(linear, "rowwise")(torch.ones(2, 32))
    expected = fp8.linear(torch.ones(2, 32), linear.weight, "rowwise") + linear.bias
    assert torch.equal(out, expected)


@pytest.mark.parametrize("recipe", ["current", "rowwise", "mxfp8"])
def test_outputs_and_gradients_are_near_those_without_fp8(recipe):
    """A few per cent in a product (ops/fp8.py) and more behind several layers. Every expert takes every token: a
    choice that flips is a jump, not an error."""
    shape = dataclasses.replace(
        SMALL,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_dim=32,
        capacity_factors=(0.0, 4.0, 4.0),
    )
    latents, sigma, text, grid = inputs()
    results = []
    for settings in (PrecisionConfig(), config(recipe)):
        model = apply(random_model(shape=shape), settings)
        out = model(latents, sigma, text, grid)
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        loss.backward()
        results.append((out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (plain, plain_grads), (low, low_grads) = results
    assert 1e-3 < relative(low, plain) < 0.15
    assert plain_grads.keys() == low_grads.keys()
    whole = [torch.cat([g[n].flatten() for n in plain_grads]) for g in (low_grads, plain_grads)]
    assert 1e-3 < relative(*whole) < 0.2


def test_it_goes_through_meta_parallelize_and_recomputation():
    """As training builds a model: the pass on meta, then recomputation, then memory and weights; bf16 autocast."""
    latents, sigma, text, grid = inputs()
    results = []
    for granularity in ("none", "full"):
        parallel_config = ParallelConfig(recompute_granularity=granularity)
        model = apply(on_meta(), config(), bf16=True, recomputes=granularity != "none")
        parallelize(model, parallel_config, single_process(torch.device("cpu"), SMALL.num_experts), bf16=True)
        materialise(model, torch.device("cpu"), 0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modulation" in name or "image_out" in name:
                    parameter.fill_(0.01)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(latents, sigma, text, grid)
        out.float().square().sum().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
        assert all(g.dtype is torch.float32 and g.isfinite().all() for g in results[-1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


STEPS = 25


def short_run(settings: PrecisionConfig) -> list[float]:
    """Losses of a small regression that the model can learn."""
    torch.manual_seed(0)
    model = apply(random_model(), settings)
    latents, sigma, text, grid = inputs(4)
    target = torch.tanh(latents.roll(1, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(STEPS):
        loss = (model(latents, sigma, text, grid) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_loss_falls_as_without_fp8():
    plain, low = short_run(PrecisionConfig()), short_run(config("current"))
    assert plain[-1] < 0.6 * plain[0]
    assert 0.9 < (low[0] - low[-1]) / (plain[0] - plain[-1]) < 1.1


def refused(settings, model=None, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        apply(model or on_meta(), settings, **kwargs)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_published_experts_do_not_fit_blocks_of_128():
    with torch.device("meta"):
        model = NucleusTransformer(PRESETS["nucleus_image_17b"], resolve_kernels(device_type="cpu"))
    message = refused(config("blockwise"), model)
    assert "blocks.3.moe.shared_expert.down has 1344 inputs, no multiple of 128" in message
    assert "--fp8-recipe current or rowwise or mxfp8" in message
    assert "--fp8-layers attention ffn" in message
    assert "--moe-intermediate-dim 1280 or 1408" in message
    message = refused(config("blockwise", ["experts"]), model)
    assert "blocks.3.moe.experts.down has 1344 inputs" in message
    apply(model, config("blockwise", ["attention", "ffn"]))
    apply(model, config("mxfp8", ["experts", "shared_experts"]))  # 1344 = 42 * 32
    assert isinstance(model.blocks[0].feed_forward.down, EmulatedLinear)


def test_widths_must_be_multiples_of_16():
    odd = dataclasses.replace(SMALL, moe_intermediate_dim=24)
    message = refused(config("current", ["experts"]), on_meta(odd))
    assert "blocks.1.moe.experts.down has 24 inputs, no multiple of 16" in message
    assert "--moe-intermediate-dim 16 or 32" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (PrecisionConfig(fp8_recipe="rowwise"), ("--fp8-recipe rowwise: needs --fp8",)),
        (PrecisionConfig(fp8_layers=("ffn", "experts")), ("--fp8-layers ffn experts: needs --fp8",)),
        (PrecisionConfig(fp8="emulated"), ("needs --fp8-recipe", "current, rowwise, blockwise, mxfp8")),
        (config("delayed"), ("--fp8-recipe delayed", "transformer_engine have it")),
        (config("rowwize"), ("did you mean rowwise?",)),
        (config("rowwise", ["expert"]), ("'expert' is unknown (did you mean experts?)",)),
        (config("rowwise", []), ("names no layer",)),
        (
            config("current", fp8_backend="torchao"),
            ("multiplies experts by rowwise", "--fp8 emulated --fp8-recipe"),
        ),
        (
            config("current", fp8_backend="transformer_engine"),
            ("experts by no recipe", "--fp8-layers attention ffn shared_experts"),
        ),
    ],
)
def test_choices_that_do_not_fit_each_other_say_what_does(settings, words):
    message = refused(settings)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["torchao", "transformer_engine"])
def test_a_library_that_is_missing_is_named_with_what_can_be_used(name, monkeypatch):
    module = "torchao" if name == "torchao" else "transformer_engine"
    monkeypatch.setitem(sys.modules, f"{module}.float8" if name == "torchao" else f"{module}.pytorch", None)
    monkeypatch.delitem(sys.modules, precision.BACKENDS[name].module, raising=False)
    message = refused(config("current", ["attention"], name), bf16=True)
    assert f"--fp8 {name} needs {module}" in message
    assert "Usable here: emulated." in message


@pytest.mark.parametrize(
    ("kwargs", "way"), [({"recomputes": True}, "none"), ({"compiles": True}, "--no-compile-blocks")]
)
def test_delayed_scales_cannot_be_repeated(kwargs, way, monkeypatch):
    monkeypatch.setattr(precision, "why_unavailable", lambda *_: None)
    settings = config("delayed", ["attention"], "transformer_engine")
    message = refused(settings, bf16=True, **kwargs)
    assert "--fp8-recipe current" in message
    assert way in message


def test_libraries_need_bf16(monkeypatch):
    monkeypatch.setattr(precision, "why_unavailable", lambda *_: None)
    assert "add --bf16" in refused(config("rowwise", fp8_backend="torchao"))


def test_layers_that_the_model_does_not_have_are_an_error():
    dense = dataclasses.replace(SMALL, dense_moe_strategy="all_dense")
    assert "the model has no such layers" in refused(config("rowwise", ["experts"]), on_meta(dense))
    message = refused(config("rowwise", ["experts", "attention", "shared_experts"]), on_meta(dense))
    assert message.startswith("--fp8-layers experts shared_experts: the model has no such layers")
    model = apply(on_meta(dense), config("rowwise"))  # all kinds, the default: those that there are
    assert isinstance(model.blocks[1].feed_forward.down, EmulatedLinear)


def test_a_named_backend_of_the_experts_is_not_replaced_unasked():
    message = refused(config("rowwise"), expert_ffn_backend="triton")
    assert message.startswith("--expert-ffn-backend triton: --fp8 emulated multiplies the experts itself")
    assert "--fp8-layers attention ffn shared_experts" in message
    apply(on_meta(), config("rowwise", ["attention"]), expert_ffn_backend="triton")
