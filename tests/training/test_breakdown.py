"""Where a step's time goes: the parts add up, and each region's seconds go to its own name."""

from __future__ import annotations

import functools

import pytest
import torch

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig, build_optimizer
from megatron_nucleus.core.parallel_state import single_process
from megatron_nucleus.training.arguments import parse_run
from megatron_nucleus.training.benchmark.benchmark import BenchConfig, make_workload
from megatron_nucleus.training.benchmark.breakdown import (
    EXCHANGE,
    OTHER,
    Step,
    draw_noise,
    sums,
    time_breakdown,
)
from megatron_nucleus.training.benchmark.parts import Timed, call_ours
from megatron_nucleus.training.benchmark.setup import reading_data
from megatron_nucleus.training.profiling.regions import REGIONS, STEP_PARTS
from megatron_nucleus.utils.config import Parser
from tests.shapes import TINY
from tests.training.test_regions import Listing, tiny_model

CPU = torch.device("cpu")


def workload(accumulation: int = 2):
    return make_workload(
        TINY,
        BenchConfig(text_tokens=4),
        (2, 3),
        micro_batch_size=3,
        accumulation=accumulation,
        bf16=False,
        device=CPU,
    )


def make_step(model: NucleusTransformer, data=None, optimizer: bool = True) -> Step:
    work = workload()
    timed = Timed(model, functools.partial(call_ours, model, work), work)
    updates = build_optimizer(model, OptimizerConfig()) if optimizer else None
    return Step(timed, updates, 1.0, data or draw_noise(work, model))


def test_seconds_by_path_become_seconds_by_name():
    own = {
        ("step",): 128.0,  # in none of the parts
        ("step", "data"): 1.0,
        ("step", "forward"): 2.0,
        ("step", "forward", "experts"): 4.0,
        ("step", "forward", "experts", "dispatch"): 8.0,  # rows that arrive while the experts wait
        ("step", "backward", "experts"): 16.0,
        ("step", "backward", "combine"): 32.0,
        ("step", "optimizer"): 64.0,
    }
    expected = dict.fromkeys(REGIONS, 0.0) | {
        "step": 255.0, OTHER: 128.0, "data": 1.0, "forward": 14.0, "backward": 48.0, "optimizer": 64.0,
        "experts": 20.0, "dispatch": 8.0, "combine": 32.0, EXCHANGE: 40.0,
    }  # fmt: skip
    assert sums(own) == expected


def test_a_step_is_data_forward_backward_for_each_micro_batch_and_one_update():
    calls = []
    model, heard = tiny_model(), Listing()
    step = make_step(model, data=lambda: calls.append("data"))
    before = model.image_out.weight.detach().clone()
    step(heard)
    assert heard.entered == ["data", "forward", "backward"] * 2 + ["optimizer"]
    assert calls == ["data", "data"]
    assert not torch.equal(model.image_out.weight, before)
    heard.entered.clear()
    make_step(model, optimizer=False)(heard)
    assert "optimizer" not in heard.entered


def test_the_parts_add_up_to_the_step():
    times = time_breakdown(make_step(tiny_model()), repeats=1, warmup=1, device=CPU, control=None)
    assert set(times) == {"step", *STEP_PARTS, OTHER, *REGIONS, EXCHANGE}
    seconds = {name: t.median_s for name, t in times.items()}
    assert sum(seconds[part] for part in (*STEP_PARTS, OTHER)) == pytest.approx(seconds["step"])
    assert 0 < sum(seconds[r] for r in REGIONS) < seconds["forward"] + seconds["backward"]
    assert seconds[EXCHANGE] == pytest.approx(seconds["dispatch"] + seconds["combine"])
    assert all(value > 0 for value in seconds.values())


def test_a_slow_part_is_found(monkeypatch):
    """A second of waiting in the experts, on a clock that only waiting moves, is theirs alone."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    model = tiny_model()
    experts = model.blocks[1].moe.experts
    original = experts.forward

    def slow(*args):
        now[0] += 1.0
        return original(*args)

    monkeypatch.setattr(experts, "forward", slow)
    times = time_breakdown(make_step(model), repeats=2, warmup=0, device=CPU, control=None)
    nonzero = {name: t.median_s for name, t in times.items() if t.median_s}
    assert nonzero == {"step": 2.0, "forward": 2.0, "experts": 2.0}  # two micro-batches


def test_what_is_in_no_part_is_in_the_step(monkeypatch):
    """The step is measured from outside: work between its parts, here ahead of clipping, does not get lost."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    step = make_step(tiny_model())
    plain = step.timed.forward_backward

    def late(*args):
        now[0] += 3.0
        plain(*args)

    monkeypatch.setattr(step.timed, "forward_backward", late)
    times = time_breakdown(step, repeats=2, warmup=0, device=CPU, control=None)
    assert {name: t.median_s for name, t in times.items() if t.median_s} == {"step": 6.0, OTHER: 6.0}


def test_a_step_learns_from_all_its_micro_batches():
    """The gradients that reach the optimizer are the sum over the micro-batches."""
    model = tiny_model()
    step = make_step(model, optimizer=False)
    step(Listing())
    both = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    step.timed.forward_backward()
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, 2 * model.get_parameter(name).grad, msg=name)


def test_noise_is_drawn_as_training_draws_it():
    from megatron_nucleus.core import flow

    latents, text, noise, sigma = draw_noise(workload(), tiny_model())()
    assert latents.shape == noise.shape == (3, 6, TINY.patch_channels)
    assert text.shape == (3, 4, TINY.text_dim)
    assert torch.equal(noise, flow.sample_noise(0, (0, 1, 2), (6, TINY.patch_channels)))
    assert torch.equal(sigma, flow.sample_sigma(flow.FlowConfig(), 0, (0, 1, 2), 6))


def test_data_come_through_loader_and_encoders(config_file):
    run, _ = parse_run(["--config", str(config_file)], Parser(prog="t"))
    with reading_data(run, single_process(CPU, 4)) as data:
        first, second = data(), data()
    assert first.latents_BSP.shape == (8, 16, 64)  # 32 px, stride 4, patch 2
    assert len({*first.draws, *second.draws}) == 16
