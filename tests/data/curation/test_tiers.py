"""Tiers and episodic buckets: the published rules against an independent reference, and the stage on a small corpus."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from megatron_nucleus.data import index
from megatron_nucleus.data.curation import tiers as rules
from megatron_nucleus.data.curation.stage import DROPS_SCHEMA
from megatron_nucleus.data.curation.stages.tiers import tiers
from megatron_nucleus.data.curation.tiers import TiersConfig
from megatron_nucleus.utils.errors import ConfigError, DataError

NO_CAP = 1.0


def make_ids(count, salt=""):
    return [hashlib.sha256(f"{salt}{i}".encode()).hexdigest() for i in range(count)]


def published_corpus(count, seed=0):
    """Tiers with the published shares, and pixel counts with ties."""
    rng = np.random.default_rng(seed)
    shares = np.array(rules.SHARES) / np.sum(rules.SHARES)
    return rng.choice(5, count, p=shares), (rng.integers(256, 2049, count) * 1024).astype(np.int64)


def plan_of(tier_numbers, pixels, config, settled=None):
    counted = rules.Histogram()
    counted.add(rules.cell(tier_numbers, pixels))
    return rules.plan_buckets(counted, np.zeros(8, np.int64) if settled is None else settled, config)


def reference_z(tier_numbers, pixels):
    """By the definition: mean rank among all images by sorting, standardised to the centres' mean and deviation."""
    ordered = np.sort(pixels)
    middle = (np.searchsorted(ordered, pixels, "left") + np.searchsorted(ordered, pixels, "right") - 1) / 2
    z = 0.6 * tier_numbers / 4 + 0.4 * middle / (len(pixels) - 1)
    return (z - z.mean()) / z.std() * np.std([-1.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 1.75])


def reference_p(z):
    logits = [[-((x - mu) ** 2) / (2 * 0.5**2 * 0.7) for mu in np.arange(-1.75, 2, 0.5)] for x in z]
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_published_edges():
    scores = np.array([4.99, 5.0, 5.49, 5.5, 6.0, 6.49, 6.5, 6.79, 6.8, 9.0, np.nan], np.float32)
    assert rules.tier_of(scores).tolist() == [-1, 0, 0, 1, 2, 2, 3, 3, 4, 4, -1]


def test_published_shares_by_rank_on_any_scale():
    rng = np.random.default_rng(1)
    for values in (rng.standard_normal(9000), np.linspace(-1e-30, 1e30, 9000), rng.random(9000) * 1e-3):
        scores = rng.permutation(np.unique(values.astype(np.float32)))[:6960]
        parts = np.array_split(rng.permutation(scores), 7)
        highest = rules.share_edges(lambda parts=parts: iter(parts))
        assert np.bincount(rules.tier_of_rank(scores, highest)).tolist() == [2150, 1910, 1400, 1000, 500]
        assert (np.diff(rules.tier_of_rank(np.sort(scores), highest)) >= 0).all()
        np.testing.assert_array_equal(highest, np.sort(scores)[[2149, 4059, 5459, 6459]])


def test_equal_scores_get_equal_tiers_whatever_the_sign_of_zero():
    scores = np.array([0.0, -0.0, 0.0, -0.0, 1.0, -1.0], np.float32)
    found = rules.tier_of_rank(scores, rules.share_edges(lambda: iter([scores]), (1, 1, 1, 1, 1)))
    assert found.tolist() == [0, 0, 0, 0, 4, 0]  # the tie reaches over three edges: its lowest tier
    assert rules.share_edges(lambda: iter([]), (1, 1, 1, 1, 1)).tolist() == [np.inf] * 4


def test_histogram_equals_numpy_over_many_batches(monkeypatch):
    monkeypatch.setattr(rules, "_MERGE_AT", 50)
    values = np.random.default_rng(2).integers(-40, 1000, 5000)
    counted = rules.Histogram()
    for batch in np.array_split(values, 60):
        counted.add(batch)
    found, counts = np.unique(values, return_counts=True)
    np.testing.assert_array_equal(counted.table(), (found, counts))
    assert [len(column) for column in rules.Histogram().table()] == [0, 0]


