"""The numbers of the report, from the tables of all stages: one part of the input in memory at a time.

Two passes over the kept rows: the first finds the range of scores, so that the second can count in round bins.
Pictures are chosen on the way (`choose.Choice`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_nucleus.data import buckets
from megatron_nucleus.data.buckets import BucketSize
from megatron_nucleus.data.crop_tally import CropTally
from megatron_nucleus.data.curation.captions import MEDIUM_WORDS, SHORT_WORDS
from megatron_nucleus.data.curation.recipe import Line
from megatron_nucleus.data.curation.report.choose import Choice, Place
from megatron_nucleus.data.curation.report.histograms import Histogram, Names, Range
from megatron_nucleus.data.curation.stage import REFERENCE_COLUMNS
from megatron_nucleus.data.curation.store import Store

INF = float("inf")
# Four bins an octave.
SIDE_EDGES_PX = (
    0,
    *(quarter * 2**octave // 4 for octave in range(6, 13) for quarter in (4, 5, 6, 7)),
    8192,
    INF,
)
ASPECT_EDGES = (
    0.0,
    *(2.0 ** (n / 8) for n in range(-14, 15)),
    INF,
)  # 3.4 : 1 either way, beyond the limit of 3
WORD_EDGES = (0, 1, 5, 9, SHORT_WORDS + 1, 21, 31, MEDIUM_WORDS + 1, 61, 81, 101, 151, 201, INF)
SHARE_EDGES = tuple(n / 20 for n in range(21))
SIDE_TICKS = {float(2**n): str(2**n) for n in range(6, 14)}
ASPECT_TICKS = {1 / 3: "1:3", 1 / 2: "1:2", 2 / 3: "2:3", 1.0: "1:1", 1.5: "3:2", 2.0: "2:1", 3.0: "3:1"}
DECADES = {10.0**n: f"{10.0**n:g}" for n in range(-3, 5)}
# Columns that a built-in stage measures, in bins that hold whatever they can be.
MEASURES: dict[str, tuple[tuple[float, ...], bool]] = {
    "laplacian_variance": ((0.0, *(2.0**n for n in range(-2, 16)), INF), True),
    "high_frequency_share": ((0.0, *(2.0 ** (n / 2) for n in range(-22, 1))), True),
    "luma_std": (tuple(5.0 * n for n in range(27)), False),  # at most 127.5
    "chroma_std": ((*(5.0 * n for n in range(21)), INF), False),
    "dominant_colour_share": (SHARE_EDGES, False),
}
MAX_OWN_COLUMNS = 12  # columns of a user's own stages that get a chart; own choice
CLUSTER_SIZES = ("2", "3", "4", "5 to 9", "10 and more")
ALIGNMENT = "caption alignment"
_PLUMBING = frozenset({"position", "offset", "length", "exif_orientation", "width_px", "height_px", "phash"})


@dataclasses.dataclass
class Tally:
    """What the page counts. Histograms hold kept and other images; all else is of the kept ones alone.

    Attributes:
        side_px: shortest side. aspect: width / height. measures: by column. scores: by the scorer's name.
        alignment: of captions with their picture, None where none was measured. words: per caption.
        revisions: scorer -> revisions. cells: (tier or None, episode bucket or None) -> images.
        captions: captions per image. sources: of captions; gates: verdicts of the caption gate; licences.
        cost: tokens in, tokens out and cost of new captions; zeros where none were made.
        clusters: images in a cluster of duplicates, the kept one included -> clusters. relations: of copies.
        unknown_sizes: images that were not kept before their size was known.
    """

    side_px: Histogram
    aspect: Histogram
    measures: dict[str, Histogram]
    scores: dict[str, Histogram]
    alignment: Histogram | None
    words: Histogram = dataclasses.field(default_factory=lambda: Histogram(WORD_EDGES, whole=True))
    revisions: dict[str, Names] = dataclasses.field(default_factory=dict)
    cells: Counter = dataclasses.field(default_factory=Counter)
    captions: Counter = dataclasses.field(default_factory=Counter)
    sources: Names = dataclasses.field(default_factory=Names)
    gates: Names = dataclasses.field(default_factory=Names)
    licences: Names = dataclasses.field(default_factory=Names)
    cost: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3))
    clusters: Counter = dataclasses.field(default_factory=Counter)
    relations: Counter = dataclasses.field(default_factory=Counter)
    unknown_sizes: int = 0


class Gathered(NamedTuple):
    """tally, and choice: which rows are shown as pictures. crop: `CropTally.rows`."""

    tally: Tally
    choice: Choice
    crop: list[dict[str, Any]]


def gather(store: Store, parts: Sequence[str], lines: Sequence[Line], moved: Mapping[str, str]) -> Gathered:
    """Read all parts. moved: small bucket -> bucket that took its images."""
    reader = _Reader(store, measured_columns(lines))
    tally = _empty_tally(reader, parts)
    choice = Choice()
    sizes = {b: tuple(map(int, b.split("x"))) for b in buckets.BUCKETS}
    token_px = 16  # of the published model: VAE stride 8 x patch 2
    crop = CropTally({b: BucketSize(w, h, w * h // token_px**2) for b, (w, h) in sizes.items()})
    for part in parts:
        kept = reader.kept(part)
        _add_kept(tally, kept)
        _add_crop(crop, kept, moved)
        choice.add_kept(part, kept)
        for level, dropped in reader.dropped(part):
            _add_sizes(tally, dropped, False)
            tally.unknown_sizes += dropped["width_px"].null_count
            choice.add_dropped(level, dropped)
        for column, values, alive in reader.measured(part):
            tally.measures[column].add(values, alive)
        for scorer, values, alive, revisions in reader.scored(part):
            tally.scores[scorer].add(values, alive)
            tally.revisions.setdefault(scorer, Names()).add(Counter(revisions).items())
    choice.find_copies(reader.dropped, parts)
    return Gathered(tally, choice, crop.rows(moved))


def kept_rows(store: Store, places: Iterable[Place]) -> dict[Place, dict[str, Any]]:
    """Chosen kept rows with their captions, reference columns, and scores and duplicates where there are any."""
    last, known = len(store.levels) - 1, {name for level in store.levels for name in level.columns}
    columns = ["id", "item", "width_px", "height_px", "captions", *REFERENCE_COLUMNS]
    columns += [name for name in ("scores", "duplicates") if name in known]
    wanted: dict[str, set[int]] = {}
    for place in places:
        wanted.setdefault(place.part, set()).add(place.position)
    out = {}
    for part, positions in wanted.items():
        table = store.read(last, part, list(dict.fromkeys(columns)), np.array(sorted(positions)))
        out.update({Place(part, row["position"]): row for row in table.to_pylist()})
    return out


def measured_columns(lines: Sequence[Line]) -> dict[str, str]:
    """Columns with a chart each -> the line that measures them."""
    known, own = {}, {}
    for line in lines:
        stage, _ = line.load()
        for field in stage.adds:
            if field.name in MEASURES:
                known[field.name] = line.name
            elif not stage.function.__module__.startswith("megatron_nucleus.") and _numeric(field):
                own[field.name] = line.name
    return known | dict(list(own.items())[:MAX_OWN_COLUMNS])


def _numeric(field: pa.Field) -> bool:
    is_number = pa.types.is_floating(field.type) or pa.types.is_integer(field.type)
    return is_number and field.name not in _PLUMBING


class _Reader:
    """The columns that the report needs, where the recipe has them."""

    def __init__(self, store: Store, measures: Mapping[str, str]):
        self.store, self.measures = store, tuple(measures)
        self.last = len(store.levels) - 1
        self.known = {name for level in store.levels for name in level.columns}

    def kept(self, part: str) -> pa.Table:
        """Kept rows of a part."""
        wanted = ("id", "item", "width_px", "height_px", "tier", "episode_bucket", "licence", "captions")
        extra = ("duplicates", "caption_gate", "caption_cost")
        return self.store.read(self.last, part, [*wanted, *(name for name in extra if name in self.known)])

    def dropped(self, part: str) -> Iterator[tuple[int, pa.Table]]:
        """(number of the stage, rows that ended there)."""
        for level in range(1, self.last + 1):
            table = self.store.dropped(level, part)
            if len(table):
                yield level, table

    def measured(
        self, part: str, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(column, values, whether the image was kept) of all images that were measured; null is NaN.

        columns: by default all that have a chart.
        """
        owners: dict[int, list[str]] = {}
        for column in self.measures if columns is None else columns:
            owners.setdefault(self.store.owner(self.last, column), []).append(column)
        alive = self.store.positions(self.last, part)
        for owner, names in owners.items():
            table = self.store.read(owner, part, names)
            kept = np.isin(table["position"].to_numpy(), alive)
            for name in names:
                values = table[name].to_numpy()
                yield name, values if values.dtype.kind == "f" else values.astype(np.float64), kept

    def scored(self, part: str) -> Iterator[tuple[str, np.ndarray, np.ndarray, list[str]]]:
        """(scorer, float32 values, whether the image was kept, revision of each) of all images with a score."""
        if "scores" not in self.known:
            return
        table = self.store.read(self.store.owner(self.last, "scores"), part, ["scores"])
        kept = np.isin(table["position"].to_numpy(), self.store.positions(self.last, part))
        owners, flat = flattened(table["scores"])
        names = np.array(flat.field("scorer").to_pylist(), dtype=object)
        values = flat.field("value").to_numpy(zero_copy_only=False).astype(np.float32)
        revisions = np.array(flat.field("revision").to_pylist(), dtype=object)
        for scorer in sorted(set(names.tolist())):
            chosen = names == scorer
            yield scorer, values[chosen], kept[owners[chosen]], revisions[chosen].tolist()


