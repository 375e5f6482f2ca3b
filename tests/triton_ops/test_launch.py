"""What the launchers promise beyond parity (tests/ops/test_parity.py): torch's own checks, and errors that teach."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from torch.autograd import forward_ad

from megatron_nucleus.ops import registry
from tests.ops.op_cases import CASES, Inputs
from triton_ops import expert_ffn, gated_residual, layer_norm, moe_rows, norm_rope, swiglu, symmetric
from triton_ops.launch import check_matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def floats(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def test_registrations_pass_torchs_own_checks():
    index = torch.tensor([0, 3, 3, 1], device=DEVICE)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    samples = [
        (moe_rows.gather_rows, (floats(5, 6), index)),
        (moe_rows.combine_rows, (floats(5, 6), floats(4, 6), floats(4), index)),
        (layer_norm.modulated_layer_norm, (floats(1, 2, 6), floats(1, 6), 1e-6, True)),
        (layer_norm.modulated_layer_norm, (floats(1, 2, 6), floats(1, 6), 1e-6, False)),
    ]
    stream, image = floats(1, 2, 6), floats(1, 6)
    rotation = floats(2, 2, 2).detach()
    grams = floats(2, 3, 3).detach()
    samples += [
        (gated_residual.gated_residual_norm, (stream, floats(1, 2, 6), image, image, 1e-6, True)),
        (gated_residual.gated_residual_norm, (stream, floats(1, 2, 6), image, image, 1e-6, False)),
        (norm_rope.norm_rope, (floats(1, 2, 3, 4), floats(4), rotation, 1e-6)),
        (norm_rope.norm_rope, (floats(1, 2, 3, 4, dtype=torch.bfloat16), floats(4), rotation, 1e-6)),
        (swiglu.swiglu, (floats(3, 6),)),
        (swiglu.swiglu_backward, (floats(3, 3).detach(), floats(3, 6).detach(), True)),
        (expert_ffn.expert_gate_up, (floats(2, 3, 4).detach(), floats(2, 4, 6).detach(), True)),
        (symmetric.symmetric_product, (floats(2, 3, 5).detach(), grams, 1.0, 2.0, torch.zeros_like(grams))),
    ]
    for op, args in samples:
        assert set(torch.library.opcheck(op, args, test_utils=tests).values()) == {"SUCCESS"}


def test_the_sum_of_a_token_is_formed_in_row_order():
    """1e8 + 1 - 1e8 in fp32 is 0 in this order and 1 in others: the order is part of the contract."""
    rows = torch.tensor([[1e8], [1.0], [-1e8]], device=DEVICE)
    ones, zero = torch.ones(3, device=DEVICE), torch.zeros(1, 1, device=DEVICE)
    index = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    assert moe_rows.combine_rows(zero, rows, ones, index).item() == 0.0
    swapped = rows[[0, 2, 1]].contiguous()
    assert moe_rows.combine_rows(zero, swapped, ones, index).item() == 1.0


def test_other_dtypes_and_layouts_are_refused():
    index = torch.tensor([0], device=DEVICE)
    with pytest.raises(ValueError, match="one dtype out of float32, bfloat16, float16; got x float64"):
        moe_rows.gather_rows(floats(2, 2, dtype=torch.float64), index)
    with pytest.raises(ValueError, match="got base float32, rows bfloat16, weight float32"):
        moe_rows.combine_rows(floats(2, 2), floats(1, 2, dtype=torch.bfloat16), floats(1), index)
    with pytest.raises(ValueError, match="gather_rows: x must be contiguous"):
        moe_rows.gather_rows(floats(2, 3).t(), index)
    with pytest.raises(ValueError, match="at most 8192 values, got 9000"):
        layer_norm.modulated_layer_norm(floats(1, 1, 9000), floats(1, 9000), 1e-6, False)
    with pytest.raises(ValueError, match="gated_residual_norm takes rows of at most 4096 values, got 9000"):
        gated_residual.gated_residual_norm(
            floats(1, 1, 9000), floats(1, 1, 9000), floats(1, 9000), floats(1, 9000), 1e-6, False
        )
    with pytest.raises(ValueError, match=r"branch must be \[1, 2, 6\], got \[1, 3, 6\]"):
        gated_residual.gated_residual_norm(
            floats(1, 2, 6), floats(1, 3, 6), floats(1, 6), floats(1, 6), 1e-6, False
        )
    with pytest.raises(ValueError, match=r"weight must be \[4\] and rotation \[2, 2, 2\] in float32"):
        norm_rope.norm_rope(floats(1, 2, 3, 4), floats(4), floats(3, 2, 2).detach(), 1e-6)
    with pytest.raises(ValueError, match="heads of an even width up to 2048, got 5"):
        norm_rope.norm_rope(floats(1, 2, 3, 5), floats(5), floats(2, 2, 2).detach(), 1e-6)
    with pytest.raises(ValueError, match=r"gate_up must be \[N, 2F\], got \[2, 3\]"):
        swiglu.swiglu(floats(2, 3))
    with pytest.raises(ValueError, match=r"weight must be \[2, 4, 2F\], got \[2, 5, 6\]"):
        expert_ffn.expert_gate_up(floats(2, 3, 4), floats(2, 5, 6), False)
    with pytest.raises(ValueError, match=r"addend must be \[2, 3, 3\], got \[2, 3, 4\]"):
        symmetric.symmetric_product(floats(2, 3, 5), floats(2, 3, 4), 1.0, 1.0, floats(2, 3, 3))


INDEX = torch.tensor([0, 3], device=DEVICE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moe_rows.gather_rows(floats(4, 5), INDEX.int()), r"index must be \[N\] in int64, got \[2\] in int32"),
        (lambda: moe_rows.gather_rows(floats(4, 5), INDEX[None]), r"index must be \[N\] in int64, got \[1, 2\]"),
        (lambda: moe_rows.gather_rows(floats(4, 5), INDEX.repeat(2)[::2]), "gather_rows: index must be contiguous"),
        (lambda: moe_rows.gather_rows(floats(4, 5, 2), INDEX), r"x must be \[T, D\], got \[4, 5, 2\]"),
        (lambda: moe_rows.gather_rows_backward(floats(3, 5), INDEX, 4), r"grad must be \[2, 5\], got \[3, 5\]"),
        (lambda: moe_rows.combine_rows(floats(4, 5), floats(2, 3), floats(2), INDEX), r"rows must be \[2, 5\]"),
        (lambda: moe_rows.combine_rows(floats(4, 5), floats(3, 5), floats(3), INDEX), r"rows must be \[2, 5\], got"),
        (lambda: moe_rows.combine_rows(floats(4, 5), floats(2, 5), floats(3), INDEX), r"weight must be \[2\], got"),
        (lambda: moe_rows.combine_rows_backward(floats(4, 3), floats(2, 5), floats(2), INDEX), r"must be \[2, 3\]"),
        (lambda: layer_norm.modulated_layer_norm(floats(3, 2, 4), floats(1, 4), 1e-6, False), r"must be \[3, 4\]"),
        (lambda: layer_norm.modulated_layer_norm(floats(3, 4), floats(3, 4), 1e-6, False), r"x must be \[B, S, D\]"),
        (
            lambda: layer_norm.modulated_layer_norm_backward(
                floats(1, 2, 4), floats(1, 1, 4), floats(1, 2, 4), floats(1, 4), 1e-6
            ),
            r"grad_plain must be \[1, 2, 4\], got \[1, 1, 4\]",
        ),
        (lambda: swiglu.swiglu_backward(floats(4, 9), floats(4, 6), False), r"grad must be \[4, 3\], got \[4, 9\]"),
        (lambda: norm_rope.norm_rope(floats(2, 3, 4), floats(4), floats(3, 2, 2), 1e-6), r"x must be \[B, T, H, K\]"),
        (lambda: expert_ffn.expert_gate_up(floats(3, 4), floats(2, 4, 6), False), r"x must be \[E, N, D\]"),
        (
            lambda: symmetric.symmetric_product(floats(3, 5), None, 1.0, 0.0, floats(3, 3)),
            r"x must be \[n, R, C\], got \[3, 5\]",
        ),
    ],
)  # fmt: skip
def test_shapes_that_do_not_belong_together_are_refused(call, message):
    """A kernel would read and write outside its tensors."""
    with pytest.raises(ValueError, match=message):
        call()


def test_offsets_inside_a_matrix_stay_below_32_bits():
    """Checked on shapes alone: such a matrix takes gigabytes."""
    check_matrix("op", "x", torch.empty(3, 2**15, 2**15, device="meta"))
    with pytest.raises(
        ValueError, match=r"op: x has 2147483648 values a matrix, its kernel takes fewer than 2\^31"
    ):
        check_matrix("op", "x", torch.empty(1, 2**15, 2**16, device="meta"))


def test_images_and_matrices_lie_on_the_axis_of_a_grid_that_takes_them_all():
    """CUDA's second and third axes end at 65,535 blocks."""
    grids = []

    def recorder(kernel):
        return type("Kernel", (), {"__getitem__": lambda self, grid: lambda *a, **k: grids.append(grid)})()

    many = 70_000
    x, image = torch.zeros(many, 1, 2, device=DEVICE), torch.zeros(many, 2, device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        for module in (layer_norm, gated_residual):
            patch.setattr(module, "forward_kernel", recorder(None))
            patch.setattr(module, "backward_kernel", recorder(None))
        patch.setattr(symmetric, "product_kernel", recorder(None))
        layer_norm.modulated_layer_norm(x, image, 1e-6, False)
        layer_norm.modulated_layer_norm_backward(x, None, x, image, 1e-6)
        gated_residual.gated_residual_norm(x, x, image, image, 1e-6, False)
        gated_residual.gated_residual_norm_backward(x, x, None, x, x, image, image, 1e-6)
        symmetric.symmetric_product(x, None, 1.0, 0.0, torch.zeros(many, 1, 1, device=DEVICE))
    assert grids == [(many,)] * 5


# The interpreter's, in padding rows.
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("tokens", [1, 9, 67])
def test_rows_that_do_not_exist_add_nothing_even_without_an_eps(images, tokens):
    """Padding rows have variance 0; with eps = 0 their 1/deviation must not reach the sums over tokens."""
    shapes = (images, tokens, 6), (images, 6)
    cases = {
        "modulated_layer_norm": lambda: (floats(*shapes[0]), floats(*shapes[1]), 0.0, True),
        "gated_residual_norm": lambda: (
            floats(*shapes[0]), floats(*shapes[0]) * 0.5, floats(*shapes[1]), floats(*shapes[1]), 0.0, True,
        ),
        "norm_rope": lambda: (
            floats(images, tokens, 1, 6), floats(6), torch.ones(tokens, 3, dtype=torch.complex64, device=DEVICE), 0.0,
        ),
    }  # fmt: skip
    for op, make in cases.items():
        results = []
        for backend in ("triton", "torch"):
            args = make()
            wanted = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
            out = registry.resolve(op, backend, device_type=DEVICE)(*args)
            out = out if isinstance(out, tuple) else (out,)
            loss = sum((o * torch.arange(o.numel(), device=DEVICE).view_as(o).sin()).sum() for o in out)
            results.append((*out, *torch.autograd.grad(loss, wanted)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4, msg=op)


def test_forward_mode_derivatives_are_refused_and_not_lost():
    """torch runs an operation without a formula for them on the values alone: the tangent would be 0."""
    x = floats(3, 6).detach()
    assert torch.func.vmap(swiglu.swiglu)(x[None]).shape == (1, 3, 3)
    with pytest.raises(
        RuntimeError, match="swiglu: no forward-mode derivatives on Triton kernels; choose the torch"
    ):
        torch.func.jvp(swiglu.swiglu, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="gather_rows: no forward-mode"):
        moe_rows.gather_rows(forward_ad.make_dual(floats(4, 6).detach(), floats(4, 6).detach()), INDEX)


@pytest.mark.parametrize("op", ["moe_gather", "modulated_layer_norm", "norm_rope", "swiglu", "expert_ffn"])
def test_second_derivatives_are_refused_and_not_lost(op):
    function = registry.resolve(op, "triton", device_type=DEVICE)
    args = next(iter(CASES[op].values()))(Inputs(torch.float32, DEVICE))
    out = function(*args)
    out = out[0] if isinstance(out, tuple) else out
    (grad,) = torch.autograd.grad(out.square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        (grad.square().sum() + args[0].square().sum()).backward()


def test_tiles_hold_whole_rows_and_stay_small():
    for width in (1, 100, 2048, 8192):
        rows, padded = layer_norm.tile(width)
        assert width <= padded <= 2 * width
        assert rows == 1 or rows * padded <= layer_norm.TILE
    for width in (2, 100, 128, 2048):
        rows, padded = norm_rope.tile(width)
        assert width <= padded <= 2 * width
        assert 1 <= rows * padded <= norm_rope.TILE
        assert norm_rope.CHUNK % rows == 0
