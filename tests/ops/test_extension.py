"""The C++ operations beyond parity: same bits for any number of threads, torch's own checks, bad input, the build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_nucleus.ops import registry
from tests.ops.op_cases import CASES, Inputs, outputs_and_gradients

ROOT = Path(__file__).resolve().parents[2]
OPS = ("moe_combine", "modulated_layer_norm", "gated_residual_norm", "rms_norm", "norm_rope", "swiglu")
REASON = registry.why_unavailable("moe_combine", "extension", device_type="cpu")
built = pytest.mark.skipif(REASON is not None, reason=f"extension backend {REASON}")


def resolve(op):
    return registry.resolve(op, "extension", device_type="cpu")


@built
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_the_number_of_threads(op):
    x = Inputs(torch.float32)
    args = {
        "moe_combine": lambda: (x(700, 96), x(1500, 96), x(1500), x.index(700, 1500)),
        "modulated_layer_norm": lambda: (x(3, 300, 96), x(3, 96), 1e-6, True),
        "gated_residual_norm": lambda: (x(3, 300, 96), x(3, 300, 96), x(3, 96), x(3, 96), 1e-6, True),
        "norm_rope": lambda: (x(4, 300, 5, 32), x(32), x.rotation(300, 16), 1e-6),
        "rms_norm": lambda: (x(4000, 32), x(32), 1e-6),
        "swiglu": lambda: (x(700, 128),),
    }[op]()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs, gradients = outputs_and_gradients(resolve(op), args)
            results.append(outputs + gradients)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@built
@pytest.mark.parametrize("op", OPS)
def test_gradients_are_those_of_finite_differences(op):
    x = Inputs(torch.float64)
    args = {
        "moe_combine": lambda: (x(4, 3), x(6, 3), x(6), x.index(4, 6)),
        "modulated_layer_norm": lambda: (x(2, 3, 5), x(2, 5), 1e-6, True),
        "gated_residual_norm": lambda: (x(2, 3, 5), x(2, 3, 5), x(2, 5), x(2, 5), 1e-6, True),
        "norm_rope": lambda: (x(2, 3, 2, 6), x(6), x.rotation(3, 3), 1e-6),
        "rms_norm": lambda: (x(3, 5), x(5), 1e-6),
        "swiglu": lambda: (x(3, 6),),
    }[op]()
    assert torch.autograd.gradcheck(resolve(op), args)


@built
def test_registrations_pass_torchs_own_checks():
    """Schema, meta shapes and autograd registration, as torch.compile relies on them."""
    x, ops = Inputs(torch.float32), torch.ops.megatron_nucleus
    resolve("moe_combine")  # loads the library
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    samples = [
        (ops.combine_rows, (x(4, 3), x(6, 3), x(6), x.index(4, 6))),
        (ops.modulated_layer_norm, (x(2, 3, 5), x(2, 5), 1e-6, True)),
        (ops.modulated_layer_norm, (x(2, 3, 5), x(2, 5), 1e-6, False)),
        (ops.gated_residual_norm, (x(2, 3, 5), x(2, 3, 5), x(2, 5), x(2, 5), 1e-6, True)),
        (ops.gated_residual_norm, (x(2, 3, 5), x(2, 3, 5), x(2, 5), x(2, 5), 1e-6, False)),
        (ops.norm_rope, (x(2, 3, 2, 6), x(6), torch.view_as_real(x.rotation(3, 3)), 1e-6)),
        (ops.rms_norm, (x(3, 5), x(5), 1e-6)),
        (ops.swiglu, (x(3, 6),)),
    ]
    for op, args in samples:
        assert set(torch.library.opcheck(op.default, args, test_utils=tests).values()) == {"SUCCESS"}


@built
@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_get_the_shapes_of_real_ones(op):
    args = next(iter(CASES[op].values()))(Inputs(torch.float32))
    real, _ = outputs_and_gradients(resolve(op), args)
    meta_args = tuple(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args)
    outputs = resolve(op)(*meta_args)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
    assert [(o.shape, o.dtype, o.stride()) for o in outputs] == [(r.shape, r.dtype, r.stride()) for r in real]
    assert all(o.is_meta for o in outputs)


@built
def test_swiglu_stays_finite_and_exact_at_extreme_gates():
    gates = torch.tensor([-1e30, -500.0, -88.0, -87.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 88.0, 500.0, 1e30])
    args = torch.stack([gates, torch.ones_like(gates)], -1).requires_grad_()
    expected, (expected_gradient,) = outputs_and_gradients(
        registry.resolve("swiglu", "torch", device_type="cpu"), (args,)
    )
    outputs, (gradient,) = outputs_and_gradients(resolve("swiglu"), (args,))
    torch.testing.assert_close(outputs[0], expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-6)


@built
@pytest.mark.parametrize("op", OPS)
def test_a_nan_is_passed_on(op):
    """A skipped step is noticed by its loss, so no kernel may swallow a NaN."""
    args = next(iter(CASES[op].values()))(Inputs(torch.float32))
    with torch.no_grad():
        args[0].view(-1)[0] = float("nan")
    outputs, gradients = outputs_and_gradients(resolve(op), args)
    assert outputs[0].isnan().any()
    if op != "moe_combine":  # its gradients do not depend on base
        assert gradients[0].isnan().any()


@built
def test_bad_arguments_are_named():
    x, combine = Inputs(torch.float32), resolve("moe_combine")
    with pytest.raises(RuntimeError, match=r"index 4 is outside \[0, 4\)"):
        combine(x(4, 3), x(2, 3), x(2), torch.tensor([0, 4]))
    with pytest.raises(RuntimeError, match="index must be int64"):
        combine(x(4, 3), x(2, 3), x(2), torch.tensor([0, 1], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="rows and tokens differ in width"):
        combine(x(4, 3), x(2, 5), x(2), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="rows, weight and index differ in length"):
        combine(x(4, 3), x(2, 3), x(3), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match=r"scale must be \[B, D\]"):
        resolve("modulated_layer_norm")(x(2, 3, 4), x(3, 4), 1e-6)
    with pytest.raises(RuntimeError, match="branch has another shape"):
        resolve("gated_residual_norm")(x(2, 3, 4), x(2, 5, 4), x(2, 4), x(2, 4), 1e-6)
    with pytest.raises(RuntimeError, match=r"gate must be \[B, D\]"):
        resolve("gated_residual_norm")(x(2, 3, 4), x(2, 3, 4), x(3, 4), x(3, 4), 1e-6)
    with pytest.raises(RuntimeError, match=r"rotation must be \[T, K/2, 2\]"):
        resolve("norm_rope")(x(2, 3, 2, 6), x(6), x.rotation(4, 3), 1e-6)
    with pytest.raises(RuntimeError, match="weight must have the width of a head"):
        resolve("norm_rope")(x(2, 3, 2, 6), x(4), x.rotation(3, 3), 1e-6)
    with pytest.raises(RuntimeError, match="weight must have the width of x"):
        resolve("rms_norm")(x(2, 4), x(3), 1e-6)
    with pytest.raises(RuntimeError, match="even width"):
        resolve("swiglu")(x(2, 3))


@built
@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_are_refused_and_not_lost(op):
    """Unregistered, a gradient would count as a constant: a penalty on it would silently have no gradient."""
    args = next(iter(CASES[op].values()))(Inputs(torch.float32))
    out = resolve(op)(*args)
    out = out[0] if isinstance(out, tuple) else out
    wanted = args[1] if op == "moe_combine" else args[0]  # a sum's gradient for its base is no operation
    (grad,) = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives; choose the torch backend"):
        (grad.square().sum() + wanted.square().sum()).backward()


@built
@pytest.mark.parametrize("op", OPS)
def test_forward_mode_derivatives_are_refused_and_not_lost(op):
    first, *rest = (
        a.detach() if isinstance(a, torch.Tensor) else a
        for a in next(iter(CASES[op].values()))(Inputs(torch.float32))
    )
    with pytest.raises(RuntimeError, match="no forward-mode derivatives; choose the torch backend"):
        torch.func.jvp(lambda x: resolve(op)(x, *rest), (first,), (torch.ones_like(first),))


@built
@pytest.mark.parametrize("weight", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mixed_dtypes_give_the_references_dtype_and_values(dtype, weight):
    generator = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(2, 3, 2, 8, generator=generator).to(dtype),
        torch.randn(8, generator=generator).to(weight),
    )
    turn = Inputs(torch.float32).rotation(4, 3).t().conj()  # neither contiguous nor resolved
    for op, extra in (("rms_norm", ()), ("norm_rope", (turn,))):
        got = resolve(op)(x, w, *extra, 1e-6)
        want = registry.resolve(op, "torch", device_type="cpu")(x, w, *extra, 1e-6)
        assert got.dtype == want.dtype
        rtol = max(1e-5, 4 * max(torch.finfo(dtype).eps, torch.finfo(weight).eps))
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)


def test_a_missing_compiler_is_a_message_not_a_failure(tmp_path):
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "-b",
        str(tmp_path / "lib"),
        "-t",
        str(tmp_path / "tmp"),
    ]
    env = {**os.environ, "CC": "no-such-compiler", "CXX": "no-such-compiler"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "megatron_nucleus._C is not built: the C++ compiler failed" in done.stderr
    assert "The package works without it" in done.stderr
    assert not list((tmp_path).rglob("*.so"))
