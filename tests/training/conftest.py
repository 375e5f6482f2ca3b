"""A small curated corpus and a small run, shared by the training tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.support import tool


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """128 scenes, curated."""
    folder = tmp_path_factory.mktemp("corpus")
    tool("make_scenes", "--output", folder / "raw", "--count", 128)
    tool(
        "curate", "--input", folder / "raw", "--output", folder / "data", "--workers", 1,
        "--config", "examples/scenes/curate.yaml",
    )  # fmt: skip
    return folder / "data"


@pytest.fixture
def config_file(tmp_path, corpus) -> Path:
    """A run of seconds: two narrow layers, one of them MoE."""
    path = tmp_path / "small.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "training": {
                    "train_steps": 6, "global_batch_size": 8, "log_interval": 1, "save_interval": 3,
                    "tensorboard": False, "cpu_threads": 1, "device": "cpu",
                },
                "model": {
                    "preset": "demo", "num_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                    "mlp_ratio": 3.0, "num_experts": 4, "moe_intermediate_dim": 32, "capacity_factors": 2.0,
                },
                "data": {"data_path": str(corpus), "resolution_px": 32, "num_workers": 0},
                "optimizer": {"lr": 2e-3},
                "schedule": {"lr_warmup_steps": 2},
                "sampling": {"steps": 2, "guidance": 2.0},
            }
        )
    )  # fmt: skip
    return path
