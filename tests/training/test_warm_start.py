"""A run that starts from another one's checkpoint: the next stage of a recipe."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
import yaml

from megatron_nucleus.core.optimizer.optimizer import build_optimizer
from megatron_nucleus.core.parallel_state import create_groups, make_layout, single_process
from megatron_nucleus.data.dataset import open_corpus
from megatron_nucleus.export import native
from megatron_nucleus.training.arguments import parse_run
from megatron_nucleus.training.initialize import build_encoders, build_model
from megatron_nucleus.training.warm_start import start_from
from megatron_nucleus.types import TrainState
from megatron_nucleus.utils.config import Parser
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.ranks import run_ranks
from tests.support import tool
from tests.training.runs import assert_identical, rows, run_here, tensors

CPU = torch.device("cpu")


def run_config(config_file, *flags):
    argv = ["--config", str(config_file), "--run-dir", "unused", *map(str, flags)]
    return parse_run(argv, Parser(prog="t"))[0]


def started(config_file, parallel, *flags) -> tuple[dict, dict, dict]:
    """(what `start_from` returned, weights, optimizer tensors) of a new run, whole."""
    run = run_config(config_file, *flags)
    encoders = build_encoders(run, open_corpus(run.data.data_path), CPU)
    model = build_model(run, parallel, encoders)
    state = TrainState(model, build_optimizer(model, run.optimizer))
    lineage = start_from(state, run, encoders, parallel)
    assert (state.step, state.samples_seen) == (0, 0)
    parts = {"model": model.state_dict(), "optimizer": state.optimizer.tensors()}
    whole = {
        f"{part}/{name}": (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
        for part, values in parts.items()
        for name, t in values.items()
    }
    return lineage, whole, state.optimizer.scalars()


def started_on_ranks(world, ep, source, config_file, *flags) -> tuple[dict, dict]:
    layout = make_layout(world, experts=4, ep=ep, replicate=1)
    lineage, whole, scalars = started(config_file, create_groups(layout, CPU, 0, 60.0), *flags)
    assert_identical(whole, tensors(source, 6))
    return lineage, scalars


@pytest.fixture
def source(config_file, tmp_path):
    """A run of six steps with checkpoints 3 and 6."""
    run_here(config_file, tmp_path / "source", "--train-steps", 6)
    return tmp_path / "source"


def of_model(values: dict) -> dict:
    return {name: t for name, t in values.items() if name.startswith("model/")}


def test_weights_and_optimizer_are_those_of_the_source(config_file, source):
    alone = single_process(CPU, 4)
    lineage, whole, scalars = started(config_file, alone, "--init-from", source, "--init-optimizer")
    assert_identical(whole, tensors(source, 6))
    assert scalars == {"updates": 6}
    assert lineage["step"] == 6
    assert lineage["samples_seen_in_all"] == 48
    assert lineage["path"].endswith("source/checkpoints/step_00000006")
    assert lineage["optimizer"] is True
    older = native.step_name(3)
    _, whole, scalars = started(config_file, alone, "--init-from", source / "checkpoints" / older)
    theirs = tensors(source, 3)
    assert_identical(of_model(whole), of_model(theirs))
    assert scalars == {"updates": 0}
    momentum = [t for name, t in whole.items() if name.startswith("optimizer/")]
    assert all(not t.any() for t in momentum)


@pytest.mark.dist
@pytest.mark.parametrize(("world", "ep"), [(2, 1), (4, 2)])
def test_ranks_take_over_what_one_process_wrote(world, ep, config_file, source, tmp_path):
    flags = ("--init-from", source, "--init-optimizer", "--expert-model-parallel-size", ep)
    results = run_ranks(world, started_on_ranks, tmp_path, world, ep, source, config_file, *flags)
    assert results == [results[0]] * world
    assert results[0][0]["step"] == 6
    assert results[0][1] == {"updates": 6}


def test_merged_and_exported_folders_start_a_run_too(config_file, source, tmp_path):
    tool("merge_checkpoints", "--checkpoints", source, "--last", 2, "--output", tmp_path / "merged")
    tool("convert_checkpoint", "--input", tmp_path / "merged", "--output", tmp_path / "hf", "--to", "hf")
    alone = single_process(CPU, 4)
    for folder in ("merged", "hf"):
        _, whole, _ = started(config_file, alone, "--init-from", tmp_path / folder)
        store = native.open_tensors(tmp_path / "merged")
        assert_identical(of_model(whole), {f"model/{name}": store.read(name) for name in store.names()})
        with pytest.raises(
            ConfigError, match=r"--init-from .*holds no optimizer state .* leave --init-optim"
        ):
            started(config_file, alone, "--init-from", tmp_path / folder, "--init-optimizer")


def test_a_ladder_changes_resolution_and_capacity_but_no_parameter(config_file, source, tmp_path):
    """6 steps at 32 px and capacity 2, then 64 px and capacity 1: the same names and shapes, the source's weights."""
    second, third = tmp_path / "second", tmp_path / "third"
    flags = ["--seed", 1, "--init-optimizer", "--train-steps", 2, "--save-interval", 1]
    run_here(config_file, second, "--init-from", source, *flags, "--resolution-px", 64, "--capacity-factors", 1,
             "--global-batch-size", 2)  # fmt: skip
    run_here(config_file, third, "--init-from", second, *flags, "--resolution-px", 96, "--capacity-factors", 0, 0.5,
             "--global-batch-size", 2, "--wavelet-loss-coeff", 0.1)  # fmt: skip
    shapes = [
        {n: t.shape for n, t in tensors(run, s).items()} for run, s in ((source, 6), (second, 2), (third, 2))
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    state = native.read_state(third / "checkpoints" / "step_00000002")
    assert state["samples_seen"] == 4
    assert state["model"]["capacity_factors"] == [0, 0.5]
    chain = state["started_from"]
    assert chain["samples_seen_in_all"] == 48 + 4
    assert chain["started_from"]["samples_seen_in_all"] == 48
    assert chain["started_from"]["started_from"] is None
    manifest = native.describe_file(second / "checkpoints" / "step_00000002" / "manifest.json")
    assert chain["manifest_sha256"] == manifest["sha256"]
    saved = yaml.safe_load((third / "config.yaml").read_text())
    assert saved["started_from"] == chain
    assert saved["config"]["training"]["seed"] == 1
    assert len(saved["data_manifest_sha256"]) == 64
    assert saved["git_commit"]
    assert rows(third)[0]["wavelet_loss"] > 0
    assert rows(second)[0]["wavelet_loss"] == 0


def test_the_same_command_resumes_and_does_not_start_again(config_file, source, tmp_path):
    flags = ["--init-from", source, "--save-interval", 1]
    run_here(config_file, tmp_path / "whole", *flags, "--train-steps", 4)
    run_here(config_file, tmp_path / "parts", *flags, "--train-steps", 2)
    shutil.rmtree(source)  # what it started from is no longer needed
    run_here(config_file, tmp_path / "parts", *flags, "--train-steps", 4)
    assert_identical(tensors(tmp_path / "whole", 4), tensors(tmp_path / "parts", 4))
    states = [
        native.read_state(tmp_path / run / "checkpoints" / "step_00000004") for run in ("whole", "parts")
    ]
    assert states[0]["started_from"] == states[1]["started_from"]
    with pytest.raises(ConfigError, match=r"training\.init_from = \S+source, now it is None; keep"):
        run_here(config_file, tmp_path / "parts", "--train-steps", 5)


def test_the_sources_own_seed_is_warned_of(config_file, source, caplog):
    alone = single_process(CPU, 4)
    with caplog.at_level(logging.WARNING):
        started(config_file, alone, "--init-from", source, "--seed", 1)
        assert caplog.records == []
        started(config_file, alone, "--init-from", source)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"--seed 0: {source}/checkpoints/step_00000006 was trained with it, too"
    )
    assert record.getMessage().endswith("give another --seed")


