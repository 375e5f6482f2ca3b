"""NVIDIA DALI as a decoder: its calls against the record, and where it is installed its pixels."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import io
import os
import subprocess
import sys
import textwrap
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_nucleus.backends import recorded
from megatron_nucleus.data import decoders, images
from megatron_nucleus.data.decoders import open_decoder
from tests.data.pictures import content_id, jpeg, scene, with_profile

REASON = decoders.why_unavailable(decoders.DALI)
installed = pytest.mark.skipif(REASON is not None, reason=str(REASON))
ADAPTER = "megatron_nucleus.backends.dali"


class FakeList:
    """What a run returns; it can be read on the CPU alone."""

    def __init__(self, arrays, device):
        self.arrays, self.device = arrays, device

    def as_cpu(self):
        return FakeList(self.arrays, "cpu")

    def __getitem__(self, i):
        assert self.device == "cpu"
        return self.arrays[i]


class FakePipeline:
    """Runs the graph it was given on Pillow, one node after the other."""

    def __init__(self, batch_size=None, num_threads=None, device_id=None, seed=None, exec_pipelined=True,
                 prefetch_queue_depth=2, exec_async=True):  # fmt: skip
        assert (exec_pipelined, prefetch_queue_depth, exec_async) == (False, 1, False)
        self.batch_size, self.num_threads, self.device_id = batch_size, num_threads, device_id
        self.fed, self.built = {}, False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def set_outputs(self, node):
        self.node = node

    def build(self):
        self.built = True

    def feed_input(self, data_node, data, layout=None, cuda_stream=None, use_copy_kernel=False):
        assert self.built
        assert len(data) <= self.batch_size
        self.fed[data_node] = data

    def run(self):
        count = len(self.fed["encoded"])
        arrays = [self.node({name: values[i] for name, values in self.fed.items()}) for i in range(count)]
        return (FakeList(arrays, self.node.device),)


def external_source(source=None, num_outputs=None, *, name=None, dtype=None, ndim=None, **kwargs):
    assert not kwargs

    def node(fed):
        assert fed[name].dtype == dtype
        assert fed[name].ndim == ndim
        return fed[name]

    return node


def decode(input, /, *, device=None, output_type=None, adjust_orientation=True, jpeg_fancy_upsampling=False):
    assert (output_type, adjust_orientation, jpeg_fancy_upsampling) == ("RGB", False, True)

    def node(fed):
        return Image.open(io.BytesIO(input(fed).tobytes())).convert("RGB")

    node.device = device
    return node


def resize(
    input, /, *, size=None, roi_start=None, roi_end=None, interp_type="LINEAR", antialias=True, **kwargs
):
    assert (interp_type, antialias, kwargs) == ("LANCZOS3", True, {})

    def node(fed):
        (top, left), (bottom, right), (height, width) = roi_start(fed), roi_end(fed), size(fed)
        box = (left, top, right, bottom)
        return np.asarray(
            input(fed).resize((int(width), int(height)), Image.Resampling.LANCZOS, box=box).copy()
        )

    node.device = input.device
    return node


@pytest.fixture
def fake(monkeypatch):
    """The adapter on a stand-in for the library."""
    fn = types.ModuleType("nvidia.dali.fn")
    fn.external_source, fn.resize = external_source, resize
    fn.decoders = types.SimpleNamespace(image=decode)
    names = types.ModuleType("nvidia.dali.types")
    names.UINT8, names.FLOAT, names.RGB, names.INTERP_LANCZOS3 = np.uint8, np.float32, "RGB", "LANCZOS3"
    dali = types.ModuleType("nvidia.dali")
    dali.fn, dali.types, dali.Pipeline = fn, names, FakePipeline
    nvidia = types.ModuleType("nvidia")
    nvidia.dali = dali
    for module in (nvidia, dali, fn, names):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    yield importlib.import_module(ADAPTER)
    sys.modules.pop(ADAPTER, None)


@pytest.mark.parametrize(("device", "device_id"), [("cpu", None), ("mixed", 3)])
def test_boxes_and_sizes_reach_the_library_in_its_order(fake, device, device_id):
    pipeline = fake.JpegPipeline(device, device_id)
    assert (pipeline._pipeline.device_id, pipeline._pipeline.batch_size) == (device_id, fake.MAX_IMAGES)
    photos = [scene(60, 40, i) for i in range(3)]
    boxes, sizes = [(3, 1, 43, 31), (0, 0, 60, 40), (10, 5, 50, 35)], [(20, 15), (9, 30), (40, 30)]
    got = pipeline.run([jpeg(p) for p in photos], boxes, sizes)
    for photo, box, size, pixels in zip(photos, boxes, sizes, got, strict=True):
        stored = Image.open(io.BytesIO(jpeg(photo))).convert("RGB")
        want = np.asarray(stored.resize(size, Image.Resampling.LANCZOS, box=box))
        assert pixels.shape == (size[1], size[0], 3)
        assert np.array_equal(pixels, want)


def test_an_error_is_told_by_its_cause(fake, monkeypatch):
    """The report as version 2.4.0 writes it."""
    report = (
        "Critical error in pipeline:\nError in CPU operator `nvidia.dali.fn.decoders.image`,\nwhich was used in the "
        'pipeline definition with the following traceback:\n\n  File "dali.py", line 103, in __init__\n    whole = '
        "fn.decoders.image(\n\nencountered:\n\nFailed to decode sample #0 : \nCurrent pipeline object is no longer "
        "valid."
    )

    def run(_):
        raise RuntimeError(report)

    monkeypatch.setattr(FakePipeline, "run", run)
    with pytest.raises(RuntimeError, match="^Failed to decode sample #0$"):
        fake.JpegPipeline("cpu").run([jpeg(scene(40, 30))], [(0, 0, 40, 30)], [(8, 8)])


def test_a_version_that_no_longer_takes_the_calls_is_refused(fake, monkeypatch):
    assert fake.why_unavailable("cpu") is None
    monkeypatch.setattr(fake.fn, "resize", lambda input, *, size=None: None)
    assert "fn.resize with roi_start, roi_end" in fake.why_unavailable("cpu")
    assert "fn.resize with roi_start, roi_end" in decoders.why_unavailable("dali")


def test_a_child_of_fork_never_destroys_the_pipelines_it_inherits(fake):
    """It has none of their threads, for which a destructor would wait for ever."""
    pipeline = fake.JpegPipeline("cpu")
    there = weakref.ref(pipeline._pipeline)
    child = os.fork()
    if not child:
        del pipeline
        gc.collect()
        os._exit(0 if there() is not None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del pipeline
    assert there() is None  # here it is destroyed as ever


def test_mixed_asks_for_a_gpu(fake, monkeypatch):
    monkeypatch.setattr(fake.torch.cuda, "is_available", lambda: False)
    assert fake.why_unavailable("mixed") == "needs an NVIDIA GPU, none is visible"
    monkeypatch.setattr(fake.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fake.torch.cuda, "current_device", lambda: 5)
    corpus = types.SimpleNamespace(encoded=None)
    decoder = open_decoder("dali_mixed", corpus)
    assert decoder.own_thread
    payload = jpeg(scene(60, 40))
    (pixels,) = decoder.decode([payload], [content_id(payload)], 32, 24)
    assert np.array_equal(pixels, images.load_pixels(payload, 32, 24))
    assert decoder._pipeline._pipeline.device_id == 5


def lanczos(pixels: np.ndarray, box: tuple, size: tuple[int, int]) -> np.ndarray:
    """Resampling with a window of 3 lobes in float64, straight from its definition."""

    def weights(count: int, low: float, high: float, wanted: int) -> np.ndarray:
        scale = (high - low) / wanted
        at = low + (np.arange(wanted) + 0.5) * scale
        x = (np.arange(count)[None] + 0.5 - at[:, None]) / max(scale, 1.0)
        w = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
        return w / w.sum(1, keepdims=True)

    left, top, right, bottom = box
    rows, columns = (
        weights(pixels.shape[0], top, bottom, size[1]),
        weights(pixels.shape[1], left, right, size[0]),
    )
    wide = np.tensordot(rows, pixels.astype(np.float64), (1, 0))
    return np.clip(np.tensordot(wide, columns, (1, 1)).transpose(0, 2, 1), 0, 255)


@installed
def test_the_installed_library_is_as_recorded():
    from nvidia import dali

    adapter = importlib.import_module(ADAPTER)
    assert recorded.drift(dali, adapter.CALLS) is None


@installed
@pytest.mark.parametrize(
    "kind", ["4:4:4", "4:2:2", "4:2:0", "progressive", "grey", "rgb", "restarts", "srgb"]
)
def test_a_decode_alone_is_pillows_to_the_bit(kind):
    photo = scene(203, 151)
    payload = {
        "4:4:4": lambda: jpeg(photo, subsampling=0),
        "4:2:2": lambda: jpeg(photo, subsampling=1),
        "4:2:0": lambda: jpeg(photo, subsampling=2),
        "progressive": lambda: jpeg(photo, progressive=True),
        "grey": lambda: jpeg(photo.convert("L")),
        "rgb": lambda: jpeg(photo, keep_rgb=True),
        "restarts": lambda: jpeg(photo, restart_marker_blocks=3),
        "srgb": lambda: with_profile(photo, "sRGB"),
    }[kind]()
    decoder = open_decoder("dali", types.SimpleNamespace(encoded=None))
    for orientation in (1, 6) if kind == "4:2:0" else (1,):
        payload = payload if orientation == 1 else jpeg(photo, orientation, subsampling=2)
        want = np.asarray(images.decode(payload).image)
        (got,) = decoder.decode([payload], [content_id(payload)], want.shape[1], want.shape[0])
        assert np.array_equal(got, want)
    assert decoder.counts.pillow == 0


@installed
@pytest.mark.parametrize("size", [(96, 96), (64, 112), (224, 224)])
def test_a_resize_is_lanczos_within_a_level_and_pillows_within_the_stated_tolerance(size):
    photo = scene(203, 151)
    payload = jpeg(photo)
    decoder = open_decoder("dali", types.SimpleNamespace(encoded=None))
    (got,) = decoder.decode([payload], [content_id(payload)], *size)
    stored = images.decode(payload).image
    box = images.crop_box(*stored.size, size[0] / size[1])
    exact = lanczos(np.asarray(stored), box, size)
    assert np.abs(got - exact)[8:-8, 8:-8].max() <= 1.0  # beyond the picture DALI repeats its border
    off = np.abs(got.astype(int) - images.load_pixels(payload, *size))
    assert off.mean() < 0.3
    assert (off > 1).mean() < 0.005


@installed
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: nothing is missing")
def test_the_graph_for_a_gpu_is_accepted_up_to_the_driver():
    adapter = importlib.import_module(ADAPTER)
    with pytest.raises(RuntimeError, match="CUDA"):
        adapter.JpegPipeline("mixed", 0)


@installed
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_nearly_the_same_pixels():
    """Never run by this project. The tolerance is own choice: nvJPEG's transform differs in rounding."""
    decoder = open_decoder("dali_mixed", types.SimpleNamespace(encoded=None))
    photos = [jpeg(scene(203, 151, i)) for i in range(3)]
    got = decoder.decode(photos, [content_id(p) for p in photos], 96, 96)
    for payload, pixels in zip(photos, got, strict=True):
        assert np.abs(pixels.astype(int) - images.load_pixels(payload, 96, 96)).mean() < 1.0
    assert decoder.counts.pillow == 0


