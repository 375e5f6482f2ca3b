"""FLOP and parameter counts: against a counter on the running modules, and against the published figures."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import PRESETS, ModelShape
from megatron_nucleus.core.parallel_state import make_layout
from megatron_nucleus.core.recompute import recomputing
from megatron_nucleus.core.transformer.text import product_pays
from megatron_nucleus.export.hf_keys import count_parameters
from megatron_nucleus.training.flops import (
    DEVICE_PEAKS_TFLOPS,
    active_parameter_count,
    device_peak_flops,
    expert_parameter_count,
    forward_flops_per_image,
    hardware_flops,
    training_flops_per_image,
)
from megatron_nucleus.training.planning.ledger import MicroBatch
from megatron_nucleus.training.planning.memory import Work
from megatron_nucleus.types import TextFeatures

PUBLISHED = PRESETS["nucleus_image_17b"]
SMALL = ModelShape(
    num_layers=3, num_attention_heads=4, attention_head_dim=32, num_key_value_heads=2, text_dim=48,
    latent_channels=4, patch_size=2, axes_dims_rope=(8, 12, 12), mlp_ratio=4.0,
    dense_moe_strategy="leave_first_block_dense", num_experts=4, moe_intermediate_dim=40,
    capacity_factors=(0.0, 1.5, 2.0), use_sigmoid=False, route_scale=2.5,
)  # fmt: skip
SHAPES = {
    "small": SMALL,
    "all_dense": dataclasses.replace(SMALL, dense_moe_strategy="all_dense"),
    "all_moe": dataclasses.replace(SMALL, dense_moe_strategy="all_moe", capacity_factors=(4.0, 0.1, 1.0)),
    "no_gqa": dataclasses.replace(SMALL, num_key_value_heads=4),
    "demo": PRESETS["demo"],
}


def plain_attention(q_BSHK, k_BTGK, v_BTGK, mask_BT=None):
    """Attention as two matmuls: the counter sees 0 FLOPs in a CPU's fused attention."""
    groups = q_BSHK.shape[2] // k_BTGK.shape[2]
    k, v = (t.repeat_interleave(groups, dim=2).transpose(1, 2) for t in (k_BTGK, v_BTGK))
    scores = q_BSHK.transpose(1, 2) @ k.mT / q_BSHK.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def meta_model(shape: ModelShape) -> NucleusTransformer:
    with torch.device("meta"):
        model = NucleusTransformer(shape)
    for block in model.blocks:
        block.attention.kernels = dataclasses.replace(model.kernels, attention=plain_attention)
    return model


def count(shape: ModelShape, batch: int, grid: tuple[int, int], text_tokens: int, backward: bool) -> int:
    model = meta_model(shape)
    with torch.device("meta"):
        latents = torch.empty(batch, grid[0] * grid[1], shape.patch_channels)
        text = TextFeatures(torch.empty(batch, text_tokens, shape.text_dim))
        sigma = torch.empty(batch)
        with FlopCounterMode(display=False) as counter:
            out = model(latents, sigma, text, grid)
            if backward:
                out.square().mean().backward()
    return counter.get_total_flops()


