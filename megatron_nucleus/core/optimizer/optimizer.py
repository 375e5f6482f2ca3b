"""One optimizer object over the whole model: Muon for matrices, AdamW for the rest (`param_groups.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_nucleus.core.optimizer import param_groups, shards
from megatron_nucleus.core.optimizer.adamw import ADAMW_BACKENDS, AdamW, AdamWParam
from megatron_nucleus.core.optimizer.clip import ClipOps, resolve_clip
from megatron_nucleus.core.optimizer.muon import Muon, MuonParam, arithmetic
from megatron_nucleus.core.optimizer.param_groups import FP32_GROUPS, NO_SPLIT, ROUTER, Rule, matrices
from megatron_nucleus.core.optimizer.rounding import Rounding
from megatron_nucleus.core.optimizer.router_orthogonality import RouterOrthogonality
from megatron_nucleus.ops import registry
from megatron_nucleus.ops.orthogonalize import orthogonalize
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError

STORED_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer: published are Muon + AdamW, lr 1e-4 and momentum 0.95; the other defaults are our choice."""

    optimizer: str = knob(
        "muon",
        "muon = Muon for matrices, AdamW for the rest; adamw = AdamW for all",
        choices=("muon", "adamw"),
    )
    lr: float = knob(1e-4, "learning rate after warm-up, for both optimizers (published)")
    # The published recipe has per-group factors, but their values are unknown: 1 for every group.
    lr_factors: tuple[str, ...] = knob((), f"GROUP=FACTOR of lr; groups: {', '.join(param_groups.GROUPS)}")
    muon_momentum: float = knob(0.95, "decay of Muon's gradient average (published)")
    muon_use_nesterov: bool = knob(True, "Nesterov look-ahead in Muon (own choice: Keller Jordan's Muon)")
    muon_num_ns_steps: int = knob(
        5,
        "Newton-Schulz steps; 5 = Keller Jordan's Muon (own choice), 4 and 3 = cheaper, with minimax coefficients",
        unit="steps",
    )
    # Moonlight, arXiv 2502.16982: 0.2*sqrt(max(fan_in, fan_out)) gives Muon's updates the RMS of AdamW's.
    muon_extra_scale_factor: float = knob(0.2, "RMS of a Muon update before lr; 0.2 lets AdamW share the lr")
    muon_dtype: str = knob(
        "auto",
        "Newton-Schulz arithmetic; auto = bf16 on CUDA, fp32 elsewhere",
        choices=("auto", "bf16", "fp32"),
    )
    orthogonalize_backend: str = knob(
        "auto", "Newton-Schulz of Muon: a name that tools/doctor.py lists, or auto"
    )
    master_weights: str = knob(
        "fp32",
        "dtype of weights and gradients; bf16 halves them, rounds updates stochastically and needs --bf16",
        choices=tuple(STORED_DTYPES),
    )
    state_dtype: str = knob(
        "fp32",
        "dtype of Muon's momentum and AdamW's averages; bf16 halves them, rounded stochastically",
        choices=tuple(STORED_DTYPES),
    )
    grad_norm_backend: str = knob(
        "auto", "gradient norm and clipping: a name that tools/doctor.py lists, or auto"
    )
    adamw_backend: str = knob("torch", "fused kernel of AdamW", choices=("torch", *ADAMW_BACKENDS))
    # Betas, eps, weight decay and clipping are unknown: Moonlight's betas and decay, Megatron's clipping.
    adam_beta1: float = knob(0.9, "decay of AdamW's gradient average (own choice)")
    adam_beta2: float = knob(0.95, "decay of AdamW's squared-gradient average (own choice)")
    adam_eps: float = knob(1e-8, "added to the root of AdamW's squared-gradient average (own choice)")
    weight_decay: float = knob(0.1, "decoupled decay of matrices; norms and biases have none (own choice)")
    clip_grad: float = knob(1.0, "largest global gradient norm, 0 = no clipping (own choice)")
    router_orthogonality: float = knob(
        1e-7, "turns router rows apart, decoupled from the loss; 0 = off (published; formula our own choice)"
    )

    def __post_init__(self) -> None:
        for name in (
            "lr",
            "muon_extra_scale_factor",
            "adam_eps",
            "weight_decay",
            "clip_grad",
            "router_orthogonality",
        ):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"optimizer.{name}: must be a number >= 0, got {getattr(self, name)}")
        for name in ("muon_momentum", "adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"optimizer.{name}: must be in [0, 1), got {getattr(self, name)}")
        if not 3 <= self.muon_num_ns_steps <= 20:
            raise ConfigError(f"optimizer.muon_num_ns_steps: must be in 3..20, got {self.muon_num_ns_steps}")
        param_groups.parse_lr_factors(self.lr_factors)


class Optimizer:
    """Muon and AdamW side by side. State is created at once, so a checkpoint can fill it in place.

    Use `build_optimizer`.
    """

    def __init__(
        self,
        muon: Muon,
        adamw: AdamW,
        orthogonality: RouterOrthogonality | None,
        rules: dict[str, Rule],
        params: dict[str, nn.Parameter],
        rounding: Rounding,
        clip_ops: ClipOps,
    ):
        self.muon, self.adamw, self.orthogonality = muon, adamw, orthogonality
        self.rules = rules
        self.params = params
        self.rounding = rounding
        self.clip_ops = clip_ops

    def step(self, lr: float) -> None:
        """Apply one update. lr: learning rate of this step, before the groups' factors.

        Raises:
            ConfigError: a trainable parameter has no gradient (unused by the loss, or backward has not run).
        """
        missing = [name for name, p in self.params.items() if p.grad is None]
        if missing:
            raise ConfigError(
                f"optimizer: parameter '{missing[0]}' has no gradient ({len(missing)} in all); freeze it "
                "with requires_grad_(False) before the optimizer is built, or use it in the loss"
            )
        self.rounding.updates = self.adamw.steps
        self.adamw.follow()
        if self.orthogonality is not None:
            self.orthogonality.start()  # the rows travel while Muon works
        self.muon.start(lr)
        if self.orthogonality is not None:
            # Before AdamW: at the weights that the gradients are of, as AdamW's own decay, and that were sent.
            self.orthogonality.finish(lr)
        self.adamw.step(lr)  # while Muon's results travel
        self.muon.finish(lr)

    def zero_grad(self) -> None:
        """Drop all gradients (set to None: the next backward writes instead of adding)."""
        for p in self.params.values():
            p.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """All state tensors by stable name (``muon.momentum.<param>``, ``adamw.exp_avg.<param>``, ...).

        The tensors are the live state: copying into them restores it. State of a sharded parameter is a DTensor
        sharded alike, of the parameter's global shape. Values that are not tensors: `scalars`.
        """
        return self.muon.tensors() | self.adamw.tensors()

    def scalars(self) -> dict[str, int]:
        """State that is not a tensor: ``updates``, how often `step` was applied."""
        return {"updates": self.adamw.steps}

    def load_scalars(self, scalars: dict[str, int]) -> None:
        """Inverse of `scalars`."""
        self.adamw.steps = int(scalars["updates"])

    def summary(self) -> list[dict]:
        """One row per group: {group, optimizer, tensors, matrices, parameters}, in the table's order."""
        rows: dict[tuple[str, str], dict] = {}
        muon_names = {p.name for p in self.muon.params}
        for group in param_groups.GROUPS:
            for name, rule in self.rules.items():
                if rule.group != group:
                    continue
                kind = "muon" if name in muon_names else "adamw"
                empty = {"group": group, "optimizer": kind, "tensors": 0, "matrices": 0, "parameters": 0}
                row = rows.setdefault((group, kind), empty)
                row["tensors"] += 1
                row["parameters"] += self.params[name].numel()
                if kind == "muon":
                    row["matrices"] += matrices(rule.split, self.params[name].shape)[:-2].numel()
        return list(rows.values())


def build_optimizer(model: nn.Module, config: OptimizerConfig, seed: int = 0) -> Optimizer:
    """Assign every trainable parameter to its row of the table and create the state.

    Sharded parameters (DTensor) must be sharded before. Every rank of their mesh then builds the optimizer and
    takes each step together with the others.

    Parameters are fp32 (fp64 in tests), or, with ``master_weights: bf16``, all of them bf16: FSDP takes one dtype only
    for what it gathers at once. Rounding to nearest would lose an update of relative size lr in a bf16 weight, so
    weights are rounded stochastically. Of the few values of `FP32_GROUPS` the optimizer keeps fp32 copies.

    Args:
        seed: of the stochastic rounding.

    Raises:
        ConfigError: a parameter that no row knows, one of another dtype or place than the configuration needs, or a
            matrix that is cut into something else than blocks of rows.
    """
    factors = param_groups.parse_lr_factors(config.lr_factors)
    narrow = config.master_weights == "bf16"
    muon, adamw, rules, params = [], [], {}, {}
    for name, param, rule in param_groups.assign(model):
        _check_stored(name, param, config)
        rules[name], params[name] = rule, param
        factor = factors.get(rule.group, 1.0)
        decay = config.weight_decay if rule.decay else 0.0
        if config.optimizer == "muon" and rule.split != NO_SPLIT:
            muon.append(MuonParam(name, param, rule.split, factor, decay))
        else:
            adamw.append(AdamWParam(name, param, factor, decay, narrow and rule.group in FP32_GROUPS))
    dtype = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}[config.muon_dtype]
    state_dtype = torch.bfloat16 if config.state_dtype == "bf16" else None
    rounding = _resolve_rounding(config, params, seed)
    averages = AdamW(
        adamw,
        beta1=config.adam_beta1,
        beta2=config.adam_beta2,
        eps=config.adam_eps,
        backend=config.adamw_backend,
        state_dtype=state_dtype,
        rounding=rounding,
    )
    momentum = Muon(
        muon,
        momentum=config.muon_momentum,
        nesterov=config.muon_use_nesterov,
        steps=config.muon_num_ns_steps,
        scale=config.muon_extra_scale_factor,
        dtype=dtype,
        state_dtype=state_dtype,
        orthogonalize=_resolve_orthogonalize(config, muon, dtype),
        rounding=rounding,
    )
    routers = {
        name: averages.masters.get(name, params[name]) for name, r in rules.items() if r.group == ROUTER
    }
    orthogonality = _build_orthogonality(config, factors.get(ROUTER, 1.0), routers)
    clip_ops = resolve_clip(config.grad_norm_backend, params.values())
    return Optimizer(momentum, averages, orthogonality, rules, params, rounding, clip_ops)


