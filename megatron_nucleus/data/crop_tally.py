"""How much of each image its bucket crops away, counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_nucleus.data.buckets import BucketSize

CROP_EDGES = (0.0, 0.001, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)  # of the histogram; the first bin is "not cropped"
CROP_LABELS = ("none", "to 5 %", "to 10 %", "to 20 %", "to 30 %", "to 50 %", "more")


class CropTally:
    """Counts over the images of every bucket, filled piece by piece; holds no image's size."""

    def __init__(self, sizes: Mapping[str, BucketSize]):
        self._sizes = dict(sizes)
        self._counts = {b: np.zeros(2 + len(CROP_LABELS), np.int64) for b in sizes}  # images, enlarged, bins
        self._sum = dict.fromkeys(sizes, 0.0)
        self._max = dict.fromkeys(sizes, 0.0)

    def add(self, bucket: str, width_px: np.ndarray, height_px: np.ndarray) -> None:
        """Count upright images of a bucket by their sizes in px."""
        if not len(width_px):
            return
        target = self._sizes[bucket]
        quotient = (width_px / height_px) / (target.width_px / target.height_px)
        cropped = 1.0 - np.minimum(quotient, 1.0 / quotient)
        enlarged = (width_px < target.width_px) | (height_px < target.height_px)
        bins = np.histogram(cropped, CROP_EDGES)[0]
        self._counts[bucket] += np.array([len(width_px), enlarged.sum(), *bins])
        self._sum[bucket] += float(cropped.sum())
        self._max[bucket] = max(self._max[bucket], float(cropped.max()))

    def rows(
        self, merged: Mapping[str, str], batches: Mapping[str, int] | None = None
    ) -> list[dict[str, Any]]:
        """One row per bucket with images, in bucket order; see `bucket_report`.

        merged: small bucket -> bucket that took its images. batches: images per step, where there are steps.
        """
        rows = []
        for bucket, size in self._sizes.items():
            images, enlarged, *bins = self._counts[bucket].tolist()
            if images:
                rows.append(
                    {
                        "bucket": bucket,
                        "images": images,
                        **size._asdict(),
                        "batch_samples": None if batches is None else batches[bucket],
                        "enlarged": enlarged,
                        "cropped_mean_frac": self._sum[bucket] / images,
                        "cropped_max_frac": self._max[bucket],
                        "cropped_histogram": dict(zip(CROP_LABELS, bins, strict=True)),
                        "merged_from": sorted(small for small, large in merged.items() if large == bucket),
                    }
                )
        return rows
