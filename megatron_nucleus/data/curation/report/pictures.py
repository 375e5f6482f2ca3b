"""Small pictures of chosen images, made from their original bytes."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from megatron_nucleus.data import images
from megatron_nucleus.data.curation.engines import WorkerDied
from megatron_nucleus.data.curation.engines.local import LocalEngine
from megatron_nucleus.data.curation.stage import PayloadSource

THUMBNAIL_PX = 160  # longest side
_DRAFT_PX = (
    2 * THUMBNAIL_PX,
    2 * THUMBNAIL_PX,
)  # twice the size, so that the last step down is a good filter's
_JPEG_QUALITY = 80
# Not looked at again: it ended a process, or decoding is what its reason warns of.
NEVER_DECODE = frozenset(
    {
        "process_crash",
        "decompression_bomb",
        "damaged_tar",
        "damaged_table",
        "compressed_tar",
        "file_too_large",
    }
)


class Thumbnail(NamedTuple):
    """A JPEG as a data URI, and its size."""

    uri: str
    width_px: int
    height_px: int


class PictureTask(NamedTuple):
    """Where the bytes of one picture lie."""

    source: PayloadSource
    container: bytes
    offset: int | None
    length: int | None


def task_of(source: PayloadSource, row: Mapping[str, Any]) -> PictureTask:
    """Of a row with reference columns, kept or dropped."""
    return PictureTask(source, row["container"], row["offset"], row["length"])


def draw(
    trusted: Iterable[PictureTask], others: Sequence[PictureTask]
) -> dict[PictureTask, Thumbnail | None]:
    """Pictures of all tasks; None for what cannot be read or decoded.

    trusted: images that a stage has decoded before; drawn in this process. others: never decoded to the end so far; in
    a process of its own, which a decoder may take down without harm.
    """
    out = {task: thumbnail(task) for task in trusted}
    left = [task for task in dict.fromkeys(others) if task not in out]
    with contextlib.closing(LocalEngine(1)) as engine:
        for task, result in engine.map(thumbnail, left):
            if isinstance(result, WorkerDied):  # this one, or the one beside it
                result = engine.alone(thumbnail, task)
            out[task] = None if isinstance(result, WorkerDied) else result
    return out


def thumbnail(task: PictureTask) -> Thumbnail | None:
    """The picture with its longest side at `THUMBNAIL_PX`; a smaller one is enlarged with its pixels visible."""
    row = {"container": task.container, "offset": task.offset, "length": task.length}
    try:
        with images.quiet_decoding():
            picture = images.decode(task.source.read(row), task.source.max_pixels, _DRAFT_PX).image
    except images.UnusableImage:
        return None
    scale = THUMBNAIL_PX / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return Thumbnail("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), *size)
