"""Decoding by a library: what it gets, what happens when it refuses, and that samples do not depend on it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_nucleus.data import decoders, images
from megatron_nucleus.data.dataset import open_corpus
from megatron_nucleus.data.loader import DataConfig, build_loader
from megatron_nucleus.data.manifest import DatasetWriter
from megatron_nucleus.data.shards import encode_json
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.data.corpora import caption, make_encoded, picture
from tests.data.pictures import content_id, jpeg, scene, wide_gamut, with_profile

MAX_IMAGES = 5
CONFIG = DataConfig(data_path="unused", resolution_px=32, num_workers=0)
RUN = {"seed": 7, "global_batch_size": 12, "accumulation": 3, "multiple_px": 8}


class StandIn:
    """A pipeline as a library's: of Pillow's parts, refuses what it is told to, and is dead after an error."""

    def __init__(self, refuses=frozenset(), seen=None):
        self.refuses, self.seen, self.dead = refuses, [] if seen is None else seen, False

    def run(self, payloads, boxes_px, sizes_px):
        assert not self.dead
        assert 1 <= len(payloads) <= MAX_IMAGES
        self.seen.append(list(payloads))
        if any(content_id(payload) in self.refuses for payload in payloads):
            self.dead = True
            raise RuntimeError("Critical error\n  a long story\nbroken somewhere\n")
        return [
            np.asarray(
                Image.open(io.BytesIO(p)).convert("RGB").resize(size, Image.Resampling.LANCZOS, box=box)
            )
            for p, box, size in zip(payloads, boxes_px, sizes_px, strict=True)
        ]


def stand_in(refuses=frozenset(), seen=None, **options):
    return decoders.BatchDecoder("dali", lambda: StandIn(refuses, seen), MAX_IMAGES, **options)


def decode(decoder, payloads, width=32, height=24):
    return decoder.decode(payloads, [content_id(p) for p in payloads], width, height)


PHOTOS = [jpeg(scene(60 + i, 50, i)) for i in range(12)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_crop_is_that_of_the_upright_picture(orientation):
    payload = jpeg(scene(64, 48), orientation)
    upright = images.decode(payload).image
    for width, height in ((min(upright.size),) * 2, (upright.width, upright.height // 2)):  # cut, not scaled
        (got,) = decode(stand_in(), [payload], width, height)
        assert np.array_equal(got, np.asarray(images.fit(upright, width, height)))
    for width, height in ((24, 24), (40, 16), (16, 56)):
        (got,) = decode(stand_in(), [payload], width, height)
        want = np.asarray(images.fit(upright, width, height))
        assert got.shape == want.shape
        assert (
            np.abs(got.astype(int) - want).mean() < 0.3
        )  # rows first or columns first: Pillow rounds between


def test_a_batch_is_run_in_pieces_and_comes_in_order():
    seen = []
    got = decode(stand_in(seen=seen), PHOTOS)
    assert [len(batch) for batch in seen] == [5, 5, 2]
    for payload, pixels in zip(PHOTOS, got, strict=True):
        assert np.array_equal(pixels, images.load_pixels(payload, 32, 24))
    assert decode(stand_in(), []) == []


def test_what_needs_more_than_a_decode_never_reaches_the_library():
    photo, buffer = scene(50, 40), io.BytesIO()
    photo.save(buffer, "MPO", save_all=True, append_images=[photo])
    others = {
        "png": picture(np.random.default_rng(0), (40, 40)),
        "cmyk": jpeg(photo.convert("CMYK")),
        "profile": wide_gamut(photo),
        "several": buffer.getvalue(),
        "nothing": b"",
        "no image": b"GIF",
        "cut": PHOTOS[0][:400],
    }
    plain = {
        "grey": jpeg(photo.convert("L")),
        "its own": with_profile(photo, "sRGB"),
        "lab": with_profile(photo),
    }
    assert images.decode(others["profile"]).image.tobytes() != photo.tobytes()
    seen = []
    decoder = stand_in(seen=seen)
    payloads = [*others.values(), *plain.values()]
    got = decode(decoder, payloads)
    assert [p for batch in seen for p in batch] == list(plain.values())
    for (name, payload), pixels in zip((others | plain).items(), got, strict=True):
        if name in ("nothing", "no image", "cut"):
            with pytest.raises(images.UnusableImage) as error:
                images.load_pixels(payload, 32, 24)
            assert str(pixels) == str(error.value)
        else:
            assert np.array_equal(pixels, images.load_pixels(payload, 32, 24))
    assert dataclasses.astuple(decoder.counts) == (3, 7, 0, 1)


def test_changed_bytes_never_reach_the_library():
    seen = []
    changed = PHOTOS[0] + b"\0"
    (got,) = stand_in(seen=seen).decode([changed], [content_id(PHOTOS[0])], 32, 24)
    assert seen == []
    assert np.array_equal(got, images.load_pixels(changed, 32, 24))


@pytest.mark.parametrize("bad", [(0,), (4,), (1, 2), (0, 5, 11), tuple(range(12))])
def test_what_the_library_refuses_is_found_and_the_rest_is_its_own(bad, caplog):
    refuses, seen = {content_id(PHOTOS[i]) for i in bad}, []
    decoder = stand_in(refuses, seen)
    got = decode(decoder, PHOTOS)
    for payload, pixels in zip(PHOTOS, got, strict=True):
        assert np.array_equal(pixels, images.load_pixels(payload, 32, 24))
    counts = decoder.counts
    assert (counts.library, counts.pillow, counts.refused) == (12 - len(bad), len(bad), len(bad))
    errors = sum(any(content_id(p) in refuses for p in batch) for batch in seen)
    last_failed = any(content_id(p) in refuses for p in seen[-1])
    assert counts.pipelines == 1 + errors - last_failed  # one more after each error, as soon as it is needed
    assert all(content_id(PHOTOS[i]) in caplog.text for i in bad)
    assert "broken somewhere" in caplog.text
    again = decode(decoder, PHOTOS[:1])
    assert np.array_equal(again[0], got[0])


def test_an_image_does_not_depend_on_its_neighbours():
    class Marked(StandIn):  # what the library decodes can be told from what Pillow does
        def run(self, *args):
            return [255 - pixels for pixels in super().run(*args)]

    refuses = {content_id(PHOTOS[3])}
    alone = [
        decode(decoders.BatchDecoder("dali", lambda: Marked(refuses), MAX_IMAGES), [p])[0] for p in PHOTOS
    ]
    together = decode(decoders.BatchDecoder("dali", lambda: Marked(refuses), MAX_IMAGES), PHOTOS)
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


class Broken:
    """A library that fails on whatever it gets."""

    def run(self, *_):
        raise RuntimeError("broken everywhere")


def test_a_library_that_fails_on_everything_is_named_soon():
    photos = [jpeg(scene(40, 40, i)) for i in range(decoders.MAX_REFUSED_IN_A_ROW + 3)]
    decoder = decoders.BatchDecoder("dali", Broken, MAX_IMAGES)
    with pytest.raises(
        DataError, match="--image-decoder dali: refused 16 images in a row.*broken everywhere"
    ):
        decode(decoder, photos)


@pytest.mark.parametrize("good", [(), (0, 1, 2)])
def test_refusals_never_end_a_run_whose_library_works(good):
    """However many there are in a row or in one batch: they are the images' fault."""
    photos = [jpeg(scene(40, 40, i)) for i in range(decoders.MAX_REFUSED_IN_A_ROW + 3)]
    decoder = stand_in({content_id(p) for i, p in enumerate(photos) if i not in good})
    for _ in range(3):
        got = decode(decoder, photos)
        assert all(np.array_equal(a, images.load_pixels(p, 32, 24)) for a, p in zip(got, photos, strict=True))
    assert decoder.counts.refused == 3 * (len(photos) - len(good))
    assert decoder.counts.library == 3 * len(good)


