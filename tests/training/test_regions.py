"""Named regions: every part forward and backward, in order, and the same bits as without them."""

from __future__ import annotations

import pytest
import torch

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.recompute import recomputing
from megatron_nucleus.training.profiling import ranges
from megatron_nucleus.training.profiling.clock import Clock
from megatron_nucleus.training.profiling.regions import REGIONS, named_regions, region
from megatron_nucleus.types import TextFeatures
from megatron_nucleus.utils.errors import ConfigError
from tests.shapes import TINY

GRID = (2, 3)
# Block 0 is dense, block 1 routes; the shared expert runs while rows travel.
FORWARD = ["attention", "dense_ffn", "attention", "router", "dispatch", "shared_expert", "experts", "combine"]


class Listing:
    """Hears what is entered and left, and whether it nests."""

    def __init__(self):
        self.entered: list[str] = []
        self.open: list[str] = []
        self.deepest = 0

    def enter(self, name: str) -> None:
        self.entered.append(name)
        self.open.append(name)
        self.deepest = max(self.deepest, len(self.open))

    def leave(self, name: str) -> None:
        assert self.open.pop() == name


def tiny_model(recompute: bool = False) -> NucleusTransformer:
    model = NucleusTransformer(TINY, seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # gates that start at zero would hide the blocks
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    if recompute:
        for block in model.blocks:
            block.forward = recomputing(block.forward, "full")
    return model


def output(model: NucleusTransformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(3, 6, TINY.patch_channels, generator=generator)
    text = TextFeatures(torch.randn(3, 4, TINY.text_dim, generator=generator))
    return model(latents, torch.rand(3, generator=generator), text, GRID)


def results(model: NucleusTransformer) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    out = output(model)
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_every_part_is_named_forward_and_backward_in_order():
    model, heard = tiny_model(), Listing()
    with named_regions(model, heard):
        out = output(model)
        assert heard.entered == FORWARD
        out.sum().backward()
    assert heard.entered == FORWARD + FORWARD[::-1]
    assert heard.open == []
    assert heard.deepest == 1
    assert set(FORWARD) == set(REGIONS)


def test_values_and_gradients_keep_their_bits():
    model = tiny_model()
    expected = [t.clone() for t in results(model)]
    with named_regions(model, Listing()):
        named = results(model)
    assert len(named) > 20
    assert all(torch.equal(a, b) for a, b in zip(expected, named, strict=True))


def test_nothing_is_left_behind():
    model, heard = tiny_model(recompute=True), Listing()
    forward = model.blocks[0].forward
    with named_regions(model, heard):
        assert "forward" in vars(model.blocks[1].attention)
    assert "forward" not in vars(model.blocks[1].attention)
    assert "dispatch" not in vars(model.blocks[1].moe.dispatcher)
    assert model.blocks[0].forward is forward
    results(model)
    assert heard.entered == []


def test_recomputation_is_named_inside_of_the_backward_pass():
    model, heard = tiny_model(recompute=True), Listing()
    expected = results(tiny_model())
    with named_regions(model, heard):
        assert all(torch.equal(a, b) for a, b in zip(expected, results(model), strict=True))
    assert heard.open == []
    for name in FORWARD:
        forward = FORWARD.count(name)
        # Once forward, once backward, and again as far as the recomputation goes before it has all it needs.
        assert 2 * forward <= heard.entered.count(name) <= 3 * forward, name
    assert heard.entered.count("attention") == 6


def test_without_gradients_there_is_no_backward_name():
    model, heard = tiny_model(), Listing()
    with named_regions(model, heard), torch.no_grad():
        output(model)
    assert heard.entered == FORWARD


def test_of_compiled_blocks_only_the_routing_is_named():
    model, heard = tiny_model(), Listing()
    with named_regions(model, heard, compiled=True):
        output(model)
    assert heard.entered == ["router", "dispatch", "experts", "combine"]


def test_an_error_inside_closes_its_region():
    model, heard = tiny_model(), Listing()
    with named_regions(model, heard), pytest.raises(ValueError, match="grid"):
        model(
            torch.zeros(1, 6, TINY.patch_channels),
            torch.zeros(1),
            TextFeatures(torch.zeros(1, 4, 24)),
            (9, 9),
        )
    assert heard.open == []


def test_the_clock_gives_every_moment_to_one_path(monkeypatch):
    moments = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    clock = Clock(torch.device("cpu"))
    with region(clock, "backward"):  # from 0
        with region(clock, "experts"):  # from 1 to 3
            pass
        with region(clock, "experts"):  # from 6 to 10
            pass
    # ends at 15
    assert clock.take() == {("backward",): 1.0 + 3.0 + 5.0, ("backward", "experts"): 2.0 + 4.0}
    assert clock.take() == {}


def test_the_clock_refuses_what_does_not_nest():
    clock = Clock(torch.device("cpu"))
    clock.enter("forward")
    clock.enter("experts")
    with pytest.raises(RuntimeError, match="'forward' ends, but open are"):
        clock.leave("forward")


def test_nvtx_ranges_are_pushed_and_popped(monkeypatch):
    """The calls that nsys and ncu hear, recorded in place of a GPU's library."""
    calls = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: calls.append(name))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    model = tiny_model()
    with named_regions(model, ranges.NvtxRanges()):
        output(model).sum().backward()
    assert calls == [word for name in FORWARD + FORWARD[::-1] for word in (name, "pop")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nvtx_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match="--nvtx.*no CUDA device"):
        ranges.nvtx_ranges()
