"""Clusters of duplicates -> one kept row each, with the captions and the provenance of the whole cluster.

Nothing of a dropped copy is lost but its bytes' place in the shards: its captions (of equal texts the first), its
source, address and licence go to the kept row, and its own row is listed in the quarantine with what it is a copy of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_nucleus.data.curation.captions import merge_captions
from megatron_nucleus.data.curation.near_duplicates import Candidates, keep_order
from megatron_nucleus.data.curation.stage import DROPS_SCHEMA, Update
from megatron_nucleus.data.curation.store import POSITION, Corpus
from megatron_nucleus.data.index import CAPTION_TYPE, DUPLICATE_TYPE, caption_dict
from megatron_nucleus.types import Caption
from megatron_nucleus.utils.errors import ConfigError

_MERGED = ("id", "item", "licence", "source_url", "captions", "tier", "episode_bucket", "duplicates")
_RANKED = (
    *("id", "licence", "width_px", "height_px", "captions", "scores"),
    *("coding_quality", "length", "laplacian_variance"),
)
READS = tuple(dict.fromkeys((*_MERGED, *_RANKED)))
ADDS = {
    "captions": pa.list_(CAPTION_TYPE),
    "tier": pa.string(),
    "episode_bucket": pa.string(),
    "duplicates": pa.list_(DUPLICATE_TYPE),
    "duplicate_cluster": pa.string(),
}
_ID_BYTES = 32
MEMBERS_PER_WINDOW = 200_000  # own choice: rows of copies in memory at a time, about 1 KB each


class Clusters(NamedTuple):
    """Which row each row is a copy of, over all rows of a corpus.

    representative: int64 [rows], the number of the kept row; a row's own number where it is kept.
    reason: uint8 [rows], index into ``reasons``. distance: int16 [rows], bits in which the hashes differ, -1: not
    measured. reasons: (reject reason, text); the text may use {item} (of the kept row) and {distance}.
    """

    representative: np.ndarray
    reason: np.ndarray
    distance: np.ndarray
    reasons: tuple[tuple[str, str], ...]


def merge(corpus: Corpus, clusters: Clusters) -> Iterator[Update]:
    """The updates of a corpus stage that declares `READS` and `ADDS` and drops all but the representatives.

    Copies are sorted to their representatives through files in ``corpus.work``, a window of parts at a time.
    """
    starts = corpus.starts()
    own = np.arange(len(clusters.representative), dtype=np.int64)
    members = np.flatnonzero(clusters.representative != own)
    kept = np.unique(clusters.representative[members])
    names = dict(zip(kept.tolist(), corpus.gather(kept, ["item"])["item"].to_pylist(), strict=True))
    window_of = _windows(clusters.representative[members], starts)
    files = _shuffle(corpus, clusters, members, window_of, starts)
    loaded, groups = -1, {}
    for number, part in enumerate(corpus.parts):
        window = int(window_of[number])
        if window != loaded:
            loaded, groups = window, _load_groups(files.get(window))
        low, high = int(starts[number]), int(starts[number + 1])
        position = corpus.read(part, [])["position"].to_numpy()
        gone = members[np.searchsorted(members, low) : np.searchsorted(members, high)]
        drops = _drops(clusters, gone, position[gone - low], names)
        here = kept[np.searchsorted(kept, low) : np.searchsorted(kept, high)]
        yield Update(drops, _changes(corpus, part, here, position[here - low], groups))


def _windows(representatives: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Window number of every part: parts in order, a new window once the copies of one pass the limit."""
    per_part = np.diff(np.searchsorted(np.sort(representatives), starts))
    before = np.concatenate([[0], np.cumsum(per_part)[:-1]]) if len(per_part) else np.empty(0)
    return (before // MEMBERS_PER_WINDOW).astype(np.int64)


def _shuffle(
    corpus: Corpus, clusters: Clusters, members: np.ndarray, window_of: np.ndarray, starts: np.ndarray
) -> dict[int, Path]:
    """Write the rows of all copies to one file per window of their representatives; {window: file}."""
    files: dict[int, Path] = {}
    with contextlib.ExitStack() as stack:
        writers: dict[int, pq.ParquetWriter] = {}
        for number in range(len(corpus.parts)):
            gone = members[
                np.searchsorted(members, starts[number]) : np.searchsorted(members, starts[number + 1])
            ]
            if not len(gone):
                continue
            goal = clusters.representative[gone]
            table = corpus.gather(gone, _MERGED)
            extra = {
                "row": gone,
                "representative": goal,
                "relation": pa.array([clusters.reasons[code][0] for code in clusters.reason[gone].tolist()]),
                "distance": clusters.distance[gone],
            }
            for name, values in extra.items():
                table = table.append_column(name, pa.array(values))
            windows = window_of[np.searchsorted(starts, goal, side="right") - 1]
            for window in np.unique(windows).tolist():
                if window not in writers:
                    files[window] = corpus.work / f"copies-{window:06d}.parquet"
                    writers[window] = stack.enter_context(pq.ParquetWriter(files[window], table.schema))
                writers[window].write_table(table.filter(pa.array(windows == window)))
    return files


def _load_groups(file: Path | None) -> dict[int, list[dict]]:
    """{representative: rows of its copies, in the order of the input}."""
    groups: dict[int, list[dict]] = {}
    if file is not None:
        table = pq.read_table(file, partitioning=None).sort_by(
            [("representative", "ascending"), ("row", "ascending")]
        )
        for row in table.to_pylist():
            groups.setdefault(row["representative"], []).append(row)
    return groups


def _drops(clusters: Clusters, rows: np.ndarray, position: np.ndarray, names: dict[int, str]) -> pa.Table:
    reasons, details = [], []
    for row in rows.tolist():
        reason, text = clusters.reasons[int(clusters.reason[row])]
        reasons.append(reason)
        item = names[int(clusters.representative[row])]
        details.append(text.format(item=item, distance=int(clusters.distance[row])))
    columns = [pa.array(position, pa.int32()), pa.array(reasons, pa.string()), pa.array(details, pa.string())]
    return pa.Table.from_arrays(columns, schema=DROPS_SCHEMA)


def _changes(
    corpus: Corpus, part: str, rows: np.ndarray, position: np.ndarray, groups: dict[int, list[dict]]
) -> pa.Table:
    own = corpus.read(part, _MERGED, position).to_pylist()
    merged = [_merge_one(kept, groups[row]) for row, kept in zip(rows.tolist(), own, strict=True)]
    schema = pa.schema([POSITION, *pa.schema(ADDS)])
    values = [{"position": int(p), **m} for p, m in zip(position, merged, strict=True)]
    return pa.Table.from_pylist(values, schema=schema)


def _merge_one(kept: dict, copies: Sequence[dict]) -> dict[str, Any]:
    rows = [kept, *copies]
    captions = merge_captions(*([Caption(**c) for c in row["captions"]] for row in rows))
    duplicates = list(kept["duplicates"] or [])
    for row in copies:
        duplicates.append(
            {
                "id": row["id"],
                "source_id": row["item"],
                "source_url": row["source_url"],
                "licence": row["licence"],
                "relation": row["relation"],
                "distance": None if row["distance"] < 0 else row["distance"],
            }
        )
        duplicates += row["duplicates"] or []
    return {
        "captions": [caption_dict(c) for c in captions],
        "tier": next((row["tier"] for row in rows if row["tier"] is not None), None),
        "episode_bucket": next((r["episode_bucket"] for r in rows if r["episode_bucket"] is not None), None),
        "duplicates": duplicates,
        "duplicate_cluster": kept["id"],
    }


def best_first(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """Row numbers (ascending ``rows``) in the order of the keep rule without scores and colours, the best first."""
    return rows[keep_order(candidates(corpus, rows))]


def candidates(
    corpus: Corpus, rows: np.ndarray, scorer: str | None = None, *, lowest: bool = False
) -> Candidates:
    """What the keep rule looks at of some rows (ascending numbers). Colours are left open: all False.

    Args:
        scorer: score that counts; None: none does. lowest: whether its lower values are the better ones.

    Raises:
        ConfigError: none of the rows has a score of that name.
    """
    table = corpus.gather(rows.astype(np.int64), _RANKED)
    ids = bytes.fromhex("".join(table["id"].to_pylist()))
    score = np.full(len(rows), np.nan, np.float32)
    if scorer is not None and len(rows):
        score = _scores(table["scores"], scorer)
    return Candidates(
        licence_known=pc.fill_null(pc.not_equal(table["licence"], "unknown"), False).to_numpy(),
        pixels=table["width_px"].to_numpy().astype(np.int64) * table["height_px"].to_numpy(),
        score=-score if lowest else score,
        colour=np.zeros(len(rows), bool),
        quality=table["coding_quality"].to_numpy(),
        file_bytes=table["length"].to_numpy(),
        sharpness=table["laplacian_variance"].to_numpy(),
        captions=pc.list_value_length(table["captions"]).to_numpy(),
        ids=np.frombuffer(ids, np.uint8).reshape(-1, _ID_BYTES),
    )


def _scores(column: pa.ChunkedArray, scorer: str) -> np.ndarray:
    """The last score of that name of every row [float32], NaN where there is none."""
    lists = pa.concat_arrays(column.chunks)
    flat, owners = pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy()
    names = pc.struct_field(flat, "scorer")
    named = pc.fill_null(pc.equal(names, scorer), False).to_numpy(zero_copy_only=False)
    if not named.any():
        there = ", ".join(sorted(set(names.to_pylist()))) or "none"
        raise ConfigError(
            f"keep_scorer {scorer}: no copy has a score of that name (there is: {there}); put a score stage with that "
            "name before, or name another"
        )
    out = np.full(len(lists), np.nan, np.float32)
    out[owners[named]] = pc.struct_field(flat, "value").to_numpy(zero_copy_only=False)[named]
    return out
