"""FP8 linear layers of Transformer Engine.

NOT RUN WITH THE LIBRARY: the calls follow its documentation, and a stand-in with the same signatures is what the
adapter is tested against. Each layer of ours keeps its own parameter and lends it to a layer of the library for the
call, so that neither names nor checkpoints change. Experts are left out: `GroupedLinear` keeps its weights in
matrices of its own, which FSDP2 and our optimizers would have to know.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from torch import Tensor, nn
from transformer_engine.common import recipe as te_recipe

from megatron_nucleus.backends import recorded
from megatron_nucleus.backends.gpu import why_no_gpu

# The library's names of our recipes.
RECIPES = {
    "delayed": "DelayedScaling",
    "current": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
# Tokens of a call must be a multiple of this: 8 for the forward pass and 16 for the weights' gradient, blocks of 128
# rows, groups of 32 (requirements in the documentation of the recipes).
TOKEN_MULTIPLE = {"delayed": 16, "current": 16, "blockwise": 128, "mxfp8": 32}


def why_unavailable(device_type: str, recipe: str | None, experts: bool) -> str | None:
    """Why the library cannot multiply in FP8 here, in one line; None when it may. recipe: None = any."""
    reason = why_no_gpu(device_type, (8, 9)) or recorded.drift(
        te, recorded.library("transformer_engine fp8").calls
    )
    if reason is not None:
        return reason
    name = RECIPES[recipe or "current"]
    if not hasattr(te_recipe, name):
        return f"needs transformer_engine.common.recipe.{name}, which this version does not have"
    if recipe == "delayed":
        reason = recorded.drift(te_recipe, recorded.library("transformer_engine recipes").calls)
        if reason is not None:
            return reason
    probe = {
        "blockwise": "is_fp8_block_scaling_available",
        "mxfp8": "is_mxfp8_available",
    }.get(recipe, "is_fp8_available")
    usable, why_not = getattr(te, probe)(return_reason=True)
    return None if usable else f"cannot use recipe {recipe or 'current'} here: {' '.join(why_not.split())}"


class BorrowingLinear(nn.Linear):
    """A linear layer over the parameters of another, multiplied by Transformer Engine."""

    def __init__(self, linear: nn.Linear, recipe: str):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias, self.multiple = linear.weight, linear.bias, TOKEN_MULTIPLE[recipe]
        # In a tuple: not a submodule, so its state and its parameter names stay out of checkpoints.
        self.lent = (
            te.Linear(
                in_features=linear.in_features,
                out_features=linear.out_features,
                bias=False,
                params_dtype=torch.float32,
                device="meta",
            ),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., M]. Tokens are filled up with zeros where the recipe needs it, which changes nothing."""
        engine = self.lent[0]
        engine.train(self.training)
        # Whole or gathered by FSDP, as it is in this call. Without autocast the library wants one dtype for both.
        mixed = torch.is_autocast_enabled(x.device.type)
        engine._parameters["weight"] = self.weight if mixed else self.weight.to(x.dtype)
        x_TD = x.reshape(-1, x.shape[-1])
        missing = -len(x_TD) % self.multiple
        out_TM = engine(inp=F.pad(x_TD, (0, 0, 0, missing)) if missing else x_TD)
        out = out_TM[: len(x_TD)].unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias.to(out.dtype)


def convert_linears(model: nn.Module, names: frozenset[str], recipe: str) -> None:
    """Replace the linear layers of these names, and run them in the library's FP8 context.

    The context surrounds each block, so that a recomputed block is in it, too. Delayed scaling, which is never
    recomputed, has one around the whole model: whenever its outermost context ends, the library moves the history of
    every layer on, also of layers that did not run in it, and reduces what it saw over all ranks. With a context per
    block it would remember as many times fewer steps as there are blocks.
    """
    made = _recipe(recipe)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, BorrowingLinear(model.get_submodule(name), recipe))
    for module in [model] if recipe == "delayed" else model.blocks:
        module.forward = _within(module.forward, made)


def _recipe(recipe: str) -> te_recipe.Recipe:
    # Every rank scales what it holds: without this, delayed scaling adds a collective of all ranks to each pass.
    settings = {"reduce_amax": False} if recipe == "delayed" else {}
    return getattr(te_recipe, RECIPES[recipe])(**settings)


def _within(forward, made):
    @functools.wraps(forward)
    def run(*args, **kwargs):
        with te.autocast(enabled=True, recipe=made):
            return forward(*args, **kwargs)

    return run
