"""tools/ablate.py on real programs: a bench of seconds, killed in the middle, against one that was not."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.data.curation.helpers import SCENES_CURATION
from tests.support import ROOT, tool

# Figures that differ from one execution to the next.
# What may differ between equal benches: counted FLOPs are a rate times a time, and the checkout may move on.
TIMING = {"train_s", "counted_flops", "trained_commits", "scored_commit"}


@pytest.fixture
def suites(tmp_path) -> Path:
    base = {
        "training": {"global_batch_size": 8, "log_interval": 2, "save_interval": 2, "tensorboard": False,
                     "cpu_threads": 1, "device": "cpu"},
        "model": {"preset": "demo", "num_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                  "mlp_ratio": 3.0, "num_experts": 4, "moe_intermediate_dim": 32, "capacity_factors": 2.0},
        "data": {"resolution_px": 32, "num_workers": 0, "data_path": "given by the bench"},
        "validation": {"valid_samples": 8, "valid_interval_samples": 16, "valid_sigmas": 2},
        "optimizer": {"lr": 2e-3},
        "schedule": {"lr_warmup_steps": 2},
        "sampling": {"steps": 2, "guidance": 2.0},
    }  # fmt: skip
    suite = {
        "base": "base.yaml",
        "corpus": {"count": 64, "curation": SCENES_CURATION},
        "text_tokens": 18,
        "budget_samples": 64,
        "seeds": [0, 1],
        "min_seeds": 2,
        "evaluate": {"prompts": {"prompts_per_skill": 1}},
        "arms": {
            "baseline": {},
            "merged": {"from": "baseline", "merge": {"last": 2, "weights": "uniform"}},
        },
        "comparisons": [{"name": "merging", "claim": "helps", "baseline": "baseline", "arm": "merged"}],
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    path = tmp_path / "suites.yaml"
    path.write_text(yaml.safe_dump({"suites": {"tiny": suite}}))
    return path


def rows(output: Path) -> list[dict]:
    """Rows by arm and seed, without timings and paths."""
    found = [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]
    text = json.dumps(sorted(found, key=lambda r: (r["arm"], r["seed"]))).replace(str(output), "OUT")
    return [{k: v for k, v in row.items() if k not in TIMING} for row in json.loads(text)]


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_with_the_same_rows(suites, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = tool("ablate", "--config", suites, "--output", whole, "--jobs", 2, "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["rows"] == 4
    command = [
        sys.executable,
        str(ROOT / "tools" / "ablate.py"),
        "--config",
        str(suites),
        "--output",
        str(killed),
    ]
    process = subprocess.Popen(
        [*command, "--jobs", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(killed.glob("runs/tiny/*/seed*/part1/checkpoints/step_*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "rows.jsonl").exists()
    tool("ablate", "--config", suites, "--output", killed, "--jobs", 2)
    assert rows(killed) == rows(whole)

    found = {(row["arm"], row["seed"]): row for row in rows(whole)}
    base, merged = (found[arm, 0] for arm in ("baseline", "merged"))
    assert (base["steps"], base["samples"]) == (8, 64)
    assert [point[0] for point in base["valid_curve"]] == [16, 32, 48, 64]
    assert base["valid_curve"][-1][2] == base["valid_loss"]
    assert math.isclose(sum(base["valid_loss_by_sigma"].values()) / 2, base["valid_loss"], rel_tol=1e-9)
    assert merged["valid_loss"] not in (base["valid_loss"], base["valid_curve"][-2][2])
    for row in (json.loads(line) for line in (whole / "rows.jsonl").read_text().splitlines()):
        assert (
            0.7 < row["counted_flops"] / row["planned_flops"] < 1.3
        )  # captions of a batch of 8 vary in length
    page = (whole / "report" / "README.md").read_text()
    assert "| merging: helps | merged against baseline |" in page
    assert (whole / "report" / "tiny_validation_loss.png").is_file()


def test_the_plan_is_printed_before_anything_runs(suites, tmp_path):
    out = tool("ablate", "--config", suites, "--output", tmp_path / "out", "--plan-only").stdout
    assert "suite tiny:" in out
    assert "last 2 checkpoints of baseline, uniform" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--suite", "tinny"), "--suite tinny: unknown (did you mean tiny?)"),
        (("--arms", "basline"), "--arms basline: unknown (did you mean baseline?)"),
        (("--seeds", "3"), "--seeds 3: error bars need at least 2 seeds"),
        (("--jobs", "0"), "--jobs 0: must be at least 1"),
        (("--stop-after", "-1"), "--stop-after -1: must be above 0 minutes"),
    ],
)
def test_refused(suites, tmp_path, flags, message):
    done = tool("ablate", "--config", suites, "--output", tmp_path / "out", *flags, check=False)
    assert done.returncode == 2
    assert message in done.stderr