def test_a_pipeline_that_cannot_be_opened_is_an_error_in_words():
    def no_memory():
        raise RuntimeError("out of memory")

    decoder = decoders.BatchDecoder("dali", no_memory, MAX_IMAGES)
    with pytest.raises(DataError, match="--image-decoder dali: cannot open a pipeline .*out of memory.*use"):
        decode(decoder, PHOTOS[:1])


def test_whole_pictures_in_memory_are_bounded(monkeypatch):
    """Photographs of 60 x 50 to 71 x 50 px, at most two of them in one run; one that is larger is Pillow's."""
    monkeypatch.setattr(decoders, "MAX_RUN_PIXELS", 7000)
    large, seen = jpeg(scene(100, 71, 3)), []
    decoder = stand_in(seen=seen)
    got = decode(decoder, [*PHOTOS[:3], large, *PHOTOS[3:7]])
    assert seen == [PHOTOS[0:2], PHOTOS[2:4], PHOTOS[4:6], PHOTOS[6:7]]
    assert np.array_equal(got[3], images.load_pixels(large, 32, 24))
    assert (decoder.counts.library, decoder.counts.pillow) == (7, 1)


@pytest.fixture
def no_collector():
    """What is freed here is freed by its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_lost_pipeline_is_gone_before_the_next_one_is_opened(no_collector):
    opened = []

    def open_pipeline():
        assert not any(ref() for ref in opened)
        pipeline = StandIn({content_id(PHOTOS[2])})
        opened.append(weakref.ref(pipeline))
        return pipeline

    decoder = decoders.BatchDecoder("dali", open_pipeline, MAX_IMAGES)
    decode(decoder, PHOTOS[:5])
    assert len(opened) == decoder.counts.pipelines > 2


def test_an_unusable_image_does_not_keep_its_batch_in_memory(tmp_path, no_collector):
    corpus = make_corpus(tmp_path / "d", damaged=(1,))
    bad = next(row for row in range(len(corpus)) if len(corpus.read(row).payload) == 300)
    decoder = stand_in()
    get = decoders.reader(corpus, decoder, [4, bad, 5], (32, 24))
    with contextlib.suppress(images.UnusableImage):
        get(bad)
    kept = weakref.ref(get(4).pixels), weakref.ref(decoder)
    del get, decoder
    assert [ref() for ref in kept] == [None, None]


def make_corpus(folder, damaged=()):
    writer = DatasetWriter(folder, tool="test", settings={})
    rng = np.random.default_rng(0)
    for i in range(40):
        size = ((60, 44), (44, 60))[i % 2]
        payload = picture(rng, size) if i % 5 == 0 else jpeg(scene(*size, i), orientation=1 + i % 4)
        row = {"id": content_id(payload), "aspect_bucket": ("1344x768", "768x1344")[i % 2]}
        info = encode_json({"captions": [caption(f"{i}", "short")]})
        writer.add(row, {"jpg": payload[:300] if i in damaged else payload, "json": info})
    writer.finish({})
    return open_corpus(folder)


def take(corpus, count, decoder, monkeypatch, **config):
    monkeypatch.setattr(decoders, "open_decoder", lambda *_: decoder)
    with build_loader(dataclasses.replace(CONFIG, **config), corpus, **RUN) as loader:
        return [next(loader) for _ in range(count)], loader.substituted


@pytest.mark.parametrize(("workers", "own_thread"), [(0, False), (0, True), (2, False)])
def test_samples_do_not_depend_on_the_decoder(tmp_path, monkeypatch, workers, own_thread):
    corpus = make_corpus(tmp_path / "d", damaged=(3, 10, 21))
    refuses = {corpus.id(row) for row in (0, 7)}
    want, replaced = take(corpus, 30, None, monkeypatch)
    decoder = stand_in(refuses, own_thread=own_thread)
    got, replaced_too = take(corpus, 30, decoder, monkeypatch, num_workers=workers, prefetch_batches=2)
    assert replaced == replaced_too > 3
    for a, b in zip(want, got, strict=True):
        assert (a.bucket, a.draws, a.ids, a.texts) == (b.bucket, b.draws, b.ids, b.texts)
        assert (a.pixels_BCHW.int() - b.pixels_BCHW.int()).float().abs().mean() < 0.3
    if workers == 0:
        assert decoder.counts.library > 60
        assert decoder.counts.refused > 0


@pytest.mark.parametrize("own_thread", [False, True])
def test_a_thread_leaves_the_filters_of_warnings_to_the_others(tmp_path, monkeypatch, own_thread):
    filters, changed = warnings.filters, set()

    class Looking(StandIn):
        def run(self, *args):
            changed.add(warnings.filters is not filters)
            return super().run(*args)

    decoder = decoders.BatchDecoder("dali", Looking, MAX_IMAGES, own_thread)
    take(make_corpus(tmp_path / "d"), 6, decoder, monkeypatch)
    assert changed == {not own_thread}
    assert warnings.filters is filters


def test_a_repeated_row_is_read_once_and_others_when_they_are_asked_for(tmp_path, monkeypatch):
    corpus, seen = make_corpus(tmp_path / "d", damaged=(1,)), []
    reads = []
    read = corpus.read
    monkeypatch.setattr(corpus, "read", lambda row: reads.append(row) or read(row))
    get = decoders.reader(corpus, stand_in(seen=seen), [4, 5, 4], (32, 24))
    assert reads == [4, 5]
    assert get(4).pixels.shape == (24, 32, 3)
    assert get(6).pixels.shape == (24, 32, 3)
    assert reads == [4, 5, 6]
    bad = next(row for row in range(len(corpus)) if len(read(row).payload) == 300)
    with pytest.raises(images.UnusableImage, match="undecodable"):
        get(bad)
    assert decoders.reader(corpus, None, [4], (32, 24)) == corpus.read
    assert decoders.reader(corpus, stand_in(), [4], None) == corpus.read


def test_a_decoder_that_cannot_run_is_refused_before_the_first_batch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "megatron_nucleus.backends.dali", raising=False)
    corpus = make_corpus(tmp_path / "d")
    config = dataclasses.replace(CONFIG, image_decoder="dali")
    with pytest.raises(ConfigError, match="--image-decoder dali: needs nvidia-dali.*Usable here: pillow$"):
        build_loader(config, corpus, **RUN)
    assert decoders.open_decoder("pillow", corpus) is None


def test_encoded_data_and_workers_beside_a_gpu_are_refused(tmp_path, monkeypatch):
    make_encoded(tmp_path / "e")
    monkeypatch.setattr(decoders, "why_unavailable", lambda _: None)
    config = dataclasses.replace(CONFIG, image_decoder="dali")
    with pytest.raises(ConfigError, match="--image-decoder dali: .*e is encoded and holds no images"):
        build_loader(config, open_corpus(tmp_path / "e"), **RUN)
    with pytest.raises(
        ConfigError, match="image_decoder dali_mixed: .*not in 2 workers; use --num-workers 0"
    ):
        dataclasses.replace(CONFIG, image_decoder="dali_mixed", num_workers=2)


def test_the_time_spent_waiting_is_told_once(tmp_path, monkeypatch):
    corpus = make_corpus(tmp_path / "d")
    clock = iter(range(1000))
    monkeypatch.setattr("megatron_nucleus.data.loader.time.perf_counter", lambda: next(clock))
    with build_loader(CONFIG, corpus, **RUN) as loader:
        for _ in range(3):
            next(loader)
        assert loader.take_waited_s() == 3
        assert loader.take_waited_s() == 0
        assert next(loader).pixels_BCHW.dtype == torch.uint8
        assert loader.take_waited_s() == 1
