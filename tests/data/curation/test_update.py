"""A finished data set that is refined or repaired: what still fits is kept, and it stays in use as long as it can."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_nucleus.data.curation import runner, shard_task
from megatron_nucleus.data.curation.pipeline import curate
from megatron_nucleus.data.dataset import open_corpus
from megatron_nucleus.data.index import INDEX_SCHEMA
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.data.curation.helpers import encode, files_of, make_settings, table, write_captioned

TOYS = str(Path(__file__).with_name("toy_stages.py"))


@pytest.fixture
def source(tmp_path, photos, monkeypatch):
    """Six pictures, 80 to 85 pixels wide, in parts of two."""
    monkeypatch.setattr("megatron_nucleus.data.curation.readers.FILES_PER_TASK", 2)
    pictures = {f"{i}.png": encode(photos["coffee.png"].resize((80 + i, 70 + i))) for i in range(6)}
    return write_captioned(tmp_path / "in", pictures)


@pytest.fixture
def ran(monkeypatch):
    """The (stage, part) that row stages were run on, as they come."""
    original, seen = runner.run_part, []

    def noted(task):
        seen.append((task.line.name, task.part))
        return original(task)

    monkeypatch.setattr(runner, "run_part", noted)
    return seen


def settings_of(min_luma_std=3.5, **knobs):
    return make_settings(
        ["inspect", "exact_duplicates", {"blank": {"min_luma_std": min_luma_std, "max_dominant_share": 1.0}}],
        **knobs,
    )


def in_use(output):
    """The files that a reader of the data set looks at."""
    return {
        name: content for name, content in files_of(output).items() if not name.startswith(("stages", "."))
    }


def test_a_changed_setting_runs_again_what_it_changes_in_a_finished_set(source, tmp_path, ran):
    output = tmp_path / "out"
    faint = np.tile(np.linspace(124, 132, 90).astype(np.uint8), (90, 1))  # a ramp; luma varies by 2.3
    (source / "faint.png").write_bytes(encode(Image.fromarray(faint)))
    (source / "faint.txt").write_text("hardly anything")
    assert curate(source, output, settings_of())["rejected"] == {"blank": 1}
    ran.clear()
    with pytest.raises(
        ConfigError, match=r"recipe\[2\].settings.min_luma_std: 3.5 there, 0.5 here\); --update makes again"
    ):
        curate(source, output, settings_of(0.5))
    result = curate(source, output, settings_of(0.5), update=True)
    assert ran == [("blank", f"files-{n:06d}") for n in range(4)]
    assert (result["kept"], result["already_complete"]) == (7, False)
    curate(source, tmp_path / "clean", settings_of(0.5))
    assert files_of(output) == files_of(tmp_path / "clean")
    assert curate(source, output, settings_of(0.5))["already_complete"]


def test_one_more_image_costs_its_own_part(source, tmp_path, photos, ran):
    output = tmp_path / "out"
    curate(source, output, settings_of())
    (source / "6.png").write_bytes(encode(photos["chelsea.png"].resize((90, 90))))
    (source / "6.txt").write_text("a cat")
    ran.clear()
    with pytest.raises(ConfigError, match="input_fingerprint: .*--update"):
        curate(source, output, settings_of())
    result = curate(source, output, settings_of(), update=True)
    assert [part for stage, part in ran if stage == "inspect"] == ["files-000003"]
    assert (result["seen"], result["kept"]) == (7, 7)
    assert len(open_corpus(output)) == 7
    curate(source, tmp_path / "clean", settings_of())
    assert files_of(output) == files_of(tmp_path / "clean")


def test_an_update_of_what_fits_does_nothing(source, tmp_path, ran):
    output = tmp_path / "out"
    assert not curate(source, output, settings_of(), update=True)["already_complete"]  # a new folder
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    ran.clear()
    assert curate(source, output, settings_of(workers=2), update=True)["already_complete"]
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert ran == []


def test_an_update_sees_an_edit_of_the_same_size(source, tmp_path):
    output = tmp_path / "out"
    curate(source, output, settings_of())
    text = (source / "3.txt").read_text()
    (source / "3.txt").write_text(text.upper())
    assert curate(source, output, settings_of())["already_complete"]
    curate(source, output, settings_of(), update=True)
    captions = {r["source_id"]: r["captions"][0]["text"] for r in table(output / "index", INDEX_SCHEMA)}
    assert captions["3.png"] == "A PICTURE CALLED 3"
    assert captions["2.png"] == "a picture called 2"


def test_an_update_makes_a_lost_shard_again(source, tmp_path, ran):
    output = tmp_path / "out"
    result = curate(source, output, settings_of())
    whole = files_of(output)
    Path(result["shards"][0]).unlink()
    ran.clear()
    with pytest.raises(DataError, match=r"\.tar: missing"):
        curate(source, output, settings_of())
    curate(source, output, settings_of(), update=True)
    assert files_of(output) == whole
    assert ran == []


def test_an_update_sees_another_version_of_an_own_stage(source, tmp_path):
    stage = tmp_path / "own.py"
    code = (
        "from megatron_nucleus.data.curation.stage import Drop, row_stage\n"
        "@row_stage(reads=('width_px',), rejects=('wide',))\ndef own(rows, config):\n"
        "    return [Drop('wide') if row['width_px'] > {} else {{}} for row in rows]\n"
    )
    stage.write_text(code.format(84))
    settings = make_settings(["inspect", f"{stage}:own"])
    assert curate(source, tmp_path / "out", settings)["kept"] == 5
    other = tmp_path / "out" / "manifest.json"
    made = json.loads(other.read_text())
    assert [fact["stage"] for fact in made["stages"]] == ["inspect", "own"]
    made["stages"][1]["version"] = (
        "0" * 16
    )  # as when the file was another: a module is imported once per process
    other.write_text(json.dumps(made))
    assert curate(source, tmp_path / "out", settings)["already_complete"]
    assert not curate(source, tmp_path / "out", settings, update=True)["already_complete"]
    assert json.loads(other.read_text())["stages"][1]["version"] != "0" * 16


@pytest.mark.parametrize("stop_in", ["blank", "pack"])
def test_a_stopped_update_goes_on_with_the_same_command(source, tmp_path, monkeypatch, ran, stop_in):
    output = tmp_path / "out"
    first = settings_of()
    curate(source, output, first)
    standing = in_use(output)
    (source / "5.txt").write_text("another caption")
    module, name = (runner, "run_part") if stop_in == "blank" else (shard_task, "write_shard")
    original = getattr(module, name)

    def stopping(task):
        if stop_in == "pack" or (task.line.name, task.part) == ("blank", "files-000001"):
            raise KeyboardInterrupt
        return original(task)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stopping)
        with pytest.raises(KeyboardInterrupt):
            curate(source, output, settings_of(2.0), update=True)
    if stop_in == "blank":
        assert in_use(output) == standing
        assert len(open_corpus(output)) == 6
    else:
        with pytest.raises(DataError, match="unfinished"):
            open_corpus(output)
    ran.clear()
    curate(source, output, settings_of(2.0), update=True)
    expected = ["files-000001", "files-000002"] if stop_in == "blank" else []
    assert ran == [("blank", part) for part in expected]
    curate(source, tmp_path / "clean", settings_of(2.0))
    assert files_of(output) == files_of(tmp_path / "clean")


def test_an_edit_is_not_forgotten_by_a_stopped_update(source, tmp_path, monkeypatch):
    """The list of items is up to date already; the data set is not."""
    output = tmp_path / "out"
    curate(source, output, settings_of())
    (source / "3.txt").write_text((source / "3.txt").read_text().upper())

    def stop(task):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_part", stop)
        with pytest.raises(KeyboardInterrupt):
            curate(source, output, settings_of(), update=True)
    assert curate(source, output, settings_of())["already_complete"]
    assert not curate(source, output, settings_of(), update=True)["already_complete"]
    captions = {r["source_id"]: r["captions"][0]["text"] for r in table(output / "index", INDEX_SCHEMA)}
    assert captions["3.png"] == "A PICTURE CALLED 3"


def test_an_update_that_leaves_nothing_changes_nothing_in_use(source, tmp_path):
    output = tmp_path / "out"
    curate(source, output, settings_of())
    standing = in_use(output)
    with pytest.raises(
        DataError, match=r"none of 6 items can be used \(6 too_small\); first: 0.png .* stays as"
    ):
        curate(source, output, settings_of(min_side_px=500), update=True)
    assert in_use(output) == standing
    assert curate(source, output, settings_of())["already_complete"]
    curate(source, output, settings_of(2.0), update=True)
    assert len(open_corpus(output)) == 6


def test_the_data_set_of_another_program_is_not_updated(source, tmp_path):
    output = tmp_path / "out"
    curate(source, output, settings_of())
    made = json.loads((output / "manifest.json").read_text())
    made["settings"]["tool"] = "encode"
    (output / "manifest.json").write_text(json.dumps(made))
    with pytest.raises(ConfigError, match=r"tool: \"encode\" there, \"curate\" here\); choose another"):
        curate(source, output, settings_of(), update=True)


class Server:
    """A recipe whose stage asks a server: away it fails even widths, refusing it stops the stage."""

    def __init__(self, folder):
        self.away, self.refuses, self.calls = folder / "away", folder / "refuses", folder / "calls"

    def settings(self, calls=None):
        files = {"unreachable": self.away, "refused": self.refuses, "calls": calls or self.calls}
        return make_settings(["inspect", {f"{TOYS}:widths": {k: str(v) for k, v in files.items()}}])


@pytest.fixture
def server(source, tmp_path):
    """With a data set in ``out`` half of which failed."""
    server = Server(tmp_path)
    server.away.touch()
    first = curate(source, tmp_path / "out", server.settings())
    assert (first["kept"], first["retryable"]) == (3, 3)
    return server


def test_a_retry_that_fails_leaves_the_data_set_in_use(source, tmp_path, server):
    output = tmp_path / "out"
    standing = in_use(output)
    server.refuses.touch()
    with pytest.raises(ConfigError, match="the server refuses the key"):
        curate(source, output, server.settings(), retry_failed=True)
    assert in_use(output) == standing
    assert len(open_corpus(output)) == 3
    assert curate(source, output, server.settings())["already_complete"]
    server.refuses.unlink()
    server.away.unlink()
    last = curate(source, output, server.settings(), retry_failed=True)
    assert (last["kept"], last["retryable"]) == (6, 0)
    assert len(open_corpus(output)) == 6


def test_a_stopped_retry_goes_on_with_the_same_command(source, tmp_path, monkeypatch, server):
    output, original, parts = tmp_path / "out", runner.run_part, []
    server.away.unlink()

    def stopping(task):
        parts.append(task.part)
        if len(parts) == 2:
            raise KeyboardInterrupt
        return original(task)

    monkeypatch.setattr(runner, "run_part", stopping)
    with pytest.raises(KeyboardInterrupt):
        curate(source, output, server.settings(), retry_failed=True)
    assert len(open_corpus(output)) == 3
    last = curate(source, output, server.settings(), retry_failed=True)
    assert parts == ["files-000000", "files-000001", "files-000001", "files-000002"]
    assert (last["kept"], last["retryable"]) == (6, 0)
    curate(source, tmp_path / "clean", server.settings())
    assert files_of(output) == files_of(tmp_path / "clean")


def test_settings_that_change_nothing_in_the_result_are_no_other_data_set(source, tmp_path, server):
    """EXECUTION of a stage's settings, such as an endpoint: also for --retry-failed."""
    output, other = tmp_path / "out", tmp_path / "other_calls"
    made = json.loads((output / "manifest.json").read_text())
    assert made["settings"]["recipe"][1] == {
        "stage": "widths",
        "from": f"{TOYS}:widths",
        "settings": {"unreachable": str(server.away)},
    }
    assert curate(source, output, server.settings(other))["already_complete"]
    assert curate(source, output, server.settings(other), update=True)["already_complete"]
    server.away.unlink()
    assert curate(source, output, server.settings(other), retry_failed=True)["kept"] == 6
    assert other.read_text() == "80\n82\n84\n"


def test_a_tar_without_images_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(bytes(10240))
    with pytest.raises(DataError, match="in: not one image in it: its 1 tars and 0 tables are empty"):
        curate(tmp_path / "in", tmp_path / "out", settings_of())
    assert not os.path.exists(tmp_path / "out" / "manifest.json")
