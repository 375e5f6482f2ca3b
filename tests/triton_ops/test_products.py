"""Products with a transpose of themselves, and the experts' product with SwiGLU inside, beyond parity."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="triton is not installed")
from megatron_nucleus.core.recompute import recomputing
from megatron_nucleus.ops import experts, registry
from triton_ops import expert_ffn, symmetric
from triton_ops.tuning import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tile(rows=16, columns=16, depth=16, warps=4, stages=2)


def floats(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("side", [16, 40, 70])
def test_every_tile_is_made_once_and_mirrored(side):
    """1, 3 and 5 tiles across; what is not written stays NaN."""
    x, addend = floats(2, side, 21), floats(2, side, side)
    addend = addend + addend.mT
    out = torch.full_like(addend, float("nan"))
    symmetric.launch(x, addend.contiguous(), 0.5, -2.0, out, SMALL)
    expected = 0.5 * (x.double() @ x.double().mT) - 2.0 * addend.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(out, out.mT)


def test_of_the_addend_only_the_lower_triangle_of_tiles_is_read():
    x, addend = floats(1, 40, 8), floats(1, 40, 40)
    addend = addend + addend.mT
    torn = addend.clone()
    torn[:, :16, 16:] = float("nan")
    whole, from_torn = torch.empty_like(addend), torch.empty_like(addend)
    symmetric.launch(x, addend, 1.0, 1.0, whole, SMALL)
    symmetric.launch(x, torn, 1.0, 1.0, from_torn, SMALL)
    assert torch.equal(whole, from_torn)


def test_steps_equal_full_products():
    """Three quintic steps over matrices of several tiles; the default tile has one tile for them."""
    x = floats(2, 40, 60)
    x = x / torch.linalg.matrix_norm(x, keepdim=True)
    quintics = ((3.0, -4.0, 2.0), (2.0, -1.5, 0.5), (1.9, -1.2, 0.4))
    wide = x.double()
    for a, b, c in quintics:
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    torch.testing.assert_close(
        symmetric.newton_schulz(x.clone(), quintics).double(), wide, rtol=1e-5, atol=1e-5
    )


def test_tiles_of_the_experts_cover_all_rows_and_columns():
    """Rows beyond one group of tiles, odd edges on all sides, and the rows before SwiGLU."""
    x, weight = floats(2, 9 * 16 + 3, 20), floats(2, 20, 2 * 37)
    hidden = torch.full((2, 147, 37), float("nan"), device=DEVICE)
    gate_up = torch.full((2, 147, 74), float("nan"), device=DEVICE)
    expert_ffn.launch(x, weight, hidden, gate_up, SMALL)
    product = x.double() @ weight.double()
    gate, up = product.chunk(2, -1)
    torch.testing.assert_close(gate_up.double(), product, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.double(), gate * torch.sigmoid(gate) * up, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "triton_fused"])
def test_the_backward_pass_keeps_the_rows_before_swiglu_alone(backend):
    """Besides its arguments: 2F values a row, and nothing where no gradient is wanted."""
    function = registry.resolve("expert_ffn", backend, device_type=DEVICE)
    arguments = floats(2, 5, 8), floats(2, 8, 12), floats(2, 6, 8)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function(*(a.clone().requires_grad_() for a in arguments))
    assert sorted(t.numel() for t in kept) == sorted([*(a.numel() for a in arguments), 2 * 5 * 12])
    kept.clear()
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function(*arguments)
    assert kept == []


@pytest.mark.parametrize("backend", ["triton", "triton_fused"])
def test_a_frozen_weight_gets_no_gradient_and_costs_the_others_nothing(backend):
    function = registry.resolve("expert_ffn", backend, device_type=DEVICE)
    for frozen in range(3):
        arguments = [floats(2, 5, 8), floats(2, 8, 12), floats(2, 6, 8)]
        for i, a in enumerate(arguments):
            a.requires_grad_(i != frozen)
        function(*arguments).sum().backward()
        copies = [a.detach().clone().requires_grad_(a.requires_grad) for a in arguments]
        experts.expert_ffn(*copies).sum().backward()
        assert arguments[frozen].grad is None
        for got, want in zip(arguments, copies, strict=True):
            if want.grad is not None:
                torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["triton", "triton_fused"])
def test_counted_flops_are_those_of_the_plain_products(backend):
    counts = []
    for name in (backend, "torch"):
        function = registry.resolve("expert_ffn", name, device_type=DEVICE)
        arguments = [a.requires_grad_() for a in (floats(2, 5, 8), floats(2, 8, 12), floats(2, 6, 8))]
        with FlopCounterMode(display=False) as counter:
            function(*arguments).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts == [3 * 2 * 2 * 5 * 8 * (12 + 6)] * 2  # forward, and twice that backward


@pytest.mark.parametrize("backend", ["triton", "triton_fused"])
def test_selective_recomputation_repeats_no_product_of_torch(backend):
    """The products stand in the region as operations of their own, so what `COSTLY` lists is kept."""
    function = registry.resolve("expert_ffn", backend, device_type=DEVICE)
    results, counts = [], []
    for run in (function, recomputing(function, "selective")):
        arguments = [a.requires_grad_() for a in (floats(2, 5, 8), floats(2, 8, 12), floats(2, 6, 8))]
        with FlopCounterMode(display=False) as counter:
            out = run(*arguments)
            results.append((out, *torch.autograd.grad(out.sum(), arguments)))
        counts.append(counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("op", ["expert_ffn", "norm_rope", "gated_residual_norm"])
def test_one_graph_under_torch_compile(op):
    """Traced without a break, forward and backward, with the values of the operation itself."""
    function = registry.resolve(op, "triton", device_type=DEVICE)
    turn = torch.ones(3, 4, dtype=torch.complex64, device=DEVICE)
    made = {
        "expert_ffn": lambda: (floats(2, 5, 8), floats(2, 8, 12), floats(2, 6, 8)),
        "norm_rope": lambda: (floats(1, 3, 2, 8), floats(8), turn, 1e-6),
        "gated_residual_norm": lambda: (
            floats(1, 3, 8),
            floats(1, 3, 8),
            floats(1, 8),
            floats(1, 8),
            1e-6,
            True,
        ),
    }[op]
    results = []
    for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        wanted = [a.requires_grad_() for a in made() if isinstance(a, torch.Tensor) and a.is_floating_point()]
        others = [a for a in made() if not (isinstance(a, torch.Tensor) and a.is_floating_point())]
        out = run(*wanted, *others)
        out = out if isinstance(out, tuple) else (out,)
        results.append((*out, *torch.autograd.grad(sum(o.square().sum() for o in out), wanted)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["triton", "triton_fused"])
def test_autocast_computes_in_its_dtype_and_gradients_keep_theirs(backend):
    function = registry.resolve("expert_ffn", backend, device_type=DEVICE)
    arguments = [a.requires_grad_() for a in (floats(2, 5, 8), floats(2, 8, 12), floats(2, 6, 8))]
    with torch.autocast(DEVICE, torch.bfloat16):
        out, expected = function(*arguments), experts.expert_ffn(*arguments)
    assert out.dtype == expected.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().sum(), arguments)
    assert [g.dtype for g in gradients] == [torch.float32] * 3
    wanted = torch.autograd.grad(expected.float().sum(), arguments)
    for got, want in zip((out, *gradients), (expected, *wanted), strict=True):
        assert float((got - want).detach().abs().max()) <= 3e-2 * float(want.detach().abs().max())


def test_norm_rope_reads_half_precision_against_a_wide_weight():
    """Under autocast q is bfloat16 and the weight fp32: the result is wide, as the reference's, without a copy of q."""
    function = registry.resolve("norm_rope", "triton", device_type=DEVICE)
    reference = registry.resolve("norm_rope", "torch", device_type=DEVICE)
    angle = floats(3, 4)
    rotation = torch.polar(torch.ones_like(angle), angle)
    results = []
    for run in (function, reference):
        x, weight = floats(2, 3, 2, 8, dtype=torch.bfloat16).requires_grad_(), floats(8).requires_grad_()
        out = run(x, weight, rotation, 1e-6)
        results.append((out, *torch.autograd.grad((out * floats(2, 3, 2, 8)).sum(), (x, weight))))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        rtol = 1e-2 if got.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("op", ["gated_residual_norm", "norm_rope", "swiglu"])
