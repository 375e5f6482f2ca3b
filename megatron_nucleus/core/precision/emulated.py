"""FP8 products in plain torch (`ops/fp8.py`): any device, slow. The stand-in for hardware that is not here."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_nucleus.ops import fp8


def why_unavailable(device_type: str, recipe: str | None, experts: bool) -> str | None:
    """None: it runs anywhere."""
    return None


class EmulatedLinear(nn.Linear):
    """A linear layer over the parameters of another, with 8-bit operands."""

    def __init__(self, linear: nn.Linear, recipe: str):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias, self.recipe = linear.weight, linear.bias, recipe

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., M]."""
        out = fp8.linear(x, self.weight, self.recipe)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def convert_linears(model: nn.Module, names: frozenset[str], recipe: str) -> None:
    """Replace the linear layers of these names; their parameters stay the same objects."""
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, EmulatedLinear(model.get_submodule(name), recipe))


def expert_ffn(rows_END: Tensor, gate_up_EDF2: Tensor, down_EFD: Tensor, *, recipe: str) -> Tensor:
    """`ops.experts.expert_ffn` with 8-bit operands."""
    return fp8.expert_ffn(rows_END, gate_up_EDF2, down_EFD, recipe)
