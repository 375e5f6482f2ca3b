"""One row per finished run in ``rows.jsonl``: what was run, at what cost, and what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_nucleus.evaluation.scenes import SKILL_OF_TAG
from megatron_nucleus.training.ablation.suites import Arm, Suite
from megatron_nucleus.training.metrics import read_metrics
from megatron_nucleus.training.run_folder import training_commits, versions
from megatron_nucleus.utils.errors import DataError
from megatron_nucleus.utils.files import write_atomic
from megatron_nucleus.utils.hardware import hardware
from megatron_nucleus.utils.revision import git_commit

FILE_NAME = "rows.jsonl"
SKILLS = tuple(SKILL_OF_TAG.values())
VALIDATION = ("valid_loss", "valid_loss_by_sigma", "valid_routing")


class Rows:
    """The rows of an output folder; the newest row of a key counts."""

    def __init__(self, output: Path):
        self.path = output / FILE_NAME
        self.all: list[dict] = []
        if self.path.is_file():
            try:
                self.all = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            except ValueError as error:
                raise DataError(
                    f"{self.path}: damaged; restore it, or move it away to measure again"
                ) from error

    def add(self, row: dict) -> None:
        """Keep a row; the file is replaced at once or not at all."""
        self.all.append(row)
        text = "".join(json.dumps(r, allow_nan=False) + "\n" for r in self.all)
        write_atomic(self.path, text)

    def find(self, suite: Suite, arm: Arm, seed: int) -> dict | None:
        """The row of exactly this arm, with these settings."""
        key = (suite.name, arm.name, seed, suite.row_key(arm))
        return next(
            (r for r in reversed(self.all) if (r["suite"], r["arm"], r["seed"], r["key"]) == key), None
        )

    def of(self, suite: Suite, arm: Arm) -> dict[int, dict]:
        """Seed -> row, for the suite's seeds that are finished."""
        found = {seed: self.find(suite, arm, seed) for seed in suite.seeds}
        return {seed: row for seed, row in found.items() if row is not None}


def make_row(
    suite: Suite,
    arm: Arm,
    seed: int,
    *,
    runs: Sequence[Path],
    validated: Mapping,
    scores: Mapping,
    commands: Sequence[str],
) -> dict:
    """The row of a finished arm.

    Args:
        runs: run folders of its parts, in order (of its source, for a derived arm).
        validated: row of metrics.jsonl that holds the arm's own validation.
        scores: `tools/evaluate.py scenes --json`. commands: everything that was run for it.

    Returns:
        among its keys ``trained_commits``, the commits of the program that trained the weights, in order, and
        ``scored_commit``, that of the program now, which has just scored them (a derived arm's are merged and
        validated right before, unless the bench was stopped in between). Rows from before these were told apart
        hold ``commit`` alone, the commit when they were written.

    Raises:
        ConfigError, DataError: a run folder without a checkpoint, or a damaged one.
    """
    trained = suite.trained(arm)
    curve, cost = _history(trained, runs)
    return {
        "suite": suite.name,
        "arm": arm.name,
        "seed": seed,
        "key": suite.row_key(arm),
        "changes": arm.changes,
        "trained_commits": list(dict.fromkeys(c for run in runs for c in training_commits(run))),
        "scored_commit": git_commit(),
        "versions": {name: versions()[name] for name in ("megatron_nucleus", "torch", "python")},
        "hardware": hardware(),
        "parameters": trained.parameters,
        "active_parameters": trained.active_parameters,
        "steps": sum(p.steps for p in trained.parts),
        "samples": sum(p.samples for p in trained.parts),
        "planned_flops": sum(p.flops for p in trained.parts),
        **cost,
        **{key: validated.get(key) for key in VALIDATION},
        "valid_curve": curve if arm is trained else [],
        "scores": dict(scores),
        "commands": list(commands),
    }


def last_validation(run: Path) -> dict:
    """The row of a run's last step, which holds its validation.

    Raises:
        DataError: it holds none.
    """
    row = read_metrics(run / "metrics.jsonl")[-1]
    if row.get("valid_loss") is None:
        raise DataError(f"{run}/metrics.jsonl: step {row['step']} has no finite valid_loss; look at its log")
    return row


def _history(trained: Arm, runs: Sequence[Path]) -> tuple[list, dict]:
    """[images seen, FLOPs, loss] of every validation, and what the training cost, over all parts."""
    curve, samples, flops, counted, seconds = [], 0, 0, 0.0, 0.0
    for part, run in zip(trained.parts, runs, strict=True):
        before = 0
        for row in read_metrics(run / "metrics.jsonl"):
            steps, before = row["step"] - before, row["step"]
            seconds += steps * row["step_s"]
            counted += steps * row["step_s"] * row["model_tflops_per_device"] * 1e12
            if row.get("valid_loss") is not None:
                seen = row["samples_seen"]
                curve.append([samples + seen, flops + seen * part.flops_per_image, row["valid_loss"]])
        samples, flops = samples + part.samples, flops + part.flops
    return curve, {"counted_flops": counted, "train_s": seconds}
