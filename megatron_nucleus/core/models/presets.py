"""Architectures by name. There are no default architecture numbers: pick a preset, then override by key."""

from __future__ import annotations

import dataclasses
import math

from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError, nearest

DENSE_STRATEGIES = (
    "leave_first_three_and_last_block_dense",
    "leave_first_three_blocks_dense",
    "leave_first_block_dense",
    "all_moe",
    "all_dense",
)


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Architecture of a `NucleusTransformer`; field names follow diffusers' config where it has the same thing."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    num_key_value_heads: int
    text_dim: int  # U, width of the text features (joint_attention_dim in diffusers)
    latent_channels: int  # channels of the codec; in_channels = latent_channels * patch_size**2
    patch_size: int
    axes_dims_rope: tuple[int, int, int]  # frame, height, width; sums to attention_head_dim
    mlp_ratio: float
    dense_moe_strategy: str
    num_experts: int
    moe_intermediate_dim: int  # F of an expert and of the shared expert
    capacity_factors: tuple[float, ...]  # one per layer; dense layers ignore theirs
    use_sigmoid: bool
    route_scale: float
    # The router judges tokens before modulation, as published. Checkpoints from before this field are of that kind.
    decoupled_routing: bool = True

    def __post_init__(self) -> None:
        self._check()

    @property
    def width(self) -> int:
        """D = heads x head width."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch_channels(self) -> int:
        """P, values per image token."""
        return self.latent_channels * self.patch_size**2

    @property
    def dense_hidden(self) -> int:
        """Hidden width of a dense FFN (diffusers rounds down to a multiple of 128)."""
        return int(self.width * self.mlp_ratio * 2 / 3) // 128 * 128

    def is_moe(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) routes to experts."""
        first, last = {
            "leave_first_three_and_last_block_dense": (3, self.num_layers - 1),
            "leave_first_three_blocks_dense": (3, self.num_layers),
            "leave_first_block_dense": (1, self.num_layers),
            "all_moe": (0, self.num_layers),
            "all_dense": (self.num_layers, self.num_layers),
        }[self.dense_moe_strategy]
        return first <= layer < last

    def _check_numbers(self) -> None:
        for name in (
            "num_layers",
            "num_attention_heads",
            "attention_head_dim",
            "num_key_value_heads",
            "text_dim",
            "latent_channels",
            "patch_size",
            "num_experts",
            "moe_intermediate_dim",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}: must be at least 1, got {getattr(self, name)}")
        # Also of dense layers, which ignore theirs: a description of the model (JSON) holds finite numbers alone.
        floats = {"mlp_ratio": (self.mlp_ratio,), "capacity_factors": self.capacity_factors,
                  "route_scale": (self.route_scale,)}  # fmt: skip
        for name, values in floats.items():
            if not all(map(math.isfinite, values)):
                raise ConfigError(f"model.{name}: must be finite, got {', '.join(map(str, values))}")

    def _check(self) -> None:
        self._check_numbers()
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"model.num_key_value_heads: {self.num_key_value_heads} does not divide "
                f"num_attention_heads = {self.num_attention_heads}"
            )
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(a % 2 for a in self.axes_dims_rope):
            raise ConfigError(
                f"model.axes_dims_rope: {list(self.axes_dims_rope)} must be even numbers that sum to "
                f"attention_head_dim = {self.attention_head_dim}"
            )
        if self.dense_moe_strategy not in DENSE_STRATEGIES:
            raise ConfigError(
                f"model.dense_moe_strategy: '{self.dense_moe_strategy}' is unknown"
                f"{nearest(self.dense_moe_strategy, DENSE_STRATEGIES)}; one of: {', '.join(DENSE_STRATEGIES)}"
            )
        if len(self.capacity_factors) != self.num_layers:
            raise ConfigError(
                f"model.capacity_factors: {len(self.capacity_factors)} values for {self.num_layers} layers; "
                "give one value for all layers or one per layer"
            )
        if self.dense_hidden < 128 and any(not self.is_moe(i) for i in range(self.num_layers)):
            raise ConfigError(
                f"model.mlp_ratio: a dense block of width {self.width} needs int(width*mlp_ratio*2/3) >= 128, "
                f"got {int(self.width * self.mlp_ratio * 2 / 3)}"
            )
        for layer, factor in enumerate(self.capacity_factors):
            if self.is_moe(layer) and not 0 < factor <= self.num_experts:
                raise ConfigError(
                    f"model.capacity_factors: layer {layer} has {factor}; an MoE layer needs a value in "
                    f"(0, num_experts = {self.num_experts}]"
                )


