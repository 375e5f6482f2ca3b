"""Measuring the data path: its images, and that shares and rates are those of clocks that are known."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from PIL import Image

from megatron_nucleus.data import bench_loading, decoders, images
from megatron_nucleus.data.loader import DataConfig
from tests.data.pictures import scene
from tests.data.test_decoders import stand_in


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    photographs = []
    for number in range(3):
        photographs.append(folder / f"{number}.png")
        scene(320, 300, number).save(photographs[-1])
    return bench_loading.make_corpus(folder / "d", photographs, (400, 200), 6), photographs, folder


def test_the_images_are_mosaics_of_the_photographs_and_the_same_again(corpus):
    made, photographs, folder = corpus
    again = bench_loading.make_corpus(folder / "e", photographs, (400, 200), 6)
    assert [again.id(row) for row in range(6)] == [made.id(row) for row in range(6)]
    assert len({made.id(row) for row in range(6)}) == 6
    for row in range(6):
        header = images.plain_jpeg(made.read(row).payload)
        assert (header.width_px, header.height_px, header.orientation) == (400, 200, 1)
    opened = bench_loading.make_corpus(folder / "d", photographs, (400, 200), 6)  # finished: not made again
    assert opened.manifest_hash == made.manifest_hash


def test_a_tile_is_a_piece_of_a_photograph_as_it_is(monkeypatch):
    side = bench_loading.TILE_PX
    source = np.asarray(scene(side + 5, side + 3))
    saved = []
    monkeypatch.setattr(Image.Image, "save", lambda self, *_, **__: saved.append(np.asarray(self).copy()))
    bench_loading._mosaic([source], (2 * side, side), np.random.default_rng(0))
    pieces = [source[y : y + side, x : x + side] for y in range(4) for x in range(6)]
    for tile in (saved[0][:, :side], saved[0][:, side:]):
        assert any(np.array_equal(tile, piece) or np.array_equal(tile, piece[:, ::-1]) for piece in pieces)


def test_rates_and_differences_of_decoders(corpus, monkeypatch):
    made = corpus[0]

    class Slow(decoders.BatchDecoder):
        def decode(self, *args):
            time.sleep(0.02)
            return [pixels ^ 2 for pixels in super().decode(*args)]  # every value is off by two levels

    slow = Slow("dali", stand_in()._open_pipeline, 5)
    monkeypatch.setattr(decoders, "open_decoder", lambda name, _: None if name == "pillow" else slow)
    pillow, dali = bench_loading.time_decoders(made, ["pillow", "dali"], 128, 3)
    assert (pillow["mean_difference"], pillow["over_1_frac"], pillow["library_frac"]) == (0, 0, 0)
    assert dali["library_frac"] == 1
    assert (dali["mean_difference"], dali["over_1_frac"]) == (2, 1)
    assert dali["low"] <= dali["images_per_s"] <= dali["high"] <= 6 / 0.04  # two batches of three


def test_the_share_of_waiting_is_that_of_the_clock(corpus, monkeypatch):
    made = corpus[0]
    config = DataConfig(data_path="-", resolution_px=32, num_workers=0, prefetch_batches=1)
    real = images.load_pixels
    monkeypatch.setattr(images, "load_pixels", lambda *a: (time.sleep(0.01), real(*a))[1])
    row = bench_loading.time_waiting(config, made, 3, 4, 0.03)
    assert 0.4 < row["waiting_frac"] < 0.8  # 3 images of 10 ms and their decode, then 30 ms
    assert row["seconds"] > 4 * 0.06
    assert 10 < bench_loading.time_loader(config, made, 3, 4)["images_per_s"] <= 100
    busy = dataclasses.replace(config, num_workers=1, prefetch_batches=2)
    assert bench_loading.time_waiting(busy, made, 3, 4, 0.1)["waiting_frac"] < 0.35  # made meanwhile


class SimulatedLoader:
    """One worker that makes a micro-batch in ``make_s`` and runs two ahead, on a clock of its own."""

    def __init__(self, make_s):
        self.make_s, self.now_s, self.waited_s, self.ready_s, self.taken_s = make_s, 0.0, 0.0, [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __next__(self):
        number = len(self.ready_s)
        room_s = self.taken_s[number - 2] if number >= 2 else 0.0
        self.ready_s.append(max(room_s, self.ready_s[-1] if self.ready_s else 0.0) + self.make_s)
        self.waited_s += max(0.0, self.ready_s[-1] - self.now_s)
        self.now_s = max(self.now_s, self.ready_s[-1])
        self.taken_s.append(self.now_s)

    def take_waited_s(self):
        waited_s, self.waited_s = self.waited_s, 0.0
        return waited_s

    def perf_counter(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds


@pytest.mark.parametrize(("make_s", "share"), [(0.3, 0.0), (0.6, 1 / 6), (2.0, 0.75)])
def test_the_share_of_waiting_is_that_of_the_long_run(make_s, share, monkeypatch):
    loader = SimulatedLoader(make_s)
    monkeypatch.setattr(bench_loading, "open_loader", lambda *_: loader)
    monkeypatch.setattr(bench_loading, "time", loader)
    row = bench_loading.time_waiting(DataConfig(data_path="-"), None, 3, 4, 0.5)
    assert row["waiting_frac"] == pytest.approx(share, abs=1e-9)
    assert row["seconds"] == pytest.approx(4 * max(0.5, make_s))


def test_a_decoder_in_the_training_process_takes_no_workers(tmp_path):
    made = bench_loading.loaders(tmp_path, ["pillow", "dali_mixed"], [0, 2], 64)
    assert [(c.image_decoder, c.num_workers) for c in made] == [
        ("pillow", 0),
        ("dali_mixed", 0),
        ("pillow", 2),
    ]
