"""Dispatch over a library's exchange against the local dispatcher; the library is emulated, over gloo."""

from __future__ import annotations

import importlib.util
import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_nucleus.core.kernels import resolve_kernels
from megatron_nucleus.core.moe import exchange as exchange_module
from megatron_nucleus.core.moe.dispatcher import LocalDispatcher
from megatron_nucleus.core.moe.exchange import open_exchange, self_test
from megatron_nucleus.core.moe.exchange_dispatcher import ExchangeDispatcher
from megatron_nucleus.core.moe.experts import Experts
from megatron_nucleus.core.parallel_state import ParallelConfig
from megatron_nucleus.core.recompute import recomputing
from megatron_nucleus.types import Routing
from megatron_nucleus.utils.errors import ConfigError
from tests.backends import deepep_emulation
from tests.core.parallel_cases import build, join, run_steps
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist
APIS = {"Buffer": "RoundsExchange", "ElasticBuffer": "RoundsExchange", "HybridEPBuffer": "RoutingMapExchange"}
B, S, D, F = 4, 10, 6, 5  # B: images over all ranks
CAPACITY = 3


def make(api: str, experts: int, width: int = D):
    """The exchange over the emulated ``api``, of all ranks."""
    backend = deepep_emulation.install(api)
    return getattr(backend, APIS[api])(dist.group.WORLD, experts, width)


def problem(E: int, images: slice, dtype=torch.float64):
    """Tokens, base, routing and the output's gradient of some of the images.

    Token 0 of every image is picked by all experts, the last two by none, those between by some.
    """
    g = torch.Generator().manual_seed(E)
    x, base, grad = (
        torch.randn(B, S, D, generator=g, dtype=torch.float64).to(dtype)[images] for _ in range(3)
    )
    others = 1 + torch.rand(B, E, S - 3, generator=g).argsort(-1)[:, :, : CAPACITY - 1]
    index = torch.cat([torch.zeros(B, E, 1, dtype=torch.int64), others], dim=-1)[images].contiguous()
    weight = torch.rand(B, E, CAPACITY, generator=g, dtype=torch.float64).to(dtype)[images].requires_grad_()
    return x.requires_grad_(), base.requires_grad_(), Routing(index, weight, weight), grad


