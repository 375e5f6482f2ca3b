"""The mixture-of-experts feed-forward."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_nucleus.core.kernels import Kernels
from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.moe.dispatcher import LocalDispatcher
from megatron_nucleus.core.moe.experts import Experts
from megatron_nucleus.core.moe.router import Router
from megatron_nucleus.core.transformer.feed_forward import FeedForward
from megatron_nucleus.types import Routing


class MoELayer(nn.Module):
    """Shared expert on every token + routed experts on the tokens they chose."""

    def __init__(self, shape: ModelShape, layer: int, kernels: Kernels):
        super().__init__()
        D, F, E = shape.width, shape.moe_intermediate_dim, shape.num_experts
        self.router = Router(
            D, E, shape.capacity_factors[layer], shape.use_sigmoid, shape.route_scale, kernels
        )
        self.experts = Experts(E, D, F, kernels)
        self.shared_expert = FeedForward(D, F, kernels)
        self.dispatcher = LocalDispatcher(kernels)

    def forward(self, x_BSD: Tensor, judged_BSD: Tensor, temb_BD: Tensor) -> tuple[Tensor, Routing]:
        """x_BSD: modulated tokens the experts compute on. judged_BSD: tokens the router judges, see `Router`."""
        routing = self.router(judged_BSD, temb_BD)  # which tokens each expert takes
        rows = self.dispatcher.dispatch(x_BSD, routing)  # send them there
        shared_BSD = self.shared_expert(x_BSD)  # meanwhile
        rows = self.experts(rows, self.dispatcher)  # batched matmuls
        return self.dispatcher.combine(shared_BSD, rows, routing), routing
