"""What a run folder says of the run: which settings and which program trained it, and when that is written."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import yaml

from megatron_nucleus.export import native
from megatron_nucleus.training import run_folder, run_state, training
from megatron_nucleus.training.run_folder import training_commits
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.training.runs import run_here


def document(run_dir: Path) -> dict:
    return yaml.safe_load((run_dir / "config.yaml").read_text())


@pytest.fixture
def program(monkeypatch):
    """Pretend that the program is of some commit."""

    def at(commit: str) -> None:
        for module in (run_folder, run_state):
            monkeypatch.setattr(module, "git_commit", lambda: commit)

    at("c1")
    return at


def test_a_finished_run_is_left_as_it_is(config_file, tmp_path, program):
    run = tmp_path / "run"
    run_here(config_file, run, "--train-steps", 2)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    program("c2")
    changed = ["--lr", 0.5, "--wavelet-loss-coeff", 3, "--global-batch-size", 16]
    assert run_here(config_file, run, "--train-steps", 2, *changed).state.step == 2
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert document(run)["git_commit"] == "c1"


def test_every_start_that_trained_a_run_stands_in_its_config(config_file, tmp_path, program):
    run = tmp_path / "run"
    run_here(config_file, run, "--train-steps", 2)
    first = document(run)
    (start,) = first["starts"]
    assert (start["step"], start["samples_seen"], start["git_commit"], start["changed"]) == (0, 0, "c1", {})
    assert start["versions"] == first["versions"]
    program("c2")
    run_here(config_file, run, "--train-steps", 4, "--lr", 0.25, "--global-batch-size", 16)
    run_here(config_file, run, "--train-steps", 5, "--lr", 0.25, "--global-batch-size", 16)
    now = document(run)
    assert now["config"]["optimizer"]["lr"] == 0.25
    assert now["git_commit"] == "c2"
    assert now["data_manifest_sha256"] == first["data_manifest_sha256"]
    assert now["starts"][0] == start
    assert [(s["step"], s["samples_seen"], s["git_commit"]) for s in now["starts"]] == [
        (0, 0, "c1"), (2, 16, "c2"), (4, 48, "c2"),
    ]  # fmt: skip
    assert now["starts"][1]["changed"] == {
        "training.train_steps": {"before": 2, "now": 4},
        "training.global_batch_size": {"before": 8, "now": 16},
        "optimizer.lr": {"before": first["config"]["optimizer"]["lr"], "now": 0.25},
    }
    assert now["starts"][2]["changed"] == {"training.train_steps": {"before": 4, "now": 5}}
    assert training_commits(run) == ["c1", "c2"]


def test_a_curriculum_and_its_change_are_recorded_without_anchors(config_file, tmp_path):
    def with_phases(*weights: int) -> Path:
        phases = [{"at_samples": 10 * i, "tiers": {"A1": w, "A2": 1}} for i, w in enumerate(weights)]
        path = tmp_path / f"{len(weights)}.yaml"
        path.write_text(yaml.safe_dump({"base": str(config_file), "curriculum": {"phases": phases}}))
        return path

    run_here(with_phases(1), tmp_path / "run", "--train-steps", 1)
    run_here(with_phases(1, 3), tmp_path / "run", "--train-steps", 2)
    changed = document(tmp_path / "run")["starts"][1]["changed"]["curriculum.phases"]
    assert [len(changed[when]) for when in ("before", "now")] == [1, 2]
    assert changed["now"][1] == {"at_samples": 10, "tiers": {"A1": 3.0, "A2": 1.0}}
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "&id" not in text
    assert "*id" not in text


def test_steps_that_were_lost_belong_to_the_start_that_took_them_again(config_file, tmp_path, program):
    run = tmp_path / "run"
    run_here(config_file, run, "--train-steps", 4, "--save-interval", 2)
    program("lost")
    run_here(config_file, run, "--train-steps", 6, "--lr", 0.5)
    (run / "checkpoints" / "latest").write_text("step_00000004\n")
    program("c2")
    run_here(config_file, run, "--train-steps", 6)
    assert [(s["step"], s["git_commit"]) for s in document(run)["starts"]] == [
        (0, "c1"), (4, "lost"), (4, "c2"),
    ]  # fmt: skip
    assert training_commits(run) == ["c1", "c2"]


def test_a_folder_of_before_goes_on(config_file, tmp_path, program):
    """Its config.yaml has no starts: they are not known, and the newest checkpoint names what trained last."""
    run = tmp_path / "run"
    run_here(config_file, run, "--train-steps", 2)
    old = document(run)
    del old["starts"]
    old["git_commit"] = "c0"  # of a later start that took no step, as it used to be
    (run / "config.yaml").write_text(yaml.safe_dump(old))
    assert training_commits(run) == ["c1"]
    with pytest.raises(ConfigError, match=r"holds a run with model\.capacity_factors"):
        run_here(config_file, run, "--train-steps", 3, "--capacity-factors", 1)
    program("c2")
    run_here(config_file, run, "--train-steps", 3)
    unknown, start = document(run)["starts"]
    assert (unknown["step"], unknown["samples_seen"], unknown["git_commit"]) == (None, None, "c0")
    assert (start["step"], start["git_commit"]) == (2, "c2")
    assert start["changed"] == {"training.train_steps": {"before": 2, "now": 3}}
    assert training_commits(run) == ["c0", "c2"]


def test_a_missing_configuration_is_said_to_be_missing(config_file, tmp_path, program, caplog):
    run = tmp_path / "run"
    run_here(config_file, run, "--train-steps", 2)
    (run / "config.yaml").unlink()
    program("c2")
    with caplog.at_level(logging.WARNING):
        run_here(config_file, run, "--train-steps", 3)
    assert "config.yaml: missing; what trained the run up to step 2 is not known" in caplog.text
    assert training_commits(run) == [None, "c2"]


@pytest.mark.parametrize("starts", ["5", "[7]", "[{step: 1}]"])
def test_a_damaged_history_is_named(config_file, tmp_path, starts):
    run = tmp_path / "run"
    run_here(config_file, run, "--train-steps", 1)
    damaged = f"config: {{}}\nstarts: {starts}\n"
    (run / "config.yaml").write_text(damaged)
    with pytest.raises(DataError, match=r"config\.yaml is damaged"):
        run_here(config_file, run, "--train-steps", 2)
    assert (run / "config.yaml").read_text() == damaged


REFUSED = [
    ({"curriculum": {"phases": [{"at_samples": 0, "tiers": {"A1": 1, "A5": 1}}]}}, r"phases\[0\]\.tiers\.A5"),
    (
        {"data": {"bucket_batch_multiple": 3}, "training": {"micro_batch_size": 4}},
        "--bucket-batch-multiple 3",
    ),
    ({"model": {"num_experts": 32}}, "--num-experts 32"),
    ({"validation": {"valid_samples": 8, "valid_resolutions_px": [36]}}, "36"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[next(iter(v)) for v, _ in REFUSED])
def test_what_the_data_refuses_is_refused_before_the_model_and_binds_no_one(
    values, message, config_file, tmp_path, monkeypatch
):
    path, run = tmp_path / "absent.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump({"base": str(config_file), **values}))
    with monkeypatch.context() as patch:
        patch.setattr(training, "build_model", lambda *_: pytest.fail("the model was built"))
        with pytest.raises(ConfigError, match=message):
            run_here(path, run, "--capacity-factors", 1)
    assert list(run.iterdir()) == []
    assert run_here(config_file, run, "--train-steps", 1, "--capacity-factors", 2).state.step == 1


def test_a_run_without_a_checkpoint_may_start_again_with_other_settings(config_file, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training.Loop, "run_to_end", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_here(config_file, run, "--capacity-factors", 1, "--seed", 5)
    assert document(run)["config"]["training"]["seed"] == 5
    run_here(config_file, run, "--train-steps", 1)
    now = document(run)
    assert now["config"]["training"]["seed"] == native.read_state(run / "checkpoints/step_00000001")["seed"]
    assert now["config"]["model"]["capacity_factors"] == [2.0]
    assert [(start["step"], start["changed"]) for start in now["starts"]] == [(0, {})]
    with pytest.raises(ConfigError, match=r"holds a run with training\.seed"):
        run_here(config_file, run, "--train-steps", 2, "--seed", 5)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 1