def test_z_and_probabilities_equal_an_independent_reference():
    tier_numbers, pixels = published_corpus(3000)
    plan = plan_of(tier_numbers, pixels, TiersConfig(max_bucket_share=NO_CAP))
    z = plan.standardised(tier_numbers, pixels)
    np.testing.assert_allclose(z, reference_z(tier_numbers, pixels), atol=1e-9)
    np.testing.assert_allclose(plan.probabilities(z), reference_p(z), atol=1e-9)


def test_draws_follow_the_probabilities_and_separate_the_buckets():
    count = 40_000
    tier_numbers, pixels = published_corpus(count)
    plan = plan_of(tier_numbers, pixels, TiersConfig(max_bucket_share=NO_CAP))
    z = reference_z(tier_numbers, pixels)
    expected = reference_p(z)
    drawn = plan.draw(make_ids(count), tier_numbers, pixels)
    for stratum in [np.ones(count, bool), *(tier_numbers == t for t in range(5)), z < -1, z > 1]:
        p = expected[stratum]
        seen = np.bincount(drawn[stratum], minlength=8)
        # each count is a sum of independent draws: within 4.5 deviations (1 in 10,000 for all 64 together)
        assert (np.abs(seen - p.sum(axis=0)) <= 4.5 * np.sqrt((p * (1 - p)).sum(axis=0)) + 1e-6).all()
    means = [z[drawn == bucket].mean() for bucket in range(8)]
    assert (np.diff(means) > 0.3).all()  # centres lie 0.5 apart
    between = sum((drawn == b).mean() * means[b] ** 2 for b in range(8)) / z.var()
    assert between > 0.8  # z in [0, 1], as the formula stands, gives 0.2


