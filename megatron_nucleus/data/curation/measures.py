"""What one look at a picture tells: perceptual hashes, and measures of emptiness and sharpness.

Everything is measured on a small version of the picture, so that it costs little beside the decode. Its scale is that
which a JPEG decoder gives for free: the picture divided by the power of two that leaves its shortest side in
256..512 px (smaller pictures as they are).

- **Hashes**: signs of low DCT frequencies against their median, of 32 x 32 and 64 x 64 luminances. All sums are
  of integers below 2^53, so that a hash is the same on every machine that decodes to the same pixels.
- **Emptiness**: spread of luminance, of 31 x 31 sampled pixels; and of those pictures that have nearly one lightness,
  spread of chroma and share of the fullest colour. Others need not be decoded in colour at all, which costs more than
  everything here.
- **Sharpness**: variance of the Laplacian and share of high frequencies, both from the spectrum of windowed tiles
  (Welch, IEEE Trans. Audio Electroacoust. 15(2), 1967), weighted as for a picture whose shortest side is 256 px.
  So they mean the same for every size, and say whether a picture is sharp when it is shown at that size: a large
  picture that is soft only at its full size counts as sharp.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

PHASH_IMPL = "megatron_nucleus-dct-1"  # implementation and version: hashes of different ones do not compare
MEASURE_SIDE_PX = 256  # own choice: the smallest side that curation keeps, so that no picture is enlarged
HIGH_FREQUENCY = 0.25  # cycles per px at MEASURE_SIDE_PX, half of what it can hold: own choice
# Side of the averaged luminance: PDQ's (Meta, "The TMK+PDQF Video-Hashing Algorithm and the PDQ Image-Hashing
# Algorithm", 2019).
_GRID_PX = 64
ONE_LIGHTNESS_SHARE = 0.95  # own choice: of photographs, about 1 in 30 is above it
# Side of the samples: 961 give a share near 0.98 to within 0.5 %; prime, so that few patterns are in step with them.
_SAMPLES_PX = 31
_CHUNK = 8  # pictures measured at once: what their spectra take stays in a core's cache
_TILE_PX, _TILES = 24, 6  # 36 tiles a picture: own choice, by time
_DCT_SCALE = 2.0**17  # the largest at which every sum stays below 2^53; see the test
_CBCR = np.array([[-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])  # JFIF 1.02

COLUMNS = {
    "phash": pa.uint64(),
    "phash256": pa.binary(32),
    "phash_impl": pa.string(),
    "pixel_key": pa.binary(16),
    "luma_std": pa.float32(),
    "chroma_std": pa.float32(),
    "dominant_colour_share": pa.float32(),
    "laplacian_variance": pa.float32(),
    "high_frequency_share": pa.float32(),
}


class Measures(NamedTuple):
    """Measures of one picture; the field names are the columns of `COLUMNS`.

    phash: 64 bits, DCT rows and columns 1..8 of 32 x 32 luminances, most significant bit first. phash256: 256 bits,
    the same of rows and columns 1..16 of 64 x 64. phash_impl: `PHASH_IMPL`. pixel_key: of the picture's size and a
    part of its pixels; equal pictures of one format have equal keys, so equal keys are worth a full comparison.
    luma_std: 0..127.5, standard deviation of luminance in levels. chroma_std: the same of (Cb, Cr) about their mean.
    dominant_colour_share: 0..1, share of pixels in the fullest RGB cube of 32 levels a side. Both null where no more
    than `ONE_LIGHTNESS_SHARE` of the pixels have one lightness; the share of one colour is below that then.
    laplacian_variance: levels^2, 0 or more. high_frequency_share: 0..1, energy above `HIGH_FREQUENCY` over the
    variance of luminance.
    """

    phash: int
    phash256: bytes
    phash_impl: str
    pixel_key: bytes
    luma_std: float
    chroma_std: float | None
    dominant_colour_share: float | None
    laplacian_variance: float
    high_frequency_share: float


class Glance(NamedTuple):
    """What is kept of a picture until it is measured, 28 kB.

    size_px: (width, height) of the whole picture. side_px: shortest side of the version looked at. levels: bytes of
    64 x 64 luminances, averaged. samples: bytes of 31 x 31, sampled. tiles: uint8 luminance [36, tile, tile].
    colours: bytes of the 31 x 31 RGB pixels (`sample_colours`), needed where `of_one_lightness` says so.
    """

    size_px: tuple[int, int]
    side_px: int
    levels: bytes
    samples: bytes
    tiles: np.ndarray
    colours: bytes | None = None


def draft_size(size_px: tuple[int, int]) -> tuple[int, int]:
    """(width, height) that a JPEG may be decoded at, for `look`: shortest side at least `MEASURE_SIDE_PX`."""
    factor = _octave(min(size_px))
    return size_px[0] // factor, size_px[1] // factor


def look(luma: Image.Image, size_px: tuple[int, int]) -> Glance:
    """Take what `measure` needs from an upright grey picture, decoded at any scale that `draft_size` allows.

    size_px: (width, height) of the picture at its full size.
    """
    small = _reduced(luma)
    levels = small.resize(
        (_GRID_PX, _GRID_PX), Image.Resampling.BILINEAR, reducing_gap=1.0
    )  # BOX would jitter
    return Glance(size_px, min(small.size), levels.tobytes(), _sampled(small), _tiles(np.asarray(small)))


def of_one_lightness(glances: Sequence[Glance]) -> list[bool]:
    """Which pictures may be of one colour: more than `ONE_LIGHTNESS_SHARE` of the samples within 48 levels."""
    samples = _stack([g.samples for g in glances]).reshape(len(glances), _SAMPLES_PX**2) >> 4
    counts = np.stack([np.bincount(row, minlength=16) for row in samples]) if glances else np.empty((0, 16))
    # Three bins of 16 hold any 33 levels, and the lightnesses of a cube of 32 levels a side are no more than those.
    share = (counts[:, :-2] + counts[:, 1:-1] + counts[:, 2:]).max(1) / _SAMPLES_PX**2
    return (share > ONE_LIGHTNESS_SHARE).tolist()


def sample_colours(picture: Image.Image) -> bytes:
    """``colours`` of a `Glance`, from the same picture in RGB."""
    return _sampled(_reduced(picture))


def measure(glances: Sequence[Glance]) -> list[Measures]:
    """Measure pictures; what comes out for one does not depend on the others.

    A few dozen at once take half the time: between decodes, each small step pays for cold caches.
    """
    return [
        made for start in range(0, len(glances), _CHUNK) for made in _measure(glances[start : start + _CHUNK])
    ]


def _measure(glances: Sequence[Glance]) -> list[Measures]:
    levels = _stack([g.levels for g in glances]).reshape(-1, _GRID_PX, _GRID_PX)
    samples = _stack([g.samples for g in glances]).reshape(len(glances), -1)
    laplacian, high = _sharpness(glances)
    # Samples miss thin lines; their means and their Laplacian, which gains 64 at most, do not.
    variance = np.maximum(samples.var(1), np.maximum(levels.var((1, 2)), laplacian / 64))
    share = (high / np.maximum(variance, 1 / 12)).clip(0, 1)  # less is the rounding to whole levels
    columns = zip(
        phash(levels).tolist(),
        phash256(levels),
        np.sqrt(variance).tolist(),
        laplacian.tolist(),
        share.tolist(),
        strict=True,
    )
    return [
        Measures(hash64, hash256, PHASH_IMPL, _pixel_key(glance), luma, *_colour(glance.colours), sharp, fine)
        for glance, (hash64, hash256, luma, sharp, fine) in zip(glances, columns, strict=True)
    ]


def _reduced(picture: Image.Image) -> Image.Image:
    factor = _octave(min(picture.size))
    return picture.reduce(factor) if factor > 1 else picture


def _sampled(picture: Image.Image) -> bytes:
    return picture.resize((_SAMPLES_PX, _SAMPLES_PX), Image.Resampling.NEAREST).tobytes()


def _stack(parts: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(parts), np.uint8)


def phash(levels: np.ndarray) -> np.ndarray:
    """uint64 [n] hashes of uint8 [n, 64, 64] luminances; their 32 x 32 are sums of two by two."""
    rows = levels[:, ::2].astype(np.float64) + levels[:, 1::2]
    return _median_bits(rows[:, :, ::2] + rows[:, :, 1::2], 8).view(">u8")[:, 0]


def phash256(levels: np.ndarray) -> list[bytes]:
    """256-bit hashes, 32 bytes each, of uint8 [n, 64, 64] luminances."""
    return [bits.tobytes() for bits in _median_bits(levels.astype(np.float64), 16)]


def _median_bits(levels: np.ndarray, count: int) -> np.ndarray:
    """Which of the ``count`` x ``count`` DCT frequencies from 1 on lie above their median: uint8 [n, count^2 / 8]."""
    dct = _dct_rows(levels.shape[-1], count)
    low = (dct @ levels @ dct.T).reshape(len(levels), -1)
    half = low.shape[1] // 2
    middle = np.partition(low, (half - 1, half), axis=1)[:, half - 1 : half + 1].mean(1, keepdims=True)
    return np.packbits(low > middle, axis=1)


@functools.cache
def _dct_rows(side: int, count: int) -> np.ndarray:
    """Rows 1..count of the DCT-II of ``side`` samples, in whole numbers: float64 [count, side]."""
    frequency, sample = np.arange(1, count + 1)[:, None], np.arange(side)[None]
    return np.rint(_DCT_SCALE * np.cos(np.pi * frequency * (2 * sample + 1) / (2 * side)))


def _octave(side_px: int) -> int:
    """Largest power of two by which a side can be divided and still be `MEASURE_SIDE_PX`; at least 1."""
    return 1 << max(0, (side_px // MEASURE_SIDE_PX).bit_length() - 1)


def _pixel_key(glance: Glance) -> bytes:
    size = struct.pack("<2I", *glance.size_px)
    return hashlib.sha256(size + glance.samples + glance.levels).digest()[:16]


def _colour(colours: bytes | None) -> tuple[float | None, float | None]:
    """Spread of chroma in levels, and share of the fullest colour, of RGB pixels; None for no pixels."""
    if colours is None:
        return None, None
    values = np.frombuffer(colours, np.uint8).reshape(-1, 3)
    chroma = _CBCR @ values.T.astype(np.float64)
    return float(np.sqrt(chroma.var(1).sum())), _dominant_share(values)


def _dominant_share(colours: np.ndarray) -> float:
    """Share of the fullest cube of 2 x 2 x 2 bins of 16 levels, of uint8 [n, 3].

    The cubes overlap: a colour on the border of two bins still counts as one.
    """
    bins = colours.astype(np.intp) >> 4
    index = bins[:, 0] << 8 | bins[:, 1] << 4 | bins[:, 2]
    counts = np.bincount(index, minlength=1 << 12).reshape(16, 16, 16)
    counts = counts[1:] + counts[:-1]
    counts = counts[:, 1:] + counts[:, :-1]
    return float((counts[..., 1:] + counts[..., :-1]).max() / len(colours))


def _tiles(luma: np.ndarray) -> np.ndarray:
    """Evenly spaced square tiles of uint8 [height, width]: [_TILES^2, tile, tile]; in a small picture they overlap."""
    tile = min(_TILE_PX, *luma.shape)
    down, right = ((n - tile) // (_TILES - 1) for n in luma.shape)
    rows, columns = luma.strides
    shape, strides = (_TILES, _TILES, tile, tile), (down * rows, right * columns, rows, columns)
    return np.ndarray(shape, np.uint8, luma, strides=strides).reshape(-1, tile, tile)


def _sharpness(glances: Sequence[Glance]) -> tuple[np.ndarray, np.ndarray]:
    """Variance of the Laplacian and energy of high frequencies, as at `MEASURE_SIDE_PX`; float64 [n], levels^2."""
    found = np.empty((len(glances), 2))
    kinds = [_transform_kind(g) for g in glances]
    for kind in sorted(set(kinds)):
        rows = [n for n, k in enumerate(kinds) if k == kind]
        power = _power(np.stack([glances[n].tiles for n in rows]), kind[1])
        weights = np.stack([_spectral_weights(*kind, glances[n].side_px) for n in rows])
        found[rows] = (weights @ power[:, :, None])[..., 0]
    return found[:, 0], found[:, 1]


def _transform_kind(glance: Glance) -> tuple[int, int]:
    """(side of the tiles in px, highest frequency that is needed, in cycles per tile)."""
    tile = glance.tiles.shape[-1]
    return tile, tile // 2 if 3 * glance.side_px < 4 * MEASURE_SIDE_PX else 3 * tile // 8


def _power(tiles: np.ndarray, highest: int) -> np.ndarray:
    """Power spectra of uint8 [n, tiles, tile, tile] up to ``highest``, summed over the tiles: float32 [n, k].

    k: rows x columns x 2 (squares of the real and of the imaginary parts). Transforms this small take half the time as
    products with matrices that they take as FFTs.
    """
    tile = tiles.shape[-1]
    across, down = _transform(tile, highest)
    lines = tiles.reshape(len(tiles), -1, tile).astype(np.float32) @ across
    parts = (down @ lines.view(np.complex64).reshape(*tiles.shape[:3], -1)).view(np.float32)
    parts *= parts
    return parts.sum(1).reshape(len(tiles), -1)


@functools.cache
def _frequencies(tile: int, highest: int) -> tuple[np.ndarray, np.ndarray]:
    """Cycles per tile of the rows and of the columns of a spectrum; its other half is the complex conjugate."""
    columns = np.arange(highest + 1)
    return np.concatenate([columns, np.arange(max(-highest, highest + 1 - tile), 0)]), columns


@functools.cache
def _transform(tile: int, highest: int) -> tuple[np.ndarray, np.ndarray]:
    """Windowed DFT of rows, float32 [tile, columns x (real, imaginary)], and of columns, complex64 [rows, tile].

    The window is Hann's, with unit mean power; it keeps a constant within the frequencies -1, 0 and 1.
    """
    sample = np.arange(tile)
    window = np.sin(np.pi * (sample + 0.5) / tile) ** 2
    window /= np.sqrt((window**2).mean())
    rows, columns = _frequencies(tile, highest)
    across = np.exp(-2j * np.pi / tile * np.outer(sample, columns)) * window[:, None]
    down = np.exp(-2j * np.pi / tile * np.outer(rows, sample)) * window
    return np.ascontiguousarray(across, np.complex64).view(np.float32), np.ascontiguousarray(
        down, np.complex64
    )


@functools.lru_cache(maxsize=512)
def _spectral_weights(tile: int, highest: int, side_px: int) -> np.ndarray:
    """What `_power` is summed with: float32 [2, k], for the variance of the Laplacian and the energy of high
    frequencies of a picture whose shortest side is ``side_px``."""
    scale = max(1.0, side_px / MEASURE_SIDE_PX)  # cycles per px here -> cycles per px at MEASURE_SIDE_PX
    rows, columns = _frequencies(tile, highest)
    y, x = scale / tile * rows[:, None], scale / tile * columns[None]
    once = np.where(
        (columns == 0) | (2 * columns == tile), 1, 2
    )  # other columns stand for two of the full plane
    held = (np.abs(y) <= 0.5) & (x <= 0.5)
    constant = (np.abs(rows)[:, None] <= 1) & (columns[None] <= 1)
    energy = once * (held & ~constant) / (tile**4 * _TILES**2)  # of the variance of luminance (Parseval)
    laplacian = (2 * np.cos(2 * np.pi * y) + 2 * np.cos(2 * np.pi * x) - 4) ** 2
    both = np.stack([energy * laplacian, energy * (np.hypot(x, y) > HIGH_FREQUENCY)])
    return both.reshape(2, -1).repeat(2, axis=1).astype(np.float32)
