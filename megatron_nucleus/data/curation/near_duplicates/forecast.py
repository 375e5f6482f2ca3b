"""What a search of a given size will take, from rates that were measured here and now.

The sample is one partition as it would be in that search: rows that agree in the leading bits of a block, so many
that keys are shared as often as they will be. Everything else is arithmetic on counts of rows, tables and pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_nucleus.data.curation.near_duplicates.keys import LARGEST_DISTANCE, layout
from megatron_nucleus.data.curation.near_duplicates.pairs import Work
from megatron_nucleus.data.curation.near_duplicates.partitions import (
    BYTES_PER_ROW,
    FILE_BYTES_PER_ROW,
    PartitionTask,
    SplitTask,
    search_partition,
    split_rows,
)
from megatron_nucleus.utils.errors import ConfigError

BILLION = 10**9
PARTITIONS = 512  # as many as the 9 bits of the first blocks allow
_MOST_SAMPLE_ROWS = 1 << 21  # a partition of a billion rows
_HASH_BYTES, _ROW_NUMBER_BYTES = 8, 4


class Rates(NamedTuple):
    """CPU seconds of one core.

    split_s: per row of a partition file. load_s: per row read and collapsed. sort_s: per row and table, for moving
    the key and sorting. compare_s: per pair of hashes compared.
    """

    split_s: float
    load_s: float
    sort_s: float
    compare_s: float


def rates_of(work: Work) -> Rates:
    """Rates of a search that wrote partition files.

    Raises:
        ConfigError: there was too little of something to divide by.
    """
    counts = (work.split_rows, work.loaded_rows, work.row_tables, work.compared)
    if not all(counts):
        raise ConfigError(
            f"no rates from {counts} split rows, loaded rows, row-tables and pairs: each must be at least 1; take a "
            "larger corpus, or sample_rates"
        )
    seconds = (work.split_s, work.load_s, work.sort_s, work.compare_s)
    return Rates(*(s / n for s, n in zip(seconds, counts, strict=True)))


def sample_rates(
    folder: str | Path,
    rows: int = BILLION,
    partitions: int = PARTITIONS,
    max_distance: int = LARGEST_DISTANCE,
    seed: int = 0,
) -> Rates:
    """Make one partition of a search of ``rows`` random hashes, split and search it, and take the times (seconds).

    folder: an empty one for two files of up to 50 MB. Partitions beyond 2^21 rows are sampled at that size.
    """
    folder = Path(folder)
    part_rows = max(1, min(rows // partitions, _MOST_SAMPLE_ROWS))
    block_bits = layout(max_distance).blocks[0][1]
    hashes = np.random.default_rng(seed).integers(0, 1 << (64 - block_bits), part_rows, np.uint64)
    np.save(folder / "sample.npy", hashes)
    del hashes
    source, split = str(folder / "sample.npy"), str(folder / "split.part")
    bits = (partitions - 1).bit_length()
    work = split_rows(SplitTask(source, 0, part_rows, 0, min(bits, block_bits), max_distance, split))
    memory_bytes = part_rows * BYTES_PER_ROW
    task = PartitionTask(
        (split,), 0, min(bits, block_bits), 0, max_distance, memory_bytes, str(folder / "found.part")
    )
    work.add(search_partition(task))
    return rates_of(work)


def forecast(
    rows: int,
    rates: Rates,
    partitions: int = PARTITIONS,
    max_distance: int = LARGEST_DISTANCE,
    candidates_over_random: float = 1.0,
) -> dict[str, float]:
    """What searching ``rows`` hashes takes.

    Args:
        candidates_over_random: candidates per candidate of random hashes; more than 1 where hashes crowd (compare
            `Work.candidates` of a search with ``random_candidates`` of it).

    Returns:
        Numbers by name with unit. ``candidates``: pairs with equal keys, once for each table. ``core_hours`` and the
        parts that it adds up from. ``temporary_bytes``: the files of one first block, and a copy of the hashes.
        ``memory_per_worker_bytes``: of a partition of average size. ``clusters_bytes``: of an answer for every row.
    """
    of = layout(max_distance)
    candidates = of.random_candidates(rows) * candidates_over_random
    blocks = len({table[0] for table in of.tables})
    parts = {
        "split_core_hours": rows * blocks * rates.split_s / 3600,
        "load_core_hours": rows * blocks * rates.load_s / 3600,
        "sort_core_hours": rows * len(of.tables) * rates.sort_s / 3600,
        "compare_core_hours": candidates * rates.compare_s / 3600,
    }
    return {
        "rows": rows,
        "max_distance_bits": max_distance,
        "tables": len(of.tables),
        "partitions": partitions,
        "candidates": candidates,
        "core_hours": sum(parts.values()),
        **parts,
        "temporary_bytes": rows * (FILE_BYTES_PER_ROW + _HASH_BYTES),
        "memory_per_worker_bytes": rows * BYTES_PER_ROW / partitions,
        "clusters_bytes": rows * (_ROW_NUMBER_BYTES + 1),
    }


def forecast_text(numbers: dict[str, float]) -> str:
    """A forecast in three lines for people."""
    return (
        f"{numbers['rows']:,} hashes, distance <= {numbers['max_distance_bits']} of 64 bits, "
        f"{numbers['tables']} tables, {numbers['partitions']} partitions\n"
        f"  {numbers['core_hours']:.2f} core-hours: sort {numbers['sort_core_hours']:.2f}, "
        f"compare {numbers['compare_core_hours']:.2f} ({numbers['candidates']:.2g} candidates), "
        f"load {numbers['load_core_hours']:.2f}, split {numbers['split_core_hours']:.2f}\n"
        f"  {numbers['temporary_bytes'] / 1e9:.3g} GB of temporary files, "
        f"{numbers['memory_per_worker_bytes'] / 1e6:.3g} MB per worker, "
        f"{numbers['clusters_bytes'] / 1e9:.3g} GB for the decision on every row"
    )