@installed
def test_a_damaged_image_ends_a_pipeline_and_the_next_goes_on():
    photos = [jpeg(scene(80, 60, i)) for i in range(6)]
    photos[2] = photos[2][:-400]  # its id is that of these bytes: nothing warns before the decode
    decoder = open_decoder("dali", types.SimpleNamespace(encoded=None))
    got = decoder.decode(photos, [content_id(p) for p in photos], 32, 24)
    assert isinstance(got[2], images.UnusableImage)
    assert got[2].reason == "undecodable"
    for i in (0, 1, 3, 4, 5):
        assert np.abs(got[i].astype(int) - images.load_pixels(photos[i], 32, 24)).mean() < 0.3
    assert dataclasses.astuple(decoder.counts) == (5, 1, 0, 5)


@installed
def test_the_installed_library_tells_the_cause():
    adapter = importlib.import_module(ADAPTER)
    with pytest.raises(RuntimeError, match="^Failed to decode sample #0$"):
        adapter.JpegPipeline("cpu").run([jpeg(scene(80, 60))[:-400]], [(0, 0, 60, 60)], [(32, 32)])


@installed
def test_pipelines_opened_again_take_no_more_threads_or_memory():
    pages = os.sysconf("SC_PAGE_SIZE")
    photos = [jpeg(scene(80, 60, i)) for i in range(4)]
    photos[1] = photos[1][:-400]
    decoder = open_decoder("dali", types.SimpleNamespace(encoded=None))
    taken = []
    for _ in range(12):
        decoder.decode(photos, [content_id(p) for p in photos], 32, 24)
        resident_bytes = int(Path("/proc/self/statm").read_text().split()[1]) * pages
        taken.append((len(os.listdir("/proc/self/task")), resident_bytes))
    assert decoder.counts.pipelines > 12 * 2
    assert len({threads for threads, _ in taken[1:]}) == 1
    assert taken[-1][1] - taken[3][1] < 16 * 2**20