def flattened(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.StructArray]:
    """All structs of a list column, in order, and the row of each [int64]."""
    lists = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    return pc.list_parent_indices(lists).to_numpy().astype(np.int64), pc.list_flatten(lists)


def _empty_tally(reader: _Reader, parts: Sequence[str]) -> Tally:
    """Histograms with their edges; those of scores and own columns from a first look at all values."""
    scores: dict[str, Range] = {}
    own = {column: Range() for column in reader.measures if column not in MEASURES}
    alignment = Range()
    for part in parts:
        for scorer, values, _, _ in reader.scored(part):
            scores.setdefault(scorer, Range()).add(values)
        for column, values, _ in reader.measured(part, list(own)):
            own[column].add(values)
        alignment.add(_alignments(reader.store.read(reader.last, part, ["captions"])["captions"]))
    measures = {
        column: Histogram(
            MEASURES[column][0], log=MEASURES[column][1], ticks=DECADES if MEASURES[column][1] else None
        )
        if column in MEASURES
        else Histogram([-INF, *own[column].edges(), INF])
        for column in reader.measures
    }
    return Tally(
        side_px=Histogram(SIDE_EDGES_PX, log=True, whole=True, ticks=SIDE_TICKS),
        aspect=Histogram(ASPECT_EDGES, log=True, ticks=ASPECT_TICKS),
        measures=measures,
        scores={scorer: Histogram([-INF, *scores[scorer].edges(), INF]) for scorer in sorted(scores)},
        alignment=Histogram([-INF, *alignment.edges(), INF]) if alignment.low <= alignment.high else None,
    )


