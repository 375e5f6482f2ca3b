"""The run report: its numbers are those of the inputs, it needs nothing from outside, and it tolerates absence."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from megatron_nucleus.core import flow
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.data.encoders import EncoderConfig
from megatron_nucleus.evaluation import report_figures as figures
from megatron_nucleus.evaluation.allocation import allocation_example, expert_allocation
from megatron_nucleus.evaluation.report import build_report
from megatron_nucleus.export import native
from megatron_nucleus.inference.pipeline import load_pipeline
from megatron_nucleus.types import TextFeatures
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.shapes import TINY

SHAPE = dataclasses.replace(
    TINY,
    num_layers=4,
    text_dim=256,
    latent_channels=16,
    dense_moe_strategy="leave_first_three_blocks_dense",
    capacity_factors=(0.0, 0.0, 0.0, 2.0),
)


def random_model(shape=SHAPE):
    model = NucleusTransformer(shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.normal_(0.0, 0.2, generator=generator)
    return model.eval()


def write_checkpoint(folder, shape=SHAPE):
    encoders = EncoderConfig()
    (folder / "model").mkdir(parents=True)
    save_file(random_model(shape).state_dict(), folder / "model" / "model.safetensors")
    state = {
        "format": 1, "step": 3, "model": native.shape_to_dict(shape), "codec": encoders.codec_spec(),
        "text_encoder": encoders.text_spec(),
        "sampling": {"steps": 2, "guidance": 3.0, "shift": 2.0, "height": 24, "width": 32},
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state))
    native.write_manifest(folder, native.describe_files(folder))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "step_00000003")


def row(step, **more):
    base = {"step": step, "samples_seen": 8 * step, "loss": 1.0 / step, "grad_norm": 1.0, "lr": 1e-3,
            "samples_per_s": 50.0, "skipped": 0, "peak_memory_bytes": 2_500_000_000}  # fmt: skip
    return {**base, **more}


@pytest.fixture
def run_dir(tmp_path):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    rows = [json.dumps(row(step)) for step in range(1, 401)]
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    config = {"training": {"global_batch_size": 8, "seed": 5}, "data": {"resolution_px": 32}}
    document = {"config": config, "git_commit": "0123abcd", "versions": {"torch": "2.x"}}
    (run / "config.yaml").write_text(yaml.safe_dump(document))
    for step in (100, 200, 300, 400):
        Image.new("RGB", (64, 32), (step // 2, 0, 0)).save(run / "samples" / f"step_{step:08d}.png")
    return run


@pytest.fixture
def samples_dir(tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as listing:
        for i, prompt in enumerate(["a red circle", "", 'a <b>"bold"</b> circle & more']):
            Image.new("RGB", (8, 8), (10 * i, 20, 30)).save(folder / f"{i:05d}.png")
            listing.write(json.dumps({"file": f"{i:05d}.png", "prompt": prompt, "seed": i + 7}) + "\n")
    return folder


SCORES = {
    "merged model": {
        "mean": 0.6125, "single_object": 0.9, "two_objects": 0.8, "counting": 0.5, "colors": 0.95, "position": 0.25,
        "color_attribution": 0.275, "samples": 600, "held_out_pairs": {"colors": 0.25, "samples": 100},
    },
    "untrained": {
        "mean": 0.0, "single_object": 0.0, "two_objects": 0.0, "counting": None, "colors": 0.0, "position": 0.0,
        "color_attribution": 0.0, "samples": 500,
    },
}  # fmt: skip


class Page(html.parser.HTMLParser):
    """Cells of every table row, headings, image sources and every link-like attribute."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.headings, self.images, self.links, self._in = [], [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self._in = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            self.images.append(attributes["src"])
        if tag in ("h1", "h2"):
            self.headings.append("")
        self.links += [v for k, v in attrs if k in ("src", "href", "action", "data", "srcset", "poster")]
        assert tag not in ("script", "link", "iframe", "object")

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in in ("td", "th"):
            self.rows[-1][-1] += data
        if self._in in ("h1", "h2"):
            self.headings[-1] += data

    def table(self):
        return {r[0]: r[1:] for r in self.rows if r}


def decode(uri):
    assert uri.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_a_full_report(tmp_path, run_dir, samples_dir, checkpoint):
    path = build_report(
        tmp_path / "out" / "report.html", title="Demo <run>", summary="What was done.", run_dir=run_dir,
        samples_dir=samples_dir, checkpoint=checkpoint, scores=SCORES, scores_note="Made from combinations.",
        timings={"curate": 30.0, "train": 90.0}, facts={"corpus": "40,000 scenes"},
        commands=["python tools/train.py"], device="cpu",
    )  # fmt: skip
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.headings == [
        "Demo <run>", "Generated pictures", "Scores", "How the pictures came about", "Training loss",
        "Which experts work where", "Time", "Settings", "Commands",
    ]  # fmt: skip
    # nothing from outside
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "url(" not in text
    assert "@import" not in text
    # the user's text is text
    assert "a &lt;b&gt;&#34;bold&#34;&lt;/b&gt; circle &amp; more" in text
    table = page.table()
    assert table["single object"] == ["0.900", "0.000"]
    assert table["counting"] == ["0.500", "–"]
    assert table["mean"] == ["0.613", "0.000"] or table["mean"] == ["0.612", "0.000"]
    assert table["colours, pairs never shown in training"] == ["0.250", "–"]
    assert table["pictures"] == ["600", "500"]
    assert table["train"][:2] == ["90.0", "75%"]
    assert table["in all"][0] == "120.0"
    assert table["images seen"] == ["3,200"]
    assert table["parameters"] == [f"{sum(p.numel() for p in random_model().parameters()):,}"]
    assert table["images per step"] == ["8"]
    assert table["version of torch"] == ["2.x"]
    assert table["source"] == ["0123abcd"]
    assert table["corpus"] == ["40,000 scenes"]
    # pictures: 3 samples, scores, 4 previews, 2 of the loss, 2 of the allocation
    pictures = [decode(uri) for uri in page.images]
    assert len(pictures) == 3 + 1 + 4 + 2 + 2
    assert [p.getpixel((0, 0)) for p in pictures[:3]] == [(0, 20, 30), (10, 20, 30), (20, 20, 30)]
    assert [p.getpixel((0, 0)) for p in pictures[4:8]] == [(50, 0, 0), (100, 0, 0), (150, 0, 0), (200, 0, 0)]
    # mean loss of steps 1-100 and 301-400
    first = sum(1 / s for s in range(1, 101)) / 100
    last = sum(1 / s for s in range(301, 401)) / 100
    assert f"from {first:.3f} at the start to {last:.3f} at the\nend" in text
    # capacity factor 2: every expert takes ceil(2*S/E) tokens, 2 experts per token
    assert "On average\n2.00 experts took a part" in text
    assert "“a red circle”" in text


def test_every_input_is_optional(tmp_path):
    text = build_report(tmp_path / "report.html", title="Nothing yet").read_text()
    page = Page(text)
    assert page.headings == ["Nothing yet"]
    assert page.images == []
    assert page.rows == []


def test_images_of_earlier_stages_count(tmp_path, run_dir):
    document = yaml.safe_load((run_dir / "config.yaml").read_text())
    document["started_from"] = {"samples_seen_in_all": 1000}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(document))
    text = build_report(tmp_path / "r.html", title="t", run_dir=run_dir).read_text()
    assert Page(text).table()["images seen in the stages before"] == ["1,000"]
    assert "<b>4,200</b>images seen in all stages" in text


def test_a_run_without_metrics_previews_and_config(tmp_path):
    (tmp_path / "run").mkdir()
    page = Page(build_report(tmp_path / "r.html", title="t", run_dir=tmp_path / "run").read_text())
    assert page.headings == ["t"]


def test_a_dense_model_has_no_map(tmp_path):
    shape = ModelShape(**{**native.shape_to_dict(SHAPE), "axes_dims_rope": (4, 6, 6), "capacity_factors": (0.0,) * 4,
                          "dense_moe_strategy": "all_dense"})  # fmt: skip
    checkpoint = write_checkpoint(tmp_path / "dense", shape)
    page = Page(build_report(tmp_path / "r.html", title="t", checkpoint=checkpoint, device="cpu").read_text())
    assert page.headings == ["t", "Settings"]


def test_scores_of_several_runs_are_drawn_without_bars_for_missing_ones():
    skills = {"counting": "counting", "mean": "mean"}
    with_value = figures.scores_figure({"a": {"counting": 0.5, "mean": 0.5}}, skills)
    without = figures.scores_figure({"a": {"counting": None, "mean": 0.5}}, skills)
    assert blue(with_value) > 1.8 * blue(without) > 0


def blue(png):
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.int16)
    return int((np.abs(pixels - [0x25, 0x63, 0xA8]).max(-1) < 8).sum())


def test_an_unfinished_last_line_is_left_out_and_later_rows_of_a_step_win(tmp_path, run_dir):
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row(400, loss=math.pi)) + "\n" + '{"step": 401, "lo')
    text = build_report(tmp_path / "r.html", title="t", run_dir=run_dir).read_text()
    last = (sum(1 / s for s in range(301, 400)) + math.pi) / 100
    assert f"to {last:.3f} at the" in text


def test_losses_that_are_null_are_left_out_of_the_means():
    rows = [row(1, loss=2.0), row(2, loss=None), row(3, loss=4.0), row(11, loss=None), row(21, loss=5.0)]
    steps, loss = figures.column(rows, "step"), figures.column(rows, "loss")
    centres, means = figures.binned(steps, loss, 10)
    assert centres.tolist() == [2.0, 21.0]
    assert means.tolist() == [3.0, 5.0]
    assert figures.loss_figure(rows, 10)[:4] == b"\x89PNG"


@pytest.mark.parametrize("rows", [1, 2, 30])
def test_short_runs_have_a_curve(tmp_path, run_dir, rows):
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row(s)) + "\n" for s in range(1, rows + 1)))
    page = Page(build_report(tmp_path / "r.html", title="t", run_dir=run_dir).read_text())
    assert "Training loss" in page.headings


def test_evenly():
    assert figures.evenly(4, 6) == [0, 1, 2, 3]
    assert figures.evenly(29, 6) == [0, 6, 11, 17, 22, 28]
    assert figures.evenly(100, 2) == [0, 99]


# --- the allocation itself ---------------------------------------------------------------------------------


def test_allocation_is_the_models_own_routing():
    shape = ModelShape(**{**native.shape_to_dict(SHAPE), "axes_dims_rope": (4, 6, 6), "dense_moe_strategy": "all_moe",
                          "capacity_factors": (2.0, 1.0, 0.5, 3.0)})  # fmt: skip
    model = random_model(shape)
    generator = torch.Generator().manual_seed(1)
    grid, sigmas = (3, 5), (1.0, 0.4, 0.0)
    clean, noise = torch.randn(2, 1, 15, 64, generator=generator)
    features = torch.randn(1, 4, 256, generator=generator)
    mask = torch.tensor([[True, True, True, False]])
    with torch.no_grad():
        text = model.project_text(features, mask, grid)
    got = expert_allocation(model, clean, noise, text, grid, sigmas)
    assert got.layers == (0, 1, 2, 3)
    assert got.taken.shape == (4, 3, 4, 3, 5)
    # conservation: every expert takes exactly ceil(factor * S / E) tokens
    capacities = [math.ceil(f * 15 / 4) for f in shape.capacity_factors]
    for layer, capacity in enumerate(capacities):
        assert (got.taken[layer].sum((-1, -2)) == capacity).all()
        assert (got.counts()[layer].sum((-1, -2)) == 4 * capacity).all()
    for j, sigma in enumerate(sigmas):
        noisy = flow.add_noise(clean, noise, torch.tensor([sigma]))
        with torch.no_grad():
            _, routings = model(
                noisy, torch.tensor([sigma]), TextFeatures(features, mask), grid, return_routing=True
            )
        for layer, routing in enumerate(routings):
            for expert in range(4):
                chosen = {divmod(int(i), 5) for i in routing.index_BEC[0, expert]}
                assert chosen == {tuple(p) for p in got.taken[layer, j, expert].nonzero().tolist()}
    with pytest.raises(ValueError, match="one picture, got 2"):
        expert_allocation(model, clean.repeat(2, 1, 1), noise, text, grid)


