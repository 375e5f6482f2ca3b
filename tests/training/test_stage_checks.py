"""Impossible stages are refused before training, with the file, the key and the fix."""

from __future__ import annotations

import os
import subprocess
import sys
import typing

import pytest
import yaml

from megatron_nucleus.training.arguments import RunConfig, parse_run
from megatron_nucleus.training.training import train
from megatron_nucleus.utils import config as cfg
from megatron_nucleus.utils.config import Parser
from megatron_nucleus.utils.errors import ConfigError
from tests.support import ROOT
from tests.training.runs import run_here


def changed(config_file, tmp_path, section: str, values: dict):
    """A stage that differs from the small run in some values."""
    path = tmp_path / "stage.yaml"
    path.write_text(yaml.safe_dump({"base": str(config_file), section: values}))
    return path


CAPTIONS = ("caption_short_weight", "caption_medium_weight", "caption_detailed_weight")
STAGES = [
    ("model", {"capacity_factors": 0}, r"model\.capacity_factors: layer 1 has 0.*needs a value in \(0, num_experts"),
    ("model", {"capacity_factors": 5}, r"model\.capacity_factors: layer 1 has 5.*needs a value in \(0, num_experts"),
    ("model", {"num_experts": 32}, r"--num-experts 32: bucket 1024x1024 at --resolution-px 32 has 16 .*at most 16"),
    ("data", {"resolution_px": 36}, r"--resolution-px 36 is not a positive multiple of 8 .*; use 32"),
    ("data", {"bucket_batch_multiple": 0}, r"data\.bucket_batch_multiple"),
    ("curriculum", {"phases": [{"at_samples": 0, "tiers": {"A1": 0}}]}, r"curriculum\.phases.*sum"),
    ("curriculum", {"phases": [{"at_samples": 0, "tiers": {"A9": 1}}]}, r"curriculum\.phases.*A9"),
    ("curriculum", {"phases": [{"at_samples": 0, "tiers": {"A1": 1, "A5": 1}}]}, r"A5"),
    ("losses", {"wavelet_band_weights": [1, 1, -1, 1]}, r"losses\.wavelet_band_weights"),
    ("training", {"keep_last_weights": 4}, r"--keep-last-weights 4: .*--keep-last-checkpoints"),
    ("validation", {"valid_interval_samples": 4}, r"--valid-interval-samples: needs --valid-samples"),
    ("validation", {"valid_resolutions_px": [32, 36]}, r"^--valid-resolutions-px 36 is not .* of 8 .*; use 32"),
    ("validation", {"valid_resolutions_px": [8]}, r"^--num-experts 4: .* at --valid-resolutions-px 8 has 1.*at most 1"),
    ("data", dict.fromkeys(CAPTIONS, 0), r"stage\.yaml: data\.caption_short_weight: .*, .*all are 0"),
    ("data", {"caption_medium_weight": -1}, r"stage\.yaml: data\.caption_medium_weight: .* -1\.0: must be"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("section", "values", "match"), STAGES, ids=[f"{s}.{next(iter(v))}" for s, v, _ in STAGES]
)
def test_refused_before_the_first_step(section, values, match, config_file, tmp_path):
    with pytest.raises(ConfigError, match=match):
        run_here(changed(config_file, tmp_path, section, values), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not metrics.exists() or not metrics.read_text()


@pytest.mark.parametrize(("section", "values", "match"), [STAGES[0], STAGES[2], STAGES[3], STAGES[5]])
def test_the_program_names_the_file(section, values, match, config_file, tmp_path):
    stage = changed(config_file, tmp_path, section, values)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "train.py"), "--config", str(stage), "--run-dir", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert f"{stage}: {section}.{next(iter(values))}" in last


@pytest.mark.parametrize(
    ("flags", "begins"),
    [
        (("--valid-resolutions-px", "36"), "--valid-resolutions-px 36 is not a positive multiple of 8"),
        (("--num-experts", "32"), "--num-experts 32: bucket 1024x1024 at --resolution-px 32 has 16 image tokens"),
        (("--num-experts", "6", "--valid-resolutions-px", "16"), "--num-experts 6: bucket 1024x1024 at --valid-resol"),
        (("--resolution-px", "36"), "--resolution-px 36 is not a positive multiple of 8"),
    ],
)  # fmt: skip
def test_what_a_flag_gave_is_said_of_no_file(flags, begins, config_file, tmp_path):
    argv = ["--config", str(config_file), "--run-dir", str(tmp_path / "run"), *flags]
    run, args = parse_run(argv, Parser(prog="t"))
    with pytest.raises(ConfigError) as caught, args.origins.named():
        train(run)
    assert str(caught.value).startswith(begins)


def _numbers() -> list[tuple[str, str, object]]:
    """(section, key, a value that is not finite) of every setting of a run that is a number or several."""
    out = []
    for section, section_cls in cfg.sections_of(RunConfig).items():
        for key, hint in typing.get_type_hints(section_cls).items():
            if "float" in str(hint):
                several = [float("nan")] * (4 if key == "wavelet_band_weights" else 1)
                out.append((section, key, several if "tuple" in str(hint) else float("inf")))
    return out


def test_every_number_of_a_run_is_finite():
    numbers = _numbers()
    assert {"sigma_std", "route_scale", "capacity_factors", "lr", "guidance"} <= {
        key for _, key, _ in numbers
    }
    for section, key, value in numbers:
        values = {"data": {"data_path": "x"}}
        values.setdefault(section, {})[key] = value
        with pytest.raises(ConfigError, match=rf"config: {section}\.{key}: expected a finite number, got"):
            cfg.from_dict(RunConfig, values)
