"""A layer's forward and backward pass captured as one CUDA graph gives what the eager layer gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_nucleus.core.kernels import resolve_kernels
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.transformer.rope import rope_table
from megatron_nucleus.types import NormalisedText
from tests.shapes import TINY

pytestmark = pytest.mark.gpu
B, GRID, L = 3, (4, 6), 5


class Layer:
    """One block with inputs that stay in place, as a graph needs them."""

    def __init__(self, number: int, bf16: bool):
        self.model = NucleusTransformer(TINY, resolve_kernels(device_type="cuda")).to("cuda")
        self.block = self.model.blocks[number]
        with torch.device("cuda"):
            S, D = GRID[0] * GRID[1], TINY.width
            self.x_BSD = torch.randn(B, S, D).requires_grad_()
            self.temb_BD, self.act_BD = torch.randn(2, B, D).unbind()
            text_BLU = torch.randn(B, L, TINY.text_dim)
            self.grad_BSD = torch.randn(B, S, D)
        for parameter in self.block.parameters():  # gates that start at zero would hide everything
            torch.nn.init.normal_(parameter, std=0.1)
        self.text = NormalisedText(text_BLU, self.model.text_norm.weight)
        self.rotations = rope_table(TINY.axes_dims_rope, GRID, L, self.x_BSD.device)
        self.bf16 = bf16

    def run(self) -> tuple[Tensor, Tensor | None]:
        """Forward and backward; gradients are fresh. Returns the output and the experts' choice."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            out_BSD, routing = self.block(
                self.x_BSD, self.temb_BD, self.act_BD, self.text, None, self.rotations
            )
        (out_BSD.float() * self.grad_BSD).sum().backward()
        return out_BSD, None if routing is None else routing.index_BEC

    def clear(self) -> None:
        self.x_BSD.grad = None
        for parameter in self.block.parameters():
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        found = {"x": self.x_BSD.grad} | {n: p.grad for n, p in self.block.named_parameters()}
        return {name: grad.detach().clone() for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("number", [0, 1], ids=["dense", "moe"])
def test_a_captured_layer_equals_the_eager_one(number, bf16):
    layer = Layer(number, bf16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what allocates or autotunes does so before the capture
        for _ in range(3):
            layer.clear()
            _, first_choice = layer.run()
    torch.cuda.current_stream().wait_stream(side)
    layer.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_BSD, choice = layer.run()

    with torch.no_grad():  # other tokens, another choice
        layer.x_BSD.copy_(torch.randn_like(layer.x_BSD))
        layer.temb_BD.copy_(torch.randn_like(layer.temb_BD))
        layer.act_BD.copy_(torch.randn_like(layer.act_BD))
    graph.replay()
    captured, captured_choice = out_BSD.detach().clone(), None if choice is None else choice.clone()
    captured_gradients = layer.gradients()

    layer.clear()
    eager, eager_choice = layer.run()
    # Rows that several experts add onto one token may be added in another order.
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if bf16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(captured, eager, **tolerance)
    if choice is not None:
        assert torch.equal(captured_choice, eager_choice)
        assert not torch.equal(captured_choice, first_choice)
    gradients = layer.gradients()
    assert captured_gradients.keys() == gradients.keys()
    for name, grad in gradients.items():
        scale = float(grad.abs().max()) + 1e-6
        torch.testing.assert_close(captured_gradients[name] / scale, grad / scale, **tolerance, msg=name)
