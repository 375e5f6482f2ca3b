"""The mixture on a corpus: interpolation, floor, empty cells, captions; each against its own arithmetic."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from megatron_nucleus.data.curriculum import CurriculumConfig, Phases
from megatron_nucleus.data.index import EPISODE_BUCKETS, TIERS
from megatron_nucleus.data.mixture import CaptionCurve, CaptionMix, Mixture, raise_to_floor
from megatron_nucleus.utils.errors import ConfigError

FULL = {(t, e): range(1) for t in TIERS for e in EPISODE_BUCKETS}


def phases(*raw):
    return Phases.from_plain(list(raw), "run.yaml: curriculum.phases")


def mixture(*raw, floor=0.0, cells=None):
    return Mixture(CurriculumConfig(phases(*raw), floor), cells or {"1024x1024": FULL}, "the data set X")


def table(at, **rows):
    return {"at_samples": at, "table": rows}


def at(mix, samples):
    """{cell: share} of the shares above 0."""
    shares = mix.shares(np.array([samples]))[:, 0].reshape(5, 8)
    return {f"{TIERS[t]}/{EPISODE_BUCKETS[e]}": shares[t, e] for t, e in np.argwhere(shares > 0).tolist()}


def test_shares_are_interpolated_between_keyframes_and_constant_outside():
    mix = mixture(
        table(0, A1={"B1": 3, "B2": 1}), table(100, A1={"B1": 1}, A2={"B1": 1}), table(300, A5={"B8": 2})
    )
    assert at(mix, 0) == pytest.approx({"A1/B1": 0.75, "A1/B2": 0.25})
    assert at(mix, 50) == pytest.approx({"A1/B1": 0.625, "A1/B2": 0.125, "A2/B1": 0.25})
    assert at(mix, 100) == pytest.approx({"A1/B1": 0.5, "A2/B1": 0.5})
    assert at(mix, 250) == pytest.approx({"A1/B1": 0.125, "A2/B1": 0.125, "A5/B8": 0.75})
    for late in (300, 301, 10**15):
        assert at(mix, late) == pytest.approx({"A5/B8": 1.0})
    assert at(mixture(table(0, A1={"B1": 3})), 10**9) == {"A1/B1": 1.0}


def test_many_samples_at_once_give_the_same_bits_as_one():
    raw = (table(0, A1={"B1": 3, "B2": 1}), table(1000, A2={"B1": 1, "B7": 5}), table(5000, A5={"B8": 2}))
    mix = mixture(*raw, floor=0.03)
    samples = np.arange(0, 7000, 13)
    together = mix.bucket_shares("1024x1024", samples)
    for i in (0, 1, 77, 200, 400, 538):
        assert (mix.bucket_shares("1024x1024", samples[i : i + 1])[:, 0] == together[:, i]).all()
    assert np.abs(together.sum(axis=0) - 1).max() < 1e-14


def water_filled(shares, floor):
    """Reference: the level of scaling at which the sum is 1, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(200):
        scale = (low + high) / 2
        low, high = (scale, high) if np.maximum(shares * scale, floor).sum() < 1 else (low, scale)
    return np.maximum(shares * high, floor)


@pytest.mark.parametrize("floor", [0.0, 0.02, 0.1, 0.125])
def test_the_floor_is_water_filling(floor):
    rng = np.random.default_rng(1)
    shares = rng.random((8, 300)) ** 12
    shares[rng.random((8, 300)) < 0.2] = 0
    shares[0] += 1e-9
    shares /= shares.sum(axis=0)
    got = raise_to_floor(shares, np.ones((8, 300), bool), floor)
    for column, result in zip(shares.T, got.T, strict=True):
        assert result == pytest.approx(water_filled(column, floor), abs=1e-9)
        assert result.sum() == pytest.approx(1)
        kept = result > floor + 1e-12
        ratio = result[kept] / column[kept]
        for one in ratio:  # what is not raised keeps its proportions
            assert one == pytest.approx(ratio[0])


def test_the_floor_keeps_the_earlier_episodes_and_only_those():
    raw = (table(0, A1={"B1": 3}, A2={"B1": 1}), table(100, A1={"B2": 1}), table(200, A1={"B3": 1}))
    mix = mixture(*raw, floor=0.05)
    assert at(mix, 0) == pytest.approx({"A1/B1": 0.75, "A2/B1": 0.25})
    assert at(mix, 1)["A1/B2"] == pytest.approx(0.01)  # on its way in: no floor before its own phase
    # B1 gone: its floor goes to the tiers it had last, in the limit of the interpolation.
    assert at(mix, 100) == pytest.approx({"A1/B1": 0.0375, "A2/B1": 0.0125, "A1/B2": 0.95})
    assert at(mix, 99) == pytest.approx({"A1/B1": 0.0375, "A2/B1": 0.0125, "A1/B2": 0.95})
    assert at(mix, 150) == pytest.approx({"A1/B1": 0.0375, "A2/B1": 0.0125, "A1/B2": 0.475, "A1/B3": 0.475})
    assert at(mix, 10**6) == pytest.approx({"A1/B1": 0.0375, "A2/B1": 0.0125, "A1/B2": 0.05, "A1/B3": 0.9})


