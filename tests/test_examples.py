"""Every training recipe in examples/ is a complete, valid configuration of tools/train.py."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from megatron_nucleus.data.encoders import build_text_encoder
from megatron_nucleus.export.hf_keys import count_parameters
from megatron_nucleus.training.ablation.plan import read_suites
from megatron_nucleus.training.arguments import RunConfig, parse_run
from megatron_nucleus.training.initialize import run_shape
from megatron_nucleus.utils.config import Parser
from tests.support import ROOT

SUITES = ROOT / "examples" / "scenes" / "ablations.yaml"  # the one file that is for tools/ablate.py
CURATION = {ROOT / "examples" / "scenes" / "curate.yaml", *(ROOT / "examples" / "curation").glob("*.yaml")}
RECIPES = sorted(set((ROOT / "examples").rglob("*.yaml")) - {SUITES} - CURATION)
LADDER = [ROOT / "examples" / "scenes" / f"{name}.yaml" for name in ("stage1_32", "stage2_64", "stage3_128")]


def test_there_are_recipes():
    assert {p.name for p in RECIPES} >= {"demo_cpu.yaml", "demo_gpu.yaml", "demo_photos_cpu.yaml"}
    assert set(LADDER) <= set(RECIPES)


def text_dim(run: RunConfig) -> int:
    """Width of the text features, without the weights of a large encoder."""
    if run.encoders.text_encoder == "qwen3_vl":
        return 4096  # Qwen3-VL-8B's hidden width
    return build_text_encoder(run.encoders.text_spec()).dim


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipe_is_valid_and_builds_an_architecture(path):
    run, _ = parse_run(["--config", str(path)], Parser(prog="t"))
    shape = run_shape(run, text_dim(run))
    assert count_parameters(shape) > 1e6
    assert run.sampling.shift >= 1


def test_stages_of_the_ladder_differ_in_no_parameter_and_keep_the_tokens_of_a_step():
    runs = [parse_run(["--config", str(path)], Parser(prog="t"))[0] for path in LADDER]
    shapes = [run_shape(run, 256) for run in runs]
    factors = [shape.capacity_factors for shape in shapes]
    assert factors == [(4.0,) * 4, (2.0,) * 4, (0.0, 2.0, 1.0, 1.0)]
    assert len({dataclasses.replace(shape, capacity_factors=factors[0]) for shape in shapes}) == 1
    tokens = [r.training.global_batch_size * (r.data.resolution_px // 8) ** 2 for r in runs]
    assert tokens == [2048] * 3
    assert [run.losses.wavelet_loss_coeff for run in runs] == [0.0, 0.0, 0.1]
    for before, run in itertools.pairwise(runs):
        assert run.training.init_from == before.training.run_dir
        assert run.training.init_optimizer


def test_published_stages_keep_the_published_numbers():
    """FACTS of the recipe: arXiv 2604.12163 and its team's blog."""
    folder = ROOT / "examples" / "nucleus_image_17b"
    paths = [folder / f"{name}.yaml" for name in ("stage1_256", "stage2_512", "stage3_1024")]
    runs = [parse_run(["--config", str(path)], Parser(prog="t"))[0] for path in paths]
    shapes = [run_shape(run, 4096) for run in runs]
    assert {count_parameters(shape) for shape in shapes} == {16_922_679_296}
    assert [shape.capacity_factors for shape in shapes] == [
        (8.0,) * 32, (4.0,) * 32, (0.0,) * 3 + (4.0,) * 2 + (2.0,) * 27,
    ]  # fmt: skip
    assert [(r.data.resolution_px, r.training.global_batch_size) for r in runs] == [
        (256, 4096), (512, 1024), (1024, 256),
    ]  # fmt: skip
    assert [r.training.global_batch_size * (r.data.resolution_px // 16) ** 2 for r in runs] == [2**20] * 3
    assert [r.losses.wavelet_loss_coeff for r in runs] == [0.0, 0.0, 0.1]
    assert [r.schedule.lr_warmup_steps for r in runs] == [1000, 0, 0]
    for run in runs:
        assert (run.optimizer.lr, run.optimizer.muon_momentum, run.optimizer.router_orthogonality) == (
            1e-4,
            0.95,
            1e-7,
        )
        assert (run.losses.moe_z_loss_coeff, run.flow.sigma_uniform_frac) == (5e-7, 0.1)
        assert run.parallel.expert_model_parallel_size == 64
        assert (run.training.keep_last_checkpoints or 0) + (run.training.keep_last_weights or 0) >= 16
    for before, run in itertools.pairwise(runs):
        assert run.training.init_from == before.training.run_dir
        assert run.training.seed != before.training.seed
        last, first = before.curriculum.phases.phases[-1], run.curriculum.phases.phases[0]
        assert dataclasses.replace(last, at_samples=0) == first  # a stage goes on where the one before ended


def test_suites_are_valid():
    assert read_suites(SUITES).keys() == {"small", "routing"}
