"""Which objects a picture of a scene shows, read from its pixels: the detector of the embedded benchmark.

The background is the median of the border. Every pixel is explained as a mixture of the background and the
palette colour that fits it best; what is more than half colour is foreground. Connected foreground is an
object, its colour is the palette colour nearest to its core, its shape the template that overlaps it best.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import ndimage

from megatron_nucleus.data.scenes import COLORS, SHAPES

MIN_SIDE_PX = 32
_NAMES = tuple(COLORS)
_PALETTE_K3 = np.array([COLORS[name] for name in _NAMES], np.float32)
_SAME_AS_BACKGROUND = 60.0  # RGB distance: a palette colour nearer to the background than this cannot be seen
_UNKNOWN_COLOR = 110.0  # RGB distance to the nearest palette colour beyond which a colour has no name
_MIN_AREA_PX, _MIN_AREA_FRAC = 12, 0.0022  # smaller specks are no objects (a third of the smallest one drawn)
_MIN_FIT = 0.7  # overlap with the best template below which a shape has no name
_MAX_ASPECT = 1.6  # a longer box holds no circle, square or triangle of this world
_SPLIT_FIT = 0.85  # a better fit than this is one object, whatever its outline
_SECOND_COLOR_FRAC = 0.2  # share of the core above which another colour is another object
_THINNEST_PX = 1.5  # a line has no shape
_WINDOW_PX = 2
_SOFTNESS_PX = (1.0, 2.0, 3.0)  # width of an edge: antialiased, and blurred by a codec or a model
_MOMENTS = {  # area of the shape in its box of side 1, and its standard deviations along x and y
    "circle": (math.pi / 4, 1 / 4, 1 / 4),
    "square": (1.0, 1 / math.sqrt(12), 1 / math.sqrt(12)),
    "triangle": (1 / 2, 1 / math.sqrt(24), 1 / math.sqrt(18)),
}


@dataclasses.dataclass(frozen=True)
class Detection:
    """One object. ``shape`` and ``color`` are None where nothing known fits.

    box_px: (left, top, right, bottom), right and bottom exclusive. fit: overlap with the template, 0 to 1.
    """

    shape: str | None
    color: str | None
    box_px: tuple[float, float, float, float]
    fit: float


def detect(pixels: np.ndarray) -> list[Detection]:
    """Find the objects of a picture, best fit first.

    Args:
        pixels: uint8 RGB [height, width, 3], both sides at least 32 px.

    Raises:
        ValueError: another shape or type.
    """
    if (
        pixels.ndim != 3
        or pixels.shape[2] != 3
        or pixels.dtype != np.uint8
        or min(pixels.shape[:2]) < MIN_SIDE_PX
    ):
        raise ValueError(
            f"expected uint8 RGB pixels [height, width, 3] of at least {MIN_SIDE_PX} px, "
            f"got {pixels.dtype} {list(pixels.shape)}"
        )
    image = pixels.astype(np.float32)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    background_3 = np.median(border, axis=0)
    alpha, label = _unmix(image, background_3)
    objects, count = ndimage.label(alpha > 0.5)
    min_area = max(_MIN_AREA_PX, _MIN_AREA_FRAC * objects.size)
    found = []
    for number, window in enumerate(ndimage.find_objects(objects, count), start=1):
        window = _grow(window, objects.shape)
        mask = objects[window] == number
        for part in _by_color(mask, label[window], min_area):
            found += _describe(image[window], part, objects[window] > 0, background_3, window, min_area)
    return sorted(found, key=lambda d: -d.fit)


def _grow(window: tuple[slice, slice], size: tuple[int, ...]) -> tuple[slice, slice]:
    return tuple(
        slice(max(w.start - _WINDOW_PX, 0), min(w.stop + _WINDOW_PX, n))
        for w, n in zip(window, size, strict=True)
    )


def _unmix(image: np.ndarray, background_3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share [height, width] and index of the palette colour that best explains each pixel.

    A pixel is p = background + share * (colour - background) + residual, 0 <= share <= 1; the colour with the
    smallest residual wins.
    """
    towards_K3 = _PALETTE_K3 - background_3
    length_K = (towards_K3**2).sum(axis=1)
    visible = np.flatnonzero(length_K > _SAME_AS_BACKGROUND**2)
    offset = image - background_3
    along = np.clip(offset @ towards_K3[visible].T / length_K[visible], 0, 1)  # [height, width, visible]
    # |offset - share * towards|^2 without the part that all colours share
    residual = along * (along * length_K[visible] - 2 * (offset @ towards_K3[visible].T))
    best = residual.argmin(axis=2)
    return np.take_along_axis(along, best[..., None], axis=2)[..., 0], visible[best]


def _core(mask: np.ndarray) -> np.ndarray:
    """The mask without its outermost pixels, or the mask itself where nothing would be left."""
    core = ndimage.binary_erosion(mask)
    return core if core.any() else mask


def _by_color(mask: np.ndarray, label: np.ndarray, min_area: float) -> list[np.ndarray]:
    """Cut touching objects of different colours apart; one mask per object."""
    core = _core(mask)
    counts = np.bincount(label[core], minlength=len(_NAMES))
    colors = np.flatnonzero(counts > max(_SECOND_COLOR_FRAC * counts.sum(), min_area / 3))
    if len(colors) < 2:
        return [mask]
    nearest = ndimage.distance_transform_edt(
        ~(core & np.isin(label, colors)), return_distances=False, return_indices=True
    )
    owner = label[tuple(nearest)]
    parts = []
    for color in colors:
        pieces, count = ndimage.label(mask & (owner == color))
        parts += [pieces == number for number in range(1, count + 1)]
    return parts


