"""Routing while a picture is drawn: what is recorded is the model's own choice, and the page shows exactly that."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_nucleus.core import flow
from megatron_nucleus.core.moe.stats import RoutingMeter, taken_mask
from megatron_nucleus.evaluation import routing_maps
from megatron_nucleus.evaluation.allocation import (
    Allocation,
    Drawing,
    StepMeter,
    draw_with_routing,
    moe_layers,
)
from megatron_nucleus.evaluation.report_figures import blues, evenly
from megatron_nucleus.evaluation.routing_maps import (
    FILES,
    _fitting,
    check_layers,
    routing_page,
    write_routing_maps,
)
from megatron_nucleus.inference.pipeline import load_pipeline
from megatron_nucleus.inference.sampler import SamplerConfig, guide
from megatron_nucleus.utils.errors import ConfigError
from tests.core.moe.random_routing import routing
from tests.inference.conftest import TINY, random_model, write_checkpoint

PROMPT = "a <b>red</b> circle </script>"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("native") / "step_00000007", random_model())
    return load_pipeline(folder, device="cpu")


@pytest.fixture(scope="module")
def drawing(pipeline):
    """3 steps of 32 x 40 px: 4 x 5 tokens, MoE layers 1 and 2, 4 experts."""
    return draw_with_routing(pipeline, PROMPT, pipeline.settings(), seed=3)


def page_of(drawing, checkpoint="step_7"):
    return routing_page(drawing, checkpoint)


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


# --- what is recorded ----------------------------------------------------------------------------------------


def test_the_picture_is_that_of_the_pipeline(pipeline, drawing):
    (want,) = pipeline.generate([PROMPT], seeds=[3], progress=False)
    assert np.array_equal(np.asarray(drawing.picture), np.asarray(want))
    assert drawing.allocation.sigmas == pytest.approx([2 * s / (1 + s) for s in (1, 2 / 3, 1 / 3)])
    assert drawing.allocation.layers == (1, 2) == moe_layers(TINY)


@torch.no_grad()
def test_choices_and_estimates_follow_the_definition(pipeline, drawing):
    """An independent loop over the steps: x += (sigma - next) * v; the estimate is x + sigma * v."""
    model, allocation = pipeline.model, drawing.allocation
    x, grid = pipeline.noise([3], 32, 40)
    texts = [pipeline.text_encoder.encode([text]) for text in (PROMPT, "")]
    sigmas = [*allocation.sigmas, 0.0]
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        level = torch.tensor([sigma])
        positive, routings = model(x, level, texts[0], grid, return_routing=True)
        v = guide(positive, model(x, level, texts[1], grid), 3.0)
        for layer, chosen in enumerate(routings):
            for expert in range(4):
                want = {divmod(int(t), 5) for t in chosen.index_BEC[0, expert]}
                assert {tuple(p) for p in allocation.taken[layer, i, expert].nonzero().tolist()} == want
        (want,) = pipeline.decode(flow.clean_estimate(x, v, level), grid)
        got = np.asarray(drawing.estimates[i], np.int16)
        assert np.abs(got - np.asarray(want, np.int16)).max() <= 1
        x = x + (sigma - following) * v
    assert (
        np.abs(got - np.asarray(drawing.picture, np.int16)).max() <= 1
    )  # nothing is left to do after the last


def test_figures_of_a_step_are_those_of_its_map(drawing):
    taken = drawing.allocation.taken
    steps, whole = drawing.routing.reports()
    capacity = [math.ceil(2.0 * 20 / 4), math.ceil(1.0 * 20 / 4)]
    assert drawing.chance == tuple(c / 20 for c in capacity)
    for layer, i in itertools.product(range(2), range(3)):
        counts, figures = taken[layer, i].sum(0), steps[i].layers[layer]
        assert figures.taken_by_none == pytest.approx(float((counts == 0).double().mean()))
        assert figures.taken_by_one == pytest.approx(float((counts == 1).double().mean()))
        assert figures.tokens_per_expert_min == figures.tokens_per_expert_max == capacity[layer]
        if i:
            common = (taken[layer, i - 1] & taken[layer, i]).sum() / (4 * capacity[layer])
            assert float(drawing.kept[layer, i - 1]) == pytest.approx(float(common))
    assert whole.images == 3
    assert whole.layers[1].taken_by_none == pytest.approx(sum(s.layers[1].taken_by_none for s in steps) / 3)
    assert whole.layers[0].sigma_explained is not None


def test_one_step_without_guidance(pipeline):
    config = pipeline.settings(steps=1, guidance=1.0)
    drawing = draw_with_routing(pipeline, "a red circle", config)
    assert drawing.kept.shape == (2, 0)
    (want,) = pipeline.generate(["a red circle"], steps=1, guidance=1.0, seeds=[0], progress=False)
    assert np.array_equal(np.asarray(drawing.picture), np.asarray(want))
    page, steps, detailed = page_of(drawing)
    assert (steps, detailed) == (1, 1)
    assert data_of(page)["figures"][0][0]["kept"] is None


def test_a_model_without_experts_is_refused(tmp_path):
    shape = dataclasses.replace(TINY, dense_moe_strategy="all_dense")
    folder = write_checkpoint(tmp_path / "step_00000001", random_model(shape=shape))
    dense = load_pipeline(folder, device="cpu")
    with pytest.raises(ConfigError, match="no MoE layers"):
        draw_with_routing(dense, "a", dense.settings())


def test_figures_of_many_pictures_by_step(pipeline):
    """Batches of a job add up: the same as one batch, and as each picture by itself."""
    grid, figures = (4, 5), []
    for batch_size in (3, 2):
        meter = StepMeter(pipeline.model.shape, grid)
        pictures = pipeline.stream(["a", "b", "c"], batch_size=batch_size, progress=False, on_routing=meter)
        assert len(list(pictures)) == 3
        assert [round(sigma, 6) for sigma in meter.sigmas] == [1.0, 0.8, 0.5]
        figures.append(meter.document())
    assert [row["images"] for row in figures[0]["steps"]] == [3, 3, 3]
    assert figures[0]["all_steps"]["images"] == 9
    single = RoutingMeter((1, 2), 4)
    total = torch.zeros_like(single.sums())
    for i, prompt in enumerate("abc"):
        total += draw_with_routing(pipeline, prompt, pipeline.settings(), seed=i).routing.sums[1]
    want = dataclasses.asdict(single.report(total))["mean"]
    for document in figures:
        got = document["steps"][1]["mean"]
        assert {k: v for k, v in got.items() if v is not None} == pytest.approx(
            {k: v for k, v in want.items() if v is not None}, rel=1e-4
        )


# --- the page ------------------------------------------------------------------------------------------------


def test_the_page_holds_exactly_the_choices(drawing):
    page, held, detailed = page_of(drawing)
    assert (held, detailed) == (3, 3)
    data, taken = data_of(page), drawing.allocation.taken.numpy()
    assert data["grid"] == [4, 5]
    assert data["layers"] == [1, 2]
    assert [step["number"] for step in data["steps"]] == [1, 2, 3]
    for i, step in enumerate(data["steps"]):
        counts = np.frombuffer(zlib.decompress(base64.b64decode(step["counts"])), np.uint8)
        assert np.array_equal(counts.reshape(2, 4, 5), taken[:, i].sum(1))
        bits = np.unpackbits(
            np.frombuffer(zlib.decompress(base64.b64decode(step["experts"])), np.uint8), count=2 * 4 * 20
        )
        assert np.array_equal(bits.reshape(2, 4, 4, 5), taken[:, i])
        picture = Image.open(io.BytesIO(base64.b64decode(step["picture"].split(",", 1)[1])))
        assert np.array_equal(np.asarray(picture), np.asarray(drawing.estimates[i]))
    steps, whole = drawing.routing.reports()
    figures = data["figures"][1][2]
    assert figures["none"] == pytest.approx(steps[2].layers[1].taken_by_none, rel=1e-3)
    assert figures["space"] == pytest.approx(steps[2].layers[1].space_entropy, rel=1e-3)
    assert figures["kept"] == pytest.approx(float(drawing.kept[1, 1]), rel=1e-3)
    assert figures["most"] == pytest.approx(math.log(5) / math.log(16), rel=1e-3)
    assert data["whole"][0]["explained"] == pytest.approx(whole.layers[0].sigma_explained, rel=1e-3)
    assert len(data["palette"]) == int(drawing.allocation.counts().max()) + 1


def test_the_page_fetches_nothing_and_the_prompt_is_text(drawing):
    page, _, _ = page_of(drawing)
    assert re.findall(r"https?://[^\s\"']+", page) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    for word in ("url(", "@import", "fetch(", "XMLHttpRequest", "<link"):
        assert word not in page
    assert not re.findall(r'(?:src|href)="(?!")[^"]+"', page.split('id="data"')[0])
    assert "a &lt;b&gt;red&lt;/b&gt; circle &lt;/script&gt;" in page
    assert page.count("</script>") == 2


@pytest.fixture(scope="module")
def large():
    """Random choices whose parts weigh enough to be left out: 6 steps, 2 layers, 32 experts, 32 x 32 tokens."""
    layers, steps, E, S = (1, 2), 6, 32, 1024
    meter = StepMeter(dataclasses.replace(TINY, num_experts=E), (32, 32))
    taken = torch.zeros(2, steps, E, 32, 32, dtype=torch.bool)
    for i in range(steps):
        routings = [routing(1, S, 64, 10 * i + layer, experts=E) for layer in range(2)]
        meter(i, 1 - i / steps, routings)
        taken[:, i] = torch.stack([taken_mask(r.index_BEC, S)[0].view(E, 32, 32) for r in routings])
    noise = np.random.default_rng(0).integers(0, 255, (steps, 32, 32, 3), np.uint8)
    pictures = [Image.fromarray(pixels) for pixels in noise]
    allocation = Allocation(layers, tuple(1 - i / steps for i in range(steps)), taken)
    kept, config = torch.full((2, steps - 1), 0.5), SamplerConfig(steps, 1.0, 1.0, 256, 256)
    return Drawing("two", 0, config, pictures[-1], pictures, allocation, kept, (1 / 16, 1 / 16), meter)


def test_what_does_not_fit_is_left_out_and_said(large, monkeypatch):
    whole, held, detailed = page_of(large)
    assert (held, detailed) == (6, 6)
    data, seen_pairs = data_of(whole), []
    for limit in range(len(whole.encode()) + 2000, 20_000, -2000):
        monkeypatch.setattr(routing_maps, "PAGE_BYTES", limit)
        try:
            page, held, detailed = page_of(large)
        except ConfigError as error:
            assert f"a page may have {limit}" in str(error)  # noqa: PT017
            break
        assert len(page.encode()) <= limit
        part = data_of(page)
        numbers = [step["number"] for step in part["steps"]]
        assert len(numbers) == held
        assert numbers == ([1] if held == 1 else [i + 1 for i in evenly(6, held)])
        assert [step["experts"] is not None for step in part["steps"]].count(True) == detailed
        for step in part["steps"]:
            full = data["steps"][step["number"] - 1]
            assert (step["counts"], step["picture"]) == (full["counts"], full["picture"])
            assert step["experts"] in (None, full["experts"])
        assert [f["none"] for f in part["figures"][1]] == [data["figures"][1][n - 1]["none"] for n in numbers]
        assert (f"this page holds {held} of 6 steps" in page) == (held < 6)
        said = f"the choices of single experts are stored for {detailed} of {held} steps"
        assert (said in page) == (detailed < held)
        seen_pairs.append((held, detailed))
    assert seen_pairs == sorted(seen_pairs, reverse=True)
    assert (6, 6) in seen_pairs
    assert any(held == 6 and 0 < detailed < 6 for held, detailed in seen_pairs)
    assert any(held < 6 for held, _ in seen_pairs)


def test_fitting():
    assert _fitting([10] * 7, 70) == [0, 1, 2, 3, 4, 5, 6]
    assert _fitting([10] * 7, 69) == [0, 1, 2, 4, 5, 6]
    assert _fitting([10] * 7, 35) == [0, 3, 6]
    assert _fitting([10] * 7, 12) == [0]
    assert _fitting([10] * 7, 9) == []
    assert _fitting([], 9) == []


# --- the files -----------------------------------------------------------------------------------------------


def test_files(drawing, tmp_path):
    result = write_routing_maps(drawing, tmp_path / "maps", checkpoint="step_7", layers=[2])
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == sorted(FILES)
    assert result["page"] == str(tmp_path / "maps" / "routing.html")
    for name in ("allocation", "experts"):
        with Image.open(result[name]) as picture:
            assert picture.width > 500
            assert np.asarray(picture.convert("L")).std() > 5
    document = json.loads((tmp_path / "maps" / "routing.json").read_text())
    steps, whole = drawing.routing.reports()
    assert document["all_steps"] == json.loads(json.dumps(dataclasses.asdict(whole)))
    assert [row["step"] for row in document["steps"]] == [1, 2, 3]
    assert document["steps"][1]["layers"][0]["expert_mass"] == list(steps[1].layers[0].expert_mass)
    assert document["kept_in_next_step"]["2"] == drawing.kept[1].tolist()
    assert document["sampling"]["steps"] == 3
    assert document["checkpoint"] == "step_7"
    with pytest.raises(ConfigError, match="holds 4 files of an earlier job"):
        write_routing_maps(drawing, tmp_path / "maps")
    (tmp_path / "maps" / "other.txt").write_text("mine")
    write_routing_maps(drawing, tmp_path / "maps", overwrite=True)
    assert (tmp_path / "maps" / "other.txt").read_text() == "mine"


def test_layers_that_do_not_route_are_refused():
    assert check_layers([7, 3], (3, 5, 7)) == [2, 0]
    with pytest.raises(ConfigError, match="--layers 4: the MoE layers of this model are 3, 5, 7"):
        check_layers([4], (3, 5, 7))


# --- in a browser --------------------------------------------------------------------------------------------


def browse(path, folder, fragment=""):
    """The page's DOM after its scripts have run, without a window."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=4000", "--dump-dom",
        f"{path.as_uri()}#{fragment}",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def seen(dom):
    """(what was drawn, the sentence above it, the note)."""
    drawn = re.search(r'data-drawn="([^"]*)"', dom)
    state, note = (re.search(rf'<p id="{name}"[^>]*>([^<]*)<', dom)[1] for name in ("state", "note"))
    return drawn[1].replace("&amp;", "&") if drawn else None, state, note


