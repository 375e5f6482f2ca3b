"""Plain statistics of pixels, without any model: five numbers in [0, 1], and their mean as a score.

They say whether a picture has contrast, colour, detail and a balanced exposure. They say nothing of what it shows,
nor of beauty: a fine night scene scores low, a test chart high. Luma is that of ITU-R BT.601, on sRGB values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from megatron_nucleus.data.curation.scorers.protocol import Scored

NAME = "image_statistics"
REVISION = "1"  # raise it whenever a value changes
MEASURED_SIDE_PX = 256  # own choice: the smallest image that curation keeps by default
MEASURES = ("contrast", "colourfulness", "sharpness", "exposure", "entropy")
# Halves of the two open scales: a measure of this size maps to 0.5.
HALF_COLOURFULNESS = 45.0  # "averagely colourful" in Hasler and Suesstrunk, table 2
HALF_LAPLACIAN_VARIANCE = 1000.0  # own choice: near the median of scikit-image's photographs at 256 px
_LUMA = np.array([0.299, 0.587, 0.114])


class ImageStatistics:
    """`FeatureModel` and `Scorer` of plain image statistics; the score is the mean of the five.

    Equal weights are our own choice: nothing was fitted. For weights from ratings train a head
    (``tools/train_scorer.py --model image_statistics``).
    """

    name = NAME
    revision = REVISION
    checksum = f"{NAME}@{REVISION}"
    side_px = 2 * MEASURED_SIDE_PX  # the last factor of two decides the sharpness: not left to a draft decode
    dim = len(MEASURES)

    def embed(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """float32 [pictures, 5]: `measure` of each."""
        vectors = [measure(picture) for picture in pictures]
        return np.array(vectors, dtype=np.float32).reshape(len(vectors), self.dim)

    def score(self, pictures: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> list[Scored]:
        """The mean of the five, in [0, 1]; captions are not looked at."""
        return [Scored(float(vector.mean())) for vector in self.embed(pictures)]


def measure(picture: Image.Image) -> np.ndarray:
    """The five measures of a picture, float64 [5] in [0, 1], in the order of `MEASURES`.

    - contrast: standard deviation of luma over 127.5, the largest there is.
    - colourfulness: c / (c + 45), c by Hasler and Suesstrunk, "Measuring colourfulness in natural images" (2003).
    - sharpness: v / (v + 1000), v the variance of luma's Laplacian (4 neighbours).
    - exposure: 1 for a mean luma of mid-grey, falling linearly to 0 for black and for white.
    - entropy: of the histogram of luma in 256 bins, in bits over 8.

    The picture is first reduced to a shortest side of 256 px; a smaller one is measured as it is.
    """
    rgb_HWC = np.asarray(_reduced(picture), dtype=np.float64)
    luma_HW = rgb_HWC @ _LUMA
    colour = colourfulness(rgb_HWC)
    detail = laplacian_variance(luma_HW)
    return np.array(
        [
            luma_HW.std() / 127.5,
            colour / (colour + HALF_COLOURFULNESS),
            detail / (detail + HALF_LAPLACIAN_VARIANCE),
            1 - abs(luma_HW.mean() - 127.5) / 127.5,
            _entropy_bits(luma_HW) / 8,
        ]
    )


def colourfulness(rgb_HWC: np.ndarray) -> float:
    """Hasler and Suesstrunk's measure of float RGB [H, W, 3] in 0..255: 0 for greys, 109 "extremely colourful"."""
    red, green, blue = np.moveaxis(rgb_HWC, -1, 0)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = np.hypot(red_green.std(), yellow_blue.std())
    return float(spread + 0.3 * np.hypot(red_green.mean(), yellow_blue.mean()))


def laplacian_variance(luma_HW: np.ndarray) -> float:
    """Variance of the Laplacian (4 neighbours) inside the border; 0 for a picture without an inside."""
    if min(luma_HW.shape) < 3:
        return 0.0
    centre = luma_HW[1:-1, 1:-1]
    around = luma_HW[:-2, 1:-1] + luma_HW[2:, 1:-1] + luma_HW[1:-1, :-2] + luma_HW[1:-1, 2:]
    return float((around - 4 * centre).var())


def _entropy_bits(luma_HW: np.ndarray) -> float:
    counts = np.bincount(np.rint(luma_HW).astype(np.int64).ravel(), minlength=256)
    shares = counts[counts > 0] / luma_HW.size
    return float(-(shares * np.log2(shares)).sum())


def _reduced(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGB")
    scale = MEASURED_SIDE_PX / min(picture.size)
    if scale >= 1:
        return picture
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BICUBIC)
