"""Figures beside the losses: by noise level, of the routers, over any number of ranks."""

from __future__ import annotations

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_nucleus.core import flow
from megatron_nucleus.core.flow import FlowConfig
from megatron_nucleus.data.dataset import open_corpus
from tests.ranks import run_ranks
from tests.training.runs import damaged_copy, rows, run_here, train_rank


def level_counts(draws: range) -> list[int]:
    """How many of these samples fall in each tenth of the noise levels (seed 0, 16 tokens)."""
    sigma = flow.sample_sigma(FlowConfig(), 0, tuple(draws), 16)
    return torch.histc(sigma, 10, 0, 1).long().tolist()


def test_loss_by_noise_level_covers_the_steps_since_the_last_row(config_file, tmp_path):
    run_here(config_file, tmp_path / "run", "--log-interval", 3)
    curve = rows(tmp_path / "run")
    assert [row["step"] for row in curve] == [3, 6]
    for row, draws in zip(curve, (range(24), range(24, 48)), strict=True):
        counts, by_sigma = level_counts(draws), row["flow_loss_by_sigma"]
        assert list(by_sigma)[::9] == ["0.0-0.1", "0.9-1.0"]
        assert [value is not None for value in by_sigma.values()] == [n > 0 for n in counts]


def test_the_mean_over_the_levels_is_the_loss(config_file, tmp_path):
    run_here(config_file, tmp_path / "run")
    for step, row in enumerate(rows(tmp_path / "run")):
        counts = level_counts(range(8 * step, 8 * step + 8))
        parts = [
            n * (value or 0.0) for n, value in zip(counts, row["flow_loss_by_sigma"].values(), strict=True)
        ]
        assert sum(parts) / 8 == pytest.approx(row["flow_loss"], rel=1e-6)


def test_routings_are_looked_at_when_due_and_shown_at_the_next_row(config_file, tmp_path):
    flags = ["--routing-interval", 3, "--log-interval", 2, "--tensorboard"]
    run_here(config_file, tmp_path / "run", *flags)
    curve = rows(tmp_path / "run")
    assert [(row["step"], "routing" in row) for row in curve] == [(2, False), (4, True), (6, True)]
    figures = curve[1]["routing"]
    assert (
        figures["layer_01/tokens_per_expert_min"] == figures["layer_01/tokens_per_expert_max"] == 8
    )  # 2 * 16 / 4
    assert figures["mean/experts_per_token"] == pytest.approx(2.0)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"histograms": 0, "scalars": 0})
    board.Reload()
    assert board.Tags()["histograms"] == [
        "routing/layer_01/experts_per_token",
        "routing/layer_01/expert_mass",
    ]
    picked = board.Histograms("routing/layer_01/experts_per_token")[0].histogram_value
    assert picked.num == 8 * 16  # every token of the batch
    assert "train/routing/mean/experts_per_token" in board.Tags()["scalars"]
    run_here(config_file, tmp_path / "never", "--log-interval", 2)
    assert all("routing" not in row for row in rows(tmp_path / "never"))


@pytest.mark.dist
def test_ranks_tell_the_same_figures_as_one_process(config_file, tmp_path):
    flags = ["--routing-interval", 1, "--train-steps", 2]
    run_here(config_file, tmp_path / "one", *flags)
    run_ranks(
        4, train_rank, tmp_path, config_file, tmp_path / "many", *flags, "--expert-model-parallel-size", 2
    )
    for ours, theirs in zip(rows(tmp_path / "many"), rows(tmp_path / "one"), strict=True):
        for a, b in zip(
            ours["flow_loss_by_sigma"].values(), theirs["flow_loss_by_sigma"].values(), strict=True
        ):
            assert a == (None if b is None else pytest.approx(b, rel=1e-4))
        assert ours["routing"] == pytest.approx(theirs["routing"], rel=1e-3, abs=1e-6)
        assert ours["mixture"]["samples"] == theirs["mixture"]["samples"] == 8


@pytest.mark.dist
def test_what_was_read_is_counted_over_all_ranks(config_file, corpus, tmp_path):
    """One image in five is damaged: replacements and captions of two ranks add up to those of one process."""
    whole = open_corpus(corpus)
    data = damaged_copy(corpus, tmp_path / "data", {whole.id(row) for row in range(0, len(whole), 5)})
    flags = ["--data-path", data, "--log-interval", 2]
    run_here(config_file, tmp_path / "one", *flags)
    run_ranks(2, train_rank, tmp_path, config_file, tmp_path / "two", *flags)
    ours, theirs = rows(tmp_path / "two"), rows(tmp_path / "one")
    assert [row["substituted"] for row in ours] == [row["substituted"] for row in theirs]
    assert [row["mixture"] for row in ours] == [row["mixture"] for row in theirs]
    assert 0 < ours[0]["substituted"] < ours[-1]["substituted"] < 48
    assert [sum(row["mixture"]["captions"].values()) for row in ours] == [16, 16, 16]


def test_the_realised_mixture_is_logged(config_file, corpus, tmp_path):
    """Scenes of one object and of several, three to one: within one image of every batch of eight."""
    tiers = {t for t, _ in next(iter(open_corpus(corpus).cells.values()))}
    several = sorted(tiers - {"A1"})
    phases = json.dumps([{"at_samples": 0, "tiers": {"A1": 3 * len(several), **dict.fromkeys(several, 1)}}])
    run_here(config_file, tmp_path / "run", "--phases", phases, "--caption-drop-frac", 0.25)
    for row in rows(tmp_path / "run"):
        cells = row["mixture"]["cells"]
        assert sum(cells.values()) == row["mixture"]["samples"] == 8
        assert abs(sum(n for cell, n in cells.items() if cell.startswith("A1/")) - 6) <= 1
        assert row["mixture"]["captions"]["dropped"] == 2
