"""The head: ridge against the textbook, its cross-validation against brute force, its file against damage."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from megatron_nucleus.data.curation.scorers import head as heads
from megatron_nucleus.data.curation.scorers.head import (
    Head,
    HeadInfo,
    HeadScorer,
    cross_validate,
    fit_ridge,
    fold_of,
    load_head,
    save_head,
)
from megatron_nucleus.data.curation.scorers.statistics import ImageStatistics
from megatron_nucleus.utils.errors import ConfigError, DataError

INFO = HeadInfo("image_statistics", "1", ImageStatistics.checksum, 5, 40, 0.1, 5, 0.5, 0.8, 1.0, 1.0, 9.0)
HEAD = Head(np.array([1.0, -2.0, 0.5, 0.0, 3.0]), 4.0, INFO)


def planted(rows: int, dim: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    vectors, weights = rng.normal(size=(rows, dim)), rng.normal(size=dim)
    return vectors, vectors @ weights + 5 + noise * rng.normal(size=rows), weights


def textbook_ridge(vectors, ratings, penalty):
    """Solve the penalised normal equations of centred data."""
    centre, level = vectors.mean(axis=0), ratings.mean()
    centred = vectors - centre
    gram = centred.T @ centred + penalty * np.eye(vectors.shape[1])
    weights = np.linalg.solve(gram, centred.T @ (ratings - level))
    return weights, level - centre @ weights


@pytest.mark.parametrize(("rows", "dim", "noise"), [(50, 6, 9.0), (30, 60, 5.0)])
def test_the_fit_is_ridge_and_its_penalty_the_best_on_rows_left_out(rows, dim, noise):
    vectors, ratings, _ = planted(rows, dim, noise)
    weights, intercept, penalty = fit_ridge(vectors, ratings)
    expected, level = textbook_ridge(vectors, ratings, penalty)
    assert weights == pytest.approx(expected, abs=1e-8)
    assert intercept == pytest.approx(level)

    def left_out_error(candidate: float) -> float:
        errors = []
        for row in range(rows):
            rest = np.arange(rows) != row
            w, b = textbook_ridge(vectors[rest], ratings[rest], candidate)
            errors.append(vectors[row] @ w + b - ratings[row])
        return float(np.mean(np.square(errors)))

    variance = np.square(vectors - vectors.mean(axis=0)).sum() / min(rows - 1, dim)
    candidates = [relative * variance for relative in heads.PENALTIES]
    assert penalty == pytest.approx(min(candidates, key=left_out_error))


def test_little_noise_finds_the_planted_weights_and_pure_noise_the_mean():
    vectors, ratings, weights = planted(200, 8, noise=0.01)
    assert fit_ridge(vectors, ratings)[0] == pytest.approx(weights, abs=0.01)
    rng = np.random.default_rng(1)
    vectors, ratings = rng.normal(size=(200, 8)), rng.normal(size=200)
    found, intercept, _ = fit_ridge(vectors, ratings)
    assert np.abs(found).max() < 0.1
    assert intercept == pytest.approx(ratings.mean(), abs=0.05)


def test_units_of_the_ratings_and_an_offset_do_not_matter():
    vectors, ratings, _ = planted(60, 5, noise=0.5)
    weights, intercept, penalty = fit_ridge(vectors, ratings)
    other, shifted, same = fit_ridge(vectors, 10 * ratings - 3)
    assert other == pytest.approx(10 * weights)
    assert shifted == pytest.approx(10 * intercept - 3)
    assert same == pytest.approx(penalty)


def test_equal_vectors_are_refused():
    with pytest.raises(DataError, match="all equal"):
        fit_ridge(np.ones((10, 4)), np.arange(10.0))


def test_cross_validation_rates_each_row_by_a_head_that_never_saw_it():
    vectors, ratings, _ = planted(40, 3, noise=0.5)
    fold = np.arange(40) % 4
    quality = cross_validate(vectors, ratings, fold)
    predicted = np.empty(40)
    for number in range(4):
        w, b, _ = fit_ridge(vectors[fold != number], ratings[fold != number])
        predicted[fold == number] = vectors[fold == number] @ w + b
    assert quality.rmse == pytest.approx(np.sqrt(np.mean((predicted - ratings) ** 2)))
    assert quality.spearman == pytest.approx(stats.spearmanr(predicted, ratings).statistic)
    assert quality.rmse < 0.7 < quality.baseline_rmse
    means = np.array([ratings[fold != number].mean() for number in fold])
    assert quality.baseline_rmse == pytest.approx(np.sqrt(np.mean((means - ratings) ** 2)))


def test_cross_validation_of_noise_is_no_better_than_the_mean():
    rng = np.random.default_rng(2)
    quality = cross_validate(rng.normal(size=(60, 30)), rng.normal(size=60), np.arange(60) % 5)
    assert quality.rmse > 0.95 * quality.baseline_rmse


def test_rank_correlation_agrees_with_scipy_with_ties_too():
    rng = np.random.default_rng(3)
    for _ in range(20):
        one, other = rng.integers(0, 6, 15), rng.normal(size=15)
        assert heads.spearman(one, other) == pytest.approx(stats.spearmanr(one, other).statistic)
    assert heads.spearman(np.ones(5), np.arange(5)) == 0


def test_folds_are_even_and_follow_the_content_not_the_order():
    contents = [f"{i:03}" for i in range(53)]
    fold = fold_of(contents, 5)
    assert sorted(np.bincount(fold)) == [10, 10, 11, 11, 11]
    assert not np.array_equal(fold, np.arange(53) % 5)
    order = np.random.default_rng(0).permutation(53)
    assert np.array_equal(fold_of([contents[i] for i in order], 5), fold[order])


def test_a_head_survives_its_file_and_equal_heads_give_equal_files(tmp_path):
    for name in ("a", "b"):
        save_head(tmp_path / name, HEAD)
    found = load_head(tmp_path / "a")
    assert np.array_equal(found.weights, HEAD.weights)
    assert (found.intercept, found.info) == (HEAD.intercept, INFO)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_scorer_rates_statistics_by_hand(photos):
    features = ImageStatistics()
    scorer = HeadScorer(features, HEAD, "cafe")
    heap = [photos["coffee.png"], photos["chelsea.png"], Image.new("RGB", (32, 32))]
    expected = features.embed(heap).astype(np.float64) @ HEAD.weights + 4
    assert [s.value for s in scorer.score(heap, [()] * 3)] == pytest.approx(expected)
    assert (scorer.name, scorer.revision) == ("image_statistics", "1+head:cafe")


def test_a_head_of_other_vectors_is_refused():
    other = HEAD._replace(info=dataclasses.replace(INFO, model="siglip", checksum="sha256:0"))
    with pytest.raises(ConfigError, match="trained on siglip"):
        HeadScorer(ImageStatistics(), other, "cafe")


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "head.safetensors"
    with pytest.raises(ConfigError, match="no such file; tools/train_scorer.py makes one"):
        load_head(path)
    save_head(path, HEAD)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(DataError, match="damaged"):
        load_head(path)
    path.write_bytes(whole.replace(b'\\"dim\\": 5', b'\\"dim\\": 6'))
    with pytest.raises(DataError, match="expected 6 finite numbers"):
        load_head(path)
    path.write_bytes(whole.replace(b'\\"folds\\"', b'\\"fools\\"'))
    with pytest.raises(DataError, match="damaged"):
        load_head(path)
    save_head(path, HEAD._replace(weights=np.array([1, np.nan, 0, 0, 0])))
    with pytest.raises(DataError, match="finite"):
        load_head(path)
    from safetensors.numpy import save_file

    save_file({"weights": np.zeros(5)}, path)
    with pytest.raises(ConfigError, match="not a head"):
        load_head(path)