def _check_stored(name: str, param: nn.Parameter, config: OptimizerConfig) -> None:
    """Whether a parameter can be trained as ``master_weights`` and ``state_dtype`` say; else ConfigError."""
    narrow = config.master_weights == "bf16"
    if narrow and param.dtype != torch.bfloat16:
        raise ConfigError(
            f"optimizer.master_weights bf16: parameter '{name}' is {param.dtype}, not torch.bfloat16; convert the "
            "model first, or choose fp32"
        )
    if not narrow and param.dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"optimizer: parameter '{name}' is {param.dtype}; keep parameters in float32 and compute in lower "
            "precision through autocast, or, for bfloat16, choose --master-weights bf16"
        )
    if not narrow and config.state_dtype == "fp32":
        return
    what = "master_weights" if narrow else "state_dtype"
    if param.dtype == torch.float64:
        raise ConfigError(
            f"optimizer.{what} bf16: parameter '{name}' is torch.float64; convert it, or choose fp32"
        )
    if param.is_meta:
        raise ConfigError(
            f"optimizer.{what} bf16: parameter '{name}' is on the meta device; materialise it first"
        )
    if not shards.in_blocks_of_rows(param):
        raise ConfigError(
            f"optimizer.{what} bf16: parameter '{name}' is not stored row by row, or cut along another axis than the "
            "first; choose fp32"
        )