def checksum(values, palette):
    """FNV-1a, 32 bits, of the map's RGBA bytes."""
    out = 0x811C9DC5
    for value in values.flatten():
        for byte in (*palette[int(value)], 255):
            out = ((out ^ byte) * 0x01000193) % 2**32
    return f"{out:08x}"


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome: apt-get install chromium")


@pytest.fixture(scope="module")
def page_file(drawing, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "routing.html"
    path.write_text(page_of(drawing)[0])
    return path


@needs_browser
def test_the_hash_decides_what_is_drawn(drawing, page_file, tmp_path):
    counts = drawing.allocation.counts().numpy()
    most = int(counts.max())
    palette = [(255, 255, 255), *(tuple(round(255 * c) for c in colour) for colour in blues(most))]
    sigma = drawing.allocation.sigmas
    drawn, state, note = seen(browse(page_file, tmp_path))
    assert drawn == f"layer=1&step=1&show=counts&checksum={checksum(counts[0, 0], palette)}"
    assert state == "Layer 1, step 1 of 3, noise level 1.00: experts per token"
    assert note == ""
    dom = browse(page_file, tmp_path, "layer=2&step=3")
    drawn, state, _ = seen(dom)
    assert drawn == f"layer=2&step=3&show=counts&checksum={checksum(counts[1, 2], palette)}"
    assert state == f"Layer 2, step 3 of 3, noise level {sigma[2]:.2f}: experts per token"
    none = 100 * (counts[1, 2] == 0).mean()
    assert f"<td>tokens that no expert took</td><td>{none:.0f} %</td>" in dom
    kept = 100 * float(drawing.kept[1, 1])
    assert f"<td>choices kept from the step before (by chance 25 %)</td><td>{kept:.0f} %</td>" in dom
    drawn, state, _ = seen(browse(page_file, tmp_path, "layer=2&step=2&show=expert&expert=3"))
    taken = drawing.allocation.taken[1, 1, 3].numpy()
    colours = [(255, 255, 255), data_of(page_file.read_text())["taken"]]
    assert drawn == f"layer=2&step=2&show=expert&expert=3&checksum={checksum(taken, colours)}"
    assert state.endswith("expert 3")
    drawn, _, note = seen(browse(page_file, tmp_path, "layer=9&step=2&expert=x"))
    assert drawn.startswith("layer=1&step=2&show=counts")
    assert note == "layer=9: no such layer with experts here. expert=x: no such expert."


@needs_browser
def test_controls_and_a_changed_hash_redraw(drawing, page_file, tmp_path):
    def after(script):
        path = tmp_path / "scripted.html"
        act = f"<script>addEventListener('load', () => setTimeout(() => {{{script}}}, 300));</script></body>"
        path.write_text(page_file.read_text().replace("</body>", act))
        return seen(browse(path, tmp_path, "layer=1&step=1"))[0].rsplit("&", 1)[0]

    assert after("location.hash = 'layer=2&step=3'") == "layer=2&step=3&show=counts"
    slide = "const s = document.getElementById('step'); s.value = 1; s.dispatchEvent(new Event('input'))"
    assert after(slide) == "layer=1&step=2&show=counts"
    assert after("document.querySelectorAll('#thumbs button')[1].click()") == "layer=2&step=1&show=counts"
    choose = "const s = document.getElementById('expert'); s.value = 2; s.dispatchEvent(new Event('change'))"
    assert after(choose) == "layer=1&step=1&show=expert&expert=2"
    play = "const b = document.getElementById('play'); b.click(); setTimeout(() => b.click(), 500)"
    assert after(play) == "layer=1&step=2&show=counts"


@needs_browser
def test_a_step_without_single_experts_says_so(large, tmp_path, monkeypatch):
    whole, _, _ = page_of(large)
    steps = data_of(whole)["steps"]
    room = sum(len(step["experts"]) for step in steps[:3])
    monkeypatch.setattr(routing_maps, "PAGE_BYTES", len(whole.encode()) - room)
    page, held, detailed = page_of(large)
    assert held == 6
    stored = [step["number"] for step in data_of(page)["steps"] if step["experts"] is not None]
    assert len(stored) == detailed
    assert 2 <= detailed < 6
    missing = next(n for n in range(2, 6) if n not in stored)
    nearest = min(stored, key=lambda n: abs(n - missing))
    path = tmp_path / "thin.html"
    path.write_text(page)
    drawn, _, note = seen(browse(path, tmp_path, f"step={missing}&show=expert"))
    assert drawn.startswith(f"layer=1&step={nearest}&show=expert&expert=0")
    assert note.strip() == f"Step {missing} is stored without single experts; this is the nearest with them."