def test_uniforms_are_uniform_and_tell_nothing_about_the_partition():
    ids = make_ids(20_000)
    drawn = rules.uniforms(ids)
    assert abs(np.histogram(drawn, 20, (0, 1))[0] - 1000).max() < 4.5 * 31
    partitions = np.array([index.partition_key(i) for i in ids])
    assert abs(np.corrcoef(drawn, partitions)[0, 1]) < 4.5 / np.sqrt(len(ids))
    assert rules.uniforms(["ab"]) == [int.from_bytes(_digest("ab"), "little") // 2048 / 2**53]


def _digest(text):
    return hashlib.blake2b(text.encode(), digest_size=8, person=b"episode_bucket").digest()


def test_caps_hold_and_mean_quality_still_rises():
    count = 40_000
    tier_numbers, pixels = published_corpus(count)
    plan = plan_of(tier_numbers, pixels, TiersConfig())
    z = reference_z(tier_numbers, pixels)
    cap = 0.13 * count
    expected = plan.probabilities(z).sum(axis=0)
    assert (expected <= cap + 1e-6).all()
    assert expected.sum() == pytest.approx(count)
    assert reference_p(z).sum(axis=0).max() > 1.15 * cap  # without it, one would be far above
    drawn = plan.draw(make_ids(count), tier_numbers, pixels)
    assert np.bincount(drawn, minlength=8).max() <= cap + 4.5 * np.sqrt(cap)
    assert (np.diff([z[drawn == bucket].mean() for bucket in range(8)]) > 0.2).all()


def test_a_cap_of_an_eighth_fills_all_buckets_alike():
    tier_numbers, pixels = published_corpus(5000)
    plan = plan_of(tier_numbers, pixels, TiersConfig(max_bucket_share=0.125))
    z = plan.standardised(tier_numbers, pixels)
    np.testing.assert_allclose(plan.probabilities(z).sum(axis=0), 625, rtol=1e-6)


def test_images_with_a_bucket_of_their_own_count_towards_the_cap():
    tier_numbers, pixels = published_corpus(5000)
    settled = np.array([0, 0, 0, 4000, 600, 0, 0, 0])
    plan = plan_of(tier_numbers, pixels, TiersConfig(), settled)
    expected = plan.probabilities(plan.standardised(tier_numbers, pixels)).sum(axis=0)
    cap = 0.13 * 9600
    assert expected[3] == 0
    assert expected[4] == pytest.approx(cap - 600)
    assert (expected[[0, 1, 2, 5, 6, 7]] <= cap + 1e-6).all()


def test_images_that_are_all_alike_spread_around_the_middle():
    plan = plan_of(np.full(1000, 2), np.full(1000, 640 * 480), TiersConfig(max_bucket_share=NO_CAP))
    expected = plan.probabilities(plan.standardised(np.array([2]), np.array([640 * 480])))[0]
    np.testing.assert_allclose(expected, reference_p([0.0])[0], atol=1e-12)
    np.testing.assert_allclose(expected, expected[::-1], atol=1e-12)


class FakeCorpus:
    """Parts in memory, with positions that have gaps, as after other stages."""

    def __init__(self, parts):
        self._parts = parts
        self.parts = tuple(parts)

    def read(self, part, columns, positions=None):
        rows = self._parts[part]
        types = {
            "id": pa.string(),
            "width_px": pa.int32(),
            "height_px": pa.int32(),
            "scores": pa.list_(index.SCORE_TYPE),
            "tier": pa.string(),
            "episode_bucket": pa.string(),
        }
        out = {"position": pa.array([3 * i + 1 for i in range(len(rows))], pa.int32())}
        out.update({name: pa.array([row.get(name) for row in rows], types[name]) for name in columns})
        return pa.table(out)


def score(value, scorer="aesthetic"):
    return [
        {"scorer": "image_statistics", "revision": "1", "value": 0.5},
        {"scorer": scorer, "revision": "1", "value": value},
    ]


def make_rows(count, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.uniform(4.8, 7.2, count)
    return [
        {
            "id": sample_id,
            "width_px": int(rng.integers(256, 2000)),
            "height_px": int(rng.integers(256, 2000)),
            "scores": score(float(value)),
        }
        for sample_id, value in zip(make_ids(count), values, strict=True)
    ]


def split(rows, sizes):
    ends = np.cumsum(sizes)
    return FakeCorpus(
        {f"files-{i:06d}": rows[e - n : e] for i, (n, e) in enumerate(zip(sizes, ends, strict=True))}
    )


def run(corpus, config):
    """id -> (tier, bucket) or reason; checks the form of what the stage yields."""
    out = {}
    for part, update in zip(corpus.parts, tiers.function(corpus, config), strict=True):
        rows = corpus.read(part, ("id",)).to_pylist()
        ids = {row["position"]: row["id"] for row in rows}
        assert update.drops.schema == DROPS_SCHEMA
        assert update.changes.schema == pa.schema([("position", pa.int32()), *tiers.adds])
        for table in update:
            assert table["position"].to_pylist() == sorted(table["position"].to_pylist())
        out.update({ids[r["position"]]: r["reason"] for r in update.drops.to_pylist()})
        out.update({ids[r["position"]]: (r["tier"], r["episode_bucket"]) for r in update.changes.to_pylist()})
    return out


@pytest.mark.parametrize("by", ["thresholds", "shares"])
def test_the_result_is_a_function_of_the_set_of_images(by):
    rows = make_rows(2000)
    config = TiersConfig(tier_by=by)
    first = run(split(rows, [2000]), config)
    shuffled = [rows[i] for i in np.random.default_rng(3).permutation(2000)]
    assert run(split(shuffled, [700, 0, 1, 299, 1000]), config) == first
    assert len(first) == 2000


def test_stage_gives_tiers_by_thresholds_and_rejects_what_is_below():
    rows = make_rows(1500)
    found = run(split(rows, [1000, 500]), TiersConfig())
    kept = np.array([isinstance(found[row["id"]], tuple) for row in rows])
    names = np.array(["none", *index.TIERS])
    for row in rows:
        value = np.float32(row["scores"][1]["value"])
        expected = names[sum(bool(value >= np.float32(edge)) for edge in (5.0, 5.5, 6.0, 6.5, 6.8))]
        assert (
            (found[row["id"]] == "below_tiers") if expected == "none" else (found[row["id"]][0] == expected)
        )
    drawn = np.array([int(found[row["id"]][1][1]) for row, k in zip(rows, kept, strict=True) if k])
    good = [row for row, k in zip(rows, kept, strict=True) if k]
    z = reference_z(
        np.array([index.TIERS.index(found[row["id"]][0]) for row in good]),
        np.array([row["width_px"] * row["height_px"] for row in good]),
    )
    assert np.corrcoef(z, drawn)[0, 1] > 0.9
    assert np.bincount(drawn)[1:].max() <= 0.13 * len(good) + 4.5 * np.sqrt(0.13 * len(good))


def test_stage_gives_the_published_shares_by_rank():
    rows = make_rows(696)
    found = run(split(rows, [300, 396]), TiersConfig(tier_by="shares"))
    counts = [sum(tier == name for tier, _ in found.values()) for name in index.TIERS]
    assert counts == [215, 191, 140, 100, 50]


def test_what_came_with_the_image_stays():
    rows = make_rows(60)
    rows[0] |= {"tier": "A5", "scores": score(1.0)}  # below A1 by its score
    rows[1] |= {"episode_bucket": "B8", "scores": score(5.1)}
    rows[2] |= {"tier": "A2", "episode_bucket": "B1", "scores": None}
    rows[3] |= {"tier": "A1", "scores": []}
    found = run(split(rows, [60]), TiersConfig())
    assert found[rows[0]["id"]][0] == "A5"
    assert found[rows[1]["id"]] == ("A1", "B8")
    assert found[rows[2]["id"]] == ("A2", "B1")
    assert found[rows[3]["id"]][0] == "A1"
    assert found[rows[3]["id"]][1] in index.EPISODE_BUCKETS


def test_images_without_a_tier_are_rejected_or_kept_without_one():
    rows = make_rows(20)
    rows[0]["scores"], rows[1]["scores"], rows[2]["scores"] = score(4.0), score(6.0, "other"), None
    found = run(split(rows, [20]), TiersConfig())
    assert [found[row["id"]] for row in rows[:3]] == ["below_tiers", "unscored", "unscored"]
    found = run(split(rows, [20]), TiersConfig(keep_untiered=True))
    assert [found[row["id"]] for row in rows[:3]] == [(None, None)] * 3


def test_of_two_scores_of_one_name_the_last_counts():
    rows = make_rows(1)
    rows[0]["scores"] = score(5.1) + score(6.9)
    assert run(split(rows, [1]), TiersConfig())[rows[0]["id"]][0] == "A5"


def test_a_scorer_that_never_ran_is_named():
    rows = make_rows(5)
    with pytest.raises(ConfigError, match=r"tier_scorer beauty: .*there is: aesthetic, image_statistics"):
        run(split(rows, [5]), TiersConfig(tier_scorer="beauty"))
    for row in rows:
        row["scores"] = None
    with pytest.raises(ConfigError, match="there is: none"):
        run(split(rows, [5]), TiersConfig())
    assert run(split([], [0]), TiersConfig()) == {}
    rows[3]["scores"] = score(float("nan"))
    with pytest.raises(DataError, match="files-000000: a score of aesthetic that is no finite number"):
        run(split(rows, [5]), TiersConfig())


@pytest.mark.parametrize(
    "options",
    [
        {"tier_edges": (5.0, 5.5)},
        {"tier_edges": (5.0, 5.5, 5.5, 6.0, 7.0)},
        {"tier_shares": (1.0, 1.0, 1.0, 1.0, 0.0)},
        {"bucket_tier_weight": 1.1},
        {"bucket_sigma": 0.0},
        {"bucket_temperature": float("nan")},
        {"max_bucket_share": 0.1},
        {"max_bucket_share": 1.5},
    ],
)
def test_settings_outside_their_range(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        TiersConfig(**options)
