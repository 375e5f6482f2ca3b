"""From planned rows to a `RawBatch`: read, decode, choose the caption. Runs in the loader's workers."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_nucleus.data import buckets, images
from megatron_nucleus.data.curriculum import CAPTION_CLASSES
from megatron_nucleus.data.dataset import Corpus, StoredSample, unpack_features
from megatron_nucleus.data.decoders import BatchDecoder, reader
from megatron_nucleus.data.mixture import CaptionMix
from megatron_nucleus.data.permutation import permute
from megatron_nucleus.types import Caption, RawBatch, TextFeatures
from megatron_nucleus.utils import rng
from megatron_nucleus.utils.errors import DataError

DROPPED = "dropped"
_SUBSTITUTE_ATTEMPTS = 16  # the first half inside the sample's cell, the rest in its whole bucket
_BELOW_ONE = 1.0 - 2.0**-53


class Job(NamedTuple):
    """One micro-batch to make.

    rows: rows of the corpus. draws: positions in the run's sample order. first_slot: position of the first sample
    in its step of ``step_samples`` images. by_cell: a curriculum chose the rows. cells: what the whole step draws
    per cell, with its first micro-batch on this rank alone, else None.
    """

    step: int
    bucket: str
    rows: tuple[int, ...]
    draws: tuple[int, ...]
    first_slot: int
    step_samples: int
    captions: CaptionMix
    by_cell: bool
    cells: dict[str, int] | None


class Made(NamedTuple):
    """A finished micro-batch. problems: samples that were replaced. captions: class or `DROPPED` -> samples."""

    batch: RawBatch
    problems: list[str]
    captions: dict[str, int]


class SampleMaker(Dataset):
    """Makes a micro-batch from a `Job`: ``maker[job]`` -> `Made`.

    A DataError is returned, not raised: DataLoader would wrap it in a worker's traceback.
    """

    def __init__(
        self,
        corpus: Corpus,
        seed: int,
        sizes: dict[str, tuple[int, int]],
        decoder: BatchDecoder | None = None,
    ):
        """sizes: bucket -> (width, height) in px; empty for encoded data. decoder: None: Pillow, image by image."""
        self.corpus, self.seed, self.sizes, self.decoder = corpus, seed, sizes, decoder
        self.empty_text = corpus.empty_text() if corpus.encoded is not None else None

    def __getitem__(self, job: Job) -> Made | DataError:
        problems: list[str] = []
        captions: Counter[str] = Counter()
        slots = range(job.first_slot, job.first_slot + len(job.rows))
        marks = caption_marks(self.seed, job.step, slots, job.step_samples).tolist()
        try:
            with self._quiet():
                read = reader(self.corpus, self.decoder, job.rows, self.sizes.get(job.bucket))
                items = [
                    self._sample(job, i, marks[i], read, problems, captions) for i in range(len(job.rows))
                ]
        except DataError as error:
            return error
        return Made(_collate(job.bucket, job.draws, job.step_samples, items), problems, dict(captions))

    def _quiet(self) -> contextlib.AbstractContextManager[None]:
        """No warnings of Pillow's, but in a thread: their filters are the whole process's."""
        threaded = self.decoder is not None and self.decoder.own_thread
        return contextlib.nullcontext() if threaded else images.quiet_decoding()

    def _sample(
        self,
        job: Job,
        i: int,
        mark: float,
        read: Callable[[int], StoredSample],
        problems: list[str],
        captions: Counter[str],
    ) -> tuple:
        """(id, caption, pixels or latents [C, H, W], text features [L, U] or None)."""
        row, draw = job.rows[i], job.draws[i]
        for attempt in range(1, _SUBSTITUTE_ATTEMPTS + 1):
            try:
                sample = read(row)
                pick = rng.key64(self.seed, draw, "caption")
                choice = choose_caption(sample.captions, job.captions, mark, pick)
                name = DROPPED if choice is None else _known_class(sample.captions[choice])
                loaded = load_sample(sample, choice, self.sizes.get(job.bucket), self.empty_text)
            except (DataError, images.UnusableImage) as error:
                problems.append(f"{self.corpus.id(row)} ({' '.join(str(error).split())})")
            else:
                captions[name] += 1
                return loaded
            rows = self._alternatives(job, job.rows[i], attempt)
            row = rows[rng.key64(self.seed, draw, f"substitute:{attempt}") % len(rows)]
        raise DataError(
            f"{self.corpus.root}: {_SUBSTITUTE_ATTEMPTS} samples of bucket {job.bucket} in a row are "
            f"unreadable, the last one {problems[-1]}; copy the data set again"
        )

    def _alternatives(self, job: Job, row: int, attempt: int) -> range:
        """Rows to replace an unreadable one from: without a curriculum the bucket, else the cell first."""
        if job.by_cell and attempt <= _SUBSTITUTE_ATTEMPTS // 2:
            return next(rows for rows in self.corpus.cells[job.bucket].values() if row in rows)
        first = self.corpus.start[job.bucket]
        return range(first, first + self.corpus.buckets[job.bucket])


def load_samples(
    corpus: Corpus, rows: Sequence[int], draws: Sequence[int], resolution_px: int, multiple_px: int = 16
) -> RawBatch:
    """A batch of chosen rows outside the training loop, the same at any time.

    The caption is the first medium one, else the first, never dropped; "" for an image without captions.

    Args:
        rows: of one aspect bucket, held out or not. draws: the position of each in whatever is measured, the key of
            its randomness. resolution_px, multiple_px: as in `build_loader`, read for images alone.

    Raises:
        ConfigError: a resolution that does not fit. ValueError: rows of several buckets, or none.
        DataError: a sample that cannot be read; it is not replaced.
    """
    names = {corpus.bucket(row) for row in rows}
    if len(names) != 1 or len(rows) != len(draws):
        raise ValueError(
            f"{len(rows)} rows of buckets {sorted(names)} with {len(draws)} draws: one bucket, one draw each"
        )
    (bucket,) = names
    size, empty_text = _fixed_form(corpus, bucket, resolution_px, multiple_px)
    with images.quiet_decoding():
        items = [_load_fixed(corpus, row, size, empty_text) for row in rows]
    return _collate(bucket, tuple(draws), len(rows), items)


def find_unreadable(
    corpus: Corpus, rows: Sequence[int], resolution_px: int, multiple_px: int = 16
) -> dict[str, str]:
    """Content id -> message of the rows, of any buckets, that `load_samples` would refuse with a DataError.

    Each is read and decoded once, alone, so memory is that of one image. Of stored features the container and the
    tensors of the caption are read; whether the values are right is not known here.
    """
    forms = {
        b: _fixed_form(corpus, b, resolution_px, multiple_px) for b in sorted(set(map(corpus.bucket, rows)))
    }
    found = {}
    with images.quiet_decoding():
        for row in rows:
            try:
                _load_fixed(corpus, row, *forms[corpus.bucket(row)])
            except DataError as error:
                found[corpus.id(row)] = str(error)
    return found


def _fixed_form(
    corpus: Corpus, bucket: str, resolution_px: int, multiple_px: int
) -> tuple[tuple[int, int] | None, torch.Tensor | None]:
    """(width, height) in px of a bucket's images, None for encoded data; features of the empty caption for these."""
    if corpus.encoded is None:
        return buckets.size(bucket, resolution_px, multiple_px), None
    return None, corpus.empty_text()


