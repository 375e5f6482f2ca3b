"""Which library turns a micro-batch's bytes into pixels, and what it is trusted with.

Pillow (`data/images.py`) is the rule that curation applied. Another library is used under these terms:

- It gets a JPEG whose bytes are those that curation decoded completely (their sha256 is the sample's id) and whose
  header asks for a decode alone: RGB or grey, no colour profile but sRGB, one picture, at most `MAX_RUN_PIXELS`.
  Pillow decodes the rest.
- What it refuses is found by halving the batch, on a new pipeline each time, because one image ends a pipeline.
  Pillow then decodes that image, or says what is wrong with it.

So which images are used and which are replaced does not depend on the decoder. Pixels do, a little (README, "The
data path"), and not on the other images of the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from megatron_nucleus.data import images
from megatron_nucleus.data.dataset import Corpus, StoredSample
from megatron_nucleus.utils.errors import ConfigError, DataError

PILLOW, DALI, DALI_MIXED = DECODERS = ("pillow", "dali", "dali_mixed")
_DEVICES = {DALI: "cpu", DALI_MIXED: "mixed"}  # as backends/dali.py names them
# Whole pictures lie in memory before they are cut, and a library keeps what it has taken: 96 MiB, own choice.
MAX_RUN_PIXELS = 2**25
# After so many images in a row that the library alone refuses, a plain one tells whether it works at all; own choice.
MAX_REFUSED_IN_A_ROW = 16
_PROBE_PX = 16
# EXIF orientation -> what makes a stored picture [H, W, 3] upright.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x[::-1].transpose(1, 0, 2),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: x[:, ::-1].transpose(1, 0, 2),
}
log = logging.getLogger(__name__)


class Pipeline(Protocol):
    """What a library has to offer: `backends.dali.JpegPipeline`."""

    def run(
        self,
        payloads: Sequence[bytes],
        boxes_px: Sequence[tuple[float, float, float, float]],
        sizes_px: Sequence[tuple[int, int]],
    ) -> list[np.ndarray]:
        """Pictures uint8 RGB [height, width, 3]; any exception ends the pipeline."""
        ...


@dataclasses.dataclass
class Counts:
    """Images by who decoded them. refused: tried by the library, then left to Pillow. pipelines: opened so far."""

    library: int = 0
    pillow: int = 0
    refused: int = 0
    pipelines: int = 0


class _Task(NamedTuple):
    """One image for the library, as it is stored; index: its place in the batch. pixels: of the whole picture."""

    index: int
    payload: bytes
    pixels: int
    box_px: tuple[float, float, float, float]
    size_px: tuple[int, int]
    orientation: int


class BatchDecoder:
    """Fits batches of images with a library, under the terms above.

    Attributes:
        name: one of `DECODERS`. own_thread: the loader must run it in a thread of the training process.
        counts: what was done so far in this process.
    """

    def __init__(
        self,
        name: str,
        open_pipeline: Callable[[], Pipeline],
        max_images: int,
        own_thread: bool = False,
    ):
        """open_pipeline: called where the images are decoded, again after each error. max_images: of one run."""
        self.name, self.own_thread, self.counts = name, own_thread, Counts()
        self._open_pipeline, self._max_images = open_pipeline, max_images
        self._pipeline: Pipeline | None = None
        self._refused_in_a_row = 0

    def decode(
        self, payloads: Sequence[bytes], ids: Sequence[str], width: int, height: int
    ) -> list[np.ndarray | images.UnusableImage]:
        """Fit images into ``width`` x ``height`` px.

        Args:
            payloads: the files. ids: their content ids, hex sha256.

        Returns:
            per image: uint8 RGB [height, width, 3], or what is wrong with it.

        Raises:
            DataError: the library opens no pipeline, or fails on everything.
        """
        out: dict[int, np.ndarray | images.UnusableImage] = {}
        refused: dict[int, str] = {}
        tasks = [
            task
            for index, (payload, sample_id) in enumerate(zip(payloads, ids, strict=True))
            if (task := _plan(index, payload, sample_id, width, height)) is not None
        ]
        for piece in _pieces(tasks, self._max_images):
            self._run(piece, out, refused)
        self.counts.library += len(out)
        for index, payload in enumerate(payloads):
            if index not in out:
                out[index] = self._by_pillow(payload, width, height)
                if index in refused and isinstance(out[index], np.ndarray):
                    self._count_refusal(ids[index], refused[index])
        return [out[index] for index in range(len(payloads))]

    def _run(self, tasks: list[_Task], out: dict, refused: dict[int, str]) -> None:
        """Decode ``tasks`` into ``out``; those that the library cannot decode even alone into ``refused``."""
        made = self._try(tasks)
        if not isinstance(made, str):
            self._refused_in_a_row = 0
            for task, picture in zip(tasks, made, strict=True):
                out[task.index] = _UPRIGHT[task.orientation](picture)
        elif len(tasks) == 1:
            refused[tasks[0].index] = made
        else:
            middle = len(tasks) // 2
            self._run(tasks[:middle], out, refused)
            self._run(tasks[middle:], out, refused)

    def _try(self, tasks: list[_Task]) -> list[np.ndarray] | str:
        """The pictures, or what the library said. Nothing of a lost pipeline is left when this returns."""
        if self._pipeline is None:
            self._pipeline = self._open()
        try:
            return self._pipeline.run(
                [t.payload for t in tasks], [t.box_px for t in tasks], [t.size_px for t in tasks]
            )
        except Exception as error:  # whatever the library raises, its pipeline is lost
            self._pipeline = None
            return _reason(error)

    def _open(self) -> Pipeline:
        self.counts.pipelines += 1
        try:
            return self._open_pipeline()
        except Exception as error:  # no memory, no threads, no driver
            raise DataError(
                f"--image-decoder {self.name}: cannot open a pipeline ({_reason(error)}); use --image-decoder {PILLOW}"
            ) from error

    def _by_pillow(self, payload: bytes, width: int, height: int) -> np.ndarray | images.UnusableImage:
        self.counts.pillow += 1
        try:
            return images.load_pixels(payload, width, height)
        except images.UnusableImage as error:  # without its frames, which hold the whole batch
            return images.UnusableImage(error.reason, error.detail)

    def _count_refusal(self, sample_id: str, reason: str) -> None:
        self.counts.refused += 1
        self._refused_in_a_row += 1
        log.warning("%s refused %s, Pillow decoded it (%s)", self.name, sample_id, reason)
        if self._refused_in_a_row < MAX_REFUSED_IN_A_ROW:
            return
        self._refused_in_a_row = 0
        said = self._try([_probe()])
        if isinstance(said, str):
            raise DataError(
                f"--image-decoder {self.name}: refused {MAX_REFUSED_IN_A_ROW} images in a row that Pillow decodes, the "
                f"last one {sample_id} ({reason}), then a plain one ({said}); use --image-decoder {PILLOW}"
            )


def why_unavailable(name: str) -> str | None:
    """Why the decoder ``name``, one of `DECODERS`, cannot run here, in one line; None when it can."""
    if name == PILLOW:
        return None
    try:
        return _library().why_unavailable(_DEVICES[name])
    except Exception as error:  # such libraries raise nearly any type at import
        return f"needs nvidia-dali-cuda130, which cannot be imported ({_reason(error)})"


def open_decoder(name: str, corpus: Corpus) -> BatchDecoder | None:
    """The decoder ``name``, one of `DECODERS`; None for Pillow, which takes no batches. Nothing is decoded yet.

    Raises:
        ConfigError: it cannot run here, with the reason and those that can, or the corpus holds no images.
    """
    reason = why_unavailable(name)
    if reason is not None:
        usable = ", ".join(other for other in DECODERS if why_unavailable(other) is None)
        raise ConfigError(f"--image-decoder {name}: {reason}. Usable here: {usable}")
    if name == PILLOW:
        return None
    if corpus.encoded is not None:
        raise ConfigError(
            f"--image-decoder {name}: {corpus.root} is encoded and holds no images; leave it at {PILLOW}"
        )
    device_id = _library().current_gpu() if name == DALI_MIXED else None
    open_pipeline = functools.partial(_open_dali, _DEVICES[name], device_id)
    return BatchDecoder(name, open_pipeline, _library().MAX_IMAGES, own_thread=name == DALI_MIXED)


def reader(
    corpus: Corpus, decoder: BatchDecoder | None, rows: Iterable[int], size_px: tuple[int, int] | None
) -> Callable[[int], StoredSample]:
    """``Corpus.read`` with the pixels of ``rows`` decoded together; other rows are decoded when they are read.

    Args:
        decoder: None: nothing is decoded here. rows: what will be read. size_px: (width, height) of the pixels.

    Returns:
        a function of a row. It raises DataError, as ``Corpus.read``, and UnusableImage.
    """
    if decoder is None or size_px is None:
        return corpus.read
    ready = _read_together(corpus, decoder, list(dict.fromkeys(rows)), size_px)

    def read(row: int) -> StoredSample:
        found = ready[row] if row in ready else _read_together(corpus, decoder, [row], size_px)[row]
        # New ones: an exception that is raised holds this frame, and with it every picture of the batch.
        if isinstance(found, images.UnusableImage):
            raise images.UnusableImage(found.reason, found.detail)
        if isinstance(found, DataError):
            raise DataError(str(found))
        return found

    return read


def _read_together(
    corpus: Corpus, decoder: BatchDecoder, rows: list[int], size_px: tuple[int, int]
) -> dict[int, StoredSample | DataError | images.UnusableImage]:
    found: dict[int, StoredSample | DataError | images.UnusableImage] = {}
    samples: dict[int, StoredSample] = {}
    for row in rows:
        try:
            samples[row] = corpus.read(row)
        except DataError as error:
            found[row] = DataError(str(error))
    payloads, ids = [s.payload for s in samples.values()], [s.id for s in samples.values()]
    decoded = decoder.decode(payloads, ids, *size_px)
    for (row, sample), pixels in zip(samples.items(), decoded, strict=True):
        found[row] = sample._replace(pixels=pixels) if isinstance(pixels, np.ndarray) else pixels
    return found


def _plan(index: int, payload: bytes, sample_id: str, width: int, height: int) -> _Task | None:
    """What to ask of the library; None where the image is Pillow's."""
    if hashlib.sha256(payload).hexdigest() != sample_id:
        return None
    header = images.plain_jpeg(payload)
    if header is None or header.width_px * header.height_px > MAX_RUN_PIXELS:
        return None
    if header.orientation >= 5:  # stored sideways
        width, height = height, width
    box_px = images.crop_box(header.width_px, header.height_px, width / height)
    pixels = header.width_px * header.height_px
    return _Task(index, payload, pixels, box_px, (width, height), header.orientation)


def _pieces(tasks: list[_Task], max_images: int) -> Iterator[list[_Task]]:
    """Runs of up to ``max_images`` images and `MAX_RUN_PIXELS`, in order."""
    piece: list[_Task] = []
    for task in tasks:
        if len(piece) == max_images or sum(t.pixels for t in piece) + task.pixels > MAX_RUN_PIXELS:
            yield piece
            piece = []
        piece.append(task)
    if piece:
        yield piece


@functools.cache
def _probe() -> _Task:
    """The plainest JPEG there is."""
    buffer = io.BytesIO()
    Image.new("RGB", (_PROBE_PX, _PROBE_PX)).save(buffer, "JPEG")
    side = float(_PROBE_PX)
    return _Task(0, buffer.getvalue(), _PROBE_PX**2, (0.0, 0.0, side, side), (_PROBE_PX, _PROBE_PX), 1)


def _library():
    return importlib.import_module("megatron_nucleus.backends.dali")


def _open_dali(device: str, device_id: int | None) -> Pipeline:
    return _library().JpegPipeline(device, device_id)


def _reason(error: Exception) -> str:
    """One line; of a library's long report the last one that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]
