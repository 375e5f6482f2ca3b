"""How well the aspect buckets fit the images: what is cropped, what is enlarged, which buckets were merged."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_nucleus.data import index
from megatron_nucleus.data.batching import batch_samples, bucket_sizes
from megatron_nucleus.data.crop_tally import CROP_LABELS, CropTally
from megatron_nucleus.data.dataset import Corpus
from megatron_nucleus.data.loader import DataConfig
from megatron_nucleus.utils.errors import DataError

_ROWS_AT_ONCE = 65_536


def bucket_report(
    corpus: Corpus, config: DataConfig, multiple_px: int, global_batch_size: int | None = None
) -> list[dict[str, Any]]:
    """How the images of a data set, held-out ones included, fit their buckets at a run's resolution.

    Reads the index, part by part. Of encoded data the resolution is the one it was encoded at.

    Args:
        multiple_px: codec stride x patch size. global_batch_size: for ``batch_samples``; None leaves it None.

    Returns:
        Per bucket ``bucket, images, width_px, height_px, tokens, batch_samples``, ``enlarged`` (images smaller than
        the bucket on a side), ``cropped_mean_frac`` and ``cropped_max_frac`` (share of an image's area outside
        the crop), ``cropped_histogram`` ({`CROP_LABELS`: images}) and ``merged_from`` (small buckets that
        joined this one).

    Raises:
        ConfigError: a resolution that does not fit. DataError: a damaged part of the index.
    """
    tally = CropTally(bucket_sizes(corpus, config.resolution_px, multiple_px))
    for entry in corpus.manifest["index"]:
        _add_part(tally, corpus.root / entry["path"])
    batches = None
    if global_batch_size is not None:
        batches = batch_samples(
            corpus, config.resolution_px, multiple_px, global_batch_size, config.bucket_batch_multiple
        )
    return tally.rows(corpus.manifest.get("merged_buckets", {}), batches)


def _add_part(tally: CropTally, path: Any) -> None:
    columns = ["aspect_bucket", "width_px", "height_px"]
    for batch in index.iter_batches(path, index.INDEX_SCHEMA, _ROWS_AT_ONCE, columns):
        buckets = np.array(batch["aspect_bucket"].to_pylist())
        width_px, height_px = (batch[name].to_numpy(zero_copy_only=False) for name in columns[1:])
        if not (np.all(width_px > 0) and np.all(height_px > 0)):  # a null is NaN here
            raise DataError(f"{path}: an image without width_px and height_px; curate the images again")
        for bucket in np.unique(buckets).tolist():
            chosen = buckets == bucket
            tally.add(bucket, width_px[chosen], height_px[chosen])


def format_report(rows: list[dict[str, Any]]) -> str:
    """The rows of `bucket_report` as a plain text table, a line per bucket and a line of sums."""
    head = ["bucket", "size", "images", "tokens", "per step", "enlarged", "cropped", "at most", *CROP_LABELS]
    lines = [[*head, "merged from"]]
    for row in rows:
        batch = "-" if row["batch_samples"] is None else str(row["batch_samples"])
        lines.append(
            [
                row["bucket"],
                f"{row['width_px']}x{row['height_px']}",
                str(row["images"]),
                str(row["tokens"]),
                batch,
            ]
            + [str(row["enlarged"]), f"{row['cropped_mean_frac']:.1%}", f"{row['cropped_max_frac']:.1%}"]
            + [str(row["cropped_histogram"][label]) for label in CROP_LABELS]
            + [", ".join(row["merged_from"]) or "-"]
        )
    images = sum(row["images"] for row in rows)
    mean = sum(row["cropped_mean_frac"] * row["images"] for row in rows) / max(images, 1)
    highest = max((row["cropped_max_frac"] for row in rows), default=0.0)
    bins = [str(sum(row["cropped_histogram"][label] for row in rows)) for label in CROP_LABELS]
    enlarged = str(sum(row["enlarged"] for row in rows))
    lines.append(["all", "", str(images), "", "", enlarged, f"{mean:.1%}", f"{highest:.1%}", *bins, ""])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    last = len(widths) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
