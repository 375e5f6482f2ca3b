"""Which of a few rows of a corpus stage are pictures in colour.

`inspect` decodes the luminance alone wherever that will do, so whether a picture is grey is not among its measures. A
stage that has to choose between copies asks here for those few; a JPEG is decoded at a fraction of its size.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from megatron_nucleus.data.curation import measures
from megatron_nucleus.data.curation.picture_tasks import PictureTask, map_pictures
from megatron_nucleus.data.curation.stage import REFERENCE_COLUMNS
from megatron_nucleus.data.curation.store import Corpus
from megatron_nucleus.data.images import UnusableImage, quiet_decoding

# Own choice. Grey that was saved as RGB has 0, and its JPEG as well; of 11 colour photographs the least has 11
# (galaxies on black). A sepia tone, which grows with the lightness, has 6 to 20: it counts as colour.
MIN_COLOUR_SPREAD = 2.0
_SIDE_PX = 64  # more than enough for the samples that are looked at


def in_colour(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """Whether each row (ascending numbers, as `Corpus.gather` takes them) has colour; bool [rows].

    A picture that can no longer be decoded, or that ends the process, counts as grey: its copy is the better one.
    """
    references = corpus.gather(rows, REFERENCE_COLUMNS).to_pylist()
    return np.array([found is True for found in map_pictures(corpus, look_for_colour, references)], bool)


def look_for_colour(task: PictureTask) -> list[bool]:
    """Whether each picture has colour; called in a worker."""
    out = []
    with quiet_decoding():
        for reference in task.references:
            try:
                picture = task.source.decode(task.source.read(reference), _SIDE_PX)
            except UnusableImage:
                out.append(False)
                continue
            out.append(colour_spread(picture) >= MIN_COLOUR_SPREAD)
    return out


def colour_spread(picture: Image.Image) -> float:
    """How much the colours of an RGB picture differ, whatever their lightness: levels of 256, 0 for a grey picture.

    The standard deviation of red minus green and blue minus green about their means, taken together, of 31 x 31 pixels.
    """
    colours = np.frombuffer(measures.sample_colours(picture), np.uint8).reshape(-1, 3).astype(np.int16)
    return float(np.sqrt((colours[:, ::2] - colours[:, 1:2]).var(0).sum()))
