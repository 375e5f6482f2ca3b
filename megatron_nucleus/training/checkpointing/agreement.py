"""Steps that succeed or fail on all ranks alike: a rank that fails alone would leave the others waiting for it."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_nucleus.core.collectives import on_first_rank
from megatron_nucleus.utils.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _Failure:
    error: Exception


class Ranks:
    """The ranks of a group, or one process alone. Every rank calls the same methods in the same order.

    Results and errors travel as pickles between hosts; keep them small.

    Args:
        group: gloo group; None for one process.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)

    def on_all(self, action: Callable[[], T]) -> list[T]:
        """Run ``action`` on every rank; the results by rank, on every rank. One all-gather.

        Raises:
            the `shared_error` of the ranks that failed, on every rank.
        """
        if self.group is None:
            return [action()]
        outcomes: list[Any] = [None] * self.world
        dist.all_gather_object(outcomes, _attempt(action), group=self.group)
        failures = {r: outcome.error for r, outcome in enumerate(outcomes) if isinstance(outcome, _Failure)}
        if failures:
            raise shared_error(failures, self.world)
        return outcomes

    def on_first(self, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0; its result or its error, on every rank. One broadcast."""
        if self.group is None:
            return action()
        outcome = on_first_rank(lambda: _attempt(action), self.group)
        if isinstance(outcome, _Failure):
            raise outcome.error
        return outcome


def shared_error(failures: Mapping[int, BaseException], world: int) -> BaseException:
    """The one error that every rank raises for the errors of some: that of the lowest rank, which it names.

    A `UserError` keeps its class; with several ranks any other error becomes a RuntimeError.
    """
    rank = min(failures)
    error = failures[rank]
    if world == 1:
        return error
    others = f", and {len(failures) - 1} more" if len(failures) > 1 else ""
    where = f"(rank {rank} of {world}{others})"
    if isinstance(error, UserError):
        return type(error)(f"{error} {where}")
    return RuntimeError(f"{type(error).__name__}: {error} {where}")


def portable(error: Exception) -> Exception:
    """``error`` as one that every rank can unpickle: anything but a `UserError` becomes its own traceback."""
    return error if isinstance(error, UserError) else RuntimeError("".join(traceback.format_exception(error)))


def _attempt(action: Callable[[], T]) -> T | _Failure:
    try:
        return action()
    except Exception as error:
        return _Failure(portable(error))