def _load_fixed(
    corpus: Corpus, row: int, size: tuple[int, int] | None, empty_text: torch.Tensor | None
) -> tuple:
    sample = corpus.read(row)
    try:
        return load_sample(sample, _fixed_caption(sample.captions), size, empty_text)
    except (DataError, images.UnusableImage) as error:
        raise DataError(f"{corpus.root}: sample {sample.id}: {error}; copy the data set again") from error


def load_sample(
    sample: StoredSample, caption: int | None, size: tuple[int, int] | None, empty_text: torch.Tensor | None
) -> tuple[str, str, torch.Tensor, torch.Tensor | None]:
    """(id, caption, pixels uint8 or latents [C, H, W], text features [L, U] or None for images).

    caption: number of the caption, None for the empty one. size: (width, height) in px, None for encoded data.
    """
    text = "" if caption is None else sample.captions[caption].text
    if size is not None:
        pixels = images.load_pixels(sample.payload, *size) if sample.pixels is None else sample.pixels
        return sample.id, text, torch.from_numpy(pixels.transpose(2, 0, 1).copy()), None
    latents, features = unpack_features(sample.payload, caption)
    return sample.id, text, latents, empty_text if features is None else features


def caption_marks(seed: int, step: int, slots: range, step_samples: int) -> np.ndarray:
    """The numbers u in [0, 1) that choose the captions of a step's slots, float64.

    u = (permuted slot + v) / images of the step: one in every stratum, so that an interval of length d holds d x
    images of them, rounded down or up. Permutation and v are keyed by (seed, step).
    """
    key = rng.key64(seed, step, "caption_slots")
    strata = permute(np.arange(slots.start, slots.stop, dtype=np.int64), step_samples, key)
    return np.minimum((strata + rng.uniform(seed, step, "caption_phase")) / step_samples, _BELOW_ONE)