def make_experts(E: int, first: int, count: int, dtype=torch.float64) -> Experts:
    g = torch.Generator().manual_seed(1)
    experts = Experts(count, D, F, resolve_kernels()).to(dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            full = torch.randn(E, *parameter.shape[1:], generator=g, dtype=torch.float64)
            parameter.copy_(full[first : first + count])
    return experts


def through(
    dispatcher, experts: Experts, E: int, images: slice, granularity="none", dtype=torch.float64
) -> dict:
    """Output and every gradient of tokens -> experts -> tokens."""
    x, base, routing, grad = problem(E, images, dtype)

    def layer(x, base, weight):
        kept = Routing(routing.index_BEC, weight, routing.logits_BSE)
        return dispatcher.combine(base, experts(dispatcher.dispatch(x, kept), dispatcher), kept)

    layer = layer if granularity == "none" else recomputing(layer, granularity)
    out = layer(x, base, routing.weight_BEC)
    out.backward(grad)
    grads = {"x": x, "base": base, "weight": routing.weight_BEC, **dict(experts.named_parameters())}
    values = {"out": out.detach()} | {name: t.grad for name, t in grads.items()}
    return {name: value.double().numpy() for name, value in values.items()}


def rank_through(
    api: str, E: int, chunks: int = 1, granularity: str = "none", wire: torch.dtype | None = None
) -> tuple[dict, list[str], int]:
    """(values, calls that talked to other ranks, bytes counted) of one rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    exchange = make(api, E)
    dtype = torch.float64 if wire is None else wire
    dispatcher = ExchangeDispatcher(exchange, world, chunks=chunks, dtype=wire)
    mine = slice(rank * B // world, (rank + 1) * B // world)
    values = through(
        dispatcher, make_experts(E, rank * E // world, E // world, dtype), E, mine, granularity, dtype
    )
    buffer = exchange.buffer if api == "HybridEPBuffer" else exchange.library.buffer
    return values, buffer.ranks.calls, dispatcher.traffic.take()


def assert_equal(parts: list[dict], expected: dict, rtol: float) -> None:
    for name, value in expected.items():  # images and experts are both cut along their first axis
        together = np.concatenate([part[name] for part in parts])
        np.testing.assert_allclose(together, value, rtol=rtol, atol=rtol * np.abs(value).max(), err_msg=name)


def local(E: int) -> dict:
    return through(LocalDispatcher(resolve_kernels()), make_experts(E, 0, E), E, slice(None))


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("world", "E"), [(1, 4), (1, 64), (2, 8), (2, 48), (2, 64), (4, 4), (4, 40), (4, 64), (4, 68)]
)
def test_it_equals_the_local_dispatcher_forward_and_backward(api, world, E, tmp_path):
    """One round and several, experts of one rank in one round and in two (E = 68: 17 a rank, 23 a round)."""
    results = run_ranks(world, rank_through, tmp_path, api, E)
    assert_equal([values for values, _, _ in results], local(E), 1e-12)
    for _, _, sent in results:  # two crossings forward and two backward
        assert sent == 4 * E * (B // world) * CAPACITY * D * 8


@pytest.mark.parametrize("api", APIS)
def test_chunks_give_the_same(api, tmp_path):
    results = run_ranks(2, rank_through, tmp_path, api, 40, chunks=2)
    assert_equal([values for values, _, _ in results], local(40), 1e-12)


@pytest.mark.parametrize("granularity", ["selective", "full"])
@pytest.mark.parametrize("api", APIS)
def test_recomputation_repeats_no_exchange(api, granularity, tmp_path):
    plain = run_ranks(2, rank_through, tmp_path, api, 40, chunks=2)
    again = run_ranks(2, rank_through, tmp_path, api, 40, chunks=2, granularity=granularity)
    for (values, calls, sent), (values_again, calls_again, sent_again) in zip(plain, again, strict=True):
        assert sorted(calls_again) == sorted(calls)
        assert sent_again == sent
        rounds = 1 if api == "HybridEPBuffer" else 2
        assert {call: calls.count(call) for call in set(calls)} == {
            "dispatch": 2 * rounds,  # chunks x rounds, forward
            "combine": 4 * rounds,  # forward, and the gradient of dispatch
            "dispatch again": 2 * rounds,  # the gradient of combine
        }
        for name, value in values.items():
            assert np.array_equal(values_again[name], value), name


@pytest.mark.parametrize("api", APIS)
def test_what_travels_in_bf16_differs_by_its_rounding(api, tmp_path):
    """Weights and their gradients stay fp32 on the way; rows round at each crossing: a few parts in 2^8."""
    results = run_ranks(2, rank_through, tmp_path, api, 40, wire=torch.bfloat16)
    expected = local(40)
    for name, value in expected.items():
        together = np.concatenate([values[name] for values, _, _ in results])
        error = np.linalg.norm(together - value) / np.linalg.norm(value)
        assert error < 0.02, f"{name}: {error}"


def proven(api: str, experts: int) -> str | None:
    exchange = make(api, experts, width=16)
    return self_test(exchange, dist.group.WORLD, experts, 16, torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(("world", "experts"), [(1, 3), (2, 64), (4, 68)])
def test_a_right_exchange_passes_its_self_test(api, world, experts, tmp_path):
    assert run_ranks(world, proven, tmp_path, api, experts) == [None] * world


# fault: (call that is wrong, what becomes of its result)
FAULTS = {
    "weights do not arrive": ("dispatch", lambda rows, weight, trip: (rows, weight + 1, trip)),
    "rows do not arrive": ("dispatch", lambda rows, weight, trip: (rows.flip(0), weight, trip)),
    "rows do not come back": ("combine", lambda x, weight: (x.roll(1, 0), weight)),
    "weights do not come back": ("combine", lambda x, weight: (x, weight * 2)),
    "a second dispatch differs": ("dispatch_again", lambda *rows: torch.stack(rows).flip(0)),
}


def emulate(api: str) -> str:
    """The whole start-up over the emulated ``api``, without the demands on GPU and dtype; returns the knob's value."""
    deepep_emulation.install(api)
    exchange_module._why_not = lambda *args: None
    return "hybridep" if api == "HybridEPBuffer" else "deepep"


def judged(api: str, fault: str) -> str:
    """The start-up of an exchange that is wrong on rank 1 alone."""
    name = emulate(api)
    if dist.get_rank() == 1:
        method, change = FAULTS[fault]
        cls = getattr(exchange_module._module(name), APIS[api])
        right = getattr(cls, method)
        setattr(cls, method, lambda *args: change(*right(*args)))
    settings = {"experts": 40, "width": 16, "device": torch.device("cpu"), "dtype": torch.bfloat16}
    with pytest.raises(ConfigError) as error:
        open_exchange(name, dist.group.WORLD, dist.group.WORLD, **settings)
    return str(error.value)


@pytest.mark.parametrize(("fault", "api"), list(zip(FAULTS, itertools.cycle(APIS), strict=False)))
def test_every_rank_hears_of_a_wrong_exchange_and_of_its_fault(fault, api, tmp_path):
    answers = run_ranks(2, judged, tmp_path, api, fault)
    assert answers[0] == answers[1]
    found = [part for part in answers[0].split("; ") if f"fails its self-test: {fault}" in part]
    assert len(found) == 1
    assert "rank 1" in found[0].replace("ranks 0, 1", "rank 1")
    assert answers[0].startswith("--moe-token-dispatcher-type ")
    assert "alltoall" in answers[0]


def refused(bf16: bool) -> str:
    config = ParallelConfig(expert_model_parallel_size=2, moe_token_dispatcher_type="deepep")
    with pytest.raises(ConfigError) as error:
        build(join(config), config, bf16=bf16)
    return str(error.value)


def test_without_the_library_every_rank_refuses_at_start_up(tmp_path):
    """And with it a CPU is refused: there is no GPU here that a rank could name."""
    answers = run_ranks(2, refused, tmp_path, True)
    assert answers[0] == answers[1]
    reason = "needs deep_ep, not installed" if importlib.util.find_spec("deep_ep") is None else "cuda"
    assert answers[0].startswith("--moe-token-dispatcher-type deepep: ")
    assert reason in answers[0]
    assert "(ranks 0, 1). Usable everywhere: alltoall" in answers[0]


def test_one_rank_exchanges_nothing():
    with pytest.raises(ConfigError, match="no token leaves its rank with --expert-model-parallel-size 1"):
        ParallelConfig(moe_token_dispatcher_type="hybridep")


def emulated_steps(api: str | None, settings: dict):
    if api is not None:
        settings = settings | {"moe_token_dispatcher_type": emulate(api)}
    return run_steps(settings, steps=1)


@pytest.mark.parametrize(
    ("api", "world", "ep", "recompute"),
    [("Buffer", 2, 2, "full"), ("ElasticBuffer", 2, 2, "selective"), ("HybridEPBuffer", 4, 2, "full")],
)
def test_training_steps_are_those_of_the_all_to_all(api, world, ep, recompute, tmp_path):
    settings = {"expert_model_parallel_size": ep, "recompute_granularity": recompute}
    expected = run_ranks(world, emulated_steps, tmp_path, None, settings)[0]
    outcome = run_ranks(world, emulated_steps, tmp_path, api, settings)[0]
    np.testing.assert_allclose(outcome.losses, expected.losses, rtol=1e-6)
    np.testing.assert_allclose(outcome.norms, expected.norms, rtol=1e-6)
    for ours, theirs in ((outcome.gradients, expected.gradients), (outcome.weights, expected.weights)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert np.linalg.norm(ours[name] - value) <= 2e-6 * max(np.linalg.norm(value), 1e-30), name


def buffers_made(api: str) -> list[int]:
    """Tokens that the library's buffer is made for, after dispatches of 4, 2, 6 and 6 tokens."""
    exchange, made = make(api, 4), []
    for tokens in (4, 2, 6, 6):
        taken = torch.ones(tokens, 4, dtype=torch.bool)
        rows, weights, _ = exchange.dispatch(torch.randn(tokens, D), taken, taken.float() * 2, tokens)
        assert rows.isfinite().all()
        assert weights.tolist() == [2.0] * 4 * tokens
        made.append((exchange if api == "HybridEPBuffer" else exchange.library).buffer.tokens)
    return made


@pytest.mark.parametrize("api", ["ElasticBuffer", "HybridEPBuffer"])
def test_a_buffer_is_made_anew_only_for_more_tokens(api, tmp_path):
    assert run_ranks(1, buffers_made, tmp_path, api) == [[4, 4, 6, 6]]
