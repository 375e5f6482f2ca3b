"""Ray: the same work on a cluster of machines that share the input and the output folder.

``ray start --head`` on one machine and ``ray start --address=HEAD:6379`` on the others, then the same command with
``--engine ray`` on any of them; without a cluster one is started on this machine and ended afterwards. Every worker is
an actor with one task at a time, so a process that dies is known by its task. The package must be installed on every
machine, and input, output and the folder where the program is started must have the same path there. Newer versions of
Ray ask for a token (``RAY_AUTH_MODE=token``): give both sides the same, or start the cluster without.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_nucleus.data.curation.engines import EngineConfig, WorkerDied
from megatron_nucleus.utils.errors import ConfigError

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported; nothing is sent unasked
try:
    import ray
    from ray.exceptions import RayActorError, RayError, RayTaskError
except ImportError as error:
    raise ConfigError(
        "--engine ray: Ray is not installed; pip install 'megatron-nucleus[ray]', or use --engine local"
    ) from error


_PROBE_S = 5.0


class RayEngine:
    """`engines.Engine` over Ray actors, which start with the first `map` and stay until `close`."""

    def __init__(self, config: EngineConfig):
        """Join the cluster that ``config`` names, or start one on this machine.

        Raises:
            ConfigError: no cluster at the address.
        """
        _join(config)
        self.workers = config.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._actors: list[Any] = []
        self._gpus = 0.0

    def map(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], gpus: float = 0.0
    ) -> Iterator[tuple[Any, Any]]:
        """See `engines.Engine`; one task per actor is in flight."""
        waiting = iter(tasks)
        running: dict[Any, tuple[Any, Any]] = {}  # reference -> (task, actor)
        idle = list(self._open(min(self._count(gpus), len(tasks)), gpus))
        while True:
            while idle and (task := next(waiting, None)) is not None:
                actor = idle.pop()
                running[actor.run.remote(function, task)] = (task, actor)
            if not running:
                return
            (done,), _ = ray.wait(list(running), num_returns=1)
            task, actor = running.pop(done)
            result = _result(done)
            if isinstance(result, WorkerDied):
                self._actors.remove(actor)
                actor = _new_actor(gpus)
                self._actors.append(actor)
            idle.append(actor)
            yield task, result

    def alone(self, function: Callable[[Any], Any], task: Any, gpus: float = 0.0) -> Any:
        """See `engines.Engine`; in an actor of its own, once all others have gone and left their place to it."""
        self._end_actors()
        actor = _new_actor(gpus)
        try:
            return _result(actor.run.remote(function, task))
        finally:
            ray.kill(actor)

    def close(self) -> None:
        """End the actors, and leave the cluster; one that was started here ends."""
        if ray.is_initialized():
            self._end_actors()
            ray.shutdown()

    def _count(self, gpus: float) -> int:
        if not gpus:
            return self.workers
        have = ray.cluster_resources().get("GPU", 0.0)
        if have < gpus:
            raise ConfigError(
                f"--engine ray: a stage needs {gpus:g} GPUs per worker, the cluster has {have:g}"
            )
        return int(have / gpus)

    def _open(self, workers: int, gpus: float) -> list[Any]:
        if self._gpus != gpus:
            self._end_actors()
        self._gpus = gpus
        while len(self._actors) < workers:
            self._actors.append(_new_actor(gpus))
        return self._actors

    def _end_actors(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


def _join(config: EngineConfig) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if config.ray_address != "auto":
        try:
            _probe(config.ray_address)
            ray.init(address=config.ray_address, **quiet)
        except (OSError, RayError, ValueError, RuntimeError) as error:
            raise _no_answer(config.ray_address, error) from error
        return
    try:
        ray.init(address="auto", **quiet)
    except (ConnectionError, RayError, ValueError, RuntimeError) as error:
        if "Could not find any running Ray instance" not in str(error):
            raise _no_answer("auto", error) from error
        ray.init(address="local", num_cpus=config.worker_count(), include_dashboard=False, **quiet)


def _probe(address: str) -> None:
    """Fail at once where nothing listens; Ray itself tries for minutes. Addresses with a scheme are left to Ray."""
    host, separator, port = address.rpartition(":")
    if "://" not in address:
        if not separator or not port.isdigit():
            raise ValueError("not HOST:PORT")
        socket.create_connection((host, int(port)), timeout=_PROBE_S).close()


def _no_answer(address: str, error: Exception) -> ConfigError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ConfigError(
        f"--ray-address {address}: no Ray cluster answers ({reason}); is it running, and have both sides the same "
        "RAY_AUTH_MODE and token?"
    )


class _Worker:
    """One process of the cluster. Ray itself gives it one OpenMP thread per CPU it has asked for.

    folder: where the program was started; paths in settings may be relative to it.
    """

    def __init__(self, folder: str):
        os.chdir(folder)

    def run(self, function: Callable[[Any], Any], task: Any) -> Any:
        """Call the function on the task."""
        return function(task)


def _new_actor(gpus: float) -> Any:
    return ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(_Worker).remote(os.getcwd())


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayActorError as error:
        return WorkerDied(" ".join(str(error).split())[:200])
    except RayTaskError as error:
        raise error.cause from None
