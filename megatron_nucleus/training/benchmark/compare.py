"""diffusers' module with the weights of ours, as parts to time beside ours. For a single process."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.export.hf_keys import to_diffusers_config, to_diffusers_state
from megatron_nucleus.training.benchmark.parts import Spread, Timed, Workload, call_ours
from megatron_nucleus.utils.errors import ConfigError

# Largest difference of the two modules' fp32 outputs, relative to their RMS, that counts as the same function.
SAME_OUTPUT = 1e-3


def diffusers_parts(model: NucleusTransformer, work: Workload, forward_only: bool) -> dict[str, Callable]:
    """diffusers' module with ``model``'s weights as parts ``theirs/<expert path>/<forward | forward_backward>``.

    Both of its expert paths are timed, the loop and grouped_mm, where the latter takes the widths.

    Raises:
        ConfigError: diffusers is not installed.
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
    _check_same(model, other, work, paths)
    for p in other.parameters():
        p.requires_grad_(True)
    parts: dict[str, Callable] = {}
    for path in paths:
        timed = Timed(other, functools.partial(_call_theirs, other, work, path), work)
        parts[f"theirs/{path}/forward"] = timed.forward
        if not forward_only:
            parts[f"theirs/{path}/forward_backward"] = timed.forward_backward
    return parts


def compare(times: dict[str, Spread], main: str, accumulation: int) -> dict:
    """Ours against the faster of their expert paths, chosen for each part by itself.

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


def _call_theirs(other: nn.Module, work: Workload, path: str) -> Tensor:
    for block in other.transformer_blocks:
        if block.moe_enabled:
            block.img_mlp.experts.use_grouped_mm = path == "grouped_mm"
    image = (1, *work.grid)
    return other(work.latents_BSP, image, work.text_BLU, timestep=work.sigma_B, return_dict=False)[0]


@torch.no_grad()
def _check_same(model: NucleusTransformer, other: nn.Module, work: Workload, paths: tuple[str, ...]) -> None:
    """Both modules in fp32 (where no rounding turns a routing decision) must give one output."""
    dtype = work.latents_BSP.dtype
    wide = dataclasses.replace(
        work,
        latents_BSP=work.latents_BSP.float(),
        sigma_B=work.sigma_B.float(),
        text_BLU=work.text_BLU.float(),
    )
    modules = [] if dtype == torch.float32 else [model, other]
    for module in modules:
        module.float()
    ours_BSP = call_ours(model, wide)
    for path in paths:
        difference = (
            _call_theirs(other, wide, path) - ours_BSP
        ).abs().max() / ours_BSP.square().mean().sqrt()
        if not float(difference) <= SAME_OUTPUT:
            raise RuntimeError(
                f"diffusers ({path}) computes something else with the same weights: largest difference "
                f"{float(difference):.2g} of the output's RMS, allowed {SAME_OUTPUT}"
            )
    for module in modules:
        module.to(dtype)
