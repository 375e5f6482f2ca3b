"""Which optimizer trains which parameter, how a tensor splits into matrices, and why: one readable table.

Muon orthogonalises *matrices*. A fused tensor (gate and up in one, 64 experts in one) is therefore cut into
the matrices that the forward pass multiplies with: the polar factor of a concatenation mixes unrelated maps.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megatron_nucleus.utils.errors import ConfigError, nearest

# How a parameter is seen as matrices: a view [..., rows, columns] whose leading axes count them.
SPLITS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda p: p.unsqueeze(0),  # (r, c)
    "gate|up rows": lambda p: p.unflatten(0, (2, -1)),  # (2F, D) -> (2, F, D)
    "per expert": lambda p: p,  # (E, F, D)
    # (E, D, 2F) -> (E, 2, D, F)
    "per expert, gate|up columns": lambda p: p.unflatten(2, (2, -1)).movedim(2, 1),
}
NO_SPLIT = "-"
ROUTER = "router"  # the group whose rows are also turned apart (`router_orthogonality.py`)


def matrices(split: str, shape: Sequence[int]) -> torch.Size:
    """Shape [..., rows, columns] of a parameter of ``shape`` seen as matrices; split: key of `SPLITS`."""
    return SPLITS[split](torch.empty(shape, device="meta")).shape


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of the table.

    group: name by which `OptimizerConfig.lr_factors` addresses the row.
    pattern: parameter names; ``N`` stands for a layer number, ``{a,b}`` for one of a, b.
    optimizer: ``muon`` or ``adamw``.
    split: key of `SPLITS`, or ``-`` where the optimizer works value by value.
    decay: whether decoupled weight decay applies.
    why: source or reason.
    """

    group: str
    pattern: str
    optimizer: str
    split: str
    decay: bool
    why: str


# "published": arXiv 2604.12163 and the team's blog name Muon for attention and expert FFN matrices, and AdamW
# for patch embedding, modulation, output head and router gates. "own": the sources are silent, we chose.
# Weight decay is unknown for every row: matrices decay, norms and biases do not (own).
_ATTENTION = "blocks.N.attention"
_EXPERTS = "blocks.N.moe.experts"
_SHARED = "blocks.N.moe.shared_expert"
_DENSE = "blocks.N.feed_forward"
TABLE: tuple[Rule, ...] = (
    Rule("attention", f"{_ATTENTION}.{{q,k,v,out,text_k,text_v}}.weight", "muon", "whole", True, "published"),
    Rule("experts", f"{_EXPERTS}.gate_up", "muon", "per expert, gate|up columns", True, "published"),
    Rule("experts", f"{_EXPERTS}.down", "muon", "per expert", True, "published"),
    Rule("shared_expert", f"{_SHARED}.gate_up.weight", "muon", "gate|up rows", True, "published: an expert"),
    Rule("shared_expert", f"{_SHARED}.down.weight", "muon", "whole", True, "published: an expert"),
    Rule("dense_ffn", f"{_DENSE}.gate_up.weight", "muon", "gate|up rows", True, "own: dense layers' expert"),
    Rule("dense_ffn", f"{_DENSE}.down.weight", "muon", "whole", True, "own: dense layers' expert"),
    Rule("text_in", "blocks.N.text_in.weight", "muon", "whole", True,
         "own: a hidden matrix before text_k and text_v, no embedding table"),
    Rule(ROUTER, "blocks.N.moe.router.weight", "adamw", NO_SPLIT, True, "published"),
    Rule("modulation", "blocks.N.modulation.weight", "adamw", NO_SPLIT, True, "published"),
    Rule("patch_embed", "image_in.weight", "adamw", NO_SPLIT, True, "published"),
    Rule("output_head", "{out_modulation,image_out}.weight", "adamw", NO_SPLIT, True, "published"),
    Rule("time_mlp", "time_embed.{linear_1,linear_2}.weight", "adamw", NO_SPLIT, True,
         "own: acts on one vector per image, close to an embedding"),
    Rule("norms", "{time_embed.norm,text_norm}.weight", "adamw", NO_SPLIT, False, "own: vectors"),
    Rule("norms", f"{_ATTENTION}.{{q_norm,k_norm,text_k_norm,text_q_norm}}.weight", "adamw", NO_SPLIT, False,
         "own: vectors"),
    Rule("biases", "{image_in,out_modulation,time_embed.linear_1,time_embed.linear_2}.bias", "adamw",
         NO_SPLIT, False, "own: vectors"),
    Rule("biases", "blocks.N.{modulation,text_in}.bias", "adamw", NO_SPLIT, False, "own: vectors"),
)  # fmt: skip

# Groups whose weights and averages the optimizer keeps in fp32 where parameters are bf16. They are 0.05 % of the
# published model's parameters. A norm's weight lies near 1, where bf16's neighbours are 0.004 to 0.008 apart; a bias or
# a router row moves all tokens at once; and the router's orthogonality adds 1e-7 at a time (all own choice).
FP32_GROUPS = (ROUTER, "norms", "biases")

GROUPS: tuple[str, ...] = tuple(dict.fromkeys(rule.group for rule in TABLE))


def _regex(pattern: str) -> re.Pattern[str]:
    text = re.escape(pattern).replace(r"\{", "(?:").replace(r"\}", ")").replace(",", "|")
    return re.compile(re.sub(r"(?<=\\\.)N(?=\\\.)", r"\\d+", text))


_COMPILED = tuple((_regex(rule.pattern), rule) for rule in TABLE)


def rule_of(name: str) -> Rule:
    """Return the one row that matches a parameter name.

    Raises:
        ConfigError: no row or more than one row matches; the message names the parameter.
    """
    rows = [rule for regex, rule in _COMPILED if regex.fullmatch(name)]
    if len(rows) != 1:
        what = "no row" if not rows else " and ".join(f"'{row.pattern}'" for row in rows)
        raise ConfigError(
            f"optimizer: parameter '{name}' matches {what} of core/optimizer/param_groups.py; "
            "every trainable parameter needs exactly one row there"
        )
    return rows[0]


def assign(model: nn.Module) -> list[tuple[str, nn.Parameter, Rule]]:
    """Return (name, parameter, row) of every trainable parameter, in the model's order.

    Parameters with ``requires_grad=False`` are left out.
    """
    return [(name, p, rule_of(name)) for name, p in model.named_parameters() if p.requires_grad]


def parse_lr_factors(items: tuple[str, ...]) -> dict[str, float]:
    """``("router=0.5", ...)`` -> ``{"router": 0.5}``; groups that are not named keep 1.

    Raises:
        ConfigError: not of the form group=factor, an unknown or repeated group, or a factor that is not >= 0.
    """
    factors: dict[str, float] = {}
    for item in items:
        group, equals, value = item.partition("=")
        if group not in GROUPS or not equals:
            raise ConfigError(
                f"--lr-factors {item}: expected GROUP=FACTOR{nearest(group, GROUPS)}; "
                f"groups: {', '.join(GROUPS)}"
            )
        if group in factors:
            raise ConfigError(f"--lr-factors {item}: group '{group}' is given twice")
        try:
            factor = float(value)
        except ValueError:
            factor = -1.0
        if not 0.0 <= factor < float("inf"):
            raise ConfigError(f"--lr-factors {item}: the factor must be a number >= 0, got '{value}'")
        factors[group] = factor
    return factors
