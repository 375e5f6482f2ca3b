"""The loader: same batches whatever the workers, ranks, micro-batches and the point of resuming."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter

import numpy as np
import pytest
import torch

from megatron_nucleus.data.buckets import size
from megatron_nucleus.data.dataset import open_corpus
from megatron_nucleus.data.images import load_pixels
from megatron_nucleus.data.loader import DataConfig, build_loader
from megatron_nucleus.data.manifest import DatasetWriter
from megatron_nucleus.data.shards import encode_json
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.data.corpora import SIZES, caption, make_encoded, picture

CONFIG = DataConfig(data_path="unused", resolution_px=32, num_workers=0)
RUN = {"seed": 7, "global_batch_size": 12, "accumulation": 3, "multiple_px": 8}


def make_corpus(folder, count=60, damaged=()):
    writer = DatasetWriter(folder, tool="test", settings={})
    rng = np.random.default_rng(0)
    payloads = {}
    for i in range(count):
        bucket = list(SIZES)[i % 3]
        payload = picture(rng, SIZES[bucket])
        sample_id = hashlib.sha256(payload).hexdigest()
        payload = payload[:300] if i in damaged else payload
        captions = [caption(f"{i} short", "short"), caption(f"{i} detailed", "detailed")]
        info = encode_json({"captions": captions[: 1 + i % 2]})
        writer.add({"id": sample_id, "aspect_bucket": bucket}, {"png": payload, "json": info})
        payloads[sample_id] = payload
    writer.finish({})
    return open_corpus(folder), payloads


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("loader") / "d")


def take(corpus, count, config=CONFIG, **options):
    with build_loader(config, corpus, **{**RUN, **options}) as loader:
        return [next(loader) for _ in range(count)]


def assert_same_batch(a, b):
    assert (a.bucket, a.draws, a.ids, a.texts) == (b.bucket, b.draws, b.ids, b.texts)
    for x, y in ((a.pixels_BCHW, b.pixels_BCHW), (a.latents_BCHW, b.latents_BCHW)):
        assert (x is None and y is None) or torch.equal(x, y)


def test_a_batch_holds_the_fitted_pixels_of_one_bucket(made):
    corpus, payloads = made
    for number, batch in enumerate(take(corpus, 9)):
        assert batch.draws == tuple(range(number * 4, number * 4 + 4))
        width, height = size(batch.bucket, 32, 8)
        assert batch.pixels_BCHW.dtype == torch.uint8
        assert batch.pixels_BCHW.shape == (4, 3, height, width)
        for sample_id, pixels in zip(batch.ids, batch.pixels_BCHW, strict=True):
            want = load_pixels(payloads[sample_id], width, height)
            assert (pixels.permute(1, 2, 0).numpy() == want).all()
        assert batch.text is None
        assert batch.latents_BCHW is None


def test_workers_change_nothing(made):
    corpus, _ = made
    alone = take(corpus, 15)
    for workers in (1, 2):
        config = dataclasses.replace(CONFIG, num_workers=workers, prefetch_batches=2)
        for a, b in zip(alone, take(corpus, 15, config), strict=True):
            assert_same_batch(a, b)


def test_the_global_random_state_is_left_alone(made):
    corpus, _ = made
    torch.manual_seed(3)
    before = torch.get_rng_state()
    take(corpus, 2)
    take(corpus, 2, dataclasses.replace(CONFIG, num_workers=1))
    assert torch.equal(before, torch.get_rng_state())


def test_resuming_anywhere_gives_the_rest(made):
    corpus, _ = made
    whole = take(corpus, 30)
    for step in (1, 4, 9):
        for a, b in zip(whole[3 * step :], take(corpus, 30 - 3 * step, start_samples=12 * step), strict=True):
            assert_same_batch(a, b)


def test_ranks_take_slices_of_the_same_global_batch(made):
    corpus, _ = made
    whole = take(corpus, 30)
    for world, pieces in ((1, 1), (2, 2), (2, 1), (3, 1), (4, 3)):
        per_rank = [
            take(corpus, 10 * pieces, accumulation=pieces, rank=rank, world=world) for rank in range(world)
        ]
        for step in range(10):
            parts = [b for rank in per_rank for b in rank[step * pieces : (step + 1) * pieces]]
            expected = whole[3 * step : 3 * step + 3]
            assert {b.bucket for b in parts} == {expected[0].bucket}
            for field in ("draws", "ids", "texts"):
                got = [x for b in parts for x in getattr(b, field)]
                assert got == [x for b in expected for x in getattr(b, field)]


def test_every_image_comes_once_per_pass(made):
    corpus, payloads = made
    seen = Counter(i for b in take(corpus, 15) for i in b.ids)  # 60 draws over 60 images in 3 equal buckets
    assert sum(seen.values()) == 60
    long = Counter(i for b in take(corpus, 150) for i in b.ids)
    assert set(long) == set(payloads)
    assert set(long.values()) <= {8, 9, 10, 11, 12}


def test_a_changed_batch_size_goes_on_with_fresh_draws(made):
    corpus, _ = made
    after = take(corpus, 4, global_batch_size=8, accumulation=2, start_samples=12 * 5)
    assert [d for b in after for d in b.draws] == list(range(60, 76))
    planned = take(
        corpus, 4, global_batch_size=8, accumulation=2, start_samples=8 * 8
    )  # ceil(60 / 8) = step 8
    assert [b.ids for b in after] == [b.ids for b in planned]


def test_a_data_set_smaller_than_the_batch_repeats_and_is_reported(tmp_path, caplog):
    corpus, _ = make_corpus(tmp_path / "d", count=4)
    with caplog.at_level(logging.INFO):
        batches = take(corpus, 6, global_batch_size=24, accumulation=2)
    assert all(len(b.ids) == 12 for b in batches)
    assert "fewer than a global batch of 24" in caplog.text
    assert "over its images" in caplog.text


def test_texts_are_the_images_own_captions_or_empty(made):
    corpus, _ = made
    config = dataclasses.replace(CONFIG, caption_drop_frac=0.5)
    own = {corpus.id(r): [c.text for c in corpus.read(r).captions] for r in range(len(corpus))}
    texts = [(i, t) for b in take(corpus, 60, config) for i, t in zip(b.ids, b.texts, strict=True)]
    assert all(t == "" or t in own[i] for i, t in texts)
    assert 0.35 < sum(t == "" for _, t in texts) / len(texts) < 0.65


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_is_replaced_counted_and_nothing_else_changes(tmp_path, made, workers, caplog):
    corpus, _ = make_corpus(tmp_path / "d", damaged={3})
    good, _ = made
    lost = next(iter(set(corpus_ids(good)) & {good_id(3)}))
    config = dataclasses.replace(CONFIG, num_workers=workers)
    with build_loader(config, corpus, **RUN) as loader, caplog.at_level(logging.WARNING):
        batches = [next(loader) for _ in range(60)]
        replaced = loader.substituted
    count = 0
    for a, b in zip(take(good, 60), batches, strict=True):
        assert (a.bucket, a.draws) == (b.bucket, b.draws)
        for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=True)):
            if x == lost:
                count += 1
                assert y != lost
                assert corpus.buckets[b.bucket] == 20
            else:
                assert x == y
                assert a.texts[i] == b.texts[i]
                assert torch.equal(a.pixels_BCHW[i], b.pixels_BCHW[i])
    assert replaced == count > 0
    assert lost in caplog.text


def test_a_caption_of_an_unknown_length_is_a_damaged_sample(tmp_path, caplog):
    """Ranks add their counts up class by class: what is none of the three classes must not come in unseen."""
    writer = DatasetWriter(tmp_path / "d", tool="test", settings={})
    for i in range(4):
        payload = picture(np.random.default_rng(i), SIZES["1024x1024"])
        info = encode_json({"captions": [caption(f"{i}", "long" if i == 2 else "short")]})
        bucket = {"id": hashlib.sha256(payload).hexdigest(), "aspect_bucket": "1024x1024"}
        writer.add(bucket, {"png": payload, "json": info})
    writer.finish({})
    config = dataclasses.replace(CONFIG, caption_drop_frac=0.0)
    with build_loader(config, open_corpus(tmp_path / "d"), **RUN) as loader, caplog.at_level(logging.WARNING):
        batches = [next(loader) for _ in range(3)]
        mixture, replaced = loader.take_mixture(), loader.substituted
    assert mixture["captions"] == {"short": 12, "medium": 0, "detailed": 0, "dropped": 0}
    assert {text for batch in batches for text in batch.texts} == {"0", "1", "3"}
    assert replaced >= 3  # 12 draws from 4 images take it three times
    assert "a caption of length_class 'long', none of short, medium, detailed" in caplog.text


def corpus_ids(corpus):
    return [corpus.id(r) for r in range(len(corpus))]


def good_id(number):
    rng = np.random.default_rng(0)
    pictures = [picture(rng, list(SIZES.values())[i % 3]) for i in range(number + 1)]
    return hashlib.sha256(pictures[-1]).hexdigest()


def test_a_bucket_of_damage_ends_with_the_file_named(tmp_path):
    corpus, _ = make_corpus(tmp_path / "d", count=6, damaged=set(range(6)))
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"16 samples of bucket .* in a row are unreadable") as caught:
            take(corpus, 1, dataclasses.replace(CONFIG, num_workers=workers))
        assert "\n" not in str(caught.value)


def test_encoded_samples_give_latents_and_padded_features(tmp_path):
    stored = make_encoded(tmp_path / "d")
    config = dataclasses.replace(CONFIG, caption_drop_frac=0.3, num_workers=1)
    masks = 0
    for batch in take(open_corpus(tmp_path / "d"), 15, config):
        assert batch.pixels_BCHW is None
        longest = 0
        for i, (sample_id, text) in enumerate(zip(batch.ids, batch.texts, strict=True)):
            latents, features = stored[sample_id]
            assert torch.equal(batch.latents_BCHW[i], latents)
            length = len(features[text])
            longest = max(longest, length)
            assert torch.equal(batch.text.features_BLU[i, :length], features[text])
            assert (batch.text.features_BLU[i, length:] == 0).all()
            if batch.text.mask_BL is not None:
                assert batch.text.mask_BL[i].tolist() == [
                    j < length for j in range(batch.text.mask_BL.shape[1])
                ]
            else:
                assert length == batch.text.features_BLU.shape[1]
        assert batch.text.features_BLU.shape[1] == longest
        masks += batch.text.mask_BL is not None
    assert masks > 0


def test_workers_are_gone_after_close_drop_and_error(made):
    corpus, _ = made
    config = dataclasses.replace(CONFIG, num_workers=2)
    before = set(multiprocessing.active_children())
    loader = build_loader(config, corpus, **RUN)
    next(loader)
    assert len(set(multiprocessing.active_children()) - before) == 2
    loader.close()
    assert set(multiprocessing.active_children()) == before
    with pytest.raises(StopIteration):
        next(loader)
    loader = build_loader(config, corpus, **RUN)
    next(loader)
    del loader
    gc.collect()
    assert set(multiprocessing.active_children()) == before


SCRIPT = """
    import signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    from megatron_nucleus.data.dataset import open_corpus
    from megatron_nucleus.data.loader import DataConfig, build_loader
    config = DataConfig(data_path="x", resolution_px=32, num_workers=2)
    loader = build_loader(config, open_corpus(sys.argv[1]), seed=0, global_batch_size=4, multiple_px=8)
    for _ in range(4):
        next(loader)  # both workers are up
    print("ready", flush=True)
    if sys.argv[2] == "exit":
        sys.exit(0)
    if sys.argv[2] == "flag":  # as a training run does: finish and save after a signal to the whole group
        asked = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: asked.append(1))
        print("set", flush=True)
        while len(asked) < 2:
            next(loader)
        for _ in range(50):
            next(loader)
        print("delivered", flush=True)
        sys.exit(0)
    while True:
        next(loader)
