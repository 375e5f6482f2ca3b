"""The caption gate: verdicts, captions and cost, with a captioner of the test's own and with the HTTP one."""

from __future__ import annotations

import io
import math

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from megatron_nucleus.data.curation import store as tables
from megatron_nucleus.data.curation.captioners import desk, prompts
from megatron_nucleus.data.curation.engines.local import LocalEngine
from megatron_nucleus.data.curation.recipe import Line
from megatron_nucleus.data.curation.runner import Run, run_stage
from megatron_nucleus.data.curation.stage import Drop, PayloadSource, Row
from megatron_nucleus.data.curation.stages.recaption import COST_TYPE, RecaptionConfig, judge, recaption
from megatron_nucleus.data.curation.store import Level, Store
from megatron_nucleus.data.images import MAX_PIXELS
from megatron_nucleus.data.index import CAPTION_TYPE
from megatron_nucleus.utils.errors import ConfigError
from tests.data.curation.caption_server import TOKENS_IN, TOKENS_OUT, CaptionServer, answer, says, status

MINE = """
from megatron_nucleus.data.curation.captioners.protocol import Failure, Reply
class Mine:
    name, revision = "mine", "r1"
    def __init__(self, settings, ledger): pass
    def caption(self, requests):
        for n, r in reversed(list(enumerate(requests))):
            shade = r.picture.getpixel((0, 0))[0]
            words = {"short": 5, "medium": 20, "detailed": 60}[r.length]
            if shade == 66:
                yield n, Failure("does not like it")
            else:
                text = f"shade {shade} {r.task} {r.caption or ''}" if shade != 77 else r.caption
                yield n, Reply(" ".join(text.split() + ["word"] * (words if shade != 77 else 0)), 100, 10)
"""


def caption(text, alignment=None, **fields):
    plain = {
        "length_class": "short",
        "source": "alt",
        "model": None,
        "model_revision": None,
        "prompt_hash": None,
    }
    stored = None if alignment is None else float(np.float32(alignment))  # as the column hands it out
    return {"text": text, **plain, "alignment": stored, **fields}


@pytest.fixture
def rows(tmp_path):
    """Rows as the runner makes them: (shade, captions) pairs -> rows of grey PNG files."""

    def make(*pairs):
        out = []
        for number, (shade, captions) in enumerate(pairs):
            file = io.BytesIO()
            Image.new("RGB", (40, 30), (shade,) * 3).save(file, "PNG")
            (tmp_path / f"{number}.png").write_bytes(file.getvalue())
            values = {
                "item": f"{number}.png",
                "container": f"{number}.png".encode(),
                "offset": None,
                "length": None,
            }
            source = PayloadSource(str(tmp_path), 1 << 20, MAX_PIXELS)
            out.append(Row(values | {"captions": captions}, source))
        return out

    return make


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)

    def make(**settings):
        return RecaptionConfig(captioner=f"{file}:Mine", **settings)

    return make


@pytest.mark.parametrize(
    ("alignments", "gate", "best"),
    [
        ([], "synthesise", None),
        ([0.66], "keep", None),
        ([0.65], "refine", 0),  # the published edges: above 0.65 keeps, 0.30 to 0.65 refines
        ([0.30], "refine", 0),
        ([0.29999], "synthesise", None),
        ([0.0], "synthesise", None),
        ([0.1, 0.5, 0.4], "refine", 1),
        ([0.5, 0.5], "refine", 0),
        ([0.1, 0.9, 0.2], "keep", None),
        ([None], "unknown", None),
        ([0.1, None], "unknown", None),
        ([0.5, None], "unknown", None),
        ([None, 0.7], "keep", None),
    ],
)
def test_the_gate(alignments, gate, best):
    captions = [caption(f"text {n}", alignment) for n, alignment in enumerate(alignments)]
    assert judge(captions, RecaptionConfig()) == (gate, best)


@pytest.mark.parametrize("edge", [0.1, 0.3, 0.35, 0.6, 0.65, 0.7, 0.9])
def test_edges_hold_in_the_precision_of_the_column(edge):
    above = float(np.nextafter(np.float32(edge), np.float32(1)))
    below = float(np.nextafter(np.float32(edge), np.float32(0)))
    config = RecaptionConfig(keep_above=edge, synthesise_below=edge)
    gates = [judge([caption("x", a)], config).gate for a in (below, edge, above)]
    assert gates == ["synthesise", "refine", "keep"]


