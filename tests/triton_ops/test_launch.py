"""What the launchers promise beyond parity (tests/ops/test_parity.py): torch's own checks, and errors that teach."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from triton_ops import expert_ffn, gated_residual, layer_norm, moe_rows, norm_rope, swiglu, symmetric

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
