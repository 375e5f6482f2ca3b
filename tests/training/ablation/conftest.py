"""A suite of two trained arms, a chained one and a derived one, and programs that pretend to run it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.data.curation.helpers import SCENES_CURATION

# Stands for every program of tools/: writes what the bench reads of it. Figures follow from seed and settings.
FAKE = """
import argparse, json, pathlib, sys, time, yaml
program = pathlib.Path(sys.argv[0]).stem
parser = argparse.ArgumentParser()
parser.add_argument("positional", nargs="*")
for name in ("config", "output", "input", "checkpoint", "checkpoints", "run-dir", "data-path", "init-from", "weights"):
    parser.add_argument("--" + name, type=pathlib.Path)
for name in ("count", "seed", "last", "train-steps", "lr", "ema-decay"):
    parser.add_argument("--" + name, type=float)
for name in ("json", "init-optimizer"):
    parser.add_argument("--" + name, action="store_true")
args = parser.parse_args()
with open("calls.txt", "a") as file:
    file.write(program + " " + " ".join(sys.argv[1:]) + "\\n")
if program == "train" and pathlib.Path("hold").exists():
    time.sleep(60)
result = {"positional": args.positional}
if program == "train":
    values = yaml.safe_load(args.config.read_text())
    fail = pathlib.Path("fail")
    if fail.exists() and fail.read_text() in str(args.run_dir):
        sys.exit("error: told to fail")
    args.run_dir.mkdir(exist_ok=True, parents=True)
    steps = int(args.train_steps)
    dense = values["model"].get("dense_moe_strategy") == "all_dense"
    rows = []
    for step in sorted({max(1, steps // 2), steps}):
        loss = 1 / (1 + step) + 0.01 * (args.seed % 1000) + 0.1 * dense - 0.05 * (args.lr == 0)
        rows.append({
            "step": step, "samples_seen": step * values["training"]["global_batch_size"], "step_s": 0.5,
            "model_tflops_per_device": 1e-6, "valid_loss": loss,
            "valid_loss_by_sigma": {"0.25": loss, "0.75": 2 * loss},
            "valid_routing": None if dense else {"mean/spread_ratio": 0.9 + 0.1 * (args.seed % 1000)},
        })
    (args.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    commit = pathlib.Path("commit").read_text()
    start = {"step": 0, "samples_seen": 0, "git_commit": commit, "versions": {}, "changed": {}}
    config = args.run_dir / "config.yaml"
    if not config.exists():  # a finished run is left as it is
        config.write_text(yaml.safe_dump({"config": {}, "git_commit": commit, "starts": [start]}))
elif program == "evaluate":
    skills = dict.fromkeys(
        ("single_object", "two_objects", "counting", "colors", "position", "color_attribution"), 0.5
    )
    mean = 0.5 + 0.01 * ("merged" in str(args.checkpoint))
    result = {"mean": mean, **skills, "samples": 12}
    args.output.mkdir(exist_ok=True)
else:
    args.output.mkdir(parents=True, exist_ok=program == "curate")
print(json.dumps(result))
"""


def tiny_document() -> dict:
    return {
        "suites": {
            "tiny": {
                "base": "base.yaml",
                "set": {"validation": {"valid_samples": 8}},
                "corpus": {"count": 64, "curation": SCENES_CURATION},
                "text_tokens": 20,
                "budget_samples": 640,
                "seeds": [0, 1],
                "min_seeds": 2,
                "arms": {
                    "baseline": {},
                    "dense": {"set": {"model": {"dense_moe_strategy": "all_dense", "mlp_ratio": 4.0}}},
                    "ladder": {
                        "stages": [
                            {"share": 3, "set": {"model": {"capacity_factors": 4.0}}},
                            {"share": 1, "set": {"model": {"capacity_factors": 2.0}}},
                        ]
                    },
                    "merged": {"from": "baseline", "merge": {"last": 3, "weights": "inverse_sqrt"}},
                },
                "comparisons": [
                    {"name": "experts", "claim": "better than dense", "baseline": "dense", "arm": "baseline"}
                ],
            }
        }
    }


BASE = {
    "training": {"global_batch_size": 8, "train_steps": 99, "seed": 7, "save_interval": 20, "device": "cpu"},
    "model": {"preset": "demo"},
    "data": {"data_path": "elsewhere", "resolution_px": 32, "num_workers": 0},
}


@pytest.fixture
def document() -> dict:
    return tiny_document()


@pytest.fixture
def write(tmp_path):
    """Write a document; returns its file."""

    def write_file(values: dict) -> Path:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
        path = tmp_path / "suites.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write_file


@pytest.fixture
def programs(tmp_path) -> Path:
    """A root folder with pretended tools/."""
    root = tmp_path / "root"
    (root / "tools").mkdir(parents=True)
    for name in ("make_scenes", "curate", "train", "evaluate", "merge_checkpoints"):
        (root / "tools" / f"{name}.py").write_text(FAKE)
    (root / "commit").write_text("c1")  # of the program train
    return root
