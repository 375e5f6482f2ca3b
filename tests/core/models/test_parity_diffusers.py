"""Our model against diffusers' `NucleusMoEImageTransformer2DModel` with the same weights."""

from __future__ import annotations

import pytest
import torch

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.export.hf_keys import to_diffusers_config, to_native_state
from megatron_nucleus.types import TextFeatures

diffusers = pytest.importorskip("diffusers")


def shape(**changes) -> ModelShape:
    base = {
        "num_layers": 5, "num_attention_heads": 4, "attention_head_dim": 16, "num_key_value_heads": 2,
        "text_dim": 24, "latent_channels": 4, "patch_size": 2, "axes_dims_rope": (4, 6, 6), "mlp_ratio": 4.0,
        "dense_moe_strategy": "leave_first_three_blocks_dense", "num_experts": 6, "moe_intermediate_dim": 40,
        "capacity_factors": (0.0, 0.0, 0.0, 2.0, 1.0), "use_sigmoid": False, "route_scale": 2.5,
    }  # fmt: skip
    return ModelShape(**{**base, **changes})


CASES = {
    "released_strategy": shape(),
    "all_dense": shape(dense_moe_strategy="all_dense", capacity_factors=(0.0,) * 5),
    "all_moe": shape(dense_moe_strategy="all_moe", capacity_factors=(4.0, 3.0, 2.0, 1.0, 0.5)),
    "first_dense": shape(dense_moe_strategy="leave_first_block_dense", capacity_factors=(0.0, 2.0, 2.0, 2.0, 2.0)),
    "first_three_and_last": shape(
        dense_moe_strategy="leave_first_three_and_last_block_dense", capacity_factors=(2.0,) * 5
    ),
    "sigmoid": shape(use_sigmoid=True, route_scale=1.7),
    "no_gqa": shape(num_key_value_heads=4),
    "one_kv_head": shape(num_key_value_heads=1),
    "odd_sizes": shape(
        num_attention_heads=3, num_key_value_heads=3, attention_head_dim=22, axes_dims_rope=(2, 8, 12), text_dim=17,
        num_experts=5, moe_intermediate_dim=31, latent_channels=3, mlp_ratio=5.9,
    ),
    "square_experts": shape(moe_intermediate_dim=32),  # 2F == D: a transposed expert would fit silently
    "capacity_of_one_token": shape(capacity_factors=(0.0, 0.0, 0.0, 0.1, 0.1)),
    "every_expert_takes_all": shape(capacity_factors=(0.0, 0.0, 0.0, 6.0, 6.0)),
}  # fmt: skip


def diffusers_arguments(case: ModelShape) -> dict:
    config = to_diffusers_config(case)
    return {k: v for k, v in config.items() if not k.startswith("_")} | {"use_grouped_mm": False}


def build_pair(case: ModelShape, seed: int = 0):
    """diffusers' module with random weights everywhere (also its uninitialised experts) and ours with the same."""
    theirs = diffusers.NucleusMoEImageTransformer2DModel(**diffusers_arguments(case))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            scale = 0.5 if p.ndim == 1 else 1.5 / p.shape[1] ** 0.5
            p.copy_(
                torch.randn(p.shape, generator=generator) * scale
                + (name.endswith("norm.weight") or "norm_" in name)
            )
    ours = NucleusTransformer(case)
    ours.load_state_dict(to_native_state(theirs.state_dict(), case), strict=True)
    return theirs, ours


def inputs(case: ModelShape, grid=(4, 6), batch=3, text_tokens=7, masked=False, seed=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, grid[0] * grid[1], case.patch_channels, generator=g)
    text = torch.randn(batch, text_tokens, case.text_dim, generator=g)
    mask = None
    if masked:
        mask = torch.arange(text_tokens)[None] < torch.tensor([text_tokens, 3, 1])[:batch, None]
    sigma = torch.rand(batch, generator=g)
    return latents.to(dtype), sigma, text.to(dtype), mask, grid


def run_theirs(model, latents, sigma, text, mask, grid):
    choices = []
    real_topk = torch.topk

    def spy(*args, **kwargs):
        result = real_topk(*args, **kwargs)
        choices.append(result.indices)
        return result

    torch.topk = spy
    try:
        out = model(
            hidden_states=latents, img_shapes=[(1, *grid)] * len(latents), encoder_hidden_states=text,
            encoder_hidden_states_mask=mask, timestep=sigma, return_dict=False,
        )[0]  # fmt: skip
    finally:
        torch.topk = real_topk
    return out, choices


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("masked", [False, True], ids=["no_mask", "mask"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_choices_agree(name, masked):
    case = CASES[name]
    theirs, ours = build_pair(case)
    latents, sigma, text, mask, grid = inputs(case, masked=masked)
    want, want_choices = run_theirs(theirs, latents, sigma, text, mask, grid)
    got, routings = ours(latents, sigma, TextFeatures(text, mask), grid, return_routing=True)
    assert relative(got, want) < 1e-5
    assert len(routings) == len(want_choices) == sum(case.is_moe(i) for i in range(case.num_layers))
    for routing, choice in zip(routings, want_choices, strict=True):
        assert torch.equal(routing.index_BEC.sort(-1).values, choice.sort(-1).values)

    probe = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    (want * probe).sum().backward()
    (got * probe).sum().backward()
    their_gradients = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()
    }
    want_gradients = to_native_state(their_gradients, case)
    total_norm = torch.stack([g.norm() for g in want_gradients.values()]).norm()
    for parameter_name, parameter in ours.named_parameters():
        if "text_q_norm" in parameter_name:  # used by nothing, on either side
            assert parameter.grad is None
            assert want_gradients[parameter_name].count_nonzero() == 0
            continue
        assert parameter.grad is not None, parameter_name
        want = want_gradients[parameter_name]
        # A token that one expert alone picked gives the router no gradient: there only rounding is left, and
        # the whole gradient's norm is the yardstick.
        allowed = 1e-5 * max(want.norm(), 1e-2 * total_norm)
        assert (parameter.grad - want).norm() < allowed, parameter_name


@pytest.mark.parametrize("grid", [(1, 1), (5, 3), (1, 9), (8, 2)])
def test_odd_grids(grid):
    case = CASES["released_strategy"] if grid != (1, 1) else CASES["capacity_of_one_token"]
    theirs, ours = build_pair(case)
    latents, sigma, text, mask, grid = inputs(case, grid=grid)
    want, _ = run_theirs(theirs, latents, sigma, text, mask, grid)
    assert relative(ours(latents, sigma, TextFeatures(text, mask), grid), want) < 1e-5


def test_bf16_within_its_tolerance():
    """Both in bf16 stay as close to each other as bf16 stays to fp32."""
    case = CASES["all_dense"]  # no discrete choices: an honest comparison of the arithmetic
    theirs, ours = build_pair(case)
    latents, sigma, text, mask, grid = inputs(case)
    exact = ours(latents, sigma, TextFeatures(text, mask), grid)
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    latents, text = latents.bfloat16(), text.bfloat16()
    want, _ = run_theirs(theirs, latents, sigma, text, mask, grid)
    got = ours(latents, sigma, TextFeatures(text, mask), grid)
    assert got.dtype == torch.bfloat16
    rounding = relative(want.float(), exact)
    assert relative(got.float(), want.float()) < max(2e-2, 1.5 * rounding)


def test_bf16_moe_chooses_nearly_the_same_tokens():
    case = CASES["all_moe"]
    theirs, ours = build_pair(case)
    latents, sigma, text, mask, grid = inputs(case, dtype=torch.bfloat16)
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    _, want_choices = run_theirs(theirs, latents, sigma, text, mask, grid)
    _, routings = ours(latents, sigma, TextFeatures(text, mask), grid, return_routing=True)
    first, last = [
        (r.index_BEC.sort(-1).values == c.sort(-1).values).float().mean().item()
        for r, c in [(routings[0], want_choices[0]), (routings[-1], want_choices[-1])]
    ]
    assert first > 0.9
    assert last > 0.5