"""


@pytest.mark.parametrize("ending", ["exit", "interrupt", "flag", "kill"])
def test_no_worker_outlives_the_program(made, ending):
    corpus, _ = made
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(corpus.root), ending],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    if ending == "interrupt":
        os.killpg(process.pid, signal.SIGINT)
    elif ending == "flag":
        assert process.stdout.readline() == "set\n"
        os.killpg(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGINT)
    elif ending == "kill":
        os.kill(process.pid, signal.SIGKILL)
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    expected = {"exit": 0, "flag": 0, "kill": -signal.SIGKILL, "interrupt": -signal.SIGINT}
    assert process.returncode == expected[ending], err
    assert out == ("delivered\n" if ending == "flag" else "")
    if ending in ("exit", "flag"):
        assert "Traceback" not in err
    elif ending == "interrupt":
        assert err.count("\nKeyboardInterrupt") == 1, err  # the program's own, none of the workers'
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and group_alive(process.pid):
        time.sleep(0.1)
    assert not group_alive(process.pid)


def group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"global_batch_size": 10},
            "--global-batch-size 10 is not a multiple of 1 data-parallel ranks x 3 micro-batches per step; use 9",
        ),
        ({"world": 5}, "of 5 data-parallel ranks"),
        ({"accumulation": 0}, "accumulation 0: at least 1"),
        ({"global_batch_size": 0}, "--global-batch-size 0: at least 1"),
        ({"start_samples": -1}, "samples seen -1"),
        ({"rank": 3, "world": 3}, "rank 3"),
        ({"multiple_px": 24}, "resolution_px 32 is not a positive multiple of 24"),
    ],
)
def test_sizes_that_do_not_fit(made, options, message):
    with pytest.raises(ConfigError, match=message):
        build_loader(CONFIG, made[0], **{**RUN, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"caption_drop_frac": 1.5},
        {"caption_short_weight": -1.0},
        {"caption_medium_weight": float("nan")},
        {"caption_detailed_weight": float("inf")},
        {"caption_short_weight": 0.0, "caption_medium_weight": 0.0, "caption_detailed_weight": 0.0},
        {"num_workers": -1},
        {"prefetch_batches": 0},
        {"resolution_px": 0},
    ],
)
def test_settings_outside_their_range(options):
    with pytest.raises(ConfigError, match=next(iter(options)).split("_")[0]):
        DataConfig(data_path="x", **options)
