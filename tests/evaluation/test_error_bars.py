"""Standard errors are those that repeating the evaluation shows."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from megatron_nucleus.data.scenes import HELD_OUT_SPLIT, TAGS
from megatron_nucleus.evaluation import error_bars, scenes
from megatron_nucleus.evaluation.error_bars import mean_of, share, shown, spread
from megatron_nucleus.evaluation.report import build_report
from megatron_nucleus.utils.errors import DataError

# ---- by hand


def test_one_picture_per_prompt_is_the_binomial_error():
    for right, wrong in ((3, 7), (50, 50), (1, 99)):
        n, p = right + wrong, right / (right + wrong)
        got = share([[True]] * right + [[False]] * wrong)
        assert got.value == p
        assert got.error == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)), rel=1e-12)
        assert got.error == pytest.approx(
            statistics.stdev([1] * right + [0] * wrong) / math.sqrt(n), rel=1e-12
        )
        assert got.pictures == n


def test_pictures_of_a_prompt_are_one_observation():
    """Prompts that are right or wrong as a whole say as much with one picture as with five."""
    one, five = ([[True] * n] * 3 + [[False] * n] * 7 for n in (1, 5))
    assert share(five).error == pytest.approx(share(one).error, rel=1e-12)
    assert share(five).pictures == 50
    # unequal numbers: shares 1/1, 1/3, 0/2 of 6 pictures; residuals 2/3, 0, -2/3
    got = share([[True], [True, False, False], [False, False]])
    assert got.value == pytest.approx(1 / 3)
    assert got.error == pytest.approx(math.sqrt(3 / 2 * (4 / 9 + 0 + 4 / 9)) / 6, rel=1e-12)


def test_edges():
    assert share([]) is None
    assert share([[]]) is None
    assert share([[True, False]]) == (0.5, None, 2)  # one prompt says nothing about others
    assert share([[True], []]) == (1.0, None, 1)
    assert share([[True], [True]]) == (1.0, 0.0, 2)
    assert mean_of([None, None]) == (None, None)
    assert mean_of([share([[True], [False]]), None]) == (0.5, pytest.approx(0.5))
    assert mean_of([share([[True], [False]]), share([[True]])]) == (0.75, None)
    assert mean_of([error_bars.Share(0.2, 0.03, 9), error_bars.Share(0.6, 0.04, 9)]) == (
        pytest.approx(0.4),
        pytest.approx(0.025),
    )
    assert spread([0.4]) is None
    assert spread([0.4, None]) is None
    assert spread([0.4, None, 0.6]) == pytest.approx(math.sqrt(0.02))
    assert [shown(0.6531, 0.0119), shown(1.0, None), shown(None, None)] == ["0.653 ± 0.012", "1.000", "–"]


# ---- against repeated evaluations of a model whose true rates are known


def evaluate(rng: np.random.Generator, rates: dict, prompts: int, samples: int, seeds: int) -> dict:
    """As the benchmark does it: each seed runs through a shuffled list of all requests, again and again."""
    by_seed = {}
    for seed in range(seeds):
        of_seed = []
        for tag, requests in rates.items():
            turns = [rng.permutation(len(requests)) for _ in range(-(-prompts // len(requests)))]
            asked = requests[np.concatenate(turns)[:prompts]]
            drawn = rng.random((prompts, samples)) < asked[:, None]
            of_seed += [({"tag": tag}, list(map(bool, row))) for row in drawn]
        by_seed[seed] = of_seed
    return scenes.summarise_seeds(by_seed)


def simulate(
    requests: int, prompts: int, samples: int, seeds: int, times: int = 1500
) -> tuple[float, float, float]:
    """True standard deviation of the mean over repetitions, root mean square of its reported error, and coverage."""
    rng = np.random.default_rng(requests + samples)
    rates = {tag: rng.beta(1.0, 1.0, requests) for tag in TAGS}
    truth = np.mean([r.mean() for r in rates.values()])
    results = [evaluate(rng, rates, prompts, samples, seeds) for _ in range(times)]
    means = np.array([r["mean"] for r in results])
    errors = np.array([r["standard_error"]["mean"] for r in results])
    covered = np.mean(np.abs(means - truth) < 2 * errors)
    return float(means.std()), float(np.sqrt(np.mean(errors**2))), float(covered)


@pytest.mark.parametrize(("samples", "seeds"), [(1, 1), (1, 3), (4, 1), (4, 3)])
def test_the_error_is_what_repetition_shows(samples, seeds):
    """Requests from a long list: right within the simulation's accuracy (1500 repetitions: 1.8 %)."""
    true, reported, covered = simulate(requests=2000, prompts=20, samples=samples, seeds=seeds)
    assert reported == pytest.approx(true, rel=0.07)
    assert 0.93 < covered < 0.975
    independent = math.sqrt(
        1 / 4 / (6 * 20 * samples * seeds)
    )  # as if all pictures were; their mean rate is 1/2
    if samples == 4:
        assert true > 1.25 * independent  # so pictures of a prompt must not be counted as independent


