"""Emulated FP8 products: rounding by its definition, error bounds, gradients, and what scaling must not change."""

from __future__ import annotations

import pytest
import torch

from megatron_nucleus.ops import fp8
from megatron_nucleus.ops.fp8 import E4M3, E5M2, LARGEST, RECIPES

STEPS = {E4M3: (2.0**-3, 2.0**-9), E5M2: (2.0**-2, 2.0**-16)}  # relative step, smallest step
BLOCKS = {"whole": (0, 0), "rows": (1, 0), "blocks": (128, 128), "groups": (1, 32), "odd": (3, 5)}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wild(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values over 12 decimal orders of magnitude, some zero."""
    x = normal(*shape, seed=seed)
    x = x * 10.0 ** (12 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed + 1)) - 6)
    return torch.where(x.abs() < 1e-5, 0.0, x)


def allowed_error(x: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], dtype) -> torch.Tensor:
    """Half a step of every value in fp64, with room for the fp32 division."""
    rows, columns = block[0] or x.shape[-2], block[1] or x.shape[-1]
    wide = scale.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    relative, smallest = STEPS[dtype]
    wide = wide[..., : x.shape[-2], : x.shape[-1]].double()
    return torch.maximum(x.double().abs() * relative, wide * smallest) / 2 * (1 + 2e-7 / relative)


def quantised_steps(dtype: torch.dtype) -> torch.Tensor:
    """Every finite value of an 8-bit format, from its bits."""
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()
    return values[values.isfinite()].unique()


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=("e4m3", "e5m2"))
@pytest.mark.parametrize("two", [True, False], ids=("power of two", "any scale"))
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_every_value_is_within_half_a_step(block, two, dtype):
    for x in (normal(3, 130, 70), wild(130, 70), wild(1, 1)):
        values, scale = fp8.quantise(x, block, dtype, two)
        back = fp8.dequantise(values, scale, block)
        assert ((back.double() - x.double()).abs() <= allowed_error(x, scale, block, dtype)).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=("e4m3", "e5m2"))
def test_rounding_is_to_the_nearest_of_all_values(dtype):
    """Against a search over the format's values, at scale 1."""
    steps = quantised_steps(dtype)
    x = torch.cat([normal(500, seed=3) * 30, steps * 1.0001, torch.tensor([LARGEST[dtype]])]).clamp(
        -LARGEST[dtype], LARGEST[dtype]
    )
    values, scale = fp8.quantise(x[None], (0, 0), dtype)
    assert scale.item() == 1.0
    nearest = (x[:, None] - steps[None]).abs().amin(1)
    torch.testing.assert_close((values[0].float() - x).abs(), nearest, rtol=0, atol=0)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_scales_use_the_whole_range_and_never_exceed_it(block):
    x = wild(130, 70, seed=5) + 1e-4
    values, scale = fp8.quantise(x, block, E4M3, power_of_two=False)
    assert values.float().abs().max() == 448
    assert values.float().isfinite().all()
    values, scale = fp8.quantise(x, block, E4M3, power_of_two=True)
    assert 224 <= values.float().abs().max() <= 448
    assert (torch.frexp(scale).mantissa == 0.5).all()


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_quantising_twice_changes_nothing(block):
    values, scale = fp8.quantise(normal(130, 70), block)
    back = fp8.dequantise(values, scale, block)
    again = fp8.dequantise(*fp8.quantise(back, block), block)
    assert torch.equal(again, back)


def test_bfloat16_holds_values_of_power_of_two_scales_exactly():
    values, scale = fp8.quantise(wild(40, 30), (1, 0))
    exact = fp8.dequantise(values, scale, (1, 0))
    assert torch.equal(fp8.dequantise(values, scale, (1, 0), torch.bfloat16).float(), exact)


def test_a_power_of_two_in_the_input_comes_out_unchanged():
    x = normal(20, 30)
    for factor in (2.0**-30, 2.0**30):
        for block in BLOCKS.values():
            one = fp8.dequantise(*fp8.quantise(x, block), block)
            other = fp8.dequantise(*fp8.quantise(x * factor, block), block)
            assert torch.equal(one * factor, other)


def test_zero_tiny_and_empty_blocks():
    values, scale = fp8.quantise(torch.zeros(4, 8), (1, 0))
    assert (scale == 1).all()
    assert (values.float() == 0).all()
    tiny = torch.full((2, 4), 1e-44)  # subnormal in fp32
    assert fp8.dequantise(*fp8.quantise(tiny, (0, 0)), (0, 0)).isfinite().all()
    for shape in ((0, 4), (4, 0), (2, 0, 4)):
        values, scale = fp8.quantise(torch.zeros(shape), (1, 32))
        assert fp8.dequantise(values, scale, (1, 32)).shape == shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_is_passed_on_within_its_block(bad):
    x = normal(4, 8)
    x[1, 2] = bad
    back = fp8.dequantise(*fp8.quantise(x, (1, 0)), (1, 0))
    assert back[1, 2].isnan()
    assert back[[0, 2, 3]].isfinite().all()
    grown = x.requires_grad_()
    out = fp8.matmul(grown, normal(8, 3), "current")
    assert out.isnan().all()


def operands(recipe: fp8.Recipe) -> tuple:
    """a, b and the output's gradient, with the blocks and formats in which each product sees them."""
    a, b, grad = normal(2, 48, 64), normal(2, 64, 40, seed=1), normal(2, 48, 40, seed=2)
    return a, b, grad, recipe


def rounding(x: torch.Tensor, block, dtype, two) -> torch.Tensor:
    """Most that rounding may change each value, fp64."""
    _, scale = fp8.quantise(x, block, dtype, two)
    return allowed_error(x, scale, block, dtype)


def product_bound(x, y, ex, ey) -> torch.Tensor:
    """Most that |x@y| may change when x and y change by ex and ey, and fp32 sums add a little."""
    x, y = x.double().abs(), y.double().abs()
    return (ex @ y + x @ ey + ex @ ey) + 1e-5 * (x @ y)


@pytest.mark.parametrize("name", RECIPES)
def test_forward_and_gradients_stay_within_the_bound_of_their_roundings(name):
    a, b, grad, recipe = operands(RECIPES[name])
    a.requires_grad_(), b.requires_grad_()
    out = fp8.matmul(a, b, name)
    grad_a, grad_b = torch.autograd.grad(out, (a, b), grad)
    a, b = a.detach(), b.detach()
    t, w, g, two = recipe
    bounds = {
        "output": (out, a, b, rounding(a, t, E4M3, two), rounding(b.mT, w, E4M3, two).mT),
        "input": (grad_a, grad, b.mT, rounding(grad, t, g, two), rounding(b, w, E4M3, two).mT),
        "weight": (grad_b, a.mT, grad, rounding(a.mT, t, E4M3, two), rounding(grad.mT, t, g, two).mT),
    }
    for what, (got, x, y, ex, ey) in bounds.items():
        error = (got.double() - x.double() @ y.double()).abs()
        assert (error <= product_bound(x, y, ex, ey)).all(), what


# Root mean square errors relative to the output's, of normal operands: 3 bits of mantissa round by 2.6 %, 2 bits by
# 5.2 %; two operands add up in squares. 1.25 is room for chance.
RMS = {"output": 0.037, "gradient": 0.058}


@pytest.mark.parametrize("name", RECIPES)
def test_typical_errors_are_those_of_the_formats(name):
    a, b, grad, recipe = operands(RECIPES[name])
    a.requires_grad_(), b.requires_grad_()
    out = fp8.matmul(a, b, name)
    gradients = torch.autograd.grad(out, (a, b), grad)
    limit = RMS["gradient"] if recipe.gradient is E5M2 else RMS["output"]

    def rms(got, want):
        return ((got - want).square().mean() / want.square().mean()).sqrt().item()

    assert 0.5 * RMS["output"] < rms(out, a @ b) < 1.25 * RMS["output"]
    assert 0.5 * limit < rms(gradients[0], grad @ b.mT) < 1.25 * limit
    assert 0.5 * limit < rms(gradients[1], a.mT @ grad) < 1.25 * limit


@pytest.mark.parametrize("name", RECIPES)
def test_values_that_the_format_holds_multiply_exactly(name):
    """Small whole numbers: every product and sum is exact, forward and backward."""
    whole = torch.Generator().manual_seed(0)
    a = torch.randint(-4, 5, (32, 64), generator=whole).float().requires_grad_()
    b = torch.randint(-4, 5, (64, 48), generator=whole).float().requires_grad_()
    grad = torch.randint(-2, 3, (32, 48), generator=whole).float()
    if name == "current":  # its scale is 1 where the largest value is the format's
        with torch.no_grad():
            a.mul_(64), b.mul_(64)
            a[0, 0], b[0, 0] = LARGEST[E4M3], LARGEST[E4M3]
        grad = grad * 2**13
        grad[0, 0] = LARGEST[E5M2]
    out = fp8.matmul(a, b, name)
    grad_a, grad_b = torch.autograd.grad(out, (a, b), grad)
    torch.testing.assert_close(out, a @ b, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad_a, grad @ b.mT, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad_b, a.mT @ grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["rowwise", "mxfp8"])
def test_a_token_is_not_changed_by_the_others(name):
    """Scales per row (or finer): an outlier in one token leaves the outputs of the others alone."""
    a, b = normal(8, 64), normal(64, 16, seed=1)
    loud = a.clone()
    loud[3] *= 1000
    calm, changed = fp8.matmul(a, b, name), fp8.matmul(loud, b, name)
    keep = torch.arange(8) != 3
    assert torch.equal(calm[keep], changed[keep])


def test_experts_are_scaled_apart():
    rows, gate_up, down = normal(3, 8, 16), normal(3, 16, 24, seed=1), normal(3, 12, 16, seed=2)
    together = fp8.expert_ffn(rows, gate_up, down, "current")
    for e in range(3):
        alone = fp8.expert_ffn(rows[e : e + 1], gate_up[e : e + 1], down[e : e + 1], "current")
        torch.testing.assert_close(together[e : e + 1], alone, rtol=1e-5, atol=1e-5)


def test_linear_takes_any_leading_axes_and_autocast():
    x, weight = normal(2, 3, 32), normal(16, 32, seed=1)
    out = fp8.linear(x, weight, "rowwise")
    torch.testing.assert_close(out[1, 2], fp8.matmul(x[1, 2:3], weight.t(), "rowwise")[0])
    with torch.autocast("cpu", torch.bfloat16):
        low = fp8.linear(x.requires_grad_(), weight.requires_grad_(), "rowwise")
    assert low.dtype is torch.bfloat16
    low.float().sum().backward()
    assert x.grad.dtype is weight.grad.dtype is torch.float32
    assert fp8.linear(normal(0, 32), weight, "rowwise").shape == (0, 16)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_no_operand_again(name, dtype):
    """8-bit values times a scale that is no power of two need more bits than bfloat16 has."""
    results = []
    for autocast in (True, False):
        a, b = (normal(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate([(8, 64), (64, 48)]))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = fp8.matmul(a, b, name)
            # a compiled backward pass is traced under the autocast of its forward pass
            results.append((out, *torch.autograd.grad(out, (a, b), normal(8, 48, seed=2, dtype=dtype))))
    assert all(torch.equal(inside, outside) for inside, outside in zip(*results, strict=True))
