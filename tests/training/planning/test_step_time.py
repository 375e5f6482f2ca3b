"""The forecast: how exchanges hide, and that it moves the way the hardware does."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_nucleus.core.models.presets import PRESETS
from megatron_nucleus.core.parallel_state import make_layout
from megatron_nucleus.training import flops
from megatron_nucleus.training.planning.devices import (
    COLLECTIVE_START_S,
    GPUS,
    NETWORKS_GBITS,
    Links,
    gpu_of,
    network_bytes_per_s,
)
from megatron_nucleus.training.planning.ledger import MicroBatch
from megatron_nucleus.training.planning.memory import Work
from megatron_nucleus.training.planning.step_time import Rates, forecast, moe_grad_span_s, moe_span_s, rates
from megatron_nucleus.utils.errors import ConfigError

PUBLISHED = PRESETS["nucleus_image_17b"]
INSTANT = Links(1e30, 1e30, 8)
H100_LINKS = Links(360e9, 40e9, 8)


def published(ep: int = 64, world: int = 64, **changes) -> Work:
    layout = make_layout(world, experts=64, ep=ep)
    return dataclasses.replace(Work(PUBLISHED, layout, MicroBatch(4, 4096, 128), 1, True), **changes)


def test_spans_of_one_piece():
    # There behind the shared expert, back behind nothing.
    assert moe_span_s(3.0, 2.0, 4.0, 1, overlap=True) == 3 + 4 + 3
    assert moe_span_s(3.0, 2.0, 4.0, 1, overlap=False) == 3 + 2 + 4 + 3
    assert moe_span_s(1.0, 2.0, 4.0, 1, overlap=True) == 2 + 4 + 1
    assert moe_grad_span_s(3.0, 2.0, 4.0, 1) == 3 + 4 + 3
    assert moe_grad_span_s(1.0, 2.0, 4.0, 1) == 1 + 4 + 2


def test_pieces_hide_the_exchange_behind_the_experts():
    assert moe_span_s(0.0, 2.0, 4.0, 3, overlap=True) == pytest.approx(6.0)
    # Two pieces: the first arrives behind the shared expert (2), experts to 6, the last piece goes home in 0.5.
    assert moe_span_s(1.0, 2.0, 4.0, 2, overlap=True) == pytest.approx(6.5)
    spans = [moe_span_s(8.0, 2.0, 8.0, n, overlap=True) for n in (1, 2, 4, 64)]
    assert spans == sorted(spans, reverse=True)
    assert spans[-1] >= 16.0  # both ways over one link
    assert moe_grad_span_s(1.0, 2.0, 4.0, 2) == pytest.approx(0.5 + 4 + 2)


def test_without_exchanges_a_step_is_its_arithmetic():
    """Memory of any speed: products alone, at their share of the peak."""
    work = published()
    peak = 989e12
    time = forecast(work, Rates(0.7 * peak, 0.5 * peak, 1e30, 0.7 * peak), INSTANT)
    parts = flops.hardware_flops(work)
    attention = 4 * flops.forward_flops_per_image(PUBLISHED, 4096, 128)["attention"]
    expected = ((parts["forward"] - attention) / 0.7 + attention / 0.5) / peak
    assert time.forward_s == pytest.approx(expected, rel=1e-6)
    assert time.muon_s == pytest.approx(parts["optimizer"] / (0.7 * peak), rel=1e-6)
    starts = COLLECTIVE_START_S * 1000
    assert time.step_s == pytest.approx(
        time.forward_s + time.backward_s + time.muon_s + time.other_optimizer_s, abs=starts
    )


def test_exchange_of_the_published_grid():
    """README's arithmetic: EP 64 sends 56 of 64 rows to other nodes, each GPU over its own port."""
    layout = make_layout(64, experts=64, ep=64)
    assert H100_LINKS.all_to_all_s(layout, 64 * 10**9) == pytest.approx(56e9 / 40e9, abs=1e-3)
    inside = make_layout(64, experts=64, ep=8)
    assert H100_LINKS.all_to_all_s(inside, 8 * 10**9) == pytest.approx(7e9 / 360e9, abs=1e-3)
    assert not H100_LINKS.crosses(inside, "ep")
    assert H100_LINKS.crosses(layout, "shard")
    # Each of a node's eight ranks brings in an eighth of what the node lacks.
    assert H100_LINKS.gather_s(layout, "shard", 64e9) == pytest.approx(64e9 * 63 / 64 / 360e9, rel=1e-3)
    slow = Links(360e9, 4e9, 8)
    assert slow.gather_s(layout, "shard", 64e9) == pytest.approx(64e9 * 56 / 64 / 8 / 4e9, rel=1e-3)
    assert slow.gather_s(make_layout(1, experts=64), "shard", 64e9) == 0.0


def test_the_forecast_follows_hardware_and_settings():
    h100 = rates(gpu_of("h100"), 989e12, 0.7, 0.5, 0.8)
    base = forecast(published(), h100, H100_LINKS)
    inside = forecast(published(ep=8), h100, H100_LINKS)
    assert inside.exposed_all_to_all_s < 0.4 * base.exposed_all_to_all_s
    # With several experts on a rank, rows are put in the experts' order and back.
    assert base.forward_s < inside.forward_s < 1.08 * base.forward_s
    chunked = forecast(published(chunks=4), h100, H100_LINKS)
    assert chunked.exposed_all_to_all_s < base.exposed_all_to_all_s
    slower = forecast(published(), h100, Links(360e9, 20e9, 8))
    assert slower.all_to_all_s == pytest.approx(2 * base.all_to_all_s, rel=0.02)
    again = [forecast(published(recompute=r), h100, H100_LINKS) for r in ("none", "selective", "full")]
    assert again[0].recompute_s == 0 < again[1].recompute_s < again[2].recompute_s
    assert again[2].recompute_s == pytest.approx(base.forward_s, rel=0.05)
    twice = forecast(published(accumulation=2), h100, H100_LINKS)
    assert twice.forward_s == pytest.approx(2 * base.forward_s)
    assert twice.muon_s == base.muon_s


def test_tables():
    for name in GPUS:
        assert gpu_of(name).peak_flops(torch.bfloat16) > 1e14, name
    assert network_bytes_per_s("ib400") == 50e9
    assert network_bytes_per_s("100") == 12.5e9
    assert all(network_bytes_per_s(name) > 1e9 for name in NETWORKS_GBITS)
    with pytest.raises(ConfigError, match=r"--device h10: unknown \(did you mean h100\?\)"):
        gpu_of("h10")
    for wrong in ("ib40o", "-5", "nan", "inf"):
        with pytest.raises(ConfigError, match=f"--network {wrong}: unknown"):
            network_bytes_per_s(wrong)
