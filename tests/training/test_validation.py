"""The validation loss: held-out images, fixed noise, equidistant levels, the same figure on any number of ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import megatron_nucleus as mn
from megatron_nucleus.core.patches import pack
from megatron_nucleus.data import images
from megatron_nucleus.data.dataset import open_corpus
from megatron_nucleus.data.encoders import build_codec, build_text_encoder
from megatron_nucleus.export.load import read_description
from megatron_nucleus.training.validation import ValidationConfig, Validator
from megatron_nucleus.utils import rng
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.ranks import run_ranks
from tests.training.runs import (
    assert_identical,
    damage,
    damaged_copy,
    held_out_ids,
    rows,
    run_here,
    tensors,
    train_rank,
)

HELD_OUT = ["--valid-samples", 6, "--valid-sigmas", 4]
STILL = ["--lr", 0, "--router-orthogonality", 0]  # weights stay as they are


def valid_keys(row: dict) -> dict:
    return {key: value for key, value in row.items() if key.startswith("valid")}


def one_by_one(run_dir, corpus_path, sigmas) -> dict[str, list[float]]:
    """The losses of each held-out image, computed the slow way from the checkpoint and the shards."""
    corpus = open_corpus(corpus_path)
    ids = sorted(corpus.id(row) for row in range(len(corpus)))[:6]
    row_of = {corpus.id(row): row for row in range(len(corpus))}
    description = read_description(run_dir)
    codec, text_encoder = build_codec(description.codec), build_text_encoder(description.text_encoder)
    model = mn.load_model(run_dir)
    out = {}
    for name in ids:
        sample = corpus.read(row_of[name])
        pixels = torch.from_numpy(images.load_pixels(sample.payload, 32, 32).transpose(2, 0, 1).copy())
        caption = next(c.text for c in sample.captions if c.length_class == "medium")
        clean, grid = pack(codec.encode(pixels[None]), 2)
        noise = torch.randn(
            clean.shape[1:], generator=rng.generator(0, int(name[:15], 16), "validation noise")
        )
        out[name] = []
        for sigma in sigmas:
            noisy = (1 - sigma) * clean + sigma * noise
            with torch.no_grad():
                velocity = model(noisy, torch.tensor([sigma]), text_encoder.encode([caption]), grid)
            out[name].append(float((velocity - (clean - noise)).double().square().mean()))
    return out


def test_it_is_the_mean_over_images_and_levels(config_file, corpus, tmp_path):
    run_here(config_file, tmp_path / "run", *HELD_OUT, "--train-steps", 3, "--valid-batch-size", 4)
    row = rows(tmp_path / "run")[-1]
    expected = np.array(list(one_by_one(tmp_path / "run", corpus, [0.125, 0.375, 0.625, 0.875]).values()))
    assert row["valid_loss"] == pytest.approx(expected.mean(), rel=1e-5)
    assert list(row["valid_loss_by_sigma"]) == ["0.125", "0.375", "0.625", "0.875"]
    np.testing.assert_allclose(list(row["valid_loss_by_sigma"].values()), expected.mean(0), rtol=1e-5)
    assert row["valid_loss_by_resolution"] == {"32": row["valid_loss"]}
    assert row["valid_samples"] == 6
    tiers = row["valid_loss_by_tier"]
    full = open_corpus(corpus, 6)
    by_tier = {t: [r for r in full.held_out if full.tier(r) == t] for t in tiers}
    mean = sum(len(members) * tiers[t] for t, members in by_tier.items()) / 6
    assert mean == pytest.approx(row["valid_loss"], rel=1e-9)
    assert all(by_tier.values())


@pytest.mark.dist
def test_it_does_not_depend_on_ranks_batch_size_or_seed(config_file, tmp_path):
    run_here(config_file, tmp_path / "source", "--train-steps", 3)
    flags = [*HELD_OUT, *STILL, "--train-steps", 1, "--init-from", tmp_path / "source"]
    run_here(config_file, tmp_path / "one", *flags)
    run_here(config_file, tmp_path / "small", *flags, "--valid-batch-size", 1, "--seed", 5)
    run_ranks(2, train_rank, tmp_path, config_file, tmp_path / "two", *flags, "--valid-batch-size", 2)
    run_ranks(
        4, train_rank, tmp_path, config_file, tmp_path / "four", *flags, "--expert-model-parallel-size", 4
    )
    expected = valid_keys(rows(tmp_path / "one")[-1])
    for name in ("small", "two", "four"):
        found = valid_keys(rows(tmp_path / name)[-1])
        assert found.keys() == expected.keys()
        assert found["valid_loss"] == pytest.approx(expected["valid_loss"], rel=1e-6)
        for key in ("valid_loss_by_sigma", "valid_loss_by_tier", "valid_loss_by_bucket"):
            assert found[key] == pytest.approx(expected[key], rel=1e-6)
        assert found["valid_routing"].keys() == expected["valid_routing"].keys()


def test_more_resolutions_and_the_interval_in_samples(config_file, tmp_path):
    flags = ["--valid-samples", 4, "--valid-interval-samples", 20, "--valid-resolutions-px", 64, 32]
    run_here(config_file, tmp_path / "run", *flags, "--log-interval", 4)
    curve = rows(tmp_path / "run")
    assert [row["step"] for row in curve] == [3, 4, 5, 6]  # 24, 40 and 48 samples, and the log's own 32
    assert [row["step"] for row in curve if "valid_loss" in row] == [3, 5, 6]
    last = curve[-1]["valid_loss_by_resolution"]
    assert list(last) == ["32", "64"]
    assert last["32"] == curve[-1]["valid_loss"]
    assert last["64"] != last["32"]


def test_due_when_an_interval_ends():
    config = ValidationConfig(valid_samples=1, valid_interval_samples=100)
    assert [config.due(a, b) for a, b in ((0, 99), (99, 100), (100, 101), (101, 350), (0, 0))] == [
        False, True, False, True, False,
    ]  # fmt: skip
    assert not ValidationConfig(valid_samples=1).due(0, 1 << 40)
    assert not ValidationConfig().due(0, 1 << 40)


def test_held_out_images_are_part_of_the_run(config_file, tmp_path):
    run_here(config_file, tmp_path / "run", *HELD_OUT, "--train-steps", 3)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000003" / "state.json").read_text())
    assert state["data"]["held_out_samples"] == 6
    with pytest.raises(ConfigError, match=r"--valid-samples 5: this run holds out 6 images"):
        run_here(config_file, tmp_path / "run", "--valid-samples", 5)


def refusal(config_file, run_dir, *flags, checked=True) -> str:
    """The DataError that a run ends with on this rank; unchecked: damage comes after the check at the start."""
    with pytest.MonkeyPatch.context() as patch:
        if not checked:
            patch.setattr(Validator, "check", lambda self: None)
        with pytest.raises(DataError) as caught:
            run_here(config_file, run_dir, *flags)
    return str(caught.value)


@pytest.mark.dist
def test_a_damaged_held_out_image_is_refused_before_the_first_step(config_file, corpus, tmp_path):
    ids = held_out_ids(corpus, 6)
    data = damaged_copy(corpus, tmp_path / "data", [ids[4], ids[1]])
    flags = [*HELD_OUT, "--data-path", data]
    told = refusal(config_file, tmp_path / "run", *flags)
    start, fix = told.split("; ", 1)
    assert start == (
        f"2 of 6 held-out images cannot be read: {data}: sample {ids[1]}: not_an_image: starts with {bytes(12)!r}"
    )
    assert fix.startswith("copy the data set again; where what is lost stays lost")
    assert fix.endswith(f"--valid-exclude-ids {ids[1]} {ids[4]}")
    assert not (tmp_path / "run" / "checkpoints").exists()
    results = run_ranks(2, refusal, tmp_path, config_file, tmp_path / "two", *flags)
    assert results[0] == results[1]
    assert results[0].startswith("2 of 6 held-out images cannot be read")
    assert set(results[0].rsplit("--valid-exclude-ids ", 1)[1].split()) == {ids[1], ids[4]}


def test_the_others_are_measured_alone_where_it_is_said(config_file, corpus, tmp_path):
    ids = held_out_ids(corpus, 6)
    data = damaged_copy(corpus, tmp_path / "data", ids[2:3])
    flags = ["--train-steps", 2, *HELD_OUT]
    run_here(config_file, tmp_path / "whole", *flags)
    run_here(config_file, tmp_path / "rest", *flags, "--data-path", data, "--valid-exclude-ids", ids[2])
    assert_identical(tensors(tmp_path / "rest", 2), tensors(tmp_path / "whole", 2))
    losses = one_by_one(tmp_path / "whole", corpus, [0.125, 0.375, 0.625, 0.875])
    row = rows(tmp_path / "rest")[-1]
    assert row["valid_loss"] == pytest.approx(np.mean([losses[i] for i in ids if i != ids[2]]), rel=1e-5)
    assert row["valid_samples"] == 5
    for excluded, match in (
        (["0" * 64], rf"--valid-exclude-ids {'0' * 64}: no held-out image of \S+ has this id"),
        (ids, r"--valid-exclude-ids: leaves none of the 6 held-out images"),
    ):
        with pytest.raises(ConfigError, match=match):
            run_here(config_file, tmp_path / "none", *flags, "--valid-exclude-ids", *excluded)


@pytest.mark.dist
def test_damage_that_comes_later_ends_all_ranks_alike(config_file, corpus, tmp_path):
    """Found on one rank at the validation after step 4 of 6."""
    ids = held_out_ids(corpus, 6)
    data = damaged_copy(corpus, tmp_path / "data", ids[:1])
    flags = [*HELD_OUT, "--valid-interval-samples", 32, "--save-interval", 0, "--data-path", data]
    results = run_ranks(2, refusal, tmp_path, config_file, tmp_path / "run", *flags, checked=False)
    assert results[0] == results[1]
    assert f"sample {ids[0]}: not_an_image" in results[0]
    assert results[0].endswith("; step 4 is saved, without its validation")
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000004\n"


def test_damage_that_comes_later_costs_no_step(config_file, corpus, tmp_path):
    data, ids = damaged_copy(corpus, tmp_path / "data", []), held_out_ids(corpus, 6)
    flags = [*HELD_OUT, "--valid-interval-samples", 32, "--save-interval", 0, "--log-interval", 3]
    run_here(config_file, tmp_path / "whole", *flags)
    flags += ["--data-path", data]
    run_here(config_file, tmp_path / "run", *flags, "--train-steps", 2)
    damage(data, ids[:1])
    told = refusal(config_file, tmp_path / "run", *flags, checked=False)
    assert told.endswith("; step 4 is saved, without its validation")
    curve = [(row["step"], "valid_loss" in row) for row in rows(tmp_path / "run")]
    assert curve == [(2, True), (3, False), (4, False)]
    told = refusal(
        config_file, tmp_path / "run", *flags, checked=False
    )  # it goes on, to the last step's validation
    assert told.endswith("step 6 is saved, without its validation (--train-steps above 6 validates again)")
    assert_identical(tensors(tmp_path / "run", 6), tensors(tmp_path / "whole", 6))
    flags += ["--train-steps", 7, "--valid-exclude-ids", ids[0]]
    run_here(config_file, tmp_path / "run", *flags)
    assert rows(tmp_path / "run")[-1]["valid_samples"] == 5


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--valid-interval-samples", 8], r"--valid-interval-samples: needs --valid-samples"),
        (["--valid-exclude-ids", "a"], r"--valid-exclude-ids: needs --valid-samples"),
        (["--valid-samples", -1], r"--valid-samples -1: must be at least 0"),
        (["--valid-samples", 4, "--valid-sigmas", 0], r"--valid-sigmas 0: must be at least 1"),
        (["--valid-samples", 100], r"--valid-samples 100"),
        (
            ["--valid-samples", 4, "--valid-resolutions-px", 33],
            r"--valid-resolutions-px 33 is not a positive multiple of 8",
        ),
    ],
)
def test_bad_settings_are_refused_before_training(flags, match, config_file, tmp_path):
    with pytest.raises(ConfigError, match=match):
        run_here(config_file, tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "checkpoints").exists()