_PUBLISHED_CAPACITY = (0.0, 0.0, 0.0, 4.0, 4.0, *([2.0] * 27))

PRESETS: dict[str, ModelShape] = {
    # Released checkpoint's transformer/config.json (Nucleus-Image, arXiv 2604.12163).
    "nucleus_image_17b": ModelShape(
        num_layers=32, num_attention_heads=16, attention_head_dim=128, num_key_value_heads=4, text_dim=4096,
        latent_channels=16, patch_size=2, axes_dims_rope=(16, 56, 56), mlp_ratio=4.0,
        dense_moe_strategy="leave_first_three_blocks_dense", num_experts=64, moe_intermediate_dim=1344,
        capacity_factors=_PUBLISHED_CAPACITY, use_sigmoid=False, route_scale=2.5,
    ),
    # Ours: the embedded `scenes` task on two CPU cores (examples/demo_cpu.yaml).
    "demo": ModelShape(
        num_layers=4, num_attention_heads=4, attention_head_dim=32, num_key_value_heads=2, text_dim=256,
        latent_channels=16, patch_size=2, axes_dims_rope=(8, 12, 12), mlp_ratio=4.0,
        dense_moe_strategy="leave_first_block_dense", num_experts=8, moe_intermediate_dim=128,
        capacity_factors=(0.0, 1.0, 1.0, 1.0), use_sigmoid=False, route_scale=2.5,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture: a preset, with any number of it overridden."""

    preset: str = knob("demo", "named architecture to start from", choices=tuple(PRESETS))
    num_layers: int | None = knob(None, "transformer blocks; None = the preset's", unit="layers")
    num_attention_heads: int | None = knob(None, "query heads; None = the preset's", unit="heads")
    attention_head_dim: int | None = knob(None, "width of a head; None = the preset's", unit="channels")
    num_key_value_heads: int | None = knob(None, "key/value heads (GQA); None = the preset's", unit="heads")
    text_dim: int | None = knob(
        None, "width of the text features; None = the text encoder's", unit="channels"
    )
    latent_channels: int | None = knob(None, "codec channels; None = the preset's", unit="channels")
    patch_size: int | None = knob(None, "latent pixels per token side; None = the preset's", unit="latents")
    axes_dims_rope: tuple[int, ...] | None = knob(
        None, "rotary widths of frame, height, width; None = the preset's"
    )
    mlp_ratio: float | None = knob(None, "dense FFN width ratio; None = the preset's")
    dense_moe_strategy: str | None = knob(None, f"which layers are dense: {', '.join(DENSE_STRATEGIES)}")
    num_experts: int | None = knob(None, "routed experts per MoE layer; None = the preset's", unit="experts")
    moe_intermediate_dim: int | None = knob(
        None, "hidden width of an expert; None = the preset's", unit="channels"
    )
    capacity_factors: tuple[float, ...] | None = knob(
        None, "rows per expert = factor*S/E; one value, or one per layer"
    )
    use_sigmoid: bool | None = knob(None, "sigmoid router scores instead of softmax")
    route_scale: float | None = knob(None, "scale of the renormalised routing weights; None = the preset's")
    decoupled_routing: bool | None = knob(
        None, "router judges unmodulated tokens (published); false = modulated ones, for comparisons"
    )


def resolve_shape(config: ModelConfig) -> ModelShape:
    """Apply the overrides of ``config`` to its preset.

    One capacity factor stands for all MoE layers; a changed ``num_layers`` needs a single factor or one per layer.

    Raises:
        ConfigError: unknown preset or an architecture that cannot be built, naming the key.
    """
    if config.preset not in PRESETS:
        raise ConfigError(f"model.preset: '{config.preset}' is unknown{nearest(config.preset, PRESETS)}")
    base = PRESETS[config.preset]
    overrides = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.name != "preset" and getattr(config, f.name) is not None
    }
    layers = overrides.get("num_layers", base.num_layers)
    factors = overrides.get("capacity_factors", base.capacity_factors)
    if len(factors) == 1:
        factors = tuple(factors) * layers
    overrides["capacity_factors"] = tuple(factors)
    if "axes_dims_rope" in overrides:
        if len(overrides["axes_dims_rope"]) != 3:
            raise ConfigError("model.axes_dims_rope: expected 3 widths (frame, height, width)")
        overrides["axes_dims_rope"] = tuple(overrides["axes_dims_rope"])
    return dataclasses.replace(base, **overrides)
