"""Every backend of every operation against the plain-torch reference in float64: values and gradients.

Parametrised over ops/table.py, so a new row is tested by being there.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from megatron_nucleus.ops import registry
from megatron_nucleus.ops.table import ROWS
from tests.ops.op_cases import CASES, Inputs, outputs_and_gradients

REFERENCES = {row.op: row for row in ROWS if row.backend == "torch"}


GPU = torch.cuda.is_available()


def runs() -> list:
    """Every case of every row in every dtype, on the CPU and, where there is one, on the GPU."""
    found = []
    for row in ROWS:
        for device in ["cpu", "cuda"] if GPU else ["cpu"]:
            interpreted = row.backend.startswith("triton") and device == "cpu"
            if device not in row.devices.split() or (interpreted and GPU):
                continue
            for position, case in enumerate(CASES[row.op]):
                for dtype in row.dtypes.split():
                    if interpreted and dtype == "float16" and position:
                        continue  # the interpreter takes milliseconds per program
                    name = f"{row.op}-{row.backend}-{case}-{dtype}-{device}".replace(" ", "_")
                    marks = [pytest.mark.gpu] if device == "cuda" else []
                    found.append(pytest.param(row, case, dtype, device, id=name, marks=marks))
    return found


def sizes_of(op: str, args: tuple) -> registry.Sizes | None:
    """What a backend may refuse of a case; the model's other sizes are ordinary ones."""
    if op != "attention":
        return None
    (H, K), G = args[0].shape[2:], args[1].shape[2]
    return registry.Sizes(H * K, H, G, K, experts=4, expert_width=64)


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: tuple[float, float], what: str) -> None:
    assert got.shape == expected.shape, what
    if got.numel() == 0:
        return
    expected = expected.double()
    limit = tolerance[0] * expected.abs().max() + tolerance[1]
    error = (got.double() - expected).abs().max()
    assert error <= limit, f"{what}: error {error:.3g} exceeds {limit:.3g}"


@pytest.mark.parametrize(("row", "case", "dtype", "device"), runs())
def test_backend_equals_reference(row, case, dtype, device):
    dtype = getattr(torch, dtype)
    args = CASES[row.op][case](Inputs(dtype, device))
    asked = {"device_type": device, "dtype": dtype, "sizes": sizes_of(row.op, args)}
    reason = registry.why_unavailable(row.op, row.backend, **asked)
    if reason is not None:
        pytest.skip(f"{row.backend} {reason}")
    function = registry.resolve(row.op, row.backend, **asked)
    # Scores are rounded to the logits' dtype before the choice: half precision has its own ties, so its own reference.
    wide = dtype if row.op == "expert_choice" and dtype.itemsize == 2 else torch.float64
    copies = tuple(
        a.detach().cpu().to(wide if a.is_floating_point() else a.dtype, copy=True).requires_grad_(a.requires_grad)
        if isinstance(a, torch.Tensor) else a
        for a in args
    )  # fmt: skip
    outputs, gradients = outputs_and_gradients(function, args)
    reference = registry.resolve(row.op, "torch", device_type="cpu")
    expected, expected_gradients = outputs_and_gradients(reference, copies)

    module = importlib.import_module(REFERENCES[row.op].target.split(":")[0])
    tolerance = module.TOLERANCES[dtype]
    assert len(outputs) == len(expected)
    for i, (got, want) in enumerate(zip(outputs, expected, strict=True)):
        if want.is_floating_point():
            assert got.dtype == (torch.float64 if row.op == "square_sum" else dtype)
            assert_near(got.cpu(), want, tolerance, f"output {i}")
        else:
            assert torch.equal(got.cpu(), want), f"output {i}"
    for i, (got, want) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert got.dtype == dtype
        assert_near(got.cpu(), want, tolerance, f"gradient {i}")


def test_every_operation_has_cases_and_a_reference():
    assert set(CASES) == set(REFERENCES) == set(registry.operations())


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.op}-{r.backend}")
def test_inputs_are_left_alone(row):
    """Half of all aliasing bugs: an output that is written into an input."""
    reason = registry.why_unavailable(row.op, row.backend, device_type="cpu")
    if reason is not None:
        pytest.skip(f"{row.backend} {reason}")
    args = next(iter(CASES[row.op].values()))(Inputs(torch.float32))
    if row.op.endswith("_"):
        pytest.skip("works in place")
    before = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
    outputs_and_gradients(registry.resolve(row.op, row.backend, device_type="cpu"), args)
    for a, b in zip(args, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
