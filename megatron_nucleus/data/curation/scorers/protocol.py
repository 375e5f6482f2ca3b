"""What a scorer is, and what a model of picture features is.

A scorer of your own is a class that takes a `ScorerConfig` and has the members of `Scorer`:

    class Darkness:
        name, revision, side_px = "darkness", "1", 64

        def __init__(self, config): ...

        def score(self, pictures, captions):
            return [Scored(1 - np.asarray(picture.convert("L")).mean() / 255) for picture in pictures]

and ``kind: my_scorers.py:Darkness`` in a recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image


class Scored(NamedTuple):
    """What a scorer says of one image.

    value: the score that thresholds look at; None when there is nothing to judge (an alignment without captions).
    captions: one number per caption, in order; None from a scorer that does not judge captions.
    """

    value: float | None
    captions: tuple[float, ...] | None = None


class Scorer(Protocol):
    """A judge of images, or of images with their captions.

    name: of the model or the measure. revision: changes whenever its values may; both are stored with every score.
    side_px: shortest side of a picture that is enough; pictures come through `reduced`, smaller ones as they are.
    """

    name: str
    revision: str
    side_px: int

    def score(self, pictures: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> Sequence[Scored]:
        """One result per picture. What it says of a picture does not depend on the others of the call.

        pictures: RGB (sRGB), upright. captions: the texts of each picture, maybe none.
        """
        ...


class FeatureModel(Protocol):
    """Pictures -> vectors on which a head can be trained.

    name, revision, side_px: as in `Scorer`. dim: width of a vector. checksum: of all that decides the vectors; a head
    is only good for the checksum that it was trained on.
    """

    name: str
    revision: str
    checksum: str
    side_px: int
    dim: int

    def embed(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """float32 [pictures, dim]; a picture's vector does not depend on the others of the call."""
        ...


def reduced(picture: Image.Image, side_px: int) -> Image.Image:
    """The picture at 1/2, 1/3, ... of its size by averaging, its shortest side still at least ``side_px``.

    What a draft decode does for a JPEG, for all formats: a batch of large pictures fits into memory.
    """
    factor = min(picture.size) // side_px
    return picture.reduce(factor) if factor > 1 else picture
