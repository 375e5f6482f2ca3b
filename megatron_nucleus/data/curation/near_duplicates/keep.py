"""Which of several near-equal images is the best: the keep rule as a sort."""

from __future__ import annotations

import numpy as np

from megatron_nucleus.utils.errors import ConfigError

ID_BYTES = 32  # an id is a SHA-256


def keep_order(
    licence_known: np.ndarray, pixels: np.ndarray, score: np.ndarray, captions: np.ndarray, ids: np.ndarray
) -> np.ndarray:
    """Positions of rows, best first: licence known, more pixels, higher score, more captions, lower id.

    Args:
        licence_known: bool [n]. pixels: int64 [n], width times height. score: float32 [n], NaN where there is none
            (behind every score). captions: int32 [n], how many. ids: V32 [n] or uint8 [n, 32], raw SHA-256.

    Returns:
        int64 [n]. Rows that are equal in everything keep their order.

    Raises:
        ConfigError: arrays of different lengths, or ids of another size.
    """
    ids = np.ascontiguousarray(ids)
    rows = len(licence_known)
    lengths = {"pixels": len(pixels), "score": len(score), "captions": len(captions), "ids": len(ids)}
    for name, length in lengths.items():
        if length != rows:
            raise ConfigError(f"keep_order: {name} has {length} rows, licence_known {rows}")
    if ids.nbytes != rows * ID_BYTES:
        raise ConfigError(f"keep_order: ids of {ids.dtype} {list(ids.shape)}; must be {ID_BYTES} bytes each")
    words = ids.view(np.uint8).reshape(rows, ID_BYTES).view(">u8").astype(np.uint64)
    # lexsort takes the most important key last; NaN sorts behind all numbers, negated or not.
    return np.lexsort(
        (
            *words.T[::-1],
            -np.asarray(captions, np.int64),
            -np.asarray(score, np.float32),
            -np.asarray(pixels, np.int64),
            ~np.asarray(licence_known, bool),
        )
    )
