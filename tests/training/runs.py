"""Short runs in this process, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_nucleus.training.arguments import parse_run
from megatron_nucleus.training.training import TrainResult, train
from megatron_nucleus.utils.config import Parser


def run_here(config_file: Path, run_dir: Path, *flags: object) -> TrainResult:
    """Train as tools/train.py would with these flags."""
    argv = ["--config", str(config_file), "--run-dir", str(run_dir), *map(str, flags)]
    run, _ = parse_run(argv, Parser(prog="t"))
    return train(run)


def rows(run_dir: Path) -> list[dict]:
    """The run's curve."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
