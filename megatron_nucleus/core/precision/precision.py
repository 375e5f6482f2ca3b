"""FP8 training as a pass over a model that knows nothing of it: which layers, by which library, by which recipe.

FP8 changes results, so it is never chosen by ``auto``. Parameters keep their names, shapes and dtypes: a checkpoint of
an FP8 run is a checkpoint like any other, and what Transformer Engine's delayed scaling remembers is not in it.
Each rank scales what it holds: with another number of ranks a result differs by rounding where a scale spans tokens.

Stay in the run's precision, because they are small or decide much: router, modulation, time embedding, first and last
projection, norms, and the text's projections (their matrices may be multiplied first, `core/transformer/text.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from torch import nn

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.ops.registry import missing
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError, nearest

# Layers by name, as patterns of module names. The experts are not linear layers; they come last.
LAYERS = {
    "attention": r"blocks\.\d+\.attention\.(q|k|v|out)",
    "ffn": r"blocks\.\d+\.feed_forward\.(gate_up|down)",
    "shared_experts": r"blocks\.\d+\.moe\.shared_expert\.(gate_up|down)",
    "experts": r"blocks\.\d+\.moe\.experts",
}
# Multiple that inputs and outputs of a layer must be, and why. Rows are filled up with zeros where needed.
_UNITS = {
    "delayed": (16, "FP8 tensor cores read 16 values at once"),
    "current": (16, "FP8 tensor cores read 16 values at once"),
    "rowwise": (16, "FP8 tensor cores read 16 values at once"),
    "blockwise": (128, "weights are scaled in blocks of 128 x 128"),
    "mxfp8": (32, "32 values in a row share a scale"),
}


class _Backend(NamedTuple):
    """module: loaded when asked for. recipes: of linear layers. expert_recipes: of the experts."""

    module: str
    recipes: tuple[str, ...]
    expert_recipes: tuple[str, ...]


BACKENDS = {
    "emulated": _Backend(
        "megatron_nucleus.core.precision.emulated",
        ("current", "rowwise", "blockwise", "mxfp8"),
        ("current", "rowwise", "blockwise", "mxfp8"),
    ),
    "torchao": _Backend("megatron_nucleus.backends.torchao", ("current", "rowwise"), ("rowwise",)),
    "transformer_engine": _Backend(
        "megatron_nucleus.backends.transformer_engine_fp8", ("delayed", "current", "blockwise", "mxfp8"), ()
    ),
}


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """FP8 matrix products in training. Weights, gradients and optimizer stay as they are without."""

    fp8: str = knob(
        "none",
        "who multiplies in FP8; emulated = plain torch, slow, to see what FP8 does to a loss",
        choices=("none", *BACKENDS),
    )
    fp8_recipe: str | None = knob(
        None, f"how operands are scaled: {', '.join(_UNITS)}; must be named with --fp8"
    )
    fp8_layers: tuple[str, ...] = knob(
        tuple(LAYERS), f"what is multiplied in FP8: any of {', '.join(LAYERS)}"
    )


def apply_precision(
    model: NucleusTransformer,
    config: PrecisionConfig,
    *,
    device_type: str,
    bf16: bool,
    recomputes: bool = False,
    compiles: bool = False,
    expert_ffn_backend: str = "auto",
) -> NucleusTransformer:
    """Rewrite ``model`` in place; before `parallelize`, on any device, also on meta.

    Args:
        device_type: where it will run. bf16: whether it will compute in bfloat16 (autocast).
        recomputes, compiles: whether activations will be recomputed in the backward pass, and blocks compiled.
        expert_ffn_backend: what the run asked for; only ``auto`` gives way to experts in FP8.

    Raises:
        ConfigError: library, recipe and layers do not fit each other, this machine or the model's widths; the message
            names the layer, the number and what can be used instead.
    """
    if config.fp8 == "none":
        if config.fp8_recipe is not None:
            raise ConfigError(f"--fp8-recipe {config.fp8_recipe}: needs --fp8, one of {', '.join(BACKENDS)}")
        if config.fp8_layers != tuple(LAYERS):
            raise ConfigError(
                f"--fp8-layers {' '.join(config.fp8_layers)}: needs --fp8, one of {', '.join(BACKENDS)}"
            )
        return model
    _check_choice(config)
    if "experts" in config.fp8_layers and expert_ffn_backend != "auto":
        raise ConfigError(
            f"--expert-ffn-backend {expert_ffn_backend}: --fp8 {config.fp8} multiplies the experts itself; leave one "
            f"of them out ({_without_experts()})"
        )
    _check_library(config, device_type)
    _check_run(config, bf16, recomputes, compiles)
    _check_widths(model, config)
    module = _module(config.fp8)
    chosen = frozenset(name for name, _ in _linears(model, config.fp8_layers))
    if chosen:
        module.convert_linears(model, chosen, config.fp8_recipe)
    if "experts" in config.fp8_layers:
        expert_ffn = functools.partial(module.expert_ffn, recipe=config.fp8_recipe)
        for block in model.blocks:
            if block.is_moe:
                experts = block.moe.experts
                experts.kernels = dataclasses.replace(experts.kernels, expert_ffn=expert_ffn)
    return model


def check_settings(
    model: NucleusTransformer,
    config: PrecisionConfig,
    *,
    bf16: bool,
    recomputes: bool = False,
    compiles: bool = False,
) -> None:
    """What `apply_precision` checks without the library, for a run on another machine; same arguments and errors."""
    if config.fp8 == "none":
        apply_precision(model, config, device_type="meta", bf16=bf16)
        return
    _check_choice(config)
    _check_run(config, bf16, recomputes, compiles)
    _check_widths(model, config)


def why_unavailable(
    name: str, device_type: str, recipe: str | None = None, experts: bool = False
) -> str | None:
    """Why the FP8 backend ``name`` cannot run here, in one line; None when it may.

    recipe: None = any. experts: whether it is to multiply experts, too.
    """
    try:
        module = _module(name)
    except Exception as error:  # optional libraries raise RuntimeError and AssertionError at import, too
        return missing(error)
    return module.why_unavailable(device_type, recipe, experts)


def _module(name: str) -> ModuleType:
    return importlib.import_module(BACKENDS[name].module)


def _check_choice(config: PrecisionConfig) -> None:
    """Library, recipe and layers among themselves."""
    backend = BACKENDS[config.fp8]
    for layer in config.fp8_layers:
        if layer not in LAYERS:
            raise ConfigError(
                f"--fp8-layers: '{layer}' is unknown{nearest(layer, LAYERS)}; any of: {', '.join(LAYERS)}"
            )
    if not config.fp8_layers:
        raise ConfigError(f"--fp8-layers: names no layer; any of: {', '.join(LAYERS)}, or --fp8 none")
    if config.fp8_recipe is None:
        raise ConfigError(f"--fp8 {config.fp8}: needs --fp8-recipe, one of: {', '.join(backend.recipes)}")
    if config.fp8_recipe not in backend.recipes:
        others = [name for name, b in BACKENDS.items() if config.fp8_recipe in b.recipes]
        where = f"; {' and '.join(others)} have it" if others else nearest(config.fp8_recipe, _UNITS)
        raise ConfigError(
            f"--fp8-recipe {config.fp8_recipe}: --fp8 {config.fp8} has {', '.join(backend.recipes)}{where}"
        )
    if "experts" in config.fp8_layers and config.fp8_recipe not in backend.expert_recipes:
        others = [name for name, b in BACKENDS.items() if b.expert_recipes]
        raise ConfigError(
            f"--fp8-layers experts: --fp8 {config.fp8} multiplies experts by "
            f"{' or '.join(backend.expert_recipes) or 'no recipe'}, not by {config.fp8_recipe}. Leave them out "
            f"({_without_experts()}) or use "
            f"{' or '.join(f'--fp8 {o} --fp8-recipe {BACKENDS[o].expert_recipes[0]}' for o in others)}"
        )


def _without_experts() -> str:
    return f"--fp8-layers {' '.join(layer for layer in LAYERS if layer != 'experts')}"


def _check_library(config: PrecisionConfig, device_type: str) -> None:
    reason = why_unavailable(config.fp8, device_type, config.fp8_recipe, "experts" in config.fp8_layers)
    if reason is not None:
        usable = [n for n in BACKENDS if why_unavailable(n, device_type) is None]
        raise ConfigError(f"--fp8 {config.fp8} {reason}. Usable here: {', '.join(usable)}.")


def _check_run(config: PrecisionConfig, bf16: bool, recomputes: bool, compiles: bool) -> None:
    if config.fp8 != "emulated" and not bf16:
        raise ConfigError(
            f"--fp8 {config.fp8}: its products come out in bfloat16; add --bf16, or use --fp8 emulated"
        )
    if config.fp8_recipe == "delayed" and (recomputes or compiles):
        why, way = (
            ("so that a recomputed pass would differ from the first", "--recompute-granularity none")
            if recomputes
            else ("which a compiled block cannot follow (the library refuses it)", "--no-compile-blocks")
        )
        raise ConfigError(
            f"--fp8-recipe delayed: its scales move with every forward pass, {why}; use --fp8-recipe current "
            f"or {way}"
        )


def _check_widths(model: NucleusTransformer, config: PrecisionConfig) -> None:
    """Every layer that is to be multiplied in FP8 exists and has widths that the recipe can take.

    A model need not have all kinds of layers; one that is named and not there is an error.
    """
    absent = [layer for layer in config.fp8_layers if next(_matrices(model, (layer,)), None) is None]
    if absent and (set(config.fp8_layers) != set(LAYERS) or len(absent) == len(LAYERS)):
        raise ConfigError(f"--fp8-layers {' '.join(absent)}: the model has no such layers; leave them out")
    unit, reason = _UNITS[config.fp8_recipe]
    for name, matrices in _matrices(model, config.fp8_layers):
        for what, width in matrices:
            if width % unit:
                raise ConfigError(
                    f"--fp8-recipe {config.fp8_recipe}: {name} has {width} {what}, no multiple of {unit} ({reason}). "
                    f"{_instead(model, config, width)}"
                )


def _instead(model: NucleusTransformer, config: PrecisionConfig, width: int) -> str:
    """What to do about a width that the recipe cannot take."""
    backend, ways = BACKENDS[config.fp8], []
    recipes = backend.expert_recipes if "experts" in config.fp8_layers else backend.recipes
    fitting = [
        recipe
        for recipe in recipes
        if all(w % _UNITS[recipe][0] == 0 for _, m in _matrices(model, config.fp8_layers) for _, w in m)
    ]
    if fitting:
        ways.append(f"--fp8-recipe {' or '.join(fitting)}")
    unit = _UNITS[config.fp8_recipe][0]
    layers = [
        layer
        for layer in config.fp8_layers
        if all(w % unit == 0 for _, m in _matrices(model, (layer,)) for _, w in m)
    ]
    if layers:
        ways.append(f"--fp8-layers {' '.join(layers)}")
    if width == model.shape.moe_intermediate_dim:
        sizes = [w for w in (width // unit * unit, (width // unit + 1) * unit) if w]
        ways.append(f"--moe-intermediate-dim {' or '.join(map(str, sizes))}")
    return "Use " + ", or ".join(ways) if ways else "Use --fp8 none"


def _linears(model: NucleusTransformer, layers: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear]]:
    patterns = [re.compile(LAYERS[layer]) for layer in layers if layer != "experts"]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(pattern.fullmatch(name) for pattern in patterns):
            yield name, module


def _matrices(
    model: NucleusTransformer, layers: tuple[str, ...]
) -> Iterator[tuple[str, tuple[tuple[str, int], ...]]]:
    """(name, ((what, width), ...)) of every matrix of the layers."""
    for name, linear in _linears(model, layers):
        yield name, (("inputs", linear.in_features), ("outputs", linear.out_features))
    if "experts" not in layers:
        return
    for i, block in enumerate(model.blocks):
        if block.is_moe:
            for name, parameter in block.moe.experts.named_parameters():
                inputs, outputs = parameter.shape[1:]
                yield f"blocks.{i}.moe.experts.{name}", (("inputs", inputs), ("outputs", outputs))