def choose_caption(captions: tuple[Caption, ...], mix: CaptionMix, mark: float, pick: int) -> int | None:
    """Index of the caption for one draw, or None where it is dropped or the image has none.

    ``mark`` in [0, 1) lies in one of the stretches dropped | short | medium | detailed, as long as their shares.
    These are renormalised over the classes that the image has; if all of those have weight 0, every caption is
    equally likely. ``pick`` chooses between captions of one class.
    """
    if not captions or mark < mix.drop_frac:
        return None
    groups = {name: [i for i, c in enumerate(captions) if c.length_class == name] for name in CAPTION_CLASSES}
    weights = zip(groups.values(), mix[:3], strict=True)
    present = [(weight, members) for members, weight in weights if members and weight > 0]
    members = list(range(len(captions)))
    if present:
        kept = (mark - mix.drop_frac) / (1.0 - mix.drop_frac)
        target = kept * sum(weight for weight, _ in present)
        for weight, members in present:  # noqa: B007  (the one reached is used)
            target -= weight
            if target < 0:
                break
    return members[pick % len(members)]


def _known_class(caption: Caption) -> str:
    """Its length class. Ranks add their counts up class by class, so an unknown one may not come in unseen."""
    if caption.length_class not in CAPTION_CLASSES:
        raise DataError(
            f"a caption of length_class {caption.length_class!r}, none of {', '.join(CAPTION_CLASSES)}"
        )
    return caption.length_class


def _fixed_caption(captions: tuple[Caption, ...]) -> int | None:
    medium = (i for i, caption in enumerate(captions) if caption.length_class == "medium")
    return next(medium, 0) if captions else None


def _collate(bucket: str, draws: tuple[int, ...], step_samples: int, items: list[tuple]) -> RawBatch:
    ids, texts, tensors, features = zip(*items, strict=True)
    stacked = torch.stack(tensors)
    if features[0] is None:
        return RawBatch(bucket, draws, ids, texts, step_samples, pixels_BCHW=stacked)
    return RawBatch(bucket, draws, ids, texts, step_samples, latents_BCHW=stacked, text=_pad(features))


def _pad(features: tuple[torch.Tensor, ...]) -> TextFeatures:
    """Stack [L_i, U] features, zeros behind the shorter ones; the mask is None when none is shorter."""
    lengths = torch.tensor([len(f) for f in features])
    padded = torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True)
    if bool((lengths == padded.shape[1]).all()):
        return TextFeatures(padded, None)
    return TextFeatures(padded, torch.arange(padded.shape[1])[None, :] < lengths[:, None])
