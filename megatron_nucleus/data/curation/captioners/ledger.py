"""What the workers of a captioning stage share: answers that are paid for, the pace, the money spent.

One SQLite file in ``cache_dir``: every change is a transaction, so a killed process leaves the state before or after
it, never half an answer, and any number of processes may use it. The folder must lie where file locks work: a local
disk, or a network file system that has them. Without ``cache_dir`` the ledger lies in memory: this process alone
keeps the pace that a server asks for, and no answer is kept.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_nucleus.data.curation.captioners.protocol import Failure, Reply
from megatron_nucleus.data.curation.captioners.settings import CaptionerConfig
from megatron_nucleus.utils.errors import ConfigError, DataError

FILE_NAME = "captions.sqlite"
_LOCK_WAIT_S = 120.0  # own choice: how long others may hold the file; a transaction takes milliseconds
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, revision TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sums (
    one INTEGER PRIMARY KEY CHECK (one = 1), requests INTEGER NOT NULL, tokens_in INTEGER NOT NULL,
    tokens_out INTEGER NOT NULL, cost REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS pace (one INTEGER PRIMARY KEY CHECK (one = 1), next_request_s REAL NOT NULL,
    next_token_s REAL NOT NULL, paused_until_s REAL NOT NULL);
INSERT OR IGNORE INTO sums VALUES (1, 0, 0, 0, 0.0);
INSERT OR IGNORE INTO pace VALUES (1, 0.0, 0.0, 0.0);
"""


class Spending(NamedTuple):
    """Sums over every answer so far, unusable ones included. cost: in the currency of the prices."""

    requests: int
    tokens_in: int
    tokens_out: int
    cost: float


class Ledger:
    """The file, or its likeness in memory; safe for threads and processes, but not across a fork."""

    def __init__(self, settings: CaptionerConfig, clock: Callable[[], float] = time.time):
        """clock: seconds, the same in all processes."""
        self._settings, self._clock, self._lock = settings, clock, threading.Lock()
        self._path = Path(settings.cache_dir) / FILE_NAME if settings.cache_dir else None
        if self._path:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"cache_dir {settings.cache_dir}: {error.strerror}; name another folder"
                ) from error
        with self._named():
            self._db = sqlite3.connect(
                self._path or ":memory:", timeout=_LOCK_WAIT_S, isolation_level=None, check_same_thread=False
            )
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")

    @property
    def keeps_answers(self) -> bool:
        """Whether there is a file; in memory, answers are not kept."""
        return self._path is not None

    def find(self, key: str) -> Reply | None:
        """The answer of an earlier `record`."""
        with self._named(), self._lock:
            row = self._db.execute(
                "SELECT text, tokens_in, tokens_out, revision FROM answers WHERE key = ?", (key,)
            ).fetchone()
        return Reply(*row) if row else None

    def record(self, key: str, answer: Reply | Failure) -> None:
        """Count an answer's cost; keep the answer too if it is a `Reply`, so that failed ones are asked again."""
        tokens = (answer.tokens_in, answer.tokens_out)
        with self._transaction() as db:
            if self.keeps_answers and isinstance(answer, Reply):
                db.execute(
                    "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)",
                    (key, answer.text, *tokens, answer.revision),
                )
            db.execute(
                "UPDATE sums SET requests = requests + 1, tokens_in = tokens_in + ?, tokens_out = tokens_out + ?,"
                " cost = cost + ?",
                (*tokens, self._settings.cost(*tokens)),
            )
            if self._settings.tokens_per_minute is not None:
                # Paid afterwards, since nobody knows before: the next request waits until the tokens are earned.
                debt_s = sum(tokens) * 60 / self._settings.tokens_per_minute
                db.execute("UPDATE pace SET next_token_s = max(next_token_s, ?) + ?", (self._clock(), debt_s))

    def spent(self) -> Spending:
        """What all runs that share the folder have cost."""
        with self._named(), self._lock:
            row = self._db.execute("SELECT requests, tokens_in, tokens_out, cost FROM sums").fetchone()
        return Spending(*row)

    def check_budget(self) -> None:
        """Raises ConfigError once ``max_cost`` is spent, saying how to go on."""
        limit = self._settings.max_cost
        if limit is not None and (spent := self.spent()).cost >= limit:
            raise ConfigError(
                f"max_cost {limit:g} is spent: {spent.cost:.6g} for {spent.requests} answers. They are kept in "
                f"{self._settings.cache_dir}; raise max_cost and run the same command again to go on from there"
            )

    def turn_s(self) -> float:
        """Seconds to wait before the next request, for its place in the queue of ``requests_per_minute``, which this
        call takes, and for the tokens of earlier answers."""
        with self._transaction() as db:
            now = self._clock()
            at = max(now, *db.execute("SELECT next_request_s, next_token_s FROM pace").fetchone())
            if self._settings.requests_per_minute is not None:
                db.execute(
                    "UPDATE pace SET next_request_s = ?", (at + 60 / self._settings.requests_per_minute,)
                )
        return at - now

    def paused_s(self) -> float:
        """Seconds until the end of the longest `pause`; 0 where there is none."""
        with self._named(), self._lock:
            (until_s,) = self._db.execute("SELECT paused_until_s FROM pace").fetchone()
        return max(0.0, until_s - self._clock())

    def pause(self, seconds: float) -> None:
        """No request of any worker before ``seconds`` have passed: what a server's Retry-After asks for."""
        with self._transaction() as db:
            db.execute("UPDATE pace SET paused_until_s = max(paused_until_s, ?)", (self._clock() + seconds,))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._named(), self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """SQLite's errors as ours, with the file and the fix."""
        try:
            yield
        except sqlite3.OperationalError as error:  # locked, full, read-only, cannot be opened
            raise ConfigError(
                f"cache_dir: {self._path}: {error}; is the disk full or the folder read-only? mend that, or name "
                "another folder"
            ) from error
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{self._path}: damaged ({error}); remove it (its answers are then asked and paid for again)"
            ) from error
