"""Costs of operations: against counters on the reference, and against the sizes of real arguments and results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_nucleus.ops import registry
from megatron_nucleus.training.benchmark import roofline
from megatron_nucleus.training.benchmark.op_cases import CASES, SHAPES, Dims, Maker, dims
from megatron_nucleus.training.benchmark.roofline import Ceilings
from tests.training.test_flops import plain_attention

# No two sizes are equal, so that a wrong letter in a formula shows.
SMALL = Dims(B=2, S=30, L=7, D=24, E=5, F=10, C=12, H=6, G=3, K=4, U=18)
MATMUL = ("attention", "expert_ffn", "orthogonalize")
# Of these more bytes are arguments than have to be read: a gather leaves tokens out that nobody takes.
PARTLY_READ = {"moe_gather"}


def reference(op: str):
    return plain_attention if op == "attention" else registry.resolve(op, "torch", device_type="cpu")


def tensors(result) -> list[Tensor]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)]


def test_every_operation_has_a_case():
    assert set(registry.operations()) <= set(CASES)


@pytest.mark.parametrize("op", MATMUL)
def test_flops_of_products_equal_the_counter(op):
    args = CASES[op].arguments(SMALL, Maker("cpu"))
    cost = CASES[op].cost(SMALL, 4)
    args = args[:3] if op == "attention" else args
    with FlopCounterMode(display=False) as counter:
        out = reference(op)(*args)
    assert counter.get_total_flops() == cost.forward_flops
    if cost.backward_flops is None:
        assert not out.requires_grad
        return
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == cost.backward_flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", CASES)
def test_forward_bytes_are_those_of_arguments_and_results(op, dtype):
    args = CASES[op].arguments(SMALL, Maker("cpu", dtype))
    results = registry.resolve(op, "torch", device_type="cpu")(*args)
    there = sum(t.nbytes for t in (*tensors(args), *tensors(results)))
    counted = CASES[op].cost(SMALL, dtype.itemsize).forward_bytes
    if op in PARTLY_READ:
        x_TD, index_N = args
        taken = index_N.unique().numel() * x_TD[0].nbytes
        assert taken + index_N.nbytes + results.nbytes <= counted <= there
    else:
        assert counted == there


@pytest.mark.parametrize("op", [op for op in CASES if CASES[op].cost(SMALL, 4).backward_bytes is not None])
def test_backward_bytes_hold_all_gradients(op):
    args = CASES[op].arguments(SMALL, Maker("cpu"))
    outputs = tensors(registry.resolve(op, "torch", device_type="cpu")(*args))
    results = [t for t in outputs if t.requires_grad]
    wanted = [t for t in tensors(args) if t.requires_grad]
    gradients = torch.autograd.grad(results, wanted, [torch.ones_like(t) for t in results])
    passed_on = args[0].nbytes if op == "moe_combine" else 0  # the base's gradient is the incoming one
    least = sum(t.nbytes for t in (*results, *gradients)) - passed_on
    counted = CASES[op].cost(SMALL, 4).backward_bytes
    everything = least + sum(t.nbytes for t in (*tensors(args), *outputs))
    assert least <= counted <= everything


def test_half_precision_moves_less():
    for op, case in CASES.items():
        wide, narrow = case.cost(SMALL, 4), case.cost(SMALL, 2)
        assert wide.forward_flops == narrow.forward_flops
        assert wide.forward_bytes / 2 <= narrow.forward_bytes < wide.forward_bytes, op


def test_published_layer():
    d = dims("17b-layer")
    assert (d.D, d.E, d.F, d.C, d.S, d.H, d.G, d.K) == (2048, 64, 1344, 128, 4096, 16, 4, 128)
    cost = CASES["expert_ffn"].cost(d, 2)
    assert cost.forward_flops == 2 * (64 * 128) * 3 * 2048 * 1344  # 135 GFLOP
    weights = 3 * 64 * 2048 * 1344 * 2
    assert cost.forward_bytes == weights + 2 * (64 * 128 * 2048) * 2
    assert CASES["attention"].cost(d, 2).forward_flops == 4 * 16 * 4096 * (4096 + 256) * 128
    assert set(SHAPES) == {"demo", "17b-layer"}


def test_images_and_tokens_can_be_given():
    d = dims("demo", images=3, tokens=12)
    assert (d.B, d.S, d.C, d.T) == (3, 12, 3, 36)
    assert dims("demo", tokens=1).C == 1


def test_indices_are_distinct_tokens_of_their_image():
    index_EBC = Maker("cpu").index(SMALL).view(SMALL.E, SMALL.B, SMALL.C)
    for expert in index_EBC:
        for image, row in enumerate(expert):
            assert row.unique().numel() == SMALL.C
            assert bool((row // SMALL.S == image).all())


def test_the_slower_of_two_bounds_counts():
    ceilings = Ceilings(flops_per_s=1e12, bytes_per_s=1e9)
    assert ceilings.floor_s(2 * 10**12, 10**9) == 2.0
    assert ceilings.floor_s(10**12, 3 * 10**9) == 3.0


def test_the_ceiling_is_the_best_of_some_sizes(monkeypatch):
    """The largest product may be the slower one; a share of its rate would be beyond 100 %."""
    rates = dict(zip(roofline.MATMUL_SIDES["cpu"], (1.0, 3.0, 2.0), strict=True))
    monkeypatch.setattr(roofline, "matmul_flops_per_s", lambda side, device, dtype: rates[side])
    monkeypatch.setattr(roofline, "copy_bytes_per_s", lambda size, device: 7.0)
    assert roofline.measure_ceilings("cpu", torch.float32) == Ceilings(3.0, 7.0)


def test_the_rate_of_a_product(monkeypatch):
    monkeypatch.setattr(roofline, "best_s", lambda call, device: call().numel() / 16 * 0.5)
    assert roofline.matmul_flops_per_s(4, "cpu", torch.bfloat16) == 2 * 4**3 / 0.5


class Recorded:
    """What a GPU would be asked for, in order; its clock stands still outside of ``call``, which takes 3 ms."""

    def __init__(self, monkeypatch):
        self.asked: list[str] = []
        self.now_ms = 0.0
        log = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                log.asked.append("record")
                self.at_ms = log.now_ms

            def synchronize(self):
                log.asked.append("wait for event")

            def elapsed_time(self, end):
                return end.at_ms - self.at_ms

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.asked.append("wait"))

    def zero_(self) -> None:
        self.asked.append("flush")
        self.now_ms += 100.0

    def call(self) -> None:
        self.asked.append("call")
        self.now_ms += 3.0


def test_on_a_gpu_an_operation_is_timed_between_events_behind_a_flush(monkeypatch):
    """Not on the host's clock, on which a launch and a wait are longer than many kernels."""
    gpu = Recorded(monkeypatch)
    monkeypatch.setattr(torch, "empty", lambda *size, **where: gpu)
    clock = roofline.OpClock("cuda")
    assert clock(gpu.call) == pytest.approx(3e-3)
    assert gpu.asked == ["wait", "flush", "record", "call", "record", "wait for event"]


def test_a_whole_step_is_timed_from_an_idle_to_an_idle_device(monkeypatch):
    gpu = Recorded(monkeypatch)
    monkeypatch.setattr("time.perf_counter", lambda: gpu.now_ms / 1e3)
    assert roofline.timed_s(gpu.call, "cuda:1") == pytest.approx(3e-3)
    assert gpu.asked == ["wait", "call", "wait"]


def test_a_cache_only_raises_the_ceiling(monkeypatch):
    """Work on few bytes is measured against a copy as small, work on many against the large one."""
    asked = []

    def rate(size_bytes, device):
        asked.append(size_bytes)
        return 5e9 if size_bytes < 1000 else 5e8

    monkeypatch.setattr(roofline, "copy_bytes_per_s", rate)
    ceilings = Ceilings(flops_per_s=1e12, bytes_per_s=1e9)
    assert ceilings.near(600, "cpu") == Ceilings(1e12, 5e9)
    assert ceilings.near(60_000, "cpu") == ceilings
    assert ceilings.near(10**10, "cpu") is ceilings
    assert asked == [300, 30_000]
