"""The loader with a curriculum, tokens per step held, and many ranks: the same global batches, whoever reads them."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter

import numpy as np
import pytest
import torch.distributed as dist

from megatron_nucleus.data.buckets import size
from megatron_nucleus.data.curriculum import CurriculumConfig, Phases
from megatron_nucleus.data.dataset import open_corpus
from megatron_nucleus.data.loader import DataConfig, build_loader
from megatron_nucleus.utils.errors import ConfigError
from tests.data.corpora import make_encoded, make_tiered
from tests.ranks import run_ranks

CELLS = {
    "1024x1024": {("A1", "B1"): 12, ("A2", "B1"): 9, ("A2", "B3"): 7, ("A5", "B8"): 3},
    "1344x768": {("A1", "B1"): 5, ("A2", "B3"): 8, ("A5", "B8"): 4},
    "768x1344": {("A1", "B1"): 6, ("A2", "B1"): 5, ("A5", "B8"): 2},
}
PHASES = [
    {"at_samples": 0, "tiers": {"A1": 4, "A2": 2}, "episodes": {"B1": 3, "B3": 1}},
    {
        "at_samples": 1000,
        "table": {"A2": {"B3": 1}, "A5": {"B8": 3}},
        "captions": {"detailed": 1},
        "caption_drop_frac": 0.5,
    },
]
CURRICULUM = CurriculumConfig(Phases.from_plain(PHASES, "phases"), 0.05)
CONFIG = DataConfig(data_path="unused", resolution_px=64, num_workers=0, bucket_batch_multiple=4)
RUN = {"seed": 3, "global_batch_size": 24, "multiple_px": 8, "curriculum": CURRICULUM}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return open_corpus(make_tiered(tmp_path_factory.mktemp("tiered") / "d", CELLS))


def take(corpus, count, config=CONFIG, **options):
    """(bucket, draws, ids, texts, shape) of so many micro-batches."""
    with build_loader(config, corpus, **{**RUN, **options}) as loader:
        return [describe(next(loader)) for _ in range(count)]


def describe(batch):
    shape = tuple(batch.pixels_BCHW.shape[2:])
    return batch.bucket, batch.step_samples, shape, batch.draws, batch.ids, batch.texts


def test_every_step_has_about_the_tokens_of_a_square_batch(corpus):
    """At 64 px in tokens of 8 px: 8 x 8 square, 11 x 6 and 6 x 11, so 240 x 64 / 66 = 232.7 images."""
    assert {b[2] for b in take(corpus, 12)} == {(64, 64), (48, 88), (88, 48)}
    for multiple, wide in ((1, 233), (4, 232), (8, 232), (16, 240), (80, 240)):
        config = dataclasses.replace(CONFIG, bucket_batch_multiple=multiple)
        got = {b[0]: (b[1], len(b[3])) for b in take(corpus, 6, config, global_batch_size=240)}
        assert got == {"1024x1024": (240, 240), "1344x768": (wide, wide), "768x1344": (wide, wide)}
    plain = dataclasses.replace(CONFIG, bucket_batch_multiple=None)
    assert {b[1] for b in take(corpus, 12, plain)} == {24}
    large = dataclasses.replace(CONFIG, resolution_px=32)  # 4 x 4, 5 x 3 and 3 x 5
    drawn = {b[0]: b[1] for b in take(corpus, 6, large, global_batch_size=240)}
    assert drawn == {"1024x1024": 240, "1344x768": 256, "768x1344": 256}
    assert {b: n * w * h for b, n in drawn.items() for w, h in [size(b, 32, 8)]} == dict.fromkeys(
        drawn, 240 * 32 * 32
    )


def test_a_small_batch_still_draws_the_multiple(corpus):
    config = dataclasses.replace(CONFIG, bucket_batch_multiple=16)
    assert {b[1] for b in take(corpus, 9, config, global_batch_size=2)} == {16}


def test_encoded_data_counts_its_own_tokens(tmp_path):
    make_encoded(tmp_path / "old")
    options = {"seed": 0, "global_batch_size": 8}
    with pytest.raises(ConfigError, match="before token sizes were recorded; run tools/encode.py again"):
        build_loader(CONFIG, open_corpus(tmp_path / "old"), **options)
    make_encoded(tmp_path / "new", multiple_px=8)
    config = dataclasses.replace(CONFIG, resolution_px=999)
    with build_loader(config, open_corpus(tmp_path / "new"), **options, multiple_px=1) as loader:
        assert next(loader).step_samples == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"world": 3},
            "--bucket-batch-multiple 4 is not a multiple of 3 data-parallel ranks x 1 .*; use 3, or",
        ),
        (
            {"world": 2, "accumulation": 4},
            "--bucket-batch-multiple 4 .* 2 data-parallel ranks x 4 .*; use 8, or",
        ),
    ],
)
def test_a_multiple_that_the_ranks_cannot_share_is_refused(corpus, options, message):
    with pytest.raises(ConfigError, match=message):
        build_loader(CONFIG, corpus, **{**RUN, **options})
    with pytest.raises(ConfigError, match="bucket_batch_multiple 0: at least 1"):
        dataclasses.replace(CONFIG, bucket_batch_multiple=0)


def test_data_without_tiers_has_no_curriculum(tmp_path):
    make_encoded(tmp_path / "d", multiple_px=8)
    with pytest.raises(
        ConfigError, match=r"phases: the data set .* has no images with a tier and an episode"
    ):
        build_loader(CONFIG, open_corpus(tmp_path / "d"), **RUN)


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_resuming_at_any_step_with_any_split_gives_the_rest(corpus, pieces):
    whole = take(corpus, 40)
    seen = 0
    for step, batch in enumerate(whole[:30]):
        if step in (1, 2, 7, 29):
            rest = take(corpus, 5 * pieces, start_samples=seen, accumulation=pieces)
            joined = [
                (*rest[i][:3], *(sum((part[k] for part in rest[i : i + pieces]), ()) for k in (3, 4, 5)))
                for i in range(0, len(rest), pieces)
            ]
            assert joined == whole[step : step + 5]
        assert batch[3] == tuple(range(seen, seen + batch[1]))
        seen += batch[1]


def test_workers_change_nothing(corpus):
    config = dataclasses.replace(CONFIG, num_workers=2, prefetch_batches=2)
    with build_loader(config, corpus, **RUN, accumulation=2) as loader:
        got = [describe(next(loader)) for _ in range(12)]
        mixture = loader.take_mixture()
    with build_loader(CONFIG, corpus, **RUN, accumulation=2) as loader:
        assert [describe(next(loader)) for _ in range(12)] == got
        assert loader.take_mixture() == mixture


def test_the_mixture_that_is_reported_is_the_one_that_was_drawn(corpus):
    with build_loader(CONFIG, corpus, **RUN, accumulation=2) as loader:
        assert loader.take_mixture() == {
            "samples": 0,
            "cells": {},
            "captions": {"short": 0, "medium": 0, "detailed": 0, "dropped": 0},
        }
        cell_of = {corpus.id(r): f"{corpus.tier(r)}/{corpus.episode(r)}" for r in range(len(corpus))}
        batches = [next(loader) for _ in range(40)]
        taken = loader.take_mixture()
        ids = Counter(cell_of[i] for b in batches for i in b.ids)
        texts = Counter((t or "- dropped").split()[1] for b in batches for t in b.texts)
        assert taken["cells"] == dict(sorted(ids.items()))
        assert taken["samples"] == sum(ids.values()) == sum(len(b.ids) for b in batches)
        assert taken["captions"] == {"short": 0, "medium": 0, "detailed": 0, "dropped": 0} | texts
        first = next(loader)  # the first half of a step: its cells are the whole step's
        half = loader.take_mixture()
        assert half["samples"] == sum(half["cells"].values()) == first.step_samples == 2 * len(first.ids)
        assert sum(half["captions"].values()) == len(first.ids)
        next(loader)
        assert loader.take_mixture()["samples"] == 0
    with build_loader(CONFIG, corpus, **{**RUN, "curriculum": CurriculumConfig()}) as loader:
        batch = next(loader)
        assert (loader.take_mixture()["samples"], loader.take_mixture()["cells"]) == (batch.step_samples, {})


def test_every_step_keeps_to_the_table_as_it_moves(corpus):
    """From the settings alone: shares interpolated by hand, those of the square bucket among its own cells."""
    start, end = (
        {"A1/B1": 0.5, "A1/B3": 1 / 6, "A2/B1": 0.25, "A2/B3": 1 / 12},
        {"A2/B3": 0.25, "A5/B8": 0.75},
    )
    cell_of = {corpus.id(r): f"{corpus.tier(r)}/{corpus.episode(r)}" for r in range(len(corpus))}
    cells = [f"{t}/{e}" for t, e in corpus.cells["1024x1024"]]
    checked = 0
    for bucket, samples, _, draws, ids, texts in take(corpus, 34):
        t = min(draws[0] / 1000, 1.0)
        share = {c: start.get(c, 0) * (1 - t) + end.get(c, 0) * t for c in {*start, *end}}
        dropped = sum(text == "" for text in texts)
        assert abs(dropped - samples * (0.1 + 0.4 * t)) < 1 + 1e-9
        kept = Counter(text.split()[1] for text in texts if text)
        for name, wanted in (("short", (1 - t) / 3), ("detailed", (1 - t) / 3 + t)):
            assert abs(kept[name] - samples * (0.9 - 0.4 * t) * wanted) < 1 + 1e-9
        if bucket == "1024x1024" and t < 0.9:  # before B1 meets the floor
            drawn = Counter(cell_of[i] for i in ids)
            total = sum(share[c] for c in cells)
            for cell in cells:
                assert abs(drawn[cell] - samples * share[cell] / total) < 1 + 1e-6
            checked += 1
    assert checked > 8


def test_an_unreadable_sample_is_replaced_from_its_own_cell(tmp_path, corpus):
    damaged = open_corpus(make_tiered(tmp_path / "d", CELLS, damaged=(0, 1, 2, 3, 4, 5, 6, 7)))
    cell_of = {damaged.id(r): f"{damaged.tier(r)}/{damaged.episode(r)}" for r in range(len(damaged))}
    with build_loader(CONFIG, damaged, **RUN) as loader:
        for _ in range(10):
            drawn = Counter(cell_of[i] for i in next(loader).ids)
            assert loader.take_mixture()["cells"] == dict(sorted(drawn.items()))
        assert loader.substituted > 0


def test_passes_are_reported_per_cell(corpus, caplog):
    with caplog.at_level(logging.INFO):
        take(corpus, 40)
    assert "bucket 1024x1024:A1/B1 is in pass 2 over its images" in caplog.text
    assert "bucket 1344x768 has no images of A1/B3, A2/B1" in caplog.text


def ranks_take(folder, counts):
    """Steps on this rank: resumed where ``counts`` say, in one lockstep."""
    corpus = open_corpus(folder)
    rank, world = dist.get_rank(), dist.get_world_size()
    taken, seen = [], 0
    for count in counts:
        part = take(corpus, 2 * count, start_samples=seen, rank=rank, world=world, accumulation=2,
                    config=dataclasses.replace(CONFIG, bucket_batch_multiple=8))  # fmt: skip
        seen += sum(batch[1] for batch in part[::2])
        taken += part
    return taken


@pytest.mark.dist
def test_ranks_stay_in_lockstep_and_share_the_one_global_batch(corpus, tmp_path):
    config = dataclasses.replace(CONFIG, bucket_batch_multiple=8)
    whole = take(corpus, 12, config)
    assert len({batch[0] for batch in whole}) == 3
    for world, counts in ((2, (12,)), (4, (12,)), (4, (5, 7)), (2, (1, 3, 8))):
        ranks = run_ranks(world, ranks_take, tmp_path, corpus.root, counts)
        for step, wanted in enumerate(whole):
            parts = [batch for taken in ranks for batch in taken[2 * step : 2 * step + 2]]
            assert {part[:3] for part in parts} == {wanted[:3]}  # bucket, step size and shape
            assert {len(part[3]) for part in parts} == {wanted[1] // world // 2}
            for field in (3, 4, 5):
                assert sum((part[field] for part in parts), ()) == wanted[field]


def test_another_world_size_goes_on_with_the_same_batches(corpus):
    config = dataclasses.replace(CONFIG, bucket_batch_multiple=8)
    whole = take(corpus, 10, config)
    seen = int(np.sum([batch[1] for batch in whole[:4]]))
    ranks = [take(corpus, 6, config, start_samples=seen, rank=r, world=8) for r in range(8)]
    for step, wanted in enumerate(whole[4:]):
        assert sum((taken[step][4] for taken in ranks), ()) == wanted[4]
