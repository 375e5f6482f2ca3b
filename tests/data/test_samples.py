"""Samples: captions stratified over a step, and chosen rows read outside the training loop."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_nucleus.data.buckets import size
from megatron_nucleus.data.dataset import open_corpus
from megatron_nucleus.data.images import fit, load_pixels
from megatron_nucleus.data.mixture import CaptionMix
from megatron_nucleus.data.samples import caption_marks, choose_caption, load_samples
from megatron_nucleus.types import Caption
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.data.corpora import make_encoded, make_tiered

CAPTIONS = tuple(
    Caption(t, c) for t, c in (("a", "short"), ("b", "medium"), ("c", "medium"), ("d", "detailed"))
)
CELLS = {"1024x1024": {("A1", "B1"): 6, ("A2", "B1"): 4}, "1344x768": {("A1", "B2"): 5}}


@pytest.mark.parametrize("samples", [1, 2, 7, 64, 1000])
def test_the_marks_of_a_step_hold_one_per_stratum(samples):
    for step in range(20):
        marks = caption_marks(3, step, range(samples), samples)
        assert sorted((marks * samples).astype(int).tolist()) == list(range(samples))
        assert marks.min() >= 0
        assert marks.max() < 1
        parts = [caption_marks(3, step, range(i, min(i + 5, samples)), samples) for i in range(0, samples, 5)]
        assert np.concatenate(parts).tolist() == marks.tolist()  # whatever the micro-batch
    if samples > 2:
        orders = {tuple(np.argsort(caption_marks(3, step, range(samples), samples))) for step in range(20)}
        assert len(orders) > 3


def test_the_marks_are_uniform_over_many_steps():
    marks = np.array([caption_marks(5, step, range(2, 3), 4)[0] for step in range(8000)])
    counts = np.histogram(marks, 16, (0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 40  # chi-square, 15 degrees of freedom: p = 0.0005


@pytest.mark.parametrize("samples", [5, 16, 250])
def test_captions_of_every_step_are_within_one_of_the_mixture(samples):
    mix = CaptionMix(1.0, 2.5, 0.5, 0.13)
    sums = Counter()
    for step in range(300):
        marks = caption_marks(7, step, range(samples), samples)
        drawn = Counter(choose_caption(CAPTIONS, mix, mark, 0) for mark in marks.tolist())
        sums.update(drawn)
        wanted = {None: 0.13, 0: 0.87 / 4, 1: 0.87 * 2.5 / 4, 3: 0.87 / 8}
        for index, share in wanted.items():
            assert abs(drawn[index] - share * samples) < 1 + 1e-9
    for index, share in wanted.items():  # and exact in the long run: the phase of the strata is random
        assert sums[index] == pytest.approx(300 * samples * share, abs=5 * 300**0.5 / 2)


def test_caption_weights_hold_over_the_classes_an_image_has():
    marks = ((np.arange(4000) + 0.5) / 4000).tolist()

    def shares(captions, mix):
        drawn = Counter(choose_caption(captions, mix, m, pick) for pick, m in enumerate(marks))
        return {index: n / len(marks) for index, n in drawn.items()}

    mix = CaptionMix(1.0, 2.0, 1.0, 0.2)
    assert shares(CAPTIONS, mix) == pytest.approx({None: 0.2, 0: 0.2, 1: 0.2, 2: 0.2, 3: 0.2}, abs=0.001)
    no_medium = CAPTIONS[:1] + CAPTIONS[3:]
    assert shares(no_medium, mix) == pytest.approx({None: 0.2, 0: 0.4, 1: 0.4}, abs=0.001)
    weightless = CaptionMix(0.0, 2.0, 1.0, 0.0)
    assert shares(CAPTIONS[:1], weightless) == {0: 1.0}
    assert 0 not in shares(CAPTIONS, weightless)
    assert shares(CAPTIONS, mix._replace(drop_frac=1.0)) == {None: 1.0}
    assert None not in shares(CAPTIONS, mix._replace(drop_frac=0.0))
    assert choose_caption((), mix._replace(drop_frac=0.0), 0.5, 0) is None


def test_chosen_rows_come_as_they_are_with_their_medium_caption(tmp_path):
    corpus = open_corpus(make_tiered(tmp_path / "d", CELLS), held_out_samples=4)
    for bucket, rows in corpus.held_out_buckets.items():
        batch = load_samples(corpus, rows, range(100, 100 + len(rows)), 32, 8)
        width, height = size(bucket, 32, 8)
        assert batch.bucket == bucket
        assert batch.draws == tuple(range(100, 100 + len(rows)))
        assert batch.step_samples == len(rows)
        for row, sample_id, text, pixels in zip(rows, batch.ids, batch.texts, batch.pixels_BCHW, strict=True):
            sample = corpus.read(row)
            assert sample_id == corpus.id(row)
            assert text == sample.captions[1].text
            assert text.endswith("medium")
            want = load_pixels(sample.payload, width, height)
            assert (pixels.permute(1, 2, 0).numpy() == want).all()
    mixed = [corpus.start["1024x1024"], corpus.start["1344x768"]]
    for rows, draws in ((mixed, (0, 1)), ([], ()), ([0], (0, 1))):
        with pytest.raises(ValueError, match="one bucket, one draw each"):
            load_samples(corpus, rows, draws, 32, 8)
    with pytest.raises(ConfigError, match="resolution_px 33"):
        load_samples(corpus, [0], [0], 33, 8)


def test_chosen_rows_of_encoded_data_and_the_first_caption_where_none_is_medium(tmp_path):
    stored = make_encoded(tmp_path / "d", 8)
    corpus = open_corpus(tmp_path / "d", held_out_samples=3)
    batch = load_samples(corpus, corpus.held_out, [0, 1, 2], 32)
    assert batch.ids == tuple(f"{i:064x}" for i in range(3))  # the smallest ids, in their order
    for i, (sample_id, text) in enumerate(zip(batch.ids, batch.texts, strict=True)):
        latents, features = stored[sample_id]
        assert text == f"{i} short"
        assert torch.equal(batch.latents_BCHW[i], latents)
        assert torch.equal(batch.text.features_BLU[i, : len(features[text])], features[text])


def test_a_chosen_row_that_cannot_be_read_is_named_not_replaced(tmp_path):
    corpus = open_corpus(make_tiered(tmp_path / "d", CELLS, damaged=tuple(range(15))))
    with pytest.raises(DataError, match=f"sample {corpus.id(2)}.*copy the data set again"):
        load_samples(corpus, [2], [0], 32, 8)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (333, 111), (64, 64), (1000, 90)])
@pytest.mark.parametrize("bucket", ["1024x1024", "1344x768", "832x1248"])
def test_a_circle_stays_a_circle(shape, bucket):
    """A disc in the middle of any image: its width and height after `fit`, from its second moments."""
    width, height = shape
    radius = 0.2 * min(shape)  # whole inside every crop
    y, x = np.mgrid[:height, :width] + 0.5
    disc = np.clip(radius + 0.5 - np.hypot(x - width / 2, y - height / 2), 0, 1)
    image = Image.fromarray((255 * disc).astype(np.uint8)).convert("RGB")
    target = size(bucket, 256, 16)
    fitted = np.asarray(fit(image, *target), np.float64)[:, :, 0]
    assert fitted.shape == target[::-1]
    y, x = np.mgrid[: target[1], : target[0]] + 0.5
    mass = fitted.sum()
    spread = [np.sqrt((fitted * (axis - (fitted * axis).sum() / mass) ** 2).sum() / mass) for axis in (x, y)]
    assert spread[0] == pytest.approx(spread[1], rel=0.01)
    scale = max(target[0] / width, target[1] / height)
    assert spread[0] == pytest.approx(radius * scale / 2, rel=0.03)  # a disc's spread is half its radius
