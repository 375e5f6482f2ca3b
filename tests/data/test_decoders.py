"""Decoding by a library: what it gets, what happens when it refuses, and that samples do not depend on it."""

from __future__ import annotations

import dataclasses
import io
import sys

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


def test_a_library_that_fails_on_everything_is_named_soon():
    photos = [jpeg(scene(40, 40, i)) for i in range(decoders.MAX_REFUSED_IN_A_ROW + 3)]
    decoder = stand_in({content_id(p) for p in photos})
    with pytest.raises(DataError, match="--image-decoder dali: refused 16 images in a row.*broken somewhere"):
        decode(decoder, photos)
    good = stand_in({content_id(p) for p in photos[:-1]})
    for _ in range(3):  # one good image between them, and it is the images
        for payload in (*photos[:9], photos[-1]):
            decode(good, [payload])
    assert good.counts.refused == 27


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