def test_a_page_of_text_is_not_refined_and_nan_is_a_bug():
    long = "x" * (prompts.MAX_ORIGINAL_CHARACTERS + 1)
    assert judge([caption(long, 0.5)], RecaptionConfig()).gate == "synthesise"
    assert judge([caption(long[:-1], 0.5)], RecaptionConfig()).gate == "refine"
    with pytest.raises(ValueError, match="NaN"):
        judge([caption("x", math.nan)], RecaptionConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_above": 0.2}, "synthesise_below 0.3, keep_above 0.2: must rise"),
        ({"drop_below": 0.5}, "drop_below 0.5: from 0 to synthesise_below"),
        ({"lengths": ("shrt",)}, "lengths: 'shrt' .did you mean short"),
        ({"lengths": ()}, "lengths none: one or more"),
        ({"lengths": ("short", "short")}, "each once"),
        ({"captioner": "http"}, "captioner http needs endpoint"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        RecaptionConfig(**settings)


def test_without_a_captioner_the_gate_classifies(rows):
    pairs = [
        (1, [caption("a", 0.9)]),
        (2, [caption("b", 0.5)]),
        (3, [caption("c", 0.1)]),
        (4, [caption("d")]),
    ]
    results = recaption.function(rows(*pairs, (5, []), (6, None)), RecaptionConfig())
    assert [r["caption_gate"] for r in results[:4]] == ["keep", "refine", "synthesise", "unknown"]
    assert [r["captions"] for r in results[:4]] == [captions for _, captions in pairs]
    assert all(r["caption_cost"] == {"tokens_in": 0, "tokens_out": 0, "cost": 0.0} for r in results[:4])
    assert [r.reason for r in results[4:]] == ["missing_caption"] * 2
    assert recaption.verdict("missing_caption") == "quarantined"


def test_what_is_written_and_where_it_goes(rows, mine):
    fine, half, bad, worse = (
        caption("fine", 0.9),
        caption("half", 0.4),
        caption("bad", 0.2),
        caption("worse", 0.01),
    )
    work = rows(
        (1, [bad, fine]), (2, [worse, half, bad]), (3, [bad, worse]), (4, None), (5, [caption("new")])
    )
    config = mine(lengths=("detailed", "short"), price_in=2.0, price_out=5.0, drop_below=0.05)
    keep, refine, anew, missing, unknown = recaption.function(work, config)

    assert (keep["captions"], keep["caption_gate"]) == ([bad, fine], "keep")
    assert (unknown["captions"], unknown["caption_gate"]) == ([caption("new")], "unknown")
    assert keep["caption_cost"] == unknown["caption_cost"] == {"tokens_in": 0, "tokens_out": 0, "cost": 0.0}

    assert refine["caption_gate"] == "refine"
    refined = caption(
        "shade 2 refine half" + " word" * 20,
        length_class="medium",
        source="refined",
        model="mine",
        model_revision="r1",
        prompt_hash=prompts.prompt_hash("refine", "medium"),
    )
    assert refine["captions"] == [worse, refined, half, bad]
    assert refine["caption_cost"] == {"tokens_in": 100, "tokens_out": 10, "cost": pytest.approx(250e-6)}

    for result, shade, rest in ((anew, 3, [bad]), (missing, 4, [])):
        written = [
            caption(
                f"shade {shade} synthesise" + " word" * words,
                length_class=name,
                source="synthetic",
                model="mine",
                model_revision="r1",
                prompt_hash=prompts.prompt_hash("synthesise", name),
            )
            for name, words in (("detailed", 60), ("short", 5))
        ]
        assert result["captions"] == [*written, *rest]  # 'worse' is below drop_below
        assert result["caption_gate"] == "synthesise"
        assert result["caption_cost"] == {"tokens_in": 200, "tokens_out": 20, "cost": pytest.approx(500e-6)}


def test_results_fit_the_declared_columns(rows, mine):
    results = recaption.function(rows((2, [caption("half", 0.4)]), (4, None)), mine())
    for name, kind in (
        ("captions", pa.list_(CAPTION_TYPE)),
        ("caption_gate", pa.string()),
        ("caption_cost", COST_TYPE),
    ):
        assert recaption.adds.field(name).type == kind
        assert pa.array([r[name] for r in results], kind).to_pylist() == [r[name] for r in results]
    assert all(r.keys() == set(recaption.adds.names) for r in results)


def test_results_do_not_depend_on_the_batch(rows, mine):
    work = [(n, [caption(f"c{n}", n / 10)] if n % 3 else None) for n in range(10)]
    together = recaption.function(rows(*work), mine())
    alone = [recaption.function([row], mine())[0] for row in rows(*work)]
    assert together == alone


def test_a_refined_text_that_says_the_same_stays_the_original(rows, mine):
    half = caption("half of it", 0.4)
    (result,) = recaption.function(rows((77, [half, caption("bad", 0.1)])), mine())
    assert result["captions"] == [half, caption("bad", 0.1)]
    assert result["caption_cost"]["tokens_in"] == 100


def test_one_failed_caption_drops_its_image_alone_and_may_be_tried_again(rows, mine):
    results = recaption.function(rows((3, None), (66, None), (4, None)), mine())
    assert results[1] == Drop("captioner_failed", "synthesise short: does not like it")
    assert [r["caption_gate"] for r in (results[0], results[2])] == ["synthesise"] * 2
    assert recaption.verdict("captioner_failed") == "quarantined"
    assert "captioner_failed" in recaption.failures


def test_the_version_follows_what_decides_the_captions(mine, tmp_path):
    base = recaption.version(mine())
    assert recaption.version(mine()) == base
    assert recaption.version(mine(keep_above=0.7)) != base
    file = tmp_path / "mine.py"
    file.write_text(MINE.replace("r1", "r2"))
    assert recaption.version(mine()) != base


def test_the_key_is_in_no_setting_and_no_version(monkeypatch):
    config = RecaptionConfig(captioner="http", endpoint="http://h/v1", model="m", api_key_env="THE_KEY")
    monkeypatch.setenv("THE_KEY", "sk-1")
    first = recaption.version(config)
    monkeypatch.setenv("THE_KEY", "sk-2")
    assert recaption.version(config) == first
    assert "sk-" not in repr(config)


def test_over_http_with_faults_and_after_a_crash(rows, tmp_path):
    """What an interrupted part has paid for is not paid for again."""
    shades = (0, 50, 100)
    with CaptionServer(None, status(500), None, answer("")) as server:
        config = RecaptionConfig(
            captioner="http",
            endpoint=server.endpoint,
            model="seer",
            lengths=("short", "medium"),
            concurrency=1,
            backoff_s=0.001,
            price_in=1.0,
            cache_dir=str(tmp_path / "cache"),
        )
        work = rows(*((shade, None) for shade in shades))
        results = recaption.function(work, config)
        # Requests: short 0; medium 0 twice, after the 500; short 1 is empty; then the rest.
        assert len(server.seen) == 7
        assert results[1] == Drop("captioner_failed", "synthesise short: empty text")
        desk._open_desk.cache_clear()  # as in a new process
        again = recaption.function(work, config)
        assert len(server.seen) == 8
    assert [again[0], again[2]] == [results[0], results[2]]
    for result, shade in zip(again, shades, strict=True):
        expected = [says(shade, prompts.render("synthesise", name, None)) for name in ("short", "medium")]
        assert [c["text"] for c in result["captions"]] == expected
        cost = {
            "tokens_in": 2 * TOKENS_IN,
            "tokens_out": 2 * TOKENS_OUT,
            "cost": pytest.approx(2e-6 * TOKENS_IN),
        }
        assert result["caption_cost"] == cost
    assert desk.open_desk(config).ledger.spent().requests == 7


def test_in_the_runner_only_failed_images_are_asked_for_again(tmp_path):
    """Two workers, two parts; one image fails at first, and a wrong key stops the whole job."""
    shades = {"part-0": [0, 30, 60], "part-1": [90, 120]}
    for shade in [*shades["part-0"], *shades["part-1"]]:
        Image.new("RGB", (40, 30), (shade,) * 3).save(tmp_path / f"{shade}.png")
    listed = {"item": pa.string(), "container": pa.binary(), "offset": pa.int64(), "length": pa.int64()}
    schema = pa.schema([tables.POSITION, *listed.items(), ("captions", pa.list_(CAPTION_TYPE))])

    def run(server, work, workers=1, retry=False):
        settings = {"captioner": "http", "endpoint": server.endpoint, "model": "seer", "lengths": ["short"]}
        settings |= {"max_retries": 0, "cache_dir": str(tmp_path / f"{work}.cache")}
        line = Line("recaption", "megatron_nucleus.data.curation.stages.recaption:recaption", settings)
        names = (tuple(schema.names[1:]), tuple(recaption.adds.names))
        store = Store(str(tmp_path / work), (Level(0, "list", names[0]), Level(1, "recaption", names[1])))
        for part, values in shades.items() if not retry else ():
            rows = [
                {"position": n, "item": f"{v}.png", "container": b"%d.png" % v} for n, v in enumerate(values)
            ]
            table = pa.Table.from_pylist(rows, schema=schema)
            store.write(0, part, table, tables.DROPPED_SCHEMA.empty_table(), version="", entry=part)
        engine = LocalEngine(workers, pool=workers > 1)
        source = PayloadSource(str(tmp_path), 1 << 20, MAX_PIXELS)
        try:
            records = run_stage(Run(store, tuple(shades), engine, source, retry), 1, line)
        finally:
            engine.close()
        made = [store.read(1, part, ["captions"])["captions"].to_pylist() for part in shades]
        return [r.counts["quarantined"] for r in records], [[row[0]["text"] for row in part] for part in made]

    prompt = prompts.render("synthesise", "short", None)
    with CaptionServer() as server:
        server.fault_of = lambda seen: status(500) if abs(np.asarray(seen.picture).mean() - 30) < 5 else None
        quarantined, texts = run(server, "work", workers=2)
        assert quarantined == [{"captioner_failed": 1}, {}]
        assert texts == [[says(s, prompt) for s in part] for part in ([0, 60], [90, 120])]
        assert len(server.seen) == 5
        server.fault_of = lambda seen: None
        quarantined, texts = run(server, "work", retry=True)
        assert quarantined == [{}, {}]
        assert texts == [[says(s, prompt) for s in part] for part in shades.values()]
        assert len(server.seen) == 6
        server.fault_of = lambda seen: status(401)
        with pytest.raises(ConfigError, match="HTTP 401"):
            run(server, "other")
