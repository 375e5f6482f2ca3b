"""Short runs in this process, and what they leave behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import pyarrow.parquet as pq
import torch

from megatron_nucleus.data.dataset import open_corpus
from megatron_nucleus.export import native
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


def train_rank(config_file: Path, run_dir: Path, *flags: object) -> dict:
    """`run_here` as one of several ranks (`tests/ranks.py`); what of the result can be sent to the parent."""
    result = run_here(config_file, run_dir, *flags)
    state = result.state
    return {
        "step": state.step,
        "samples_seen": state.samples_seen,
        "loss": result.loss,
        "skipped": state.skipped,
    }


def damaged_copy(data: Path, folder: Path, ids: Collection[str]) -> Path:
    """A copy of a data set in which the payloads of some samples are zeros."""
    shutil.copytree(data, folder)
    damage(folder, ids)
    return folder


def damage(data: Path, ids: Collection[str]) -> None:
    """Overwrite the payloads of some samples with zeros; sizes stay."""
    found = [row for part in (data / "index").glob("*.parquet") for row in pq.read_table(part).to_pylist()]
    for row in found:
        if row["id"] in ids:
            with open(data / row["tar"], "r+b") as file:
                file.seek(row["offset"])
                file.write(bytes(row["length"]))


def held_out_ids(data: Path, count: int) -> list[str]:
    """Ids of the images that a run with ``--valid-samples count`` holds out, by bucket and id."""
    corpus = open_corpus(data, count)
    return [corpus.id(row) for row in corpus.held_out]


# Figures of a row that differ from run to run.
TIMING = {
    "step_s",
    "samples_per_s",
    "model_tflops_per_device",
    "mfu",
    "peak_memory_bytes",
    "timestamp",
    "optimizer_s",
    "data_s",
}


def curve(run_dir: Path) -> list[dict]:
    """The run's curve without its timings."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows(run_dir)]


def same_curve(a: Path, b: Path) -> None:
    """Two runs logged the same figures."""
    assert curve(a) == curve(b)


def tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """All weights and optimizer state of a checkpoint, whole, however many ranks wrote it."""
    folder = run_dir / "checkpoints" / native.step_name(step)
    out = {}
    for part in ("model", "optimizer"):
        store = native.open_tensors(folder, part)
        out |= {f"{part}/{name}": store.read(name) for name in store.names()}
    return out


def assert_identical(a: dict, b: dict) -> None:
    """Same names, same bits."""
    assert a.keys() == b.keys()
    assert len(a) > 20
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []
