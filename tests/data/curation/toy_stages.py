"""Stages of a user's own: what the tests of the runner, the recipe and the engines run."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

import pyarrow as pa

from megatron_nucleus.data.curation.engines import WorkerDied
from megatron_nucleus.data.curation.stage import DROPS_SCHEMA, Drop, Update, corpus_stage, row_stage
from megatron_nucleus.data.curation.store import POSITION
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class DoubleConfig:
    """Which values are odd in which way."""

    factor: int = knob(2, "what values are multiplied by")
    poison: tuple[int, ...] = knob((), "values that take the process down, as a decoder may")
    raises: tuple[int, ...] = knob((), "values on which the function raises")
    unreachable: str = knob("", "while this file exists, multiples of five fail for a passing reason")
    calls: str = knob("", "file that gets a line per call: the values of the batch")
    wrong_key: bool = knob(False, "fails every row, as a wrong password does")

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ConfigError(f"factor {self.factor}: at least 1")


@row_stage(
    DoubleConfig,
    reads=("value",),
    adds={"double": pa.int64(), "notes": pa.list_(pa.string())},
    rejects=("negative",),
    failures=("no_answer",),
    batch_rows=4,
)
def double(rows, config):
    """Multiplies; negative values are rejected."""
    values = [row["value"] for row in rows]
    if config.calls:
        with open(config.calls, "a") as file:
            file.write(" ".join(map(str, values)) + "\n")
    if config.wrong_key:
        raise ConfigError("the server refuses the key")
    if set(values) & set(config.poison):
        os.kill(os.getpid(), signal.SIGKILL)
    if bad := set(values) & set(config.raises):
        raise ValueError(f"no double of {sorted(bad)}")
    away = bool(config.unreachable) and Path(config.unreachable).exists()
    out = []
    for value in values:
        if value < 0:
            out.append(Drop("negative", f"{value} is below 0"))
        elif away and value % 5 == 0:
            out.append(Drop("no_answer", "the server is away"))
        else:
            out.append({"double": config.factor * value, "notes": ["even"] if value % 2 == 0 else []})
    return out


@dataclasses.dataclass(frozen=True)
class WidthsConfig:
    """A server that is away at times."""

    unreachable: str = knob("", "while this file exists, even widths fail for a passing reason")
    calls: str = knob("", "file that gets a line per call: the widths")
    refused: str = knob("", "while this file exists, the server refuses the key")
    EXECUTION = ("calls", "refused")


@row_stage(
    WidthsConfig, reads=("width_px",), adds={"wide": pa.bool_()}, failures=("no_answer",), batch_rows=8
)
def widths(rows, config):
    """A stage for real pictures."""
    with open(config.calls, "a") as file:
        file.write(" ".join(str(row["width_px"]) for row in rows) + "\n")
    if config.refused and Path(config.refused).exists():
        raise ConfigError("the server refuses the key")
    away = Path(config.unreachable).exists()
    return [
        Drop("no_answer", "the server is away") if away and row["width_px"] % 2 == 0 else {"wide": True}
        for row in rows
    ]


@row_stage(reads=("value",), adds={"letter": pa.string()})
def wrong_columns(rows, config):
    """Returns a column it did not declare."""
    return [{"letters": "a"} for _ in rows]


@row_stage(reads=("value",), rejects=("odd",))
def undeclared(rows, config):
    """Drops for a reason it did not declare."""
    return [Drop("strange") for _ in rows]


@corpus_stage(
    reads=("value", "double"), adds={"double": pa.int64(), "rank": pa.int32()}, rejects=("repeated",)
)
def ranks(corpus, config):
    """Drops repeated values, and numbers those above 3 through the whole corpus; their double becomes -1."""
    seen, rank = set(), 0
    squares = dict(corpus.map(square, range(100)))
    for part in corpus.parts:
        drops, changes = [], []
        for row in corpus.read(part, ["value", "double"]).to_pylist():
            value = row["value"]
            assert squares[value] == value * value
            if value in seen:
                drops.append({"position": row["position"], "reason": "repeated", "detail": f"{value} again"})
            elif value > 3:
                changes.append({"position": row["position"], "double": -1, "rank": rank})
                rank += 1
            seen.add(value)
        schema = pa.schema([POSITION, ("double", pa.int64()), ("rank", pa.int32())])
        yield Update(
            pa.Table.from_pylist(drops, schema=DROPS_SCHEMA), pa.Table.from_pylist(changes, schema=schema)
        )


@dataclasses.dataclass(frozen=True)
class SquaresConfig:
    """Which tasks of a corpus stage end their process."""

    poison: tuple[int, ...] = knob((), "values whose square takes the process down")
    away: str = knob("", "only while this file exists; none: always")
    lost_too: bool = knob(True, "false: a lost task stops the stage")


@corpus_stage(SquaresConfig, reads=("value",), adds={"square": pa.int64()}, rejects=("repeated",))
def squares(corpus, config):
    """Squares values in tasks of one value each; drops those whose task ended its process."""
    poison = () if config.away and not Path(config.away).exists() else config.poison
    for part in corpus.parts:
        rows = corpus.read(part, ["value"])
        tasks = [(value, value in poison) for value in rows["value"].to_pylist()]
        results = list(corpus.map(poisonous_square, tasks, lost_too=config.lost_too))
        drops, changes = [], []
        for position, result in zip(rows["position"].to_pylist(), results, strict=True):
            if isinstance(result, WorkerDied):
                drops.append({"position": position, "reason": "process_crash", "detail": result.detail})
            else:
                changes.append({"position": position, "square": result})
        schema = pa.schema([POSITION, ("square", pa.int64())])
        yield Update(
            pa.Table.from_pylist(drops, schema=DROPS_SCHEMA), pa.Table.from_pylist(changes, schema=schema)
        )


def poisonous_square(task):
    """A task of `squares`."""
    value, deadly = task
    if deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return value * value


def square(number):
    """A task of `ranks`."""
    return number, number * number


not_a_stage = 3


def die(task):
    """A task that ends its process."""
    os.kill(os.getpid(), signal.SIGKILL)


def process_id(task):
    """A task that says where it ran."""
    return os.getpid()


@dataclasses.dataclass(frozen=True)
class NonsenseConfig:
    """What a careless stage returns."""

    kind: str = knob("none", "which nonsense")


@row_stage(NonsenseConfig, reads=("value",), adds={"whole": pa.int64()}, rejects=("odd",), batch_rows=8)
def nonsense(rows, config):
    """Breaks the promise of a stage in many ways."""
    if config.kind == "exit":
        sys.exit(3)
    whole = {"float": 1.5, "text": "one", "large": 2**70}.get(config.kind, 1)
    results = [{"whole": whole} for _ in rows]
    return {
        "none": None,
        "generator": (result for result in results),
        "short": results[:-1],
        "nothing": [None] * len(rows),
        "tuples": [("whole", 1)] * len(rows),
        "detail": [Drop("odd", 5)] * len(rows),
        "reason": [Drop(None)] * len(rows),
        "id": [Drop("odd", id=7)] * len(rows),
        "size": [Drop("odd", width_px=0)] * len(rows),
    }.get(config.kind, results)


@dataclasses.dataclass(frozen=True)
class CarelessConfig:
    """What a careless corpus stage yields."""

    kind: str = knob("good", "which nonsense")


@corpus_stage(CarelessConfig, reads=("value",), adds={"whole": pa.int64()}, rejects=("odd",))
def careless(corpus, config):
    """Breaks the promise of a corpus stage in many ways."""
    if config.kind == "nothing":
        return None
    return _careless(corpus, config.kind)


def _careless(corpus, kind):
    if kind == "raises":
        raise ValueError("no\nidea")
    if kind == "exit":
        sys.exit(3)
    yielded = {
        "reason": _update([0], reason="strange"),
        "no reason": _update([0], reason=None),
        "no detail": _update([0], detail=None),
        "foreign": _update([4711]),
        "foreign change": _update([], [-1]),
        "falling": _update([], [2, 1]),
        "twice": _update([1, 1]),
        "column": Update(_update([]).drops, pa.table({"position": [0], "hole": [1]})),
        "no column": Update(_update([]).drops.drop_columns("detail"), _update([]).changes),
        "text": Update(_update([]).drops, pa.table({"position": [0], "whole": ["one"]})),
        "fraction": Update(_update([]).drops, pa.table({"position": [0], "whole": [1.5]})),
        "tuple": tuple(_update([])),
        "rows": Update([], []),
        "none": None,
    }.get(kind, _update([0], [1]))
    parts = len(corpus.parts) + {"few": -1, "many": 1}.get(kind, 0)
    for _ in range(parts):
        yield yielded


def _update(gone, changed=(), reason="odd", detail=""):
    drops = [{"position": at, "reason": reason, "detail": detail} for at in gone]
    changes = {"position": pa.array(changed, pa.int32()), "whole": pa.array([7] * len(changed), pa.int64())}
    return Update(pa.Table.from_pylist(drops, schema=DROPS_SCHEMA), pa.table(changes))
