"""training/ablation: which programs run, in what order, how often, and what stands in the rows and the report."""

from __future__ import annotations

import json
import math
import time

import pytest
import yaml

from megatron_nucleus.training.ablation import figures
from megatron_nucleus.training.ablation import rows as ablation_rows
from megatron_nucleus.training.ablation.bench import PART_SEED, Bench
from megatron_nucleus.training.ablation.plan import read_suites
from megatron_nucleus.training.ablation.report import write_report
from megatron_nucleus.training.ablation.statistics import NO_DIFFERENCE
from megatron_nucleus.utils.errors import DataError, StoppedError


def calls(root) -> list[list[str]]:
    path = root / "calls.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def run(root, suites, arms=None, slots=1, end=None) -> dict:
    output = root / "out"
    output.mkdir(exist_ok=True)
    return Bench(output, root).run(list(suites.values()), arms, slots, end)


def rows(root) -> dict[tuple[str, int], dict]:
    lines = (root / "out" / "rows.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert len({(r["arm"], r["seed"]) for r in found}) == len(found)
    return {(row["arm"], row["seed"]): row for row in found}


@pytest.fixture
def suites(write, document):
    return read_suites(write(document))


def test_the_programs_of_one_bench(programs, suites):
    assert run(programs, suites) == {}
    made = calls(programs)
    assert [words[0] for words in made[:2]] == ["make_scenes", "curate"]
    seed0 = [words for words in made[2:] if "/seed0/" in " ".join(words)]
    assert [words[0] for words in seed0] == [
        "train", "evaluate", "merge_checkpoints", "train", "evaluate",  # baseline, and merged from it
        "train", "evaluate",  # dense
        "train", "train", "evaluate",  # ladder
    ]  # fmt: skip
    assert len(made) == 2 + 2 * len(seed0)
    first, second = (words for words in seed0 if "/ladder-" in " ".join(words) and words[0] == "train")
    assert "--init-from" not in first
    assert second[second.index("--init-from") + 1] == first[first.index("--run-dir") + 1]
    assert "--init-optimizer" in second
    assert [w[w.index("--seed") + 1] for w in (first, second)] == ["0", str(PART_SEED)]
    steps = [part.steps for part in suites["tiny"].arms["ladder"].parts]
    assert [int(w[w.index("--train-steps") + 1]) for w in (first, second)] == steps
    validation = seed0[3]
    assert validation[validation.index("--lr") + 1] == "0"
    assert validation[validation.index("--init-from") + 1].endswith("/merged")
    assert run(programs, suites) == {}
    assert calls(programs) == made  # nothing is done twice


def test_rows_hold_what_a_run_was(programs, suites):
    run(programs, suites)
    found, suite = rows(programs), suites["tiny"]
    assert found.keys() == {(arm, seed) for arm in suite.arms for seed in (0, 1)}
    row, part = found["baseline", 1], suite.arms["baseline"].parts[0]
    assert (row["steps"], row["samples"], row["planned_flops"]) == (80, 640, suite.budget_flops)
    assert row["valid_loss"] == pytest.approx(1 / 81 + 0.01)
    half, whole = row["valid_curve"]
    assert half == [320, 320 * part.flops_per_image, pytest.approx(1 / 41 + 0.01)]
    assert whole[:2] == [640, 640 * part.flops_per_image]
    assert (row["train_s"], row["counted_flops"]) == (40.0, pytest.approx(40.0 * 1e6))
    assert row["scores"]["mean"] == 0.5
    assert row["trained_commits"] == ["c1"]
    assert row["commands"][0].startswith("python tools/train.py --config out/runs/tiny/baseline-")
    ladder = found["ladder", 0]
    parts = suite.arms["ladder"].parts
    assert ladder["steps"] == sum(p.steps for p in parts)
    assert ladder["planned_flops"] == sum(p.flops for p in parts)
    assert [p[0] for p in ladder["valid_curve"]][-1] == sum(p.samples for p in parts)
    assert ladder["valid_curve"][-1][1] == ladder["planned_flops"]
    assert [p[0] for p in ladder["valid_curve"]] == sorted(p[0] for p in ladder["valid_curve"])
    merged = found["merged", 0]
    assert merged["valid_loss"] == pytest.approx(1 / 2 - 0.05)  # of its own validation, one step at rate 0
    assert merged["valid_curve"] == []
    assert merged["planned_flops"] == suite.budget_flops
    assert len(merged["commands"]) == 4


def finished_run(folder, *commits):
    """A run folder as far as a row reads it, trained by programs of these commits."""
    folder.mkdir(parents=True)
    starts = [{"step": 5 * i, "git_commit": commit} for i, commit in enumerate(commits)]
    (folder / "config.yaml").write_text(yaml.safe_dump({"config": {}, "starts": starts}))
    metrics = {
        "step": 10,
        "samples_seen": 80,
        "step_s": 0.5,
        "model_tflops_per_device": 1.0,
        "valid_loss": 0.5,
    }
    (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    return folder


def test_rows_tell_the_commits_that_trained_from_the_one_that_scored(suites, monkeypatch, tmp_path):
    suite = suites["tiny"]
    runs = {
        "baseline": [finished_run(tmp_path / "a", "c1")],
        "ladder": [finished_run(tmp_path / "b", "c1", "c2"), finished_run(tmp_path / "c", "c3")],
    }
    runs["merged"] = runs["baseline"]
    scores = dict.fromkeys(("mean", *ablation_rows.SKILLS), 0.5) | {"samples": 12}
    validated = {"valid_loss": 0.5, "valid_loss_by_sigma": {"0.5": 0.5}}
    monkeypatch.setattr(ablation_rows, "git_commit", lambda: "c9")
    found = ablation_rows.Rows(tmp_path)
    for name, folders in runs.items():
        arm = suite.arms[name]
        found.add(ablation_rows.make_row(
            suite, arm, suite.seeds[0], runs=folders, validated=validated, scores=scores, commands=[]
        ))  # fmt: skip
    trained = {"baseline": ["c1"], "ladder": ["c1", "c2", "c3"], "merged": ["c1"]}
    assert {row["arm"]: row["trained_commits"] for row in found.all} == trained
    assert [(row["scored_commit"], "commit" in row) for row in found.all] == 3 * [("c9", False)]
    write_report(tmp_path / "report", [suite], ablation_rows.Rows(tmp_path), "c")
    assert (
        "; trained at commit c1 (2 rows); c1, then c2, then c3 (1 rows); scored (derived arms: merged, too) at "
        "commit c9.\n" in (tmp_path / "report" / "README.md").read_text()
    )


def test_rows_of_before_are_finished_and_do_not_claim_to_know_what_trained_them(
    suites, monkeypatch, tmp_path
):
    suite, found = suites["tiny"], ablation_rows.Rows(tmp_path)
    folders = [finished_run(tmp_path / "a", "c1")]
    scores = dict.fromkeys(("mean", *ablation_rows.SKILLS), 0.5) | {"samples": 12}
    validated = {"valid_loss": 0.5, "valid_loss_by_sigma": {"0.5": 0.5}}
    monkeypatch.setattr(ablation_rows, "git_commit", lambda: "c1")
    for seed in suite.seeds[:2]:
        found.add(ablation_rows.make_row(
            suite, suite.arms["dense"], seed, runs=folders, validated=validated, scores=scores, commands=[]
        ))  # fmt: skip
    write_report(tmp_path / "new", [suite], found, "c")
    assert "; commit c1.\n" in (tmp_path / "new" / "README.md").read_text()
    old = found.all[0]
    old["commit"] = old.pop("scored_commit")
    del old["trained_commits"]
    found.add(found.all.pop())  # writes all
    again = ablation_rows.Rows(tmp_path)
    assert again.find(suite, suite.arms["dense"], suite.seeds[0]) == old
    write_report(tmp_path / "old", [suite], again, "c")
    text = "; trained at commit c1 (1 rows); not recorded (1 rows); scored (derived arms: merged, too) at commit c1.\n"
    assert text in (tmp_path / "old" / "README.md").read_text()


def test_changed_settings_run_again_and_are_never_mixed(programs, suites, write, document):
    run(programs, suites)
    before = len(calls(programs))
    document["suites"]["tiny"]["arms"]["dense"]["set"]["optimizer"] = {"lr": 1e-3}
    changed = read_suites(write(document))
    assert run(programs, changed) == {}
    new = calls(programs)[before:]
    assert [words[0] for words in new] == ["curate"] + ["train", "evaluate"] * 2
    bench = Bench(programs / "out", programs)
    dense = [r for r in bench.rows.all if r["arm"] == "dense"]
    assert len(dense) == 4
    assert bench.rows.of(changed["tiny"], changed["tiny"].arms["dense"]) == {0: dense[2], 1: dense[3]}
    assert bench.rows.of(suites["tiny"], suites["tiny"].arms["dense"]) == {0: dense[0], 1: dense[1]}


def test_arms_can_be_chosen_and_a_derived_one_brings_its_source(programs, suites):
    assert run(programs, suites, arms=["merged"]) == {}
    assert rows(programs).keys() == {(arm, seed) for arm in ("baseline", "merged") for seed in (0, 1)}


def test_a_failed_arm_is_named_and_the_others_are_measured(programs, suites):
    (programs / "fail").write_text("/dense-")
    failed = run(programs, suites, slots=2)
    assert failed.keys() == {"tiny: dense, seed 0", "tiny: dense, seed 1"}
    assert "told to fail" in str(failed["tiny: dense, seed 0"])
    assert ("merged", 1) in rows(programs)
    assert ("dense", 0) not in rows(programs)
    (programs / "fail").unlink()
    assert run(programs, suites) == {}
    assert ("dense", 0) in rows(programs)


def test_stopped_in_the_middle_it_goes_on_to_the_same_rows(programs, suites, tmp_path):
    run(programs, suites, arms=["dense"])
    (programs / "hold").touch()
    with pytest.raises(StoppedError):
        run(programs, suites, slots=2, end=time.monotonic() + 1.0)
    assert rows(programs).keys() == {("dense", 0), ("dense", 1)}
    (programs / "hold").unlink()
    run(programs, suites, slots=2)
    stopped = rows(programs)
    for path in (programs / "out", programs / "calls.txt"):
        path.rename(tmp_path / path.name)
    run(programs, suites)
    assert rows(programs) == stopped


def test_a_damaged_file_of_rows_is_no_empty_one(programs, suites):
    (programs / "out").mkdir()
    (programs / "out" / "rows.jsonl").write_text('{"suite": "ti')
    with pytest.raises(DataError, match="rows.jsonl: damaged"):
        run(programs, suites)


def test_report(programs, suites, tmp_path):
    run(programs, suites)
    bench = Bench(programs / "out", programs)
    folder = tmp_path / "report"
    results = write_report(folder, list(suites.values()), bench.rows, "tools/ablate.py --config x")
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    arms = results["suites"]["tiny"]["arms"]
    losses = [1 / 81 + 0.01 * seed for seed in (0, 1)]
    assert arms["baseline"]["valid_loss"]["mean"] == pytest.approx(sum(losses) / 2)
    assert arms["baseline"]["valid_loss"]["std"] == pytest.approx(0.01 / math.sqrt(2))
    assert arms["baseline"]["difference"] is None
    dense = arms["dense"]["difference"][
        "valid_loss"
    ]  # the same offset for both seeds: no spread of differences
    assert dense["standard_error"] == pytest.approx(0, abs=1e-12)
    assert dense["verdict"] == "worse"
    assert arms["dense"]["difference"]["mean"]["verdict"] == NO_DIFFERENCE
    (claim,) = results["suites"]["tiny"]["comparisons"]
    assert claim["valid_loss"]["mean"] == pytest.approx(-dense["mean"])
    assert claim["valid_loss"]["verdict"] == "better"
    page = (folder / "README.md").read_text()
    assert "Made by `tools/ablate.py --config x`" in page
    assert f"| **baseline** (baseline) | 2 | {sum(losses) / 2:.4f} ± 0.0071 |" in page
    assert "| experts: better than dense | baseline against dense |" in page
    assert (
        f"| baseline | {sum(losses) / 2:.3f} ± 0.007 | {sum(losses):.3f} ± 0.014 |" in page
    )  # by noise level
    low = arms["dense"]["valid_loss at sigma 0.25"]["mean"]
    assert f"| dense | **{low:.3f} ± 0.007** | **{2 * low:.3f} ± 0.014** |" in page
    assert "Not finished" not in page
    assert arms["baseline"]["mean/spread_ratio"]["mean"] == pytest.approx(0.95)
    assert arms["dense"]["mean/spread_ratio"] == {"n": 0}
    assert "| baseline | - | - | - | 0.950 ± 0.071 | - | - | - |" in page
    for name in ("tiny_routing.png", "tiny_scores.png", "tiny_validation_loss.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in page
    assert str(tmp_path) not in page


def test_agreement_by_noise_level():
    row = {
        "valid_routing": {"mean/agreement/0.25-0.75": 0.8, "mean/agreement_ends": 0.5, "mean/spread_low": 1.0}
    }
    assert figures.agreement_steps(row) == {0.5: 0.8}
    assert figures.agreement_steps({"valid_routing": None}) == {}
    assert figures.agreement_figure({"a": {0: row, 1: row}}).startswith(b"\x89PNG")


def test_report_of_a_bench_that_is_not_finished(programs, suites, tmp_path):
    run(programs, suites, arms=["baseline"])
    bench = Bench(programs / "out", programs)
    write_report(tmp_path / "report", list(suites.values()), bench.rows, "c")
    page = (tmp_path / "report" / "README.md").read_text()
    assert "Not finished: 6 of 8 rows are missing." in page
    assert "not measured yet" in page