def test_what_cannot_be_started_from_is_named(config_file, source, tmp_path):
    def refused(kind, match, *flags):
        with pytest.raises(kind, match=match):
            run_here(config_file, tmp_path / "new", *flags)
        assert not (tmp_path / "new" / "checkpoints").exists()

    refused(ConfigError, r"--init-from \S+nowhere: .*no such folder", "--init-from", tmp_path / "nowhere")
    refused(ConfigError, r"--init-optimizer: needs --init-from", "--init-optimizer")
    refused(
        ConfigError, r"--init-from .*trained with model\.num_experts = 4, this run is configured for 2",
        "--init-from", source, "--num-experts", 2,
    )  # fmt: skip
    refused(
        ConfigError, r"--init-from .*trained with the codec .*this run is configured for",
        "--init-from", source, "--dct-statistics", "photographs",
    )  # fmt: skip
    refused(
        ConfigError, r"--init-from .*optimizer tensor \S+ exists only in",
        "--init-from", source, "--init-optimizer", "--optimizer", "adamw",
    )  # fmt: skip
    weights = next((source / "checkpoints" / "step_00000006" / "model").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(DataError, rf"--init-from .*{weights.name}", "--init-from", source)
    state = source / "checkpoints" / "step_00000003" / "state.json"
    state.write_text(json.dumps({}))
    refused(DataError, r"--init-from .*state\.json", "--init-from", state.parent)


def test_a_missing_optimizer_file_says_what_to_do(config_file, source):
    folder = source / "checkpoints" / "step_00000006"
    file = next((folder / "optimizer").glob("*.safetensors"))
    file.unlink()
    flags = ("--init-from", source, "--init-optimizer")
    with pytest.raises(DataError) as caught:
        started(config_file, single_process(CPU, 4), *flags)
    use = folder.with_name("step_00000003")
    assert str(caught.value) == (
        f"--init-from {source}: {file}: missing; use {use}, which is complete, or leave --init-optimizer out"
    )