def test_an_empty_cell_passes_its_share_on_within_its_bucket(caplog):
    cells = {
        "1024x1024": FULL,
        "1344x768": {("A1", "B1"): range(0, 4), ("A2", "B1"): range(4, 9), (None, "B1"): range(9, 11)},
    }
    with caplog.at_level(logging.WARNING):
        mix = mixture(table(0, A1={"B1": 1}, A2={"B1": 3}, A5={"B8": 4}), cells=cells)
        assert caplog.text == ""  # said once, by who begins to draw
        mix.warn()
    assert "bucket 1344x768 has no images of A5/B8: their share, up to 50.0 %" in caplog.text
    assert "bucket 1344x768: 2 images have no tier or no episode bucket" in caplog.text
    assert "1024x1024" not in caplog.text
    assert list(mix.cells["1344x768"]) == [("A1", "B1"), ("A2", "B1")]
    assert mix.bucket_shares("1344x768", np.array([0]))[:, 0].tolist() == [0.25, 0.75]
    full = mix.bucket_shares("1024x1024", np.array([0]))[:, 0].reshape(5, 8)
    assert (full[0, 0], full[1, 0], full[4, 7]) == (0.125, 0.375, 0.5)


@pytest.mark.parametrize(
    ("raw", "cells", "message"),
    [
        (
            [table(0, A1={"B1": 1}), table(9, A5={"B8": 1})],
            {"1024x1024": FULL, "1344x768": {("A1", "B1"): range(4), ("A2", "B3"): range(4, 5)}},
            r"\[1\]: draws no image of aspect bucket 1344x768 of the data set X, which has A1/B1, A2/B3; give one",
        ),
        (
            [table(0, A1={"B1": 1}), table(9, A1={"B1": 1}, A4={"B2": 1})],
            {"1024x1024": {("A1", "B1"): range(4), ("A2", "B2"): range(4, 6)}},
            r"\[1\].table.A4: no image of the data set X has it \(there are A1, A2, B1, B2\)",
        ),
        (
            [{"at_samples": 0, "episodes": {"B1": 1, "B5": 0.5, "B6": 0}}],
            {"1024x1024": {("A1", "B1"): range(4)}},
            r"\[0\].episodes.B5: no image of the data set X has it",
        ),
        (
            [table(0, A1={"B1": 1})],
            {"1024x1024": {(None, None): range(4)}},
            "no images with a tier and an episode",
        ),
        (
            [table(0, A1={"B1": 1})],
            {"1024x1024": {("A1", None): range(4)}},
            "no images with a tier and an episode",
        ),
        (
            [table(0, A1={"B1": 1})],
            {"1024x1024": FULL, "1344x768": {(None, None): range(4)}},
            "no image of aspect bucket 1344x768 .* images without a tier only",
        ),
    ],
)
def test_a_curriculum_that_the_data_cannot_follow_is_refused(raw, cells, message):
    with pytest.raises(ConfigError, match=message) as caught:
        mixture(*raw, cells=cells)
    assert str(caught.value).startswith("run.yaml: curriculum.phases")


def test_the_floor_keeps_a_bucket_alive_whose_cells_are_of_the_past():
    cells = {"1024x1024": FULL, "1344x768": {("A1", "B1"): range(4), ("A2", "B1"): range(4, 5)}}
    mix = mixture(table(0, A1={"B1": 1}, A2={"B1": 1}), table(9, A5={"B8": 1}), floor=0.02, cells=cells)
    assert mix.bucket_shares("1344x768", np.array([10**6]))[:, 0].tolist() == [0.5, 0.5]


def test_a_floor_too_high_for_the_corpus_is_refused():
    with pytest.raises(ConfigError, match="8 x 0.2 is more than 1"):
        mixture({"at_samples": 0, "tiers": {"A1": 1}}, floor=0.2)


def test_captions_come_from_the_phases_that_name_them():
    default = CaptionMix(1.0, 1.0, 2.0, 0.1)
    assert CaptionCurve(default).at(10**6) == (0.25, 0.25, 0.5, 0.1)
    raw = (
        table(0, A1={"B1": 1}),
        {**table(100, A1={"B1": 1}), "captions": {"detailed": 5}, "caption_drop_frac": 0.3},
        {**table(200, A1={"B1": 1}), "caption_drop_frac": 0.0},
        table(300, A1={"B1": 1}),
    )
    curve = CaptionCurve(default, phases(*raw).phases)
    assert curve.at(0) == pytest.approx((0.25, 0.25, 0.5, 0.1))
    assert curve.at(50) == pytest.approx((0.125, 0.125, 0.75, 0.2))
    assert curve.at(100) == pytest.approx((0, 0, 1, 0.3))
    assert curve.at(150) == pytest.approx((0, 0, 1, 0.15))
    for late in (200, 250, 300, 10**9):  # from there on, until a phase says otherwise
        assert curve.at(late) == pytest.approx((0, 0, 1, 0.0))