def _alignments(column: pa.ChunkedArray) -> np.ndarray:
    """Of all captions [float32], NaN where it was not measured."""
    return flattened(column)[1].field("alignment").to_numpy(zero_copy_only=False).astype(np.float32)


def _add_kept(tally: Tally, kept: pa.Table) -> None:
    _add_sizes(tally, kept, True)
    pairs = zip(kept["tier"].to_pylist(), kept["episode_bucket"].to_pylist(), strict=True)
    tally.cells.update(pairs)
    tally.licences.add(_counted(kept["licence"]))
    _add_captions(tally, kept["captions"])
    if "caption_gate" in kept.column_names:
        tally.gates.add(_counted(kept["caption_gate"]))
    if "caption_cost" in kept.column_names:
        cost = kept["caption_cost"]
        sums = [pc.sum(pc.struct_field(cost, n)).as_py() or 0 for n in ("tokens_in", "tokens_out", "cost")]
        tally.cost += sums
    if "duplicates" in kept.column_names:
        copies = pc.fill_null(pc.list_value_length(kept["duplicates"]), 0).to_numpy()
        tally.clusters.update(_cluster_size(int(n) + 1) for n in copies[copies > 0])
        tally.relations.update(flattened(kept["duplicates"])[1].field("relation").to_pylist())


def _counted(column: pa.ChunkedArray) -> list[tuple[Any, int]]:
    return [(entry["values"], entry["counts"]) for entry in pc.value_counts(column).to_pylist()]


def _cluster_size(images: int) -> str:
    return str(images) if images < 5 else CLUSTER_SIZES[-2] if images < 10 else CLUSTER_SIZES[-1]


def _add_sizes(tally: Tally, table: pa.Table, kept: bool) -> None:
    width, height = (table[name].to_numpy().astype(np.float64) for name in ("width_px", "height_px"))
    tally.side_px.add(np.fmin(width, height), kept)
    known = (width > 0) & (height > 0)
    tally.aspect.add(width[known] / height[known], kept)


def _add_captions(tally: Tally, column: pa.ChunkedArray) -> None:
    per_image = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    tally.captions.update(per_image.tolist())
    captions = flattened(column)[1]
    text = pc.utf8_trim_whitespace(captions.field("text"))
    words = pc.list_value_length(pc.utf8_split_whitespace(text)).to_numpy(zero_copy_only=False)
    empty = pc.equal(pc.utf8_length(text), 0).to_numpy(zero_copy_only=False)
    tally.words.add(np.where(empty, 0, words).astype(np.int64), True)
    tally.sources.add(_counted(captions.field("source")))
    if tally.alignment is not None:
        tally.alignment.add(_alignments(column), True)


def _add_crop(crop: Any, kept: pa.Table, moved: Mapping[str, str]) -> None:
    width, height = (kept[name].to_numpy() for name in ("width_px", "height_px"))
    if not len(width):
        return
    sizes, inverse = np.unique(np.stack([width, height], axis=1), axis=0, return_inverse=True)
    own = [_assign(int(w), int(h)) for w, h in sizes]
    numbers = np.array([buckets.BUCKETS.index(moved.get(b, b)) for b in own])[inverse.reshape(-1)]
    for number in np.unique(numbers).tolist():
        chosen = numbers == number
        crop.add(buckets.BUCKETS[number], width[chosen], height[chosen])


@functools.lru_cache(maxsize=1 << 16)
def _assign(width_px: int, height_px: int) -> str:
    return buckets.assign(width_px, height_px)
