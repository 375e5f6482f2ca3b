"""Where the work of curation runs: in this process, in a pool of processes, or on a Ray cluster.

An engine maps a module-level function over picklable tasks. Only descriptors and counts travel, never pixels, and the
results do not depend on the engine. A worker that dies gives `WorkerDied` for the task it had; deciding what then
happens is the runner's.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class WorkerDied:
    """Instead of a result: the process that ran the task ended without one. detail: what is known about it."""

    detail: str


class Engine(Protocol):
    """Runs functions over tasks."""

    def map(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], gpus: float = 0.0
    ) -> Iterator[tuple[Any, Any]]:
        """Yield (task, result or `WorkerDied`) as they finish, in any order. gpus: that one worker needs."""
        ...

    def alone(self, function: Callable[[Any], Any], task: Any, gpus: float = 0.0) -> Any:
        """Result or `WorkerDied` of one task in a worker that has no other; not while a `map` is being read."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Where the work runs; changes nothing in the result."""

    engine: str = knob(
        "local",
        "local: processes on this machine; ray: a Ray cluster, or Ray on this one",
        choices=("local", "ray"),
    )
    workers: int = knob(
        0,
        "processes; 0: one per core this process may use, 1: no pool; on a Ray cluster 0: all its CPUs",
        unit="processes",
    )
    ray_address: str = knob(
        "auto", "auto: the cluster that this machine belongs to, or else a new one on it; or HOST:PORT"
    )

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"--workers {self.workers}: 0 or more")

    def worker_count(self) -> int:
        """Processes to use on this machine."""
        return self.workers or len(os.sched_getaffinity(0))


def open_engine(config: EngineConfig) -> Engine:
    """The engine that a configuration names.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers at the address.
    """
    if config.engine == "ray":
        from megatron_nucleus.data.curation.engines.ray import RayEngine

        return RayEngine(config)
    from megatron_nucleus.data.curation.engines.local import LocalEngine

    return LocalEngine(config.worker_count(), pool=config.workers != 1)