FORK = """
    import gc, multiprocessing
    from megatron_nucleus.backends.dali import JpegPipeline
    from tests.data.pictures import jpeg, scene
    gc.disable()
    photos = [jpeg(scene(64, 48, i)) for i in range(3)]
    settings = [(0, 0, 48, 48)] * 3, [(32, 32)] * 3
    holder = {"pipeline": JpegPipeline("cpu")}
    holder["itself"] = holder  # garbage that only a collection finds
    want = holder["pipeline"].run(photos, *settings)
    del holder

    def child():
        gc.collect()
        got = JpegPipeline("cpu").run(photos, *settings)
        assert all((a == b).all() for a, b in zip(want, got, strict=True))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    print("ended with", process.exitcode)
    process.kill()
"""


@installed
def test_workers_may_be_forked_after_pipelines_have_run():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORK)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "ended with 0", done.stderr[-2000:]


LOADER = """
    import dataclasses, sys, tempfile
    from pathlib import Path
    from megatron_nucleus.data.loader import DataConfig, build_loader
    from tests.data.test_decoders import make_corpus
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder) / "d", damaged=(3, 10, 21))
        took = {}
        for name, workers in (("pillow", 0), ("dali", 2), ("dali", 0)):
            config = DataConfig(data_path="-", resolution_px=32, num_workers=workers, image_decoder=name)
            with build_loader(config, corpus, seed=7, global_batch_size=12, multiple_px=8) as loader:
                took[name, workers] = [next(loader) for _ in range(12)]
                replaced = loader.substituted
            for a, b in zip(took["pillow", 0], took[name, workers], strict=True):
                assert (a.ids, a.texts, a.draws) == (b.ids, b.texts, b.draws)
                assert (a.pixels_BCHW.int() - b.pixels_BCHW.int()).float().abs().mean() < 0.3
            if workers == 0 and name == "dali":
                pairs = zip(took["dali", 0], took["dali", 2], strict=True)
                assert all((a.pixels_BCHW == b.pixels_BCHW).all() for a, b in pairs)
            options = dict(seed=7, global_batch_size=12, multiple_px=8, start_samples=48)
            with build_loader(config, corpus, **options) as loader:
                for a, b in zip(took[name, workers][4:], loader):
                    assert a.ids == b.ids and (a.pixels_BCHW == b.pixels_BCHW).all()
        assert replaced > 3
    print("same", len(took))
"""


@installed
def test_loaders_with_and_without_workers_draw_the_same_through_the_library():
    """In a process of its own: workers are forked, and this one may have run pipelines."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOADER)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "same 3", done.stderr[-2000:]
