"""report.html: its numbers are the run's, texts stay texts, equal input gives equal bytes, and a browser shows it."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megatron_nucleus.data import index
from megatron_nucleus.data.curation import report
from megatron_nucleus.data.curation.pipeline import curate
from megatron_nucleus.data.curation.report import choose, pictures
from megatron_nucleus.data.curation.settings import Settings
from megatron_nucleus.utils.config import from_dict
from megatron_nucleus.utils.errors import DataError

STAGES = str(Path(__file__).with_name("report_stages.py"))
HOSTILE = "</figcaption><script>alert(\"x\")</script><img src=x onerror=alert(1)> & \u2067right to left\u2069 'quoted'"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)


def painting(seed, size=(96, 96), red=0):
    """A picture with large shapes and fine grain, unlike those of other seeds."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    values = np.asarray(coarse).astype(int) + rng.integers(-25, 26, (size[1], size[0], 3))
    values[..., 0] = np.maximum(values[..., 0], red)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def save(folder, name, picture, text="", kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    (folder / name).write_bytes(buffer.getvalue())
    if text:
        (folder / name).with_suffix(".txt").write_text(text)


def fill(folder):
    """49 items, among them every kind that the report treats in a way of its own."""
    folder.mkdir()
    for seed in range(24):
        size = ((96, 96), (144, 96), (90, 160))[seed % 3]
        save(folder, f"good{seed:02d}.png", painting(seed, size), " ".join(["word"] * (seed + 1)))
    for seed in range(4):
        save(
            folder,
            f"near{seed}.jpg",
            painting(seed, ((96, 96), (144, 96), (90, 160))[seed % 3]),
            "near",
            "JPEG",
            quality=92,
        )
    for seed in (5, 6):
        shutil.copy(folder / f"good{seed:02d}.png", folder / f"same{seed}.png")
        (folder / f"same{seed}.txt").write_text(f"another caption {seed}")
    for n in range(9):
        save(folder, f"blank{n}.png", Image.new("RGB", (80, 80 + n), (90, 20 * n, 40)), "nothing")
    for n in range(3):
        save(folder, f"tiny{n}.png", painting(100 + n, (20, 30)), "tiny")
        save(folder, f"red{n}.png", painting(200 + n, red=240), "red")
    save(folder, "hostile.png", painting(300), HOSTILE)
    (folder / "hostile.json").write_text('{"license": "<u>licence</u>"}')
    save(folder, "<b>&name.png", painting(301, (20, 20)), "tiny too")
    save(folder, "bomb.png", painting(302, (400, 400)), "large header")
    save(folder, "cut.png", painting(303), "cut")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:900])
    return folder


