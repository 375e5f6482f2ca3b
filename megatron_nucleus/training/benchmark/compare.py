"""diffusers' module with the weights of ours, as parts to time beside ours. For a single process."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.export.hf_keys import to_diffusers_config, to_diffusers_state
from megatron_nucleus.training.benchmark.parts import Spread, Timed, Workload, call_ours
from megatron_nucleus.utils.errors import ConfigError

# Largest difference of the two modules' fp32 outputs, relative to their RMS, that counts as the same function.
SAME_OUTPUT = 1e-3
COMPILE_BACKEND = "inductor"


class Variant(NamedTuple):
    """One way to run diffusers' module: its expert path (``loop`` or ``grouped_mm``) and what is done on top."""

    path: str
    compiled: bool = False
    checkpointing: bool = False

    def __str__(self) -> str:
        extras = [name for name in ("compiled", "checkpointing") if getattr(self, name)]
        return "+".join([self.path, *extras])


class Theirs:
    """diffusers' module and its ways to run.

    Args:
        compiled: also with its blocks compiled (`COMPILE_BACKEND`).
        checkpointing: with its gradient checkpointing, in all variants.
    """

    def __init__(self, other: nn.Module, paths: tuple[str, ...], *, compiled: bool, checkpointing: bool):
        self.other = other
        if checkpointing:
            other.enable_gradient_checkpointing()
            other.train()  # it keeps activations in evaluation mode; it has no dropout
        self.variants = [Variant(path, False, checkpointing) for path in paths]
        if compiled:
            self.variants += [Variant(path, True, checkpointing) for path in paths]
            self._compiled = [
                torch.compile(b.forward, backend=COMPILE_BACKEND) for b in other.transformer_blocks
            ]

    def __call__(self, work: Workload, variant: Variant) -> Tensor:
        """Velocity [B, S, P]."""
        for number, block in enumerate(self.other.transformer_blocks):
            if block.moe_enabled:
                block.img_mlp.experts.use_grouped_mm = variant.path == "grouped_mm"
            vars(block).pop("forward", None)
            if variant.compiled:
                block.forward = self._compiled[number]
        image = (1, *work.grid)
        return self.other(work.latents_BSP, image, work.text_BLU, timestep=work.sigma_B, return_dict=False)[0]

    def drop_what_does_not_compile(self, work: Workload, forward_only: bool) -> dict[str, str]:
        """Run every compiled variant once, and leave out those that fail: variant -> reason.

        torch 2.13's compiler takes grouped_mm neither in fp32 nor, on a CPU, in bf16.

        Raises:
            ConfigError: none is left.
        """
        asked = [variant for variant in self.variants if variant.compiled]
        refused: dict[str, str] = {}
        for variant in asked:
            timed = Timed(self.other, functools.partial(self, work, variant), work)
            try:
                timed.forward()
                if not forward_only:
                    timed.forward_backward()
            except Exception as error:  # a compiler's errors have no common class
                refused[str(variant)] = " ".join(str(error).split())[:300]
                self.variants.remove(variant)
        if asked and len(refused) == len(asked):
            raise ConfigError(f"--compare-compile: torch cannot compile diffusers' blocks here: {refused}")
        return refused


