"""Candidate pairs -> which of them are truly near, by a longer hash or by embeddings.

A check is called with the rows of pairs, a and b (integers [m], any m), and says for each pair whether it holds (bool
[m]). It reads in chunks and in the order of rows, so that files that are mapped and larger than memory will do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_nucleus.utils.errors import ConfigError, DataError

Check = Callable[[np.ndarray, np.ndarray], np.ndarray]

PDQ_MAX_BITS = 31  # of 256: the threshold that goes with the PDQ hash
_CHUNK_BYTES = 64 << 20  # of both sides of the pairs of a chunk; own choice


def hash_check(hashes: np.ndarray, max_bits: int = PDQ_MAX_BITS) -> Check:
    """Pairs hold whose hashes differ in at most ``max_bits`` bits.

    Args:
        hashes: uint8 [n, bytes], 32 bytes for 256 bits; may be mapped.

    Raises:
        ConfigError: another type or shape, or max_bits outside 0..8 * bytes.
    """
    if hashes.ndim != 2 or hashes.dtype != np.uint8:
        raise ConfigError(
            f"hash_check: hashes are {hashes.dtype} {list(hashes.shape)}, not uint8 [rows, bytes]"
        )
    if not 0 <= max_bits <= 8 * hashes.shape[1]:
        raise ConfigError(f"max_bits {max_bits}: must be 0 to {8 * hashes.shape[1]}, the length of a hash")

    def near(a: np.ndarray, b: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.bitwise_count(a ^ b).sum(1, dtype=np.int64) <= max_bits

    return _in_chunks(hashes, near, 2 * hashes.shape[1])


def cosine_check(embeddings: np.ndarray, min_cosine: float) -> Check:
    """Pairs hold whose embeddings have a cosine of at least ``min_cosine``, taken in float32.

    Args:
        embeddings: float16 or float32 [n, d], of any length; may be mapped.

    Raises:
        ConfigError: another type or shape, or min_cosine outside -1..1.
        DataError: by the check, on an embedding that is zero or not finite: it has no direction.
    """
    if embeddings.ndim != 2 or embeddings.dtype not in (np.float16, np.float32):
        shown = f"{embeddings.dtype} {list(embeddings.shape)}"
        raise ConfigError(f"cosine_check: embeddings are {shown}, not float16 or float32 [rows, d]")
    if not -1 <= min_cosine <= 1:
        raise ConfigError(f"min_cosine {min_cosine}: must be -1 to 1")

    def near(a: np.ndarray, b: np.ndarray, rows: np.ndarray) -> np.ndarray:
        a, b = a.astype(np.float32), b.astype(np.float32)
        # Scaled to 1 at most first, so that no square runs over or under.
        a, b = (_scaled(x, rows[i]) for i, x in enumerate((a, b)))
        product = np.einsum("nd,nd->n", a, b)
        lengths = np.sqrt(np.einsum("nd,nd->n", a, a) * np.einsum("nd,nd->n", b, b))
        return product >= np.float32(min_cosine) * lengths

    return _in_chunks(embeddings, near, 16 * embeddings.shape[1])


def _scaled(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    largest = np.abs(values).max(1, initial=0)
    bad = np.flatnonzero(~(np.isfinite(largest) & (largest > 0)))
    if len(bad):
        raise DataError(
            f"the embedding of row {rows[bad[0]]} is zero or not finite; compute it again or drop it"
        )
    return values / largest[:, None]


def _in_chunks(table: np.ndarray, near: Callable[..., np.ndarray], pair_bytes: int) -> Check:
    """A check that gives ``near`` the entries of a and b, and their rows [2, m], a chunk at a time."""
    step = max(1, _CHUNK_BYTES // max(1, pair_bytes))

    def check(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        holds = np.empty(len(a), bool)
        order = np.lexsort((b, a))
        for start in range(0, len(a), step):
            part = order[start : start + step]
            rows, place = np.unique(np.concatenate([a[part], b[part]]), return_inverse=True)
            entries = np.asarray(table[rows])  # in ascending order: the disk is read forwards
            sides = place.reshape(2, len(part))
            holds[part] = near(entries[sides[0]], entries[sides[1]], rows[sides])
        return holds

    return check
