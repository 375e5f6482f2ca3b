"""Stage ``tiers``: a tier by quality and an episodic bucket for every image (`curation/tiers.py` has the rules).

A tier or bucket that came with the image (a ``.json`` beside it) stays. Needs a score stage before it, unless
``keep_untiered`` is true; passes over the columns of all parts: to count, and to write (by shares, two more to find the
edges). It holds one part's columns and the counts of distinct sizes in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_nucleus.data.curation import tiers as rules
from megatron_nucleus.data.curation.stage import DROPS_SCHEMA, Update, corpus_stage
from megatron_nucleus.data.curation.tiers import TiersConfig
from megatron_nucleus.data.index import EPISODE_BUCKETS, TIERS
from megatron_nucleus.utils.errors import ConfigError, DataError

_COLUMNS = ("id", "width_px", "height_px", "scores", "tier", "episode_bucket")


class _Rows(NamedTuple):
    """One part. scores: float32, NaN where there is none. tiers, buckets: int8, -1 where there is none yet."""

    table: pa.Table
    pixels: np.ndarray
    scores: np.ndarray
    tiers: np.ndarray
    buckets: np.ndarray


@corpus_stage(
    TiersConfig,
    reads=_COLUMNS,
    adds={"tier": pa.string(), "episode_bucket": pa.string()},
    rejects=("below_tiers", "unscored"),
    modules=(rules,),
    needs_scores=lambda config: {} if config.keep_untiered else {"tier_scorer": config.tier_scorer},
)
def tiers(corpus: Any, config: TiersConfig) -> Iterator[Update]:
    """Give every image a tier and a bucket; reject those below A1 or without a score, unless ``keep_untiered``.

    Raises:
        ConfigError: no image has a score of that name.
        DataError: a score that is no finite number.
    """
    edges = _edges(corpus, config)
    counted, settled = rules.Histogram(), np.zeros(len(EPISODE_BUCKETS), np.int64)
    for part in corpus.parts:
        rows = _read(corpus, part, config, edges)
        to_draw = (rows.tiers >= 0) & (rows.buckets < 0)
        counted.add(rules.cell(rows.tiers[to_draw], rows.pixels[to_draw]))
        stays = (rows.buckets >= 0) & ((rows.tiers >= 0) | config.keep_untiered)
        settled += np.bincount(rows.buckets[stays], minlength=len(settled))
    plan = rules.plan_buckets(counted, settled, config)
    for part in corpus.parts:
        yield _update(_read(corpus, part, config, edges), plan, config)


def _edges(corpus: Any, config: TiersConfig) -> np.ndarray | None:
    """What `share_edges` finds, None by thresholds; checks that there are scores at all."""

    def batches() -> Iterator[np.ndarray]:
        for part in corpus.parts:
            table = corpus.read(part, ("scores", "tier"))
            scores = _scores(part, table["scores"], config.tier_scorer)
            yield scores[~np.isnan(scores) & table["tier"].is_null().to_numpy()]

    _check_scored(corpus, config)
    return rules.share_edges(batches, config.tier_shares) if config.tier_by == "shares" else None


def _check_scored(corpus: Any, config: TiersConfig) -> None:
    """Stop at the first part that has a score of the wanted name; complain when none has."""
    seen: set[str] = set()
    in_need = False
    for part in corpus.parts:
        table = corpus.read(part, ("scores", "tier"))
        seen |= set(_flat_scores(table["scores"])[0].to_pylist())
        if config.tier_scorer in seen:
            return
        in_need = in_need or table["tier"].null_count > 0
    if in_need and not config.keep_untiered:
        raise ConfigError(
            f"tier_scorer {config.tier_scorer}: no image has a score of that name (there is: "
            f"{', '.join(sorted(seen)) or 'none'}); put a score stage with that name before tiers, or name another"
        )


def _flat_scores(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """All scores of a part in row order: scorer, value [float32, NaN for null], row number."""
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists = pa.concat_arrays(lists.chunks) if lists.num_chunks else pa.array([], column.type)
    flat = pc.list_flatten(lists)
    values = pc.struct_field(flat, "value").to_numpy(zero_copy_only=False).astype(np.float32)
    return pc.struct_field(flat, "scorer"), values, pc.list_parent_indices(lists).to_numpy()


def _scores(part: str, column: pa.ChunkedArray, scorer: str) -> np.ndarray:
    """The last score of that name of every row [float32], NaN where there is none."""
    out = np.full(len(column), np.nan, np.float32)
    names, values, owners = _flat_scores(column)
    chosen = pc.fill_null(pc.equal(names, scorer), False).to_numpy(zero_copy_only=False)
    if not np.isfinite(values[chosen]).all():
        raise DataError(f"{part}: a score of {scorer} that is no finite number; run the score stage again")
    out[owners[chosen]] = values[chosen]
    return out


def _read(corpus: Any, part: str, config: TiersConfig, edges: np.ndarray | None) -> _Rows:
    table = corpus.read(part, _COLUMNS)
    width, height = (table[name].to_numpy().astype(np.int64) for name in ("width_px", "height_px"))
    scores = _scores(part, table["scores"], config.tier_scorer)
    found = rules.tier_of(scores, config.tier_edges) if edges is None else rules.tier_of_rank(scores, edges)
    given = _numbers(table["tier"], TIERS)
    return _Rows(
        table,
        width * height,
        scores,
        np.where(given >= 0, given, found),
        _numbers(table["episode_bucket"], EPISODE_BUCKETS),
    )


def _numbers(column: pa.ChunkedArray, names: tuple[str, ...]) -> np.ndarray:
    """Place of each value in ``names`` [int8], -1 for null."""
    found = pc.index_in(column, value_set=pa.array(names))
    return pc.fill_null(found, -1).to_numpy().astype(np.int8)


def _update(rows: _Rows, plan: rules.BucketPlan, config: TiersConfig) -> Update:
    to_draw = np.flatnonzero((rows.tiers >= 0) & (rows.buckets < 0))
    buckets = rows.buckets.copy()
    if len(to_draw):
        ids = rows.table["id"].take(pa.array(to_draw)).to_pylist()
        buckets[to_draw] = plan.draw(ids, rows.tiers[to_draw], rows.pixels[to_draw])
    dropped = np.zeros(len(buckets), bool) if config.keep_untiered else rows.tiers < 0
    position = rows.table["position"].to_numpy()
    drops = [
        (int(at), "unscored", f"no score of {config.tier_scorer}")
        if np.isnan(score)
        else (int(at), "below_tiers", f"{config.tier_scorer} {score:.4g}, A1 from {config.tier_edges[0]:.4g}")
        for at, score in zip(position[dropped], rows.scores[dropped], strict=True)
    ]
    changes = {
        "position": pa.array(position[~dropped], pa.int32()),
        "tier": _names(rows.tiers[~dropped], TIERS),
        "episode_bucket": _names(buckets[~dropped], EPISODE_BUCKETS),
    }
    return Update(
        pa.table(
            {
                name: pa.array([row[i] for row in drops], DROPS_SCHEMA.field(name).type)
                for i, name in enumerate(DROPS_SCHEMA.names)
            }
        ),
        pa.table(changes),
    )


def _names(numbers: np.ndarray, names: tuple[str, ...]) -> pa.Array:
    """Inverse of `_numbers`."""
    return pa.array(names).take(pa.array(numbers, pa.int8(), mask=numbers < 0))
