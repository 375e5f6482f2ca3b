"""Properties of the model that need no second implementation."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import PRESETS, ModelConfig, resolve_shape
from megatron_nucleus.types import TextFeatures
from megatron_nucleus.utils import config as config_lib
from megatron_nucleus.utils.errors import ConfigError
from tests.shapes import TINY

DEMO = PRESETS["demo"]


def randomised(shape=DEMO, seed=0):
    """A model whose zero-initialised parts are not zero, so that everything matters."""
    model = NucleusTransformer(shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.count_nonzero() == 0:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def batch(size=4, grid=(4, 4), text_tokens=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, grid[0] * grid[1], DEMO.patch_channels, generator=g),
        torch.rand(size, generator=g),
        torch.randn(size, text_tokens, DEMO.text_dim, generator=g),
        grid,
    )


def test_released_model_has_the_published_parameter_count():
    with torch.device("meta"):
        model = NucleusTransformer(PRESETS["nucleus_image_17b"])
    assert sum(p.numel() for p in model.parameters()) == 16_922_679_296
    assert sum(p.numel() for n, p in model.named_parameters() if ".experts." in n) == 15_325_986_816
    assert all(p.is_meta for p in model.parameters())


def test_kept_text_keys_equal_projecting_them_in_every_block():
    model = randomised()
    latents, sigma, text, grid = batch()
    mask = torch.arange(6)[None] < torch.tensor([6, 4, 1, 5])[:, None]
    kept = model(latents, sigma, model.project_text(text, mask, grid=grid), grid)
    assert torch.equal(kept, model(latents, sigma, TextFeatures(text, mask), grid))


def test_a_sample_never_sees_the_rest_of_its_batch():
    """Routing is per sample: alone or in company, the same velocity."""
    model = randomised().double()
    latents, sigma, text, grid = batch()
    together = model(latents.double(), sigma.double(), TextFeatures(text.double()), grid)
    for i in range(len(latents)):
        one = slice(i, i + 1)
        alone = model(latents[one].double(), sigma[one].double(), TextFeatures(text[one].double()), grid)
        torch.testing.assert_close(alone, together[one], rtol=1e-10, atol=1e-11)


def test_masked_text_tokens_change_nothing():
    model = randomised().double()
    latents, sigma, text, grid = batch()
    latents, text = latents.double(), text.double()
    short = model(latents, sigma, TextFeatures(text[:, :4]), grid)
    mask = (torch.arange(6) < 4).expand(4, 6)
    torch.testing.assert_close(
        model(latents, sigma, TextFeatures(text, mask), grid), short, rtol=1e-9, atol=1e-10
    )


def test_text_position_depends_on_the_image_size():
    model = randomised()
    _, _, text, _ = batch()
    small = model.project_text(text, None, grid=(4, 4))
    large = model.project_text(text, None, grid=(4, 12))
    assert not torch.allclose(small.k_BLGK[0], large.k_BLGK[0])
    assert torch.equal(small.v_BLGK[0], large.v_BLGK[0])


def test_router_judges_unmodulated_tokens():
    """Decoupled routing: a modulation that scales tokens 10x, per channel, leaves every choice in place."""
    model = randomised(
        dataclasses.replace(DEMO, dense_moe_strategy="all_moe", num_layers=1, capacity_factors=(2.0,))
    )
    latents, sigma, text, grid = batch()
    before = model(latents, sigma, TextFeatures(text), grid, return_routing=True)
    with torch.no_grad():
        D = DEMO.width
        scale2 = model.blocks[0].modulation.bias[2 * D : 3 * D]
        scale2.copy_(torch.linspace(0, 9, D))
    after = model(latents, sigma, TextFeatures(text), grid, return_routing=True)
    assert torch.equal(before[1][0].index_BEC, after[1][0].index_BEC)
    assert not torch.allclose(before[0], after[0])


def test_coupled_routing_is_the_same_model_but_for_what_the_router_sees():
    """Equal weights, equal outputs where nothing is modulated, other choices where tokens are."""
    shape = dataclasses.replace(DEMO, dense_moe_strategy="all_moe", num_layers=1, capacity_factors=(2.0,))
    models = [
        randomised(dataclasses.replace(shape, decoupled_routing=decoupled)) for decoupled in (True, False)
    ]
    latents, sigma, text, grid = batch()
    D = DEMO.width

    def outputs():
        return [m(latents, sigma, TextFeatures(text), grid, return_routing=True) for m in models]

    for model in models:
        with torch.no_grad():
            model.blocks[0].modulation.weight[2 * D : 3 * D] = 0.0
            model.blocks[0].modulation.bias[2 * D : 3 * D] = 0.0
    (decoupled, (before,)), (coupled, (also,)) = outputs()
    assert torch.equal(decoupled, coupled)
    assert torch.equal(before.index_BEC, also.index_BEC)
    for model in models:
        with torch.no_grad():
            model.blocks[0].modulation.bias[2 * D : 3 * D] = torch.linspace(0, 9, D)
    (_, (still,)), (_, (moved,)) = outputs()
    assert torch.equal(still.index_BEC, before.index_BEC)
    assert not torch.equal(moved.index_BEC, before.index_BEC)


def test_routing_is_decoupled_unless_asked_for():
    assert all(shape.decoupled_routing for shape in PRESETS.values())
    assert resolve_shape(ModelConfig()).decoupled_routing
    run = dataclasses.make_dataclass("Run", [("model", ModelConfig)], frozen=True)
    config = config_lib.from_dict(run, {"model": {"decoupled_routing": False}}).model
    assert resolve_shape(config) == dataclasses.replace(DEMO, decoupled_routing=False)


def test_initial_model_is_the_identity_with_zero_output_and_still_learns():
    model = NucleusTransformer(DEMO, seed=1)
    latents, sigma, text, grid = batch()
    velocity = model(latents, sigma, TextFeatures(text), grid)
    assert velocity.count_nonzero() == 0
    (velocity - latents).square().mean().backward()
    assert model.image_out.weight.grad.abs().max() > 0
    with torch.no_grad():
        model.image_out.weight.normal_()
    model.zero_grad()
    model(latents, sigma, TextFeatures(text), grid).square().mean().backward()
    for block in model.blocks:  # gates of zero still receive a gradient: nothing is stuck
        assert block.modulation.weight.grad.abs().max() > 0


def test_initial_weights_follow_the_documented_table():
    model = NucleusTransformer(DEMO, seed=1)
    D, F = DEMO.width, DEMO.moe_intermediate_dim
    p = dict(model.named_parameters())
    for name in ("blocks.0.modulation.weight", "out_modulation.weight", "image_out.weight", "image_in.bias"):
        assert p[name].count_nonzero() == 0, name
    assert (p["blocks.1.attention.q_norm.weight"] == 1).all()
    experts = p["blocks.1.moe.experts.gate_up"]
    assert experts.isfinite().all()
    per_expert = experts.std(dim=(1, 2))
    torch.testing.assert_close(per_expert, torch.full_like(per_expert, D**-0.5), rtol=0.05, atol=0)
    assert p["blocks.1.moe.experts.down"].std().item() == pytest.approx(F**-0.5, rel=0.02)
    assert p["blocks.1.moe.router.weight"].std().item() == pytest.approx(0.1 * (2 * D) ** -0.5, rel=0.1)
    assert not torch.equal(experts[0], experts[1])


def test_initial_weights_depend_on_seed_and_name_alone():
    a, b, c = (NucleusTransformer(DEMO, seed=s).state_dict() for s in (1, 1, 2))
    deeper = NucleusTransformer(
        dataclasses.replace(DEMO, num_layers=5, capacity_factors=(2.0,) * 5), seed=1
    ).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["image_in.weight"], c["image_in.weight"])
    assert all(torch.equal(a[k], deeper[k]) for k in a)


def test_bad_shapes_are_named():
    model = NucleusTransformer(DEMO)
    latents, sigma, text, grid = batch()
    with pytest.raises(ValueError, match=r"grid \(3, 4\) has 12 tokens"):
        model(latents, sigma, TextFeatures(text), (3, 4))
    with pytest.raises(ValueError, match="packed patches"):
        model(latents[..., :60], sigma, TextFeatures(text), grid)
    with pytest.raises(ValueError, match="one noise level per image"):
        model(latents, sigma[:2], TextFeatures(text), grid)
    with pytest.raises(ValueError, match="text features must be"):
        model(latents, sigma, TextFeatures(text[..., :7]), grid)
    with pytest.raises(ValueError, match="projected for grid"):
        model(latents, sigma, model.project_text(text, None, grid=(2, 8)), grid)
    with pytest.raises(ValueError, match="2 texts for 4 images"):
        model(latents, sigma, TextFeatures(text[:2]), grid)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"axes_dims_rope": (8, 8, 8)}, "axes_dims_rope"),
        ({"capacity_factors": (1.0, 2.0)}, "2 values for 4 layers"),
        ({"route_scale": math.nan}, "model.route_scale: must be finite, got nan"),
        ({"mlp_ratio": math.inf}, "model.mlp_ratio: must be finite, got inf"),
        (
            {"capacity_factors": (math.nan, 1.0, 1.0, 1.0)},
            "model.capacity_factors: must be finite, got nan, 1.0",
        ),
        ({"capacity_factors": (0.0,)}, "layer 1 has 0.0"),
        ({"capacity_factors": (9.0,)}, "layer 1 has 9.0"),
        ({"dense_moe_strategy": "all_moee"}, "did you mean all_moe"),
        ({"num_experts": 0}, "num_experts"),
        ({"mlp_ratio": 1.0}, "mlp_ratio"),
    ],
)
def test_impossible_architectures_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        resolve_shape(ModelConfig(preset="demo", **override))


def test_one_capacity_factor_stands_for_every_layer():
    shape = resolve_shape(ModelConfig(preset="demo", num_layers=6, capacity_factors=(1.5,)))
    assert shape.capacity_factors == (1.5,) * 6


class _Casts(TorchDispatchMode):
    """Counts the casts of tensors of one shape."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.aten._to_copy.default and tuple(args[0].shape) == self.shape
        return op(*args, **(kwargs or {}))


def test_autocast_casts_text_features_once_and_the_blocks_keep_one_copy():
    model, shape = NucleusTransformer(TINY), (2, 7, TINY.text_dim)
    latents = torch.randn(2, 16, TINY.patch_channels)
    kept = set()

    def note(tensor):
        kept.update([(tensor.data_ptr(), tensor.dtype)] if tensor.numel() == math.prod(shape) else [])
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), _Casts(shape) as casts, hooks:
        model(latents, torch.rand(2), TextFeatures(torch.randn(shape)), (4, 4))
    assert casts.count == 1
    assert {dtype for _, dtype in kept} == {torch.bfloat16}
    assert len(kept) == 1 < len(model.blocks)
