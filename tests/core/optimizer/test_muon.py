"""Muon in batches equals Muon one matrix at a time, equals torch's, and orthogonalises."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from megatron_nucleus.core.optimizer import muon as muon_module
from megatron_nucleus.core.optimizer import muon_reference
from megatron_nucleus.core.optimizer.muon import Muon, MuonParam, newton_schulz_flops
from megatron_nucleus.core.optimizer.muon_reference import muon_update
from megatron_nucleus.core.optimizer.param_groups import SPLITS
from megatron_nucleus.ops.orthogonalize import coefficients, orthogonalize

SETTINGS = {"momentum": 0.95, "nesterov": True, "steps": 5, "scale": 0.2}
SHAPES = {  # name: (shape, split); several share a matrix shape once tall ones are turned
    "square": ((16, 16), "whole"),
    "wide": ((16, 24), "whole"),
    "tall": ((24, 16), "whole"),
    "rows": ((48, 16), "gate|up rows"),
    "experts_down": ((5, 24, 16), "per expert"),
    "experts_gate_up": ((5, 16, 48), "per expert, gate|up columns"),
    "experts_square": ((3, 16, 32), "per expert, gate|up columns"),
}


def make_params(decay: float = 0.1, dtype: torch.dtype = torch.float32) -> list[MuonParam]:
    generator = torch.Generator().manual_seed(3)
    return [
        MuonParam(
            name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)), split, 1.0 + 0.5 * i, decay
        )
        for i, (name, (shape, split)) in enumerate(SHAPES.items())
    ]


def reference_step(param, gradient, momentum, lr, **settings):
    """`muon_update` matrix by matrix over a split tensor."""
    new_param, new_momentum = param.clone(), momentum.clone()
    views = [SPLITS[settings["split"]](t) for t in (param, gradient, momentum, new_param, new_momentum)]
    lead = views[0].shape[:-2]
    for index in torch.cartesian_prod(*[torch.arange(n) for n in lead]).reshape(-1, len(lead)).tolist():
        w, g, m, out_w, out_m = (view[tuple(index)] for view in views)
        a, b = muon_update(
            w,
            g,
            m,
            lr,
            weight_decay=settings["decay"],
            nesterov=settings["nesterov"],
            steps=settings["steps"],
        )
        out_w.copy_(a)
        out_m.copy_(b)
    return new_param, new_momentum


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("steps", [3, 5])
@pytest.mark.parametrize("batch_values", [1, 1000, 1 << 18])
def test_batched_equals_one_matrix_at_a_time(nesterov, steps, batch_values, monkeypatch):
    monkeypatch.setitem(muon_module.BATCH_VALUES, "cpu", batch_values)
    params = make_params()
    optimizer = Muon(params, **{**SETTINGS, "nesterov": nesterov, "steps": steps})
    expected = {p.name: (p.param.detach().clone(), torch.zeros_like(p.param)) for p in params}
    generator = torch.Generator().manual_seed(5)
    for step in range(3):
        for p in params:
            p.param.grad = torch.randn(p.param.shape, generator=generator) * 10.0 ** (step - 2)
            weight, momentum = expected[p.name]
            expected[p.name] = reference_step(
                weight, p.param.grad, momentum, 0.02 * p.lr_factor,
                split=p.split, decay=p.weight_decay, nesterov=nesterov, steps=steps,
            )  # fmt: skip
        optimizer.step(0.02)
    for p in params:
        weight, momentum = expected[p.name]
        torch.testing.assert_close(p.param.detach(), weight, rtol=1e-5, atol=1e-5, msg=p.name)
        torch.testing.assert_close(optimizer.tensors()[f"muon.momentum.{p.name}"], momentum, msg=p.name)


def test_matrices_of_one_shape_form_one_batch():
    optimizer = Muon(make_params(), **SETTINGS)
    counts = {(b.rows, b.columns): b.count for b in optimizer._batches}
    assert counts == {(16, 16): 1 + 3 * 2, (16, 24): 2 + 2 + 5 + 5 * 2}


def test_gradients_stay_untouched_and_a_zero_gradient_moves_nothing_but_decay():
    params = make_params(decay=0.5)
    before = [p.param.detach().clone() for p in params]
    for p in params:
        p.param.grad = torch.zeros_like(p.param)
    Muon(params, **SETTINGS).step(0.1)
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.param.detach(), old * (1 - 0.1 * p.lr_factor * 0.5))
    gradients = [torch.randn_like(p.param) for p in params]
    for p, g in zip(params, gradients, strict=True):
        p.param.grad = g.clone()
    Muon(params, **SETTINGS).step(0.1)
    assert all(torch.equal(p.param.grad, g) for p, g in zip(params, gradients, strict=True))


BANDS = {
    3: (0.01, 0.71, 1.29),
    4: (0.003, 0.77, 1.23),
    5: (0.003, 0.68, 1.21),
}  # values from .. end in .. to ..


@pytest.mark.parametrize("steps", BANDS)
def test_polynomial_keeps_its_band(steps):
    """The scalar map of the singular values over the whole promised range, rounding above 1 included."""
    lowest, low, high = BANDS[steps]
    values = torch.logspace(math.log10(lowest), math.log10(1.02), 100_001, dtype=torch.float64)
    for a, b, c in coefficients(steps):
        values = a * values + b * values**3 + c * values**5
    assert low < float(values.min()) < float(values.max()) < high


@pytest.mark.parametrize("steps", BANDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_one_gradient_does_not_blow_up(steps, dtype):
    """Its only singular value is the norm itself: rounding may put it above 1, where steep quintics explode."""
    generator = torch.Generator().manual_seed(9)
    stack = torch.randn(50, 24, 1, generator=generator) @ torch.randn(50, 1, 40, generator=generator)
    values = torch.linalg.svdvals(orthogonalize(stack.to(dtype), steps).float())
    assert 0.65 < float(values[:, 0].min()) < float(values[:, 0].max()) < 1.35
    limit = 1e-3 if dtype == torch.float32 else 1.0  # bf16 rounding gives the other directions some length
    assert float(values[:, 1].max()) < limit


@pytest.mark.parametrize("steps", BANDS)
@pytest.mark.parametrize("shape", [(32, 32), (32, 96), (128, 128)])
def test_singular_values_end_in_the_known_band(shape, steps):
    generator = torch.Generator().manual_seed(1)
    u, _, vt = torch.linalg.svd(torch.randn(4, *shape, generator=generator), full_matrices=False)
    lowest, low, high = BANDS[steps]
    spectrum = torch.logspace(0, math.log10(6 * lowest), shape[0])  # all above ``lowest`` of the norm
    assert float(spectrum[-1] / spectrum.norm()) > lowest
    stack = u * spectrum @ vt * torch.tensor([1e-6, 1.0, 3.0, 1e6]).view(4, 1, 1)
    result = orthogonalize(stack, steps)
    values = torch.linalg.svdvals(result)
    assert float(values.min()) > low
    assert float(values.max()) < high
    # The singular vectors stay: U^T result V is diagonal.
    rotated = u.mT @ result @ vt.mT
    off_diagonal = rotated - torch.diag_embed(torch.diagonal(rotated, dim1=-2, dim2=-1))
    assert float(off_diagonal.abs().max()) < 2e-3


def test_many_steps_do_not_leave_the_band_and_any_scale_gives_one_answer():
    matrix = torch.randn(20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        muon_reference.orthogonalize(matrix), muon_reference.orthogonalize(1e5 * matrix)
    )
    values = torch.linalg.svdvals(muon_reference.orthogonalize(matrix, steps=15))
    assert float(values.min()) > 0.68
    assert float(values.max()) < 1.21


@pytest.mark.parametrize("steps", BANDS)
def test_flops_are_those_of_the_matrix_products(steps):
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(6, 8, 20), steps)
    assert newton_schulz_flops((2, 3, 8, 20), steps) == newton_schulz_flops((6, 20, 8), steps)
    assert newton_schulz_flops((6, 8, 20), steps) == counter.get_total_flops()


def test_fp64_keeps_its_precision():
    matrix = torch.randn(12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(
        orthogonalize(matrix[None], 5)[0], muon_reference.orthogonalize(matrix), rtol=1e-12, atol=1e-12
    )


def test_one_process_sends_nothing():
    assert Muon(make_params(), **SETTINGS).traffic() == {"gather": 0, "return": 0, "replicate": 0}


def test_update_rms_does_not_depend_on_the_shape():
    """0.2*sqrt(max side) makes every update's RMS about 0.2, which is what AdamW's updates have."""
    for shape in [(64, 64), (64, 256), (256, 64)]:
        param = nn.Parameter(torch.zeros(shape))
        param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        Muon([MuonParam("w", param, "whole", 1.0, 0.0)], **SETTINGS).step(1.0)
        rms = float(param.detach().square().mean().sqrt())
        assert 0.15 < rms < 0.23, (shape, rms)


def test_equals_torch_muon(monkeypatch):
    """torch.optim.Muon in fp32: its bf16 cast is replaced, the rest is its own code."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    start = [
        torch.randn(s, generator=torch.Generator().manual_seed(7)) for s in [(24, 16), (16, 24), (16, 16)]
    ]
    ours = [nn.Parameter(t.clone()) for t in start]
    theirs = [nn.Parameter(t.clone()) for t in start]
    mine = Muon([MuonParam(str(i), p, "whole", 1.0, 0.1) for i, p in enumerate(ours)], **SETTINGS)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(8)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step(0.02)
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_bf16_arithmetic_points_the_same_way():
    params, low = make_params(decay=0.0), make_params(decay=0.0)
    for p, q in zip(params, low, strict=True):
        p.param.grad = torch.randn(p.param.shape, generator=torch.Generator().manual_seed(4))
        q.param.grad = p.param.grad.clone()
    before = [p.param.detach().clone() for p in params]
    Muon(params, **SETTINGS).step(1.0)
    Muon(low, **SETTINGS, dtype=torch.bfloat16).step(1.0)
    for p, q, old in zip(params, low, before, strict=True):
        cosine = torch.cosine_similarity((p.param - old).flatten(), (q.param - old).flatten(), dim=0)
        assert float(cosine.detach()) > 0.995, p.name
