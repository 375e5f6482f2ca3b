"""metrics.jsonl stays one curve over resumes and crashes; values keep full precision."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_nucleus.training.metrics import FILE_NAME, KEYS, MetricsWriter, read_metrics
from megatron_nucleus.utils.errors import DataError


def row(step: int, **changes) -> dict:
    values = dict.fromkeys(KEYS, 0.0) | {
        "step": step,
        "samples_seen": 64 * step,
        "skipped": 0,
        "bucket": "64x64",
    }
    return values | {"loss": 1.0 / 3.0 + step, "mfu": None, "peak_memory_bytes": 123} | changes


def write(folder, steps, start=0, **kwargs) -> None:
    with MetricsWriter(folder, start, tensorboard=False) as writer:
        for step in steps:
            writer.write(row(step, **kwargs))


def test_rows_keep_every_digit_and_the_documented_keys(tmp_path):
    write(tmp_path, [10], grad_norm=torch.tensor(0.1), lr=np.float64(1e-4) / 3)
    text = (tmp_path / FILE_NAME).read_text()
    assert text.endswith("\n")
    assert repr(1.0 / 3.0 + 10) in text
    (stored,) = read_metrics(tmp_path / FILE_NAME)
    assert tuple(stored) == KEYS
    assert stored["loss"] == 1.0 / 3.0 + 10
    assert stored["grad_norm"] == float(torch.tensor(0.1))
    assert stored["lr"] == 1e-4 / 3
    assert stored["mfu"] is None
    assert stored["bucket"] == "64x64"


def test_extra_keys_follow_the_documented_ones(tmp_path):
    write(tmp_path, [1], optimizer_s=0.5)
    (stored,) = read_metrics(tmp_path / FILE_NAME)
    assert tuple(stored) == (*KEYS, "optimizer_s")


def test_a_missing_key_is_named(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer, pytest.raises(ValueError, match="lacks lr"):
        writer.write({k: v for k, v in row(1).items() if k != "lr"})


def test_rows_are_on_disk_before_the_writer_is_closed(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(row(1))
    assert [r["step"] for r in read_metrics(tmp_path / FILE_NAME)] == [1]
    writer.close()


def test_resume_takes_back_what_the_checkpoint_does_not_know(tmp_path):
    write(tmp_path, [10, 20, 30, 40])
    before = (tmp_path / FILE_NAME).read_bytes().splitlines()
    write(tmp_path, [25, 50], start=20)
    assert [r["step"] for r in read_metrics(tmp_path / FILE_NAME)] == [10, 20, 25, 50]
    assert (tmp_path / FILE_NAME).read_bytes().splitlines()[:2] == before[:2], "kept rows change in no byte"
    write(tmp_path, [10])
    assert [r["step"] for r in read_metrics(tmp_path / FILE_NAME)] == [10], "a run from step 0 is a new curve"


def test_a_row_cut_off_by_a_crash_is_dropped(tmp_path):
    write(tmp_path, [10, 20])
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes() + b'{"step": 30, "loss": 0.')
    assert [r["step"] for r in read_metrics(path)] == [10, 20]
    write(tmp_path, [30], start=20)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


@pytest.mark.parametrize("bad", [b"not json\n", b'{"loss": 1}\n', b"[1]\n", b"\xff\xfe\n"])
def test_damage_before_the_end_is_named_and_nothing_is_lost(tmp_path, bad):
    write(tmp_path, [10, 20])
    path = tmp_path / FILE_NAME
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + bad + second)
    content = path.read_bytes()
    with pytest.raises(DataError, match=FILE_NAME):
        MetricsWriter(tmp_path, 20, tensorboard=False)
    assert path.read_bytes() == content


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_metrics(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_values_that_are_not_finite_become_null(tmp_path, bad):
    write(tmp_path, [1], loss=bad)
    assert json.loads((tmp_path / FILE_NAME).read_text())["loss"] is None
    assert "NaN" not in (tmp_path / FILE_NAME).read_text()


def read_board(folder) -> EventAccumulator:
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return board


def test_tensorboard_has_the_same_curve_over_a_resume(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.write(row(step, loss=float(step), grad_norm=math.nan if step == 20 else 1.0))
    with MetricsWriter(tmp_path, 20) as writer:
        writer.write(row(30, loss=33.0))
        writer.image("samples", Image.new("RGB", (5, 3), (255, 0, 0)), 30)
    board = read_board(tmp_path)
    assert {e.step: e.value for e in board.Scalars("train/loss")} == {10: 10.0, 20: 20.0, 30: 33.0}
    assert [e.step for e in board.Scalars("train/grad_norm")] == [10, 30]
    (image,) = board.Images("samples")
    assert (image.width, image.height, image.step) == (5, 3, 30)
    assert "train/mfu" not in board.Tags()["scalars"]


def events(folder) -> EventAccumulator:
    board = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "histograms": 0})
    board.Reload()
    return board


def test_mappings_become_groups_of_curves(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        curves = {"flow_loss_by_sigma": {"0.0-0.1": 0.25, "0.1-0.2": None, "0.2-0.3": math.nan}}
        writer.write(row(3, **curves, valid_loss=0.5, valid_loss_by_tier={"A1": 0.75}))
    (stored,) = read_metrics(tmp_path / FILE_NAME)
    assert stored["flow_loss_by_sigma"] == {"0.0-0.1": 0.25, "0.1-0.2": None, "0.2-0.3": None}
    board = events(tmp_path)
    tags = {t for t in board.Tags()["scalars"] if "sigma" in t or t.startswith("validation")}
    assert tags == {"train/flow_loss_by_sigma/0.0-0.1", "validation/loss", "validation/loss_by_tier/A1"}
    (event,) = board.Scalars("validation/loss_by_tier/A1")
    assert (event.step, event.value) == (3, 0.75)


def test_a_histogram_keeps_counts_and_edges(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.histogram("routing/x", [1, 0, 3], [-0.5, 0.5, 1.5, 2.5], 7)
        writer.histogram("routing/empty", [0, 0], [0, 1, 2], 7)
    board = events(tmp_path)
    assert board.Tags()["histograms"] == ["routing/x"]
    (event,) = board.Histograms("routing/x")
    value = event.histogram_value
    assert (event.step, value.num, value.sum, value.min, value.max) == (7, 4.0, 6.0, -0.5, 2.5)
    filled = [(limit, n) for limit, n in zip(value.bucket_limit, value.bucket, strict=True) if n]
    assert filled == [(0.5, 1.0), (2.5, 3.0)]