def _resolve_rounding(config: OptimizerConfig, params: dict[str, nn.Parameter], seed: int) -> Rounding:
    """With the best backend for where the parameters are, if anything is to be rounded."""
    if not params or "bf16" not in (config.master_weights, config.state_dtype):
        return Rounding(seed)
    device_type = next(iter(params.values())).device.type
    return Rounding(seed, registry.resolve("stochastic_round", device_type=device_type, dtype=torch.float32))


def _resolve_orthogonalize(
    config: OptimizerConfig, params: list[MuonParam], dtype: torch.dtype | None
) -> Callable[[Tensor, int, bool], Tensor]:
    """The backend for where the parameters are; without any nothing is resolved and none is called."""
    if not params:
        return orthogonalize
    first = params[0].param
    return registry.resolve(
        "orthogonalize",
        config.orthogonalize_backend,
        device_type=first.device.type,
        dtype=arithmetic(dtype, first),
    )


def _build_orthogonality(
    config: OptimizerConfig, lr_factor: float, routers: dict[str, Tensor]
) -> RouterOrthogonality | None:
    """None where nothing is to be done: no coefficient, no routers, or routers whose learning rate is 0."""
    coefficient = config.router_orthogonality * lr_factor
    if not (routers and coefficient and config.lr):
        return None
    return RouterOrthogonality(routers, coefficient, config.lr)
