"""The board in the store on which every rank writes its signs of life, and the one finding that ends a run."""

from __future__ import annotations

import datetime
import math
import threading
import time
from collections.abc import Callable, Iterable

import torch.distributed as dist

from megatron_nucleus.training.watchdog.roll_call import DONE, Beat, Finding, Sighting

# Only so many ranks read everybody's beats: the store's load then grows with the ranks, not with their square.
_OBSERVERS = 32


class BulletinBoard:
    """A thread that writes this rank's beat each heartbeat and reads what others wrote.

    Its attributes are there to be read by other threads. The store's answers may fail to come for ever (its host is
    frozen); then only this thread stands.

    Attributes:
        seen: last beat of the ranks that were read. full_looks: how often all of them were.
        finding: what the run ends for, the first that any rank posted; None while there is nothing.
        answers: exchanges with the store that succeeded. error: what the last one failed with, None if it did not.
        observer: whether this rank reads everybody's beats. late: set by the user of the board: others read them, too.
        closed: the rank that hosts the store has finished the run and taken the store along.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world: int,
        make_beat: Callable[[int], Beat],
        *,
        store_rank: int | None,
        heartbeat_s: float,
        timeout_s: float,
    ):
        # Clients serialise their requests, and the caller's may be waiting in one: so this takes clients of its own.
        self._spare = store.clone()
        self._spare.set_timeout(datetime.timedelta(seconds=timeout_s))
        self._store = self._spare.clone()
        self._rank, self._world, self._store_rank = rank, world, store_rank
        self._make_beat, self._heartbeat_s = make_beat, heartbeat_s
        self._stride = math.ceil(world / _OBSERVERS)
        self.observer = rank % self._stride == 0 or rank == store_rank
        self.late = False
        self.seen: dict[int, Sighting] = {}
        self.full_looks = 0
        self.finding: Finding | None = None
        self.answers = 0
        self.error: str | None = None
        self.closed = False
        self._looked_at: dict[int, float] = {}
        self._written: str | None = None
        self._to_post: Finding | None = None
        self._stop, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog-board", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread, unless it stands in the store."""
        self._stop.set()
        self._wake.set()
        self._thread.join(self._heartbeat_s)

    def post(self, finding: Finding) -> None:
        """Write ``finding`` unless some rank has written one; `finding` tells which one holds."""
        self._to_post = self._to_post or finding
        self._wake.set()

    def has_written(self, state: str) -> bool:
        """Whether a beat with this state is in the store; asks for one at once if not."""
        if self._written != state:
            self._wake.set()
        return self._written == state

    def all_others_left(self) -> bool:
        """Whether every other rank has written that it ends."""
        others = (self.seen.get(rank) for rank in range(self._world) if rank != self._rank)
        return all(sighting is not None and sighting.beat.has_left for sighting in others)

    def _run(self) -> None:
        tick = 0
        while not self._stop.is_set():
            try:
                self._exchange(tick)
                self.answers += 1
                self.error = None
            except RuntimeError as error:
                host = self.seen.get(self._store_rank)
                if host is not None and host.beat.state == DONE:
                    self.closed = True
                    return
                self.error = " ".join(str(error).split())[:200]
                self._reconnect()
            tick += 1
            self._wake.wait(self._heartbeat_s)
            self._wake.clear()

    def _reconnect(self) -> None:
        """A client whose connection broke stays broken."""
        try:
            self._store = self._spare.clone()
        except RuntimeError as error:
            self.error = " ".join(str(error).split())[:200]

    def _exchange(self, tick: int) -> None:
        beat = self._make_beat(tick)
        self._store.set(f"beat/{self._rank}", beat.to_text())
        self._written = beat.state
        if self.finding is None:
            if self._to_post is not None:
                self._store.compare_set("finding", "", self._to_post.to_text())
            if self._store.check(["finding"]):
                self.finding = Finding.from_text(self._store.get("finding"))
        if self.observer or (self.late and tick % self._stride == self._rank % self._stride):
            self._look(range(self._world))
            self.full_looks += 1
        elif self._store_rank is not None:
            self._look([self._store_rank])

    def _look(self, ranks: Iterable[int]) -> None:
        now = time.monotonic()
        # A gap in which this process did not run, or the store did not answer anybody, is no silence of the others.
        longest_s = 2 * self._heartbeat_s * (1 if self.observer else self._stride)
        seen = dict(self.seen)
        for rank, beat in self._read(ranks).items():
            before = seen.get(rank)
            silent_s = 0.0
            if before is not None and before.beat.count == beat.count:
                silent_s = before.silent_s + min(now - self._looked_at[rank], longest_s)
            self._looked_at[rank] = now
            seen[rank] = Sighting(beat, silent_s)
        self.seen = seen

    def _read(self, ranks: Iterable[int]) -> dict[int, Beat]:
        """The beats that are there; asking for one that is not would wait for it."""
        keys = {rank: f"beat/{rank}" for rank in ranks}
        if not self._store.check(list(keys.values())):
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        if self._store.has_extended_api():
            texts = self._store.multi_get(list(keys.values())) if keys else []
        else:
            texts = [self._store.get(key) for key in keys.values()]
        return {rank: Beat.from_text(text) for rank, text in zip(keys, texts, strict=True)}


def host_and_port(store: dist.Store) -> str | None:
    """Where the server of ``store`` listens; None if it has none."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return f"{store.host}:{store.port}" if isinstance(store, dist.TCPStore) else None