def _describe(
    image: np.ndarray,
    mask: np.ndarray,
    foreground: np.ndarray,
    background_3: np.ndarray,
    window: tuple[slice, slice],
    min_area: float,
) -> list[Detection]:
    """Name one connected mask, or its two or more parts when each fits a template better than the whole."""
    if mask.sum() < min_area:
        return []
    whole = _name(image, mask, foreground & ~mask, background_3, window)
    if whole.shape is not None and whole.fit >= _SPLIT_FIT:
        return [whole]
    parts = [part for part in _by_neck(mask) if part.sum() >= min_area]
    if len(parts) < 2:
        return [whole]
    split = [_name(image, part, foreground & ~part, background_3, window) for part in parts]
    better = min(d.fit for d in split) > (whole.fit if whole.shape is not None else _MIN_FIT)
    return split if better else [whole]


def _by_neck(mask: np.ndarray) -> list[np.ndarray]:
    """Cut a mask at its necks: the cores left by the first erosion depth that leaves more than one."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    for limit in np.arange(1.0, depth.max(), 0.5):
        cores, count = ndimage.label(depth > limit)
        sizes = np.bincount(cores.ravel())[1:]
        if count > 1 and np.sort(sizes)[-2] >= 2:
            nearest = ndimage.distance_transform_edt(cores == 0, return_distances=False, return_indices=True)
            owner = cores[tuple(nearest)]
            return [mask & (owner == number) for number in range(1, count + 1)]
    return [mask]


def _name(
    image: np.ndarray,
    mask: np.ndarray,
    others: np.ndarray,
    background_3: np.ndarray,
    window: tuple[slice, slice],
) -> Detection:
    """Colour and shape of one mask; ``others`` marks foreground that belongs to other objects."""
    core_3 = np.median(image[_core(mask)], axis=0)
    distance_K = np.sqrt(((_PALETTE_K3 - core_3) ** 2).sum(axis=1))
    color = _NAMES[int(distance_K.argmin())] if distance_K.min() <= _UNKNOWN_COLOR else None
    towards_3 = core_3 - background_3
    alpha = np.clip((image - background_3) @ towards_3 / max(float(towards_3 @ towards_3), 1.0), 0, 1)
    alpha *= ndimage.binary_dilation(mask, iterations=_WINDOW_PX) & ~others
    shape, fit, aspect = _best_shape(alpha)
    if fit < _MIN_FIT or not 1 / _MAX_ASPECT <= aspect <= _MAX_ASPECT:
        shape = None
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = window[1].start, window[0].start
    box = (columns[0] + left, rows[0] + top, columns[-1] + 1 + left, rows[-1] + 1 + top)
    return Detection(shape, color, tuple(float(edge) for edge in box), fit)


def _best_shape(alpha: np.ndarray) -> tuple[str | None, float, float]:
    """The shape whose template overlaps the soft mask best, that overlap, and its width over its height.

    A template has the soft mask's centroid, area and ratio of second moments, which a blur leaves nearly
    as they are, unlike the box; its edges are tried sharp and soft.
    """
    area = float(alpha.sum())
    if area < 1:  # nothing stands out: the median colour of speckle can equal the background
        return None, 0.0, 1.0
    y = np.arange(alpha.shape[0], dtype=np.float32)[:, None] + 0.5
    x = np.arange(alpha.shape[1], dtype=np.float32) + 0.5
    center_x, center_y = float((alpha * x).sum()) / area, float((alpha * y).sum()) / area
    dx, dy = x - center_x, y - center_y
    spread_xx, spread_yy = float((alpha * dx * dx).sum()) / area, float((alpha * dy * dy).sum()) / area
    if min(spread_xx, spread_yy) < _THINNEST_PX**2 / 12:
        return None, 0.0, 1.0
    spread = math.sqrt(spread_xx / spread_yy)
    best: tuple[str | None, float, float] = (None, 0.0, spread)
    for shape in SHAPES:
        fill, spread_x, spread_y = _MOMENTS[shape]
        aspect = spread * spread_y / spread_x
        half_x, half_y = math.sqrt(area * aspect / fill) / 2, math.sqrt(area / aspect / fill) / 2
        for soft_px in _SOFTNESS_PX:
            template = _template(shape, dx, dy, half_x, half_y, soft_px)
            overlap = float(np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum())
            if overlap > best[1]:
                best = (shape, overlap, aspect)
    return best


def _template(
    shape: str, dx: np.ndarray, dy: np.ndarray, half_x: float, half_y: float, soft_px: float
) -> np.ndarray:
    """Coverage [height, width] of a shape 2 half_x wide and 2 half_y high at its centroid."""

    def inside(distance_px: np.ndarray) -> np.ndarray:
        return np.clip(0.5 - distance_px / soft_px, 0, 1)

    if shape == "circle":
        return inside((np.sqrt((dx / half_x) ** 2 + (dy / half_y) ** 2) - 1) * min(half_x, half_y))
    if shape == "square":
        return inside(np.abs(dx) - half_x) * inside(np.abs(dy) - half_y)
    rise = 2 * half_y / half_x  # of the slanted sides; the centroid lies at two thirds of the height
    slanted = (np.abs(dx) * rise - dy - half_y * 4 / 3) / math.sqrt(rise * rise + 1)
    return inside(slanted) * inside(dy - half_y * 2 / 3)
