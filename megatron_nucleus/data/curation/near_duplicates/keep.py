"""Which of several copies of a picture is the best: the keep rule as a sort.

1. a known licence before an unknown one
2. more pixels
3. the better score, where the caller has one
4. colour before grey
5. a better coding: lossless, else the higher quality up to `TELLING_QUALITY`; a file that does not tell counts as
   `UNKNOWN_QUALITY`
6. more bytes, among lossy files
7. sharper
8. more captions
9. the lower id

A picture that was coded badly once and then again with care says so in its bytes at most: of photographs, a JPEG of
quality 25 saved again at 95 has fewer than the original at 85 to 90, and passes for better than one at 75. Saved again
without loss, it is not found out. Captions come late because the row that stays gets those of all its copies.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megatron_nucleus.utils.errors import ConfigError

ID_BYTES = 32  # an id is a SHA-256
LOSSLESS = 100.0
# Own choice: the setting that encoders take by themselves (libjpeg, libwebp, and Pillow for AVIF: 75).
UNKNOWN_QUALITY = 75.0
# Own choice: from here on a header does not tell an original from a copy that was saved again, and bytes tell more.
TELLING_QUALITY = 85.0


class Candidates(NamedTuple):
    """What the keep rule looks at; arrays of one length.

    licence_known: bool. pixels: int64, width times height. score: float32, higher is better, NaN where there is none
    (behind every score). colour: bool, False for grey. quality: float32, 0..100, of the coding, `LOSSLESS` for that,
    NaN where the file does not tell. file_bytes: int64. sharpness: float32, 0 or more. captions: int32, how many.
    ids: V32 [n] or uint8 [n, 32], raw SHA-256.
    """

    licence_known: np.ndarray
    pixels: np.ndarray
    score: np.ndarray
    colour: np.ndarray
    quality: np.ndarray
    file_bytes: np.ndarray
    sharpness: np.ndarray
    captions: np.ndarray
    ids: np.ndarray


def keep_order(candidates: Candidates) -> np.ndarray:
    """Positions of rows, best first, by the rule of the module docstring.

    Returns:
        int64 [n]. Rows that are equal in everything keep their order.

    Raises:
        ConfigError: arrays of different lengths, or ids of another size.
    """
    ids = np.ascontiguousarray(candidates.ids)
    rows = len(candidates.licence_known)
    for name, column in candidates._asdict().items():
        if len(column) != rows:
            raise ConfigError(f"keep_order: {name} has {len(column)} rows, licence_known {rows}")
    if ids.nbytes != rows * ID_BYTES:
        raise ConfigError(f"keep_order: ids of {ids.dtype} {list(ids.shape)}; must be {ID_BYTES} bytes each")
    words = ids.view(np.uint8).reshape(rows, ID_BYTES).view(">u8").astype(np.uint64)
    quality = np.asarray(candidates.quality, np.float32)
    lossless = quality == LOSSLESS
    quality = np.where(np.isnan(quality), np.float32(UNKNOWN_QUALITY), quality)
    quality = np.where(lossless, quality, np.minimum(quality, np.float32(TELLING_QUALITY)))
    # The bytes of a lossless file say how hard its packer tried.
    lossy_bytes = np.where(lossless, 0, np.asarray(candidates.file_bytes, np.int64))
    # lexsort takes the most important key last; NaN sorts behind all numbers, negated or not.
    return np.lexsort(
        (
            *words.T[::-1],
            -np.asarray(candidates.captions, np.int64),
            -np.asarray(candidates.sharpness, np.float32),
            -lossy_bytes,
            -quality,
            ~np.asarray(candidates.colour, bool),
            -np.asarray(candidates.score, np.float32),
            -np.asarray(candidates.pixels, np.int64),
            ~np.asarray(candidates.licence_known, bool),
        )
    )
