"""Every recipe in examples/ is a complete, valid configuration of tools/train.py."""

from __future__ import annotations

import pytest

from megatron_nucleus.data.encoders import build_text_encoder
from megatron_nucleus.export.hf_keys import count_parameters
from megatron_nucleus.training.arguments import parse_run
from megatron_nucleus.training.initialize import run_shape
from megatron_nucleus.utils.config import Parser
from tests.support import ROOT

RECIPES = sorted((ROOT / "examples").rglob("*.yaml"))


def test_there_are_recipes():
    assert {p.name for p in RECIPES} >= {"demo_cpu.yaml", "demo_gpu.yaml", "demo_photos_cpu.yaml"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipe_is_valid_and_builds_an_architecture(path):
    run, _ = parse_run(["--config", str(path)], Parser(prog="t"))
    shape = run_shape(run, build_text_encoder(run.encoders.text_spec()).dim)
    assert count_parameters(shape) > 1e6
    assert run.sampling.shift >= 1