def test_requests_that_come_back_make_the_error_too_large_if_anything():
    """Three requests, each asked seven times: how they differ is counted though it is no uncertainty."""
    true, reported, covered = simulate(requests=3, prompts=21, samples=1, seeds=2)
    assert 1.0 < reported / true < 1.5
    assert covered > 0.95


# ---- the summary


def prompts_of(tag: str, rights: int, wrongs: int, **more) -> list:
    return [({"tag": tag, **more}, [i < rights]) for i in range(rights + wrongs)]


def test_the_summary_of_seeds_is_that_of_all_their_prompts():
    first = prompts_of("single_object", 4, 1) + prompts_of("counting", 1, 4)
    second = prompts_of("single_object", 2, 3) + prompts_of("counting", 0, 5)
    second += prompts_of("color_attr", 3, 1, split=HELD_OUT_SPLIT)
    result = scenes.summarise_seeds({7: first, -2: second})
    assert (result["single_object"], result["counting"], result["mean"]) == (0.6, 0.1, pytest.approx(0.35))
    errors = {"single_object": math.sqrt(0.24 / 9), "counting": math.sqrt(0.09 / 9)}
    assert result["standard_error"] == {
        **dict.fromkeys(scenes.SKILL_OF_TAG.values()),
        **{skill: pytest.approx(error) for skill, error in errors.items()},
        "mean": pytest.approx(math.hypot(*errors.values()) / 2),
    }
    assert result["samples"] == 20
    assert result["held_out_pairs"] == {
        "color_attribution": 0.75,
        "samples": 4,
        "standard_error": {"color_attribution": pytest.approx(math.sqrt(0.75 * 0.25 / 3))},
    }
    assert result["seeds"] == [7, -2]
    per_seed = [(row["seed"], row["single_object"], row["counting"], row["mean"], row["samples"])
                for row in result["per_seed"]]  # fmt: skip
    assert per_seed == [(7, 0.8, 0.2, 0.5, 10), (-2, 0.4, 0.0, 0.2, 10)]
    assert result["std_over_seeds"] == {
        **dict.fromkeys(scenes.SKILL_OF_TAG.values()),
        "single_object": pytest.approx(statistics.stdev([0.8, 0.4])),
        "counting": pytest.approx(statistics.stdev([0.2, 0.0])),
        "mean": pytest.approx(statistics.stdev([0.5, 0.2])),
    }
    assert scenes.summarise_seeds({0: first})["std_over_seeds"] is None


# ---- in the report


def test_the_report_shows_errors_where_there_are_some(tmp_path):
    scores = {
        "merged model": scenes.summarise(prompts_of("counting", 10, 30) + prompts_of("single_object", 20, 0)),
        "an older one": {"mean": 0.5, "counting": 0.5, "samples": 8},
    }
    text = build_report(tmp_path / "report.html", title="t", scores=scores, scores_note="Note.").read_text()
    assert f'<td>counting</td>\n<td class="n">0.250 ± {math.sqrt(0.25 * 0.75 / 39):.3f}</td>' in text
    assert '<td class="n">0.500</td>' in text
    assert "Note. ± is one standard error" in text
    assert f"0.62 ± {math.sqrt(0.25 * 0.75 / 39) / 2:.2f}" in text  # at the top
    plain = build_report(tmp_path / "plain.html", title="t", scores={"a": scores["an older one"]}).read_text()
    assert "±" not in plain
    for bad in (-0.1, "0.1", math.nan, math.inf):
        broken = {"a": {"mean": 0.5, "standard_error": {"mean": bad}}}
        with pytest.raises(DataError, match="scores of 'a': the standard error of mean is"):
            build_report(tmp_path / "bad.html", title="t", scores=broken)
