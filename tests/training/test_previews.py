"""What a run shows in TensorBoard while it goes on."""

from __future__ import annotations

import pytest

from tests.training.runs import run_here


def test_tensorboard_holds_scalars_previews_and_the_routing_map(config_file, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_here(
        config_file, tmp_path / "run", "--tensorboard", "--train-steps", 4, "--sample-interval", 2,
        "--sample-prompts", "a photo of a red circle",
    )  # fmt: skip
    board = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    tags = board.Tags()
    assert set(tags["images"]) == {"samples", "routing"}
    assert {e.step for e in board.Images("routing")} == {2, 4}
    assert board.Images("routing")[0].width > 200
    loss = next(tag for tag in tags["scalars"] if tag.split("/")[-1] == "loss")
    assert [e.step for e in board.Scalars(loss)] == [1, 2, 3, 4]


def test_a_dense_model_has_no_routing_map(config_file, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_here(
        config_file, tmp_path / "run", "--tensorboard", "--train-steps", 2, "--sample-interval", 2,
        "--sample-prompts", "a photo of a red circle", "--dense-moe-strategy", "all_dense",
    )  # fmt: skip
    board = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    assert board.Tags()["images"] == ["samples"]
