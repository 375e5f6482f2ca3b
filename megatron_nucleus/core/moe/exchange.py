"""Libraries that carry tokens to their experts and back: which there are, whether one can serve, and its self-test.

An exchange belongs to one group of ranks and serves all layers of a model. It knows nothing of autograd
(`core/moe/exchange_dispatcher.py` does). Its backend is imported here by name, when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nucleus.ops.registry import missing
from megatron_nucleus.utils.errors import ConfigError


class Exchange(Protocol):
    """T tokens of this rank, E experts in all and e here, n rows of each expert: N = e*n rows, expert by expert.

    Every rank of the group makes the same calls with the same sizes. The order of an expert's rows is the
    library's; ``trip`` holds it for the way back.
    """

    def dispatch(
        self, x_TD: Tensor, taken_TE: Tensor, weight_TE: Tensor, rows: int
    ) -> tuple[Tensor, Tensor, Any]:
        """Tokens and weights to their experts.

        Args:
            x_TD: what travels. taken_TE: bool, whether the expert picked the token; over all ranks each expert picks
                ``rows``. weight_TE: fp32, 0 where it did not.

        Returns:
            (rows [N, D], weight of each row [N], trip)
        """
        ...

    def dispatch_again(self, x_TD: Tensor, trip: Any) -> Tensor:
        """Other values on the same trip: rows [N, D] in the same order. The gradient of `combine`."""
        ...

    def combine(
        self, rows_ND: Tensor, trip: Any, scale_N: Tensor | None = None, weight_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Back to the tokens, where the rows of a token add up. The gradient of `dispatch`.

        Args:
            rows_ND: any floating dtype. scale_N: factor of each row. weight_N: a number per row that goes back to its
                own place, not added up.

        Returns:
            (x [T, D] in the dtype that was dispatched, weight_TE or None), zeros where no row went
        """
        ...


class _Backend(NamedTuple):
    """module: of the optional library. exchange: class in it. unfit: function (ranks, experts, width) -> reason."""

    module: str
    exchange: str
    unfit: str


_DEEPEP = "megatron_nucleus.backends.deepep"
BACKENDS = {
    "deepep": _Backend(_DEEPEP, "RoundsExchange", "why_deepep_unavailable"),
    "hybridep": _Backend(_DEEPEP, "RoutingMapExchange", "why_hybridep_unavailable"),
}


def why_unavailable(name: str, device_type: str) -> str | None:
    """Why the exchange ``name`` cannot run here, whatever the model, in one line; None when it may."""
    try:
        module = _module(name)
    except Exception as error:  # DeepEP raises AssertionError at import
        return missing(error)
    return module.why_unavailable(device_type)