def settings_of(**sections):
    stages = ["inspect", "exact_duplicates", "blank", f"{STAGES}:redness", "near_duplicates"]
    stages += [{"score": {"as": "quality", "kind": "image_statistics"}}, "tiers"]
    values = {
        "recipe": {"stages": stages},
        "inspect": {"min_side_px": 40},
        "tiers": {"tier_by": "shares", "tier_scorer": "quality"},
        "curation": {"max_pixels": 100_000, "min_bucket_images": 2},
        "engine": {"workers": 1},
    }
    return from_dict(Settings, values | sections)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The output of a curation, and what it says of itself."""
    folder = tmp_path_factory.mktemp("report")
    source = fill(folder / "<i>&in")
    result = curate(source, folder / "out", settings_of())
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    rows = [
        r
        for f in sorted((folder / "out" / "index").glob("*"))
        for r in index.iter_rows(f, index.INDEX_SCHEMA)
    ]
    quarantine = [
        r
        for f in sorted((folder / "out" / "quarantine").glob("*"))
        for r in index.iter_rows(f, index.QUARANTINE_SCHEMA)
    ]
    return SimpleNamespace(
        folder=folder,
        source=source,
        output=folder / "out",
        result=result,
        page=page,
        rows=rows,
        dropped=quarantine,
    )


class Page(HTMLParser):
    """Texts of the page by place, as a browser reads them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.images, self.links, self.ids, self.heads, self.text = Counter(), [], [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags[tag] += 1
        if "id" in values:
            assert values["id"] not in self.ids
            self.ids.add(values["id"])
        if tag == "img":
            self.images.append(values)
        if "href" in values:
            self.links.append(values["href"])
        if re.fullmatch("h[1-6]", tag):
            self.heads.append(int(tag[1]))
        assert not [name for name in values if name.startswith("on")]

    def handle_data(self, data):
        self.text.append(data)


def plain(fragment):
    """A fragment's text, white space collapsed."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", fragment)).replace("\xa0", " ").split())


def table_after(page, heading):
    """Cells of the first table behind a heading of third order."""
    body = page.split(f"<h3>{heading}</h3>")[1]
    rows = re.findall(r"<tr>(.*?)</tr>", body.split("<table")[1].split("</table>")[0], re.S)
    return [[plain(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S)] for row in rows]


def number(text):
    return int(text.replace(",", ""))


def charted(page, heading):
    """range -> (kept, not kept) of a chart's numbers."""
    head, *rows = table_after(page, heading)
    other = "not kept" in head
    return {row[0]: (number(row[1]), number(row[2]) if other else 0) for row in rows}


def barred(page, heading):
    return {row[0]: number(row[1]) for row in table_after(page, heading)}


# --- the numbers of a whole run ------------------------------------------------------------------------------


def test_the_corpus_holds_what_the_report_must_show(made):
    assert made.result["rejected"].keys() >= {
        "blank", "exact_duplicate", "near_duplicate", "too_small", "too <b>red</b>"
    }  # fmt: skip
    assert made.result["quarantined"] == {"decompression_bomb": 1, "undecodable": 1}


def test_every_reason_stands_with_its_number_share_and_meaning(made):
    table = made.page.split('<table class="reasons">')[1].split("</table>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in table.split("<tr id=")[1:]]
    found = {}
    for reason, meaning, stage, images_, share in rows:
        name, verdict = (
            re.search(r"<b>(.*?)</b>", reason)[1],
            plain(re.search(r"<span.*</span>", reason, re.S)[0]),
        )
        found[html.unescape(name)] = (
            verdict,
            plain(meaning),
            plain(stage),
            number(plain(images_)),
            plain(share),
        )
    counts = {(v, r): n for v in ("rejected", "quarantined") for r, n in made.result[v].items()}
    assert {(v, r): n for r, (v, _, _, n, _) in found.items()} == counts
    seen = made.result["seen"]
    assert all(share == f"{100 * n / seen:.1f} %" for _, _, _, n, share in found.values())
    assert found["too_small"][1].startswith("The shortest side is below the limit. min_side_px = 40 px")
    assert found["too <b>red</b>"][1:3] == (
        "Measures how red a picture is, and drops the reddest. examples",
        "redness",
    )
    stages = {row["reason"]: row["stage"] for row in made.dropped}
    assert {reason: row[2] for reason, row in found.items()} == stages


def test_the_funnel_reconciles(made):
    text = plain(made.page)
    seen, kept = made.result["seen"], made.result["kept"]
    rejected, quarantined = (sum(made.result[v].values()) for v in ("rejected", "quarantined"))
    assert seen == kept + rejected + quarantined == 49
    assert f"{seen} seen = {kept} kept + {rejected} rejected + {quarantined} quarantined" in text
    arrived = seen
    for stage in made.result["stages"][1:]:
        step = re.search(rf"aria-label=\"{stage['stage']}: (\d+) of (\d+) go on\"", made.page)
        assert (int(step[1]), int(step[2])) == (stage["kept"], arrived)
        widths = re.findall(
            r'<span class="(\w+)" style="width:([\d.]+)%">', made.page[step.end() :].split("</div>")[0]
        )
        losses = {v: sum(stage[v].values()) for v in ("rejected", "quarantined")}
        want = {"kept": stage["kept"], **losses}
        assert {k: float(w) for k, w in widths} == {
            k: pytest.approx(100 * n / seen, abs=1e-3) for k, n in want.items() if n
        }
        arrived = stage["kept"]


def test_size_charts_count_kept_and_other_images(made):
    def sides(rows):
        return [min(r["width_px"], r["height_px"]) for r in rows if r["width_px"]]

    kept, other = (Counter(sides(rows)) for rows in (made.rows, made.dropped))
    for label, counts in charted(made.page, "Shortest side").items():
        low, high = map(int, re.fullmatch(r"(\d+) to (\d+) px", label).groups())
        assert counts == tuple(sum(n for side, n in c.items() if low <= side <= high) for c in (kept, other))
    assert sum(k for k, _ in charted(made.page, "Shortest side").values()) == made.result["kept"]
    unknown = sum(r["width_px"] is None for r in made.dropped)
    assert f"({unknown} were set aside before that)" in plain(made.page)
    aspects = charted(made.page, "Aspect ratio")
    assert sum(k for k, _ in aspects.values()) == made.result["kept"]
    assert sum(o for _, o in aspects.values()) == len(made.dropped) - unknown


def of_all_parts(made, stage, columns):
    """Rows of a stage's own tables, read without the store."""
    (folder,) = (made.output / "stages").glob(f"*-{stage}")
    files = sorted(folder.glob("*/rows.parquet"))
    return [
        row
        for f in files
        for row in pq.read_table(f, columns=["position", *columns], partitioning=None).to_pylist()
    ]


def in_range(label, value):
    if label.startswith("below"):
        return value < float(label.split()[1])
    if label.endswith("and more"):
        return value >= float(label.split()[0])
    low, high = (float(x) for x in label.split(" to "))
    return low <= np.float32(value) < high


@pytest.mark.parametrize(
    ("title", "stage", "column"), [("Redness", "redness", "redness"), ("Contrast", "inspect", "luma_std")]
)
def test_measures_count_kept_and_later_dropped_images(made, title, stage, column):
    (last,) = (made.output / "stages").glob("*-tiers")
    alive = {r["position"] for r in of_all_parts(made, last.name[3:], [])}
    rows = of_all_parts(made, stage, [column])
    table = charted(made.page, title)
    for label, counts in table.items():
        inside = [r["position"] in alive for r in rows if in_range(label, r[column])]
        assert counts == (sum(inside), len(inside) - sum(inside)), label
    assert sum(map(sum, table.values())) == len(rows)
    assert sum(k for k, _ in table.values()) == made.result["kept"] < len(rows)


def test_scores_tiers_and_buckets(made):
    values = [s["value"] for r in made.rows for s in r["scores"] if s["scorer"] == "quality"]
    table = charted(made.page, "Score: quality")
    assert {label: sum(in_range(label, v) for v in values) for label in table} == {
        k: n for k, (n, _) in table.items()
    }
    assert sum(k for k, _ in table.values()) == len(values) == made.result["kept"]
    assert f"Mean of the kept images: {np.mean(values):.4g}." in plain(made.page)
    heat = made.page.split('<table class="heat">')[1].split("</table>")[0]
    rows = [
        [plain(c) for c in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", r, re.S)] for r in heat.split("<tr>")[1:]
    ]
    want = Counter((r["tier"], r["episode_bucket"]) for r in made.rows)
    got = {(row[0], rows[0][c]): int(row[c]) for row in rows[1:] for c in range(1, len(row))}
    assert {k: n for k, n in got.items() if "all" not in k and n} == dict(want)
    assert got["all", "all"] == made.result["kept"]
    assert got["A1", "all"] == sum(n for (tier, _), n in want.items() if tier == "A1")
    assert {name.split()[0]: n for name, n in barred(made.page, "Aspect buckets").items()} == made.result[
        "buckets"
    ]


def test_captions_licences_and_crops(made):
    captions = [c for r in made.rows for c in r["captions"]]
    words = Counter(len(c["text"].split()) for c in captions)
    for label, (count, _) in charted(made.page, "Words per caption").items():
        low, high = map(int, re.fullmatch(r"(\d+) to (\d+) words", label).groups())
        assert count == sum(n for length, n in words.items() if low <= length <= high)
    lengths = Counter(c["length_class"] for c in captions)
    assert {k: n for k, n in barred(made.page, "Captions by length").items() if n} == dict(lengths)
    assert barred(made.page, "Captions per image") == {
        str(k): n for k, n in Counter(len(r["captions"]) for r in made.rows).items()
    }
    assert barred(made.page, "Where captions come from") == dict(Counter(c["source"] for c in captions))
    mean = sum(k * n for k, n in words.items()) / len(captions)
    assert (
        f"{len(captions)} captions of {len(made.rows)} kept images: {len(captions) / len(made.rows):.2f} per image, "
        + (f"{mean:.1f} words on average.")
        in plain(made.page)
    )
    licences = made.page.split("<h3>Licences</h3>")[1].split("</table>")[0]
    assert "&lt;u&gt;licence&lt;/u&gt;" in licences
    fits = plain(made.page.split("How the images fit their buckets")[1].split("</table>")[0])
    for bucket, images_ in made.result["buckets"].items():
        assert re.search(rf"{bucket} {images_} \d", fits)


def test_duplicates_stand_side_by_side(made):
    relations = Counter(d["relation"] for r in made.rows for d in r["duplicates"])
    shown = {name.split()[0]: n for name, n in barred(made.page, "Kinds of copies").items()}
    assert shown == dict(relations) == {"near_duplicate": 4, "exact_duplicate": 2}
    clusters = made.page.split('<section class="cluster">')[1:]
    assert len(clusters) == 4  # those of copies with the same bytes alone are counted, not drawn
    for cluster in clusters:
        names = [html.unescape(n) for n in re.findall(r'class="name">(.*?)</bdi>', cluster)][:2]
        pair = (
            {f"good{names[0][4:6]}.png", f"near{int(names[0][4:6])}.jpg"}
            if names[0][0] == "g"
            else set(names)
        )
        assert pair == set(names)
        kept = next(r for r in made.rows if r["source_id"] == names[0])
        (copy,) = kept["duplicates"]
        assert f"near duplicate, distance {copy['distance']};" in cluster
        assert cluster.split("</section>")[0].count("<img ") == 2


# --- what the page is made of --------------------------------------------------------------------------------


def test_it_needs_nothing_from_outside_and_runs_nothing(made):
    page = Page(made.page)
    assert not {"script", "iframe", "object", "link", "base", "form"} & page.tags.keys()
    assert all(i["src"].startswith("data:image/jpeg;base64,") for i in page.images)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert "url(" not in made.page
    assert "http://" not in made.page
    assert "https://" not in made.page
    assert "@import" not in made.page
    assert "default-src 'none'" in made.page


def test_hostile_texts_stay_texts(made):
    page = Page(made.page)
    everything = "".join(page.text)
    assert HOSTILE in everything
    assert any(i["alt"] == HOSTILE for i in page.images)
    assert "<b>&name.png" in everything
    assert "<i>&in" in everything
    assert "too <b>red</b>" in everything
    assert "& more than <i>190</i>" in everything


def test_headings_pictures_and_alternative_texts(made):
    page = Page(made.page)
    assert page.heads[0] == 1
    assert page.heads.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(page.heads))
    assert 0 < len(page.images) <= choose.MAX_PICTURES
    for picture in page.images:
        assert picture["alt"]
        with Image.open(io.BytesIO(base64.b64decode(picture["src"].split(",")[1]))) as opened:
            assert opened.size == (int(picture["width"]), int(picture["height"]))
            assert max(opened.size) == pictures.THUMBNAIL_PX


def test_examples_are_those_of_their_reason(made):
    found = {}
    for section in re.split(r'<h3 id="shown-', made.page)[1:]:
        reason = plain(re.search(r">(.*?)<span", section, re.S)[1])
        section = section.split("<h2")[0]
        names = [html.unescape(n) for n in re.findall(r'class="name">(.*?)</bdi>', section)]
        found[reason] = (names, section.count("<img "))
    items = {}
    for row in made.dropped:
        items.setdefault(row["reason"], set()).add(row["item"])
    assert found.keys() == items.keys()
    for reason, (names, shots) in found.items():
        assert set(names) <= items[reason]
        assert len(names) == len(set(names)) == min(len(items[reason]), choose.REASON_EXAMPLES)
        assert shots == (0 if reason in ("decompression_bomb", "undecodable") else len(names))


def test_equal_input_gives_equal_bytes(made, tmp_path):
    """On another engine shape, in another folder."""
    result = curate(made.source, tmp_path / "again", settings_of(engine={"workers": 2}))
    assert result["kept"] == made.result["kept"]
    for name in (report.REPORT, report.FUNNEL):
        assert (tmp_path / "again" / name).read_bytes() == (made.output / name).read_bytes()


def test_nothing_kept_still_gives_a_report(tmp_path):
    (tmp_path / "in").mkdir()
    for n in range(3):
        save(tmp_path / "in", f"{n}.png", painting(n, (20, 20)), "small")
    with pytest.raises(DataError, match="none of 3 items"):
        curate(tmp_path / "in", tmp_path / "out", settings_of())
    text = plain((tmp_path / "out" / report.REPORT).read_text())
    assert "Nothing was kept, so no data set was made." in text
    assert "3 seen = 0 kept + 3 rejected + 0 quarantined" in text
    assert (tmp_path / "out" / report.FUNNEL).read_bytes()[:4] == b"\x89PNG"


# --- the browser ---------------------------------------------------------------------------------------------

_MEASURE = """<!doctype html><body style="margin:0"><iframe id="f" style="border:0;width:{width}px;height:900px"
srcdoc="{page}"></iframe><pre id="out"></pre><script>addEventListener("load", () => setTimeout(() => {{
const d = document.getElementById("f").contentDocument, e = d.documentElement;
document.getElementById("out").textContent = JSON.stringify({{wide: e.scrollWidth, client: e.clientWidth,
images: [...d.images].map(i => [i.complete, i.naturalWidth, i.clientWidth, i.clientHeight].map(Number)),
heads: [...d.querySelectorAll("h2")].map(h => [h.id, h.getBoundingClientRect().height]),
charts: [...d.querySelectorAll("svg")].map(s => s.getBoundingClientRect().width)}});}}, 300));</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome: apt-get install chromium")
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_it_whole_at_any_width(made, tmp_path, width):
    path = tmp_path / "frame.html"
    path.write_text(_MEASURE.format(width=width, page=html.escape(made.page, quote=True)))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--virtual-time-budget=4000",
        "--enable-logging=stderr", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert "CONSOLE" not in done.stderr
    seen = json.loads(re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)[1])
    assert width - 20 <= seen["client"] <= width
    assert seen["wide"] <= seen["client"]
    assert len(seen["images"]) == len(Page(made.page).images)
    assert all(min(values) > 0 for values in seen["images"])
    names = [name for name, height in seen["heads"] if height > 0]
    assert names == re.findall(r'<a href="#([a-z-]+)">', made.page.split("<nav")[1].split("</nav>")[0])
    assert {
        "funnel",
        "reasons",
        "sizes",
        "quality",
        "tiers",
        "captions",
        "duplicates",
        "not-kept",
        "made",
    } <= set(names)
    assert all(260 < chart <= 460 for chart in seen["charts"])