def test_a_nan_is_passed_on(op):
    """A skipped step is noticed by its loss, so no kernel may swallow a NaN."""
    function = registry.resolve(op, "triton", device_type=DEVICE)
    arguments = {
        "gated_residual_norm": (floats(1, 3, 8), floats(1, 3, 8), floats(1, 8), floats(1, 8), 1e-6),
        "norm_rope": (
            floats(1, 3, 2, 8),
            floats(8),
            torch.ones(3, 4, dtype=torch.complex64, device=DEVICE),
            1e-6,
        ),
        "swiglu": (floats(3, 8),),
    }[op]
    arguments[0].view(-1)[0] = float("nan")
    x = arguments[0].requires_grad_()
    out = function(*arguments)
    out = out if isinstance(out, torch.Tensor) else out[1]
    assert out.isnan().any()
    assert torch.autograd.grad(out.sum(), x)[0].isnan().any()


@pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp"
)  # the interpreter's, on the way to silu(-1e30) = 0
def test_swiglu_stays_finite_and_exact_at_extreme_gates():
    gates = torch.tensor([-1e30, -500.0, -88.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 88.0, 500.0, 1e30])
    packed = torch.stack([gates, torch.ones_like(gates)], -1).to(DEVICE)
    results = []
    for backend in ("triton", "torch"):
        x = packed.clone().requires_grad_()
        out = registry.resolve("swiglu", backend, device_type=DEVICE)(x)
        results.append((out, *torch.autograd.grad(out.sum(), x)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
