"""The one table between our parameter names and diffusers', in both directions, with shapes and layouts.

Everything is identity except the rows of a dense SwiGLU: ours are ``[gate; up]`` everywhere, while diffusers keeps
``[up; gate]`` in `FeedForward` (dense blocks and shared experts) and ``[gate, up]`` in its packed experts.
Source: diffusers 0.42.1, transformer_nucleusmoe_image.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_nucleus.core.models.presets import DENSE_STRATEGIES, ModelShape
from megatron_nucleus.utils.errors import ConfigError, DataError, nearest

CLASS_NAME = "NucleusMoEImageTransformer2DModel"


class Rule(NamedTuple):
    """One line of the table.

    shape: names of `dimensions`. swap_halves: the two halves of the first dimension change places.
    """

    native: str
    diffusers: str
    shape: tuple[str, ...]
    swap_halves: bool = False


class Key(NamedTuple):
    """One parameter of one model: both names, its shape and whether halves of the rows are swapped."""

    native: str
    diffusers: str
    shape: tuple[int, ...]
    swap_halves: bool


_STEM = (
    Rule("image_in.weight", "img_in.weight", ("D", "P")),
    Rule("image_in.bias", "img_in.bias", ("D",)),
    Rule("time_embed.linear_1.weight", "time_text_embed.timestep_embedder.linear_1.weight", ("4D", "D")),
    Rule("time_embed.linear_1.bias", "time_text_embed.timestep_embedder.linear_1.bias", ("4D",)),
    Rule("time_embed.linear_2.weight", "time_text_embed.timestep_embedder.linear_2.weight", ("D", "4D")),
    Rule("time_embed.linear_2.bias", "time_text_embed.timestep_embedder.linear_2.bias", ("D",)),
    Rule("time_embed.norm.weight", "time_text_embed.norm.weight", ("D",)),
    Rule("text_norm.weight", "txt_norm.weight", ("U",)),
)
_BLOCK = (
    Rule("modulation.weight", "img_mod.1.weight", ("4D", "D")),
    Rule("modulation.bias", "img_mod.1.bias", ("4D",)),
    Rule("text_in.weight", "encoder_proj.weight", ("D", "U")),
    Rule("text_in.bias", "encoder_proj.bias", ("D",)),
    Rule("attention.q.weight", "attn.to_q.weight", ("HK", "D")),
    Rule("attention.k.weight", "attn.to_k.weight", ("GK", "D")),
    Rule("attention.v.weight", "attn.to_v.weight", ("GK", "D")),
    Rule("attention.out.weight", "attn.to_out.0.weight", ("D", "HK")),
    Rule("attention.text_k.weight", "attn.add_k_proj.weight", ("GK", "D")),
    Rule("attention.text_v.weight", "attn.add_v_proj.weight", ("GK", "D")),
    Rule("attention.q_norm.weight", "attn.norm_q.weight", ("K",)),
    Rule("attention.k_norm.weight", "attn.norm_k.weight", ("K",)),
    Rule("attention.text_q_norm.weight", "attn.norm_added_q.weight", ("K",)),  # stored upstream, never used
    Rule("attention.text_k_norm.weight", "attn.norm_added_k.weight", ("K",)),
)
_DENSE = (
    Rule("feed_forward.gate_up.weight", "img_mlp.net.0.proj.weight", ("2I", "D"), swap_halves=True),
    Rule("feed_forward.down.weight", "img_mlp.net.2.weight", ("D", "I")),
)
_MOE = (
    Rule("moe.router.weight", "img_mlp.gate.weight", ("E", "2D")),
    Rule("moe.experts.gate_up", "img_mlp.experts.gate_up_proj", ("E", "D", "2F")),
    Rule("moe.experts.down", "img_mlp.experts.down_proj", ("E", "F", "D")),
    Rule(
        "moe.shared_expert.gate_up.weight",
        "img_mlp.shared_expert.net.0.proj.weight",
        ("2F", "D"),
        swap_halves=True,
    ),
    Rule("moe.shared_expert.down.weight", "img_mlp.shared_expert.net.2.weight", ("D", "F")),
)
_HEAD = (
    Rule("out_modulation.weight", "norm_out.linear.weight", ("2D", "D")),
    Rule("out_modulation.bias", "norm_out.linear.bias", ("2D",)),
    Rule("image_out.weight", "proj_out.weight", ("P", "D")),
)


def dimensions(shape: ModelShape) -> dict[str, int]:
    """Values of the letters used in the table (legend in `types`; I is the hidden width of a dense block)."""
    D, F, hidden = shape.width, shape.moe_intermediate_dim, shape.dense_hidden
    return {
        "D": D, "2D": 2 * D, "4D": 4 * D, "P": shape.patch_channels, "U": shape.text_dim,
        "K": shape.attention_head_dim, "HK": D, "GK": shape.num_key_value_heads * shape.attention_head_dim,
        "E": shape.num_experts, "F": F, "2F": 2 * F, "I": hidden, "2I": 2 * hidden,
    }  # fmt: skip


def keys(shape: ModelShape) -> list[Key]:
    """Every parameter of a model of this architecture, in the order in which images meet them."""
    sizes = dimensions(shape)

    def place(rules: tuple[Rule, ...], native: str = "", diffusers: str = "") -> list[Key]:
        return [
            Key(native + r.native, diffusers + r.diffusers, tuple(sizes[s] for s in r.shape), r.swap_halves)
            for r in rules
        ]

    out = place(_STEM)
    for layer in range(shape.num_layers):
        rules = _BLOCK + (_MOE if shape.is_moe(layer) else _DENSE)
        out += place(rules, f"blocks.{layer}.", f"transformer_blocks.{layer}.")
    return out + place(_HEAD)


def count_parameters(shape: ModelShape) -> int:
    """Number of parameters, without building the model."""
    return sum(math.prod(key.shape) for key in keys(shape))


def check_expressible(shape: ModelShape) -> None:
    """Refuse an architecture that diffusers' class does not have.

    Raises:
        ConfigError: coupled routing.
    """
    if not shape.decoupled_routing:
        raise ConfigError(
            f"model.decoupled_routing: false cannot be expressed in diffusers, whose {CLASS_NAME} always routes by "
            "unmodulated tokens; keep the native checkpoint, or train with model.decoupled_routing: true"
        )


def to_diffusers_config(shape: ModelShape) -> dict[str, Any]:
    """diffusers' ``config.json`` of this architecture.

    ``use_grouped_mm`` is true as in the released config, unless its kernel cannot take the widths (rows must be
    multiples of 16 bytes: 8 bf16 values).

    Raises:
        ConfigError: see `check_expressible`.
    """
    check_expressible(shape)
    return {
        "_class_name": CLASS_NAME,
        "_diffusers_version": "0.38.0",  # the first release with this class
        "attention_head_dim": shape.attention_head_dim,
        "axes_dims_rope": list(shape.axes_dims_rope),
        "capacity_factors": [float(c) for c in shape.capacity_factors],
        "dense_moe_strategy": shape.dense_moe_strategy,
        "in_channels": shape.patch_channels,
        "joint_attention_dim": shape.text_dim,
        "mlp_ratio": shape.mlp_ratio,
        "moe_enabled": True,
        "moe_intermediate_dim": shape.moe_intermediate_dim,
        "num_attention_heads": shape.num_attention_heads,
        "num_experts": shape.num_experts,
        "num_key_value_heads": shape.num_key_value_heads,
        "num_layers": shape.num_layers,
        "out_channels": shape.latent_channels,
        "patch_size": shape.patch_size,
        "route_scale": shape.route_scale,
        "use_grouped_mm": shape.width % 8 == 0 and shape.moe_intermediate_dim % 8 == 0,
        "use_sigmoid": shape.use_sigmoid,
    }


# What diffusers assumes for a key that config.json leaves out. Only used to read such files, never for new models.
_UPSTREAM_DEFAULTS = {
    "patch_size": 2, "in_channels": 64, "out_channels": None, "num_layers": 24, "attention_head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": None, "joint_attention_dim": 3584,
    "axes_dims_rope": (16, 56, 56), "mlp_ratio": 4.0, "moe_enabled": True,
    "dense_moe_strategy": "leave_first_three_and_last_block_dense", "num_experts": 128,
    "moe_intermediate_dim": 1344, "capacity_factors": 8.0, "use_sigmoid": False, "route_scale": 2.5,
    "use_grouped_mm": False,
}  # fmt: skip


def from_diffusers_config(config: dict[str, Any], where: str) -> ModelShape:
    """Architecture of a diffusers ``config.json``; keys that are left out take diffusers' defaults.

    Args:
        where: path of the file, for messages.

    Raises:
        DataError: another class, an unknown key or strategy, or an architecture that we cannot build.
    """
    if config.get("_class_name") != CLASS_NAME:
        raise DataError(
            f"{where}: _class_name is {config.get('_class_name')!r}; only {CLASS_NAME} can be read"
        )
    values = {k: v for k, v in config.items() if not k.startswith("_")}
    for key in values:
        if key not in _UPSTREAM_DEFAULTS:
            raise DataError(
                f"{where}: unknown key '{key}'{nearest(key, _UPSTREAM_DEFAULTS)}; remove it or correct it"
            )
    c = {**_UPSTREAM_DEFAULTS, **values}
    strategy = c["dense_moe_strategy"] if c["moe_enabled"] else "all_dense"
    if strategy not in DENSE_STRATEGIES:
        guess = nearest(str(strategy), DENSE_STRATEGIES)
        raise DataError(
            f"{where}: dense_moe_strategy '{strategy}' is unknown{guess}; one of: {', '.join(DENSE_STRATEGIES)}"
        )
    try:
        return _build_shape(c, strategy, where)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: a value has the wrong type ({error}); correct the file") from error
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from error


def _build_shape(c: dict[str, Any], strategy: str, where: str) -> ModelShape:
    layers, patch = int(c["num_layers"]), int(c["patch_size"])
    latent_channels = int(c["out_channels"] or c["in_channels"])
    if latent_channels * patch * patch != int(c["in_channels"]):
        raise DataError(
            f"{where}: out_channels {c['out_channels']} x patch_size^2 {patch * patch} must equal "
            f"in_channels {c['in_channels']}: the model predicts what it reads"
        )
    factors = c["capacity_factors"]
    factors = list(factors) if isinstance(factors, (list, tuple)) else [factors] * layers
    if len(factors) < layers:
        raise DataError(f"{where}: capacity_factors has {len(factors)} values for {layers} layers")
    return ModelShape(
        num_layers=layers,
        num_attention_heads=int(c["num_attention_heads"]),
        attention_head_dim=int(c["attention_head_dim"]),
        num_key_value_heads=int(c["num_key_value_heads"] or c["num_attention_heads"]),
        text_dim=int(c["joint_attention_dim"]),
        latent_channels=latent_channels,
        patch_size=patch,
        axes_dims_rope=tuple(int(a) for a in c["axes_dims_rope"]),
        mlp_ratio=float(c["mlp_ratio"]),
        dense_moe_strategy=strategy,
        num_experts=int(c["num_experts"]),
        moe_intermediate_dim=int(c["moe_intermediate_dim"]),
        capacity_factors=tuple(float(f) for f in factors[:layers]),  # upstream ignores what follows
        use_sigmoid=bool(c["use_sigmoid"]),
        route_scale=float(c["route_scale"]),
    )


def to_native_state(diffusers_state: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """A diffusers state dict (or anything shaped like one, such as its gradients) under our names and layout."""
    return {k.native: _swap(diffusers_state[k.diffusers], k.swap_halves) for k in keys(shape)}


def to_diffusers_state(native_state: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Inverse of `to_native_state`; ConfigError as of `check_expressible`."""
    check_expressible(shape)
    return {k.diffusers: _swap(native_state[k.native], k.swap_halves) for k in keys(shape)}


def _swap(tensor: Tensor, swap_halves: bool) -> Tensor:
    return torch.cat(tensor.chunk(2, dim=0)[::-1]) if swap_halves else tensor