def hardware(
    shape: ModelShape, batch: int, grid: tuple[int, int], text_tokens: int, recompute: str = "none"
) -> dict[str, int]:
    """What a process computes in a step, by the formulas; attention's backward as of two plain products."""
    layout = make_layout(1, experts=shape.num_experts)
    size = MicroBatch(batch, grid[0] * grid[1], text_tokens)
    parts = hardware_flops(Work(shape, layout, size, 1, False, recompute))
    attention = batch * forward_flops_per_image(shape, size.tokens, text_tokens)["attention"]
    # A fused kernel forms the scores a second time: five products in place of four.
    return parts | {"backward": parts["backward"] - attention // 2}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("grid", "text_tokens"), [((4, 4), 8), ((3, 5), 1), ((2, 4), 400)])
def test_hardware_flops_equal_the_counter(name, grid, text_tokens):
    """Forward and backward to the last product, on both ways from text to keys and values."""
    shape = SHAPES[name]
    parts = hardware(shape, 2, grid, text_tokens)
    assert parts["forward"] == count(shape, 2, grid, text_tokens, backward=False)
    assert parts["forward"] + parts["backward"] == count(shape, 2, grid, text_tokens, backward=True)


def test_both_ways_of_the_text_are_tested():
    kv_values = 2 * SMALL.num_key_value_heads * SMALL.attention_head_dim
    ways = [product_pays(2 * L, SMALL.text_dim, SMALL.width, kv_values) for L in (8, 400)]
    assert ways == [False, True]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_equals_the_counter(recompute):
    """On real values, for a meta tensor has no routing to keep. The counter knows no fused attention of a CPU."""
    shape = SMALL
    model = NucleusTransformer(shape)
    for block in model.blocks:
        if recompute == "full":
            block.attention.kernels = dataclasses.replace(model.kernels, attention=plain_attention)
        block.forward = recomputing(block.forward, recompute)
    with FlopCounterMode(display=False) as counter:
        out = model(torch.randn(2, 16, 16), torch.rand(2), TextFeatures(torch.randn(2, 8, 48)), (4, 4))
        out.square().mean().backward()
    parts = hardware(shape, 2, (4, 4), 8, recompute)
    attention = 2 * forward_flops_per_image(shape, 16, 8)["attention"]
    unseen = 3 * attention if recompute == "selective" else 0
    assert (parts["recompute"] > 0) == (recompute == "full")
    assert counter.get_total_flops() == parts["forward"] + parts["backward"] + parts["recompute"] - unseen


@pytest.mark.parametrize("name", SHAPES)
def test_model_and_hardware_differ_by_what_is_saved(name):
    """The router's time half is formed once per image, not for every token; nothing else in a forward pass."""
    shape, S, L = SHAPES[name], 16, 1
    parts = forward_flops_per_image(shape, S, L)
    saved = parts["router"] // 2 - parts["router"] // 2 // S
    assert hardware(shape, 1, (4, 4), L)["forward"] == sum(parts.values()) - saved
    assert training_flops_per_image(shape, S, L) == 3 * sum(parts.values())


def test_published_model_equals_the_counter():
    parts = forward_flops_per_image(PUBLISHED, 64, 8)
    counted = count(PUBLISHED, 1, (8, 8), 8, backward=False)
    assert counted == hardware(PUBLISHED, 1, (8, 8), 8)["forward"]
    assert counted == pytest.approx(sum(parts.values()), rel=0.005)


def test_optimizer_flops_are_those_of_newton_schulz():
    """One process, five steps: 4*r*r*c + 2*r*r*r each for every matrix r x c, r <= c."""
    work = Work(SMALL, make_layout(1, experts=4), MicroBatch(1, 16, 8), 1, False)
    D, F, U, kv, dense = 128, 40, 48, 64, 256
    attention = [(D, D)] * 2 + [(kv, D)] * 4
    blocks = [*attention, (U, D)] * 3 + [(D, dense)] * 3 + [(F, D)] * (2 * 3 * (4 + 1))
    assert SMALL.dense_hidden == dense
    assert hardware_flops(work)["optimizer"] == sum(5 * (4 * r * r * c + 2 * r**3) for r, c in blocks)


def test_diffusers_module_has_the_same_count():
    transformers = pytest.importorskip("diffusers.models.transformers.transformer_nucleusmoe_image")
    shape = SMALL
    model = transformers.NucleusMoEImageTransformer2DModel(
        patch_size=2, in_channels=shape.patch_channels, out_channels=shape.latent_channels, num_layers=3,
        attention_head_dim=32, num_attention_heads=4, num_key_value_heads=2, joint_attention_dim=48,
        axes_dims_rope=(8, 12, 12), mlp_ratio=4.0, dense_moe_strategy=shape.dense_moe_strategy, num_experts=4,
        moe_intermediate_dim=40, capacity_factors=list(shape.capacity_factors), use_grouped_mm=False,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)

    def attention_flops(q, k, v, *args, out_shape=None, **kwargs) -> int:
        (b, h, s, width), t = q, k[2]
        return 2 * b * h * s * t * width * 2

    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(torch.randn(2, 15, 16), (1, 3, 5), torch.randn(2, 7, 48), timestep=torch.rand(2))
    assert counter.get_total_flops() == 2 * sum(forward_flops_per_image(shape, 15, 7).values())


@pytest.mark.parametrize("name", [*SHAPES, "nucleus_image_17b"])
def test_parameters_equal_the_module(name):
    shape = SHAPES.get(name) or PRESETS[name]
    with torch.device("meta"):
        model = NucleusTransformer(shape)
    assert count_parameters(shape) == sum(p.numel() for p in model.parameters())


def test_published_figures():
    def uniform(factor: float) -> ModelShape:
        return dataclasses.replace(PUBLISHED, capacity_factors=(factor,) * 32)

    assert count_parameters(PUBLISHED) == 16_922_679_296
    assert expert_parameter_count(PUBLISHED) == 8_257_536
    active = [active_parameter_count(s) for s in (PUBLISHED, uniform(2.0), uniform(4.0), uniform(8.0))]
    assert [round(a / 1e9, 3) for a in active] == [2.109, 2.076, 2.555, 3.512]
    # 256, 512 and 1024 px with 128 text tokens whose K/V are kept: the image path alone.
    for shape, tokens, tera in (
        (uniform(8.0), 256, 1.36),
        (uniform(4.0), 1024, 3.67),
        (PUBLISHED, 4096, 14.3),
    ):
        parts = forward_flops_per_image(shape, tokens, 128)
        image_path = sum(parts.values()) - parts["text"]
        assert image_path / 1e12 == pytest.approx(tera, rel=0.005)
    assert parts["attention"] / image_path == pytest.approx(0.32, abs=0.005)


def test_capacity_beyond_the_image_is_refused():
    shape = dataclasses.replace(SMALL, num_experts=4, capacity_factors=(0.0, 4.0, 4.0))
    assert forward_flops_per_image(shape, 15, 1)["routed_experts"] == 2 * 2 * 4 * 15 * 3 * 128 * 40


def test_device_peaks():
    assert device_peak_flops("cpu") is None
    assert device_peak_flops("cuda", name="NVIDIA H100 80GB HBM3") == 989e12
    assert device_peak_flops("cuda", name="NVIDIA H100 PCIe") == 756e12
    assert device_peak_flops("cuda", name="NVIDIA H200") == 989e12
    assert device_peak_flops("cuda", name="NVIDIA H200 NVL") == 835e12
    assert device_peak_flops("cuda", name="NVIDIA H800 PCIe") == 756e12
    assert device_peak_flops("cuda", name="NVIDIA GH200 480GB") == 989e12
    assert device_peak_flops("cuda", name="NVIDIA GB200") == 2500e12
    assert device_peak_flops("cuda", name="NVIDIA B200") == 2250e12
    assert device_peak_flops("cuda", name="NVIDIA H20") == 148e12
    assert device_peak_flops("cuda", name="NVIDIA A100-SXM4-80GB") == 312e12
    assert device_peak_flops("cuda", torch.float32, name="NVIDIA A100-SXM4-80GB") == 19.5e12
    assert device_peak_flops("cuda", name="NVIDIA L40S") == 362e12
    assert device_peak_flops("cuda", name="NVIDIA L40") == 181e12
    assert device_peak_flops("cuda", name="NVIDIA L4") == 121e12
    assert device_peak_flops("cuda", name="NVIDIA GeForce RTX 3060") is None
    assert device_peak_flops("cuda", torch.float16, name="NVIDIA H100 80GB HBM3") is None


def test_no_row_of_the_peak_table_hides_a_later_one():
    names = [name for name, _, _ in DEVICE_PEAKS_TFLOPS]
    for i, later in enumerate(names):
        assert not any(earlier in later for earlier in names[:i]), later