def diffusers_parts(
    model: NucleusTransformer,
    work: Workload,
    forward_only: bool,
    *,
    compiled: bool = False,
    checkpointing: bool = False,
) -> tuple[dict[str, Callable], dict[str, str]]:
    """diffusers' module with ``model``'s weights as parts ``theirs/<variant>/<forward | forward_backward>``.

    Both of its expert paths are timed, the loop and grouped_mm, where the latter takes the widths. compiled,
    checkpointing: of `Theirs`.

    Returns:
        the parts, and of each variant that torch cannot compile here the reason.

    Raises:
        ConfigError: diffusers is not installed, or no variant can be compiled.
        RuntimeError: its output is not ours.
    """
    try:
        from diffusers import NucleusMoEImageTransformer2DModel
    except ImportError as error:
        raise ConfigError("--compare diffusers: needs diffusers >= 0.38, not installed here") from error
    config = {k: v for k, v in to_diffusers_config(model.shape).items() if not k.startswith("_")}
    paths = ("loop", "grouped_mm") if config.pop("use_grouped_mm") else ("loop",)
    other = NucleusMoEImageTransformer2DModel(**config).to(work.latents_BSP.device)
    # assign: both modules share the storage of every tensor whose layout is the same.
    state = to_diffusers_state({k: v.detach() for k, v in model.state_dict().items()}, model.shape)
    other.load_state_dict(state, assign=True)
    theirs = Theirs(other, paths, compiled=compiled, checkpointing=checkpointing)
    for p in other.parameters():
        p.requires_grad_(True)
    refused = theirs.drop_what_does_not_compile(work, forward_only)
    _check_same(model, theirs, work)
    parts: dict[str, Callable] = {}
    for variant in theirs.variants:
        timed = Timed(other, functools.partial(theirs, work, variant), work)
        parts[f"theirs/{variant}/forward"] = timed.forward
        if not forward_only:
            parts[f"theirs/{variant}/forward_backward"] = timed.forward_backward
    return parts, refused


def settings(work: Workload, *, compiled: bool, checkpointing: bool) -> dict:
    """How diffusers' module was run beside the expert paths of `compare`, for the record."""
    return {
        "version": importlib.metadata.version("diffusers"),
        "compiled_too": compiled,
        "checkpointing": checkpointing,
        "weights_dtype": str(work.latents_BSP.dtype).removeprefix("torch."),
        "attention": "its default, scaled_dot_product_attention",
    }


def compare(times: dict[str, Spread], main: str, accumulation: int) -> dict:
    """Ours against the fastest of their variants, chosen for each part by itself.

    Args:
        times: of our parts and of those of `diffusers_parts`.
        main: the part that a step repeats ``accumulation`` times.
    """
    out: dict = {"name": "diffusers"}
    for part in ("forward", "forward_backward"):
        candidates = {
            n.split("/")[1]: t for n, t in times.items() if n.startswith("theirs/") and n.endswith(f"/{part}")
        }
        if not candidates:
            continue
        path = min(candidates, key=lambda name: candidates[name].median_s)
        ratio = candidates[path].median_s / times[part].median_s
        if part == main:
            out |= {"step_s": accumulation * candidates[path].median_s, "ratio": ratio}
        out[part] = {"expert_path": path, "ratio": ratio} | dataclasses.asdict(candidates[path])
        out[part]["all_paths_s"] = {name: t.median_s for name, t in candidates.items()}
    return out


@torch.no_grad()
def _check_same(model: NucleusTransformer, theirs: Theirs, work: Workload) -> None:
    """Both modules in fp32 (where no rounding turns a routing decision) must give one output.

    In bf16 a compiled variant is not compared: what it is compiled from is, and fp32 would compile something else.
    """
    dtype = work.latents_BSP.dtype
    wide = dataclasses.replace(
        work,
        latents_BSP=work.latents_BSP.float(),
        sigma_B=work.sigma_B.float(),
        text_BLU=work.text_BLU.float(),
    )
    modules = [] if dtype == torch.float32 else [model, theirs.other]
    for module in modules:
        module.float()
    ours_BSP = call_ours(model, wide)
    for variant in theirs.variants:
        if variant.compiled and dtype != torch.float32:
            continue
        difference = (theirs(wide, variant) - ours_BSP).abs().max() / ours_BSP.square().mean().sqrt()
        if not float(difference) <= SAME_OUTPUT:
            raise RuntimeError(
                f"diffusers ({variant}) computes something else with the same weights: largest difference "
                f"{float(difference):.2g} of the output's RMS, allowed {SAME_OUTPUT}"
            )
    for module in modules:
        module.to(dtype)