def test_the_example_is_the_picture_that_sampling_gives(checkpoint):
    pipeline = load_pipeline(checkpoint, device="cpu")
    example = allocation_example(pipeline, "a red circle", seed=3, sigmas=(1.0, 0.0))
    want = pipeline.generate(["a red circle"], seeds=[3], progress=False)[0]
    assert np.abs(np.asarray(example.picture, np.int16) - np.asarray(want, np.int16)).max() <= 1
    assert np.abs(np.asarray(example.noisy[1], np.int16) - np.asarray(want, np.int16)).max() <= 1
    noise, grid = pipeline.noise([3], 24, 32)
    assert np.array_equal(np.asarray(example.noisy[0]), np.asarray(pipeline.decode(noise, grid)[0]))
    mean, untaken = figures.mean_taken(example.allocation)
    assert mean == pytest.approx(2.0)  # 4 experts x 6 of 12 tokens
    assert untaken == pytest.approx(float((example.allocation.counts() == 0).double().mean()))


def test_the_spotlight_keeps_what_the_expert_took():
    pixels = np.full((8, 12, 3), 0.5)
    taken = np.zeros((2, 3), bool)
    taken[1, 2] = True
    lit = figures._spotlight(pixels, taken)
    assert (lit[4:, 8:] == 0.5).all()
    assert lit[:4].max() < 0.25


# --- bad input ----------------------------------------------------------------------------------------------


def test_missing_folders(tmp_path, run_dir):
    with pytest.raises(ConfigError, match="run folder .*nowhere: no such folder"):
        build_report(tmp_path / "r.html", title="t", run_dir=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no samples.jsonl"):
        build_report(tmp_path / "r.html", title="t", samples_dir=tmp_path)
    with pytest.raises(ConfigError, match="nowhere"):
        build_report(tmp_path / "r.html", title="t", checkpoint=tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"report .*r\.html: cannot be written"):
        build_report(tmp_path / "file" / "r.html", title="t")


def test_damaged_files_are_named(tmp_path, run_dir, samples_dir):
    good = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text(good + "{broken\n" + good)
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 401: no row of metrics"):
        build_report(tmp_path / "r.html", title="t", run_dir=run_dir)
    (run_dir / "metrics.jsonl").write_text(good)
    (run_dir / "samples" / "step_00000200.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"step_00000200\.png: cannot be read as a picture"):
        build_report(tmp_path / "r.html", title="t", run_dir=run_dir)
    (run_dir / "samples" / "step_00000200.png").unlink()
    (run_dir / "config.yaml").write_text("a: [1, 2")
    with pytest.raises(DataError, match=r"config\.yaml: damaged"):
        build_report(tmp_path / "r.html", title="t", run_dir=run_dir)
    (samples_dir / "samples.jsonl").write_text('{"file": "00000.png"}\n')
    with pytest.raises(DataError, match=r"samples\.jsonl, line 1: no row of a picture"):
        build_report(tmp_path / "r.html", title="t", samples_dir=samples_dir)
    with pytest.raises(DataError, match=r"scores of 'x': mean is 1.5"):
        build_report(tmp_path / "r.html", title="t", scores={"x": {"mean": 1.5}})
    assert not re.search(r"r\.html", " ".join(p.name for p in tmp_path.iterdir()))