def open_exchange(
    name: str,
    group: dist.ProcessGroup,
    control: dist.ProcessGroup,
    *,
    experts: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Exchange:
    """Build an exchange and prove it on known rows. Every rank calls this; all raise if one cannot go on.

    Args:
        name: of `BACKENDS`. group: ranks that share the experts. control: gloo group of all ranks.
        experts: E. width: D. device, dtype: of the tokens; the libraries carry bfloat16 alone.

    Raises:
        ConfigError: with the reason, the ranks it was found on, and the alternative.
    """
    _agree(name, control, lambda: _why_not(name, group.size(), experts, width, device, dtype))
    made: list[Exchange] = []

    def build() -> None:
        made.append(getattr(_module(name), BACKENDS[name].exchange)(group, experts, width))

    _agree(name, control, build)
    _agree(name, control, lambda: self_test(made[0], group, experts, width, device, dtype))
    return made[0]


def self_test(
    exchange: Exchange,
    group: dist.ProcessGroup,
    experts: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    """Send known rows there and back; what came out wrong, in one line, or None.

    Values are exact in bfloat16: tokens of -1, 0 and 1, of which up to E = 256 add up. Every rank knows what every
    other sends. A weight is the number of its (rank, token, expert), so that it names the row beside it.
    """
    ranks, rank, local = group.size(), group.rank(), experts // group.size()
    known = [_known(other, experts, width) for other in range(ranks)]
    x_TD, taken_TE, weight_TE = (t.to(device) for t in known[rank])
    x_TD = x_TD.to(dtype)
    rows = ranks * _PICKS
    # All calls before any verdict: a rank that stopped halfway would leave the others waiting.
    rows_ND, weight_N, trip = exchange.dispatch(x_TD, taken_TE, weight_TE, rows)
    back_TD, back_TE = exchange.combine(rows_ND, trip, torch.ones_like(weight_N), weight_N)
    again_ND = exchange.dispatch_again(-x_TD, trip)

    all_x, all_weights = (torch.stack([one[i] for one in known]) for i in (0, 2))
    mine = all_weights[:, :, rank * local : (rank + 1) * local]  # [ranks, T, e]
    sent_eN = mine.permute(2, 0, 1).flatten(1).sort(dim=1, descending=True).values[:, :rows]
    came_eN = weight_N.to("cpu", torch.float32).view(local, rows)
    if not torch.equal(came_eN.sort(dim=1, descending=True).values, sent_eN):
        return "fails its self-test: weights do not arrive as they were sent"
    token_N = (came_eN.flatten().long() - 1) // experts
    if not torch.equal(rows_ND.float().cpu(), all_x.flatten(0, 1)[token_N]):
        return "fails its self-test: rows do not arrive as they were sent"
    if not torch.equal(back_TD.float(), x_TD.float() * taken_TE.sum(1, keepdim=True)):
        return "fails its self-test: rows do not come back to their tokens"
    if back_TE is None or not torch.equal(back_TE.float(), weight_TE):
        return "fails its self-test: weights do not come back to their tokens"
    if not torch.equal(again_ND, -rows_ND):
        return "fails its self-test: a second dispatch differs from the first"
    return None


_PICKS = 2  # tokens that each expert takes of each rank in the self-test: one that all take and another


def _known(rank: int, experts: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x_TD, taken_TE, weight_TE) of the self-test: token 0 is taken by every expert, the last by none."""
    generator = torch.Generator().manual_seed(rank)
    tokens = 2 + experts
    x_TD = torch.randint(-1, 2, (tokens, width), generator=generator).float()
    taken_TE = torch.zeros(tokens, experts, dtype=torch.bool)
    taken_TE[0] = True
    other_E = torch.randint(1, tokens - 1, (experts,), generator=generator)
    taken_TE[other_E, torch.arange(experts)] = True
    number_TE = torch.arange(tokens * experts).view(tokens, experts) + rank * tokens * experts + 1
    return x_TD, taken_TE, (number_TE * taken_TE).float()


def _why_not(
    name: str, ranks: int, experts: int, width: int, device: torch.device, dtype: torch.dtype
) -> str | None:
    reason = why_unavailable(name, device.type)
    if reason is not None:
        return reason
    if dtype != torch.bfloat16:
        return f"carries bfloat16 alone, the tokens are {str(dtype).removeprefix('torch.')} (--bf16)"
    return getattr(_module(name), BACKENDS[name].unfit)(ranks, experts, width)


def _agree(name: str, control: dist.ProcessGroup, step: Callable[[], str | None]) -> None:
    """Run a step that returns a reason or raises; every rank hears of every one that could not."""
    try:
        reason = step()
    except Exception as error:  # the library's own: it must not leave the other ranks waiting
        reason = f"fails at start-up ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    reasons: list[str | None] = [None] * control.size()
    dist.all_gather_object(reasons, reason, group=control)
    found = {
        reason: [r for r, other in enumerate(reasons) if other == reason] for reason in reasons if reason
    }
    if found:
        text = "; ".join(f"{reason} ({_ranks(ranks)})" for reason, ranks in found.items())
        raise ConfigError(
            f"--moe-token-dispatcher-type {name}: {text}. Usable everywhere: alltoall; "
            "tools/doctor.py tells what this machine has"
        )


def _ranks(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks[:4]))}{more}"


def _module(name: str) -> ModuleType:
    return importlib.import_module(BACKENDS[name].module)
