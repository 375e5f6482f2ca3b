"""Ray on this machine, two workers: the same bytes as the local engine, and the same answers to what goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("ray")

from megatron_nucleus.data.curation.engines import EngineConfig, WorkerDied, open_engine
from megatron_nucleus.utils.errors import ConfigError
from tests.data.curation import toy_stages
from tests.data.curation.helpers import encode, write_captioned
from tests.data.curation.test_runner import column, files_of, line, make_run, run_all
from tests.support import ROOT


@pytest.fixture(scope="module")
def cluster():
    engine = open_engine(EngineConfig(engine="ray", workers=2))
    yield engine
    engine.close()


class Kept:
    """The module's engine, which a run does not close."""

    def __init__(self, engine):
        self.map, self.alone = engine.map, engine.alone

    def close(self):
        pass


def run_ray(cluster, work, lines):
    run = make_run(work, lines)._replace(engine=Kept(cluster))
    return run, run_all(run, lines)


def test_ray_and_local_give_the_same_bytes(cluster, tmp_path):
    lines = [line(raises=(1,)), line("ranks")]
    run_all(make_run(tmp_path / "local", lines, workers=2), lines)
    run_ray(cluster, tmp_path / "ray", lines)
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")


def test_a_row_that_takes_the_worker_down_is_quarantined_alone(cluster, tmp_path):
    run, (records,) = run_ray(cluster, tmp_path, [line(poison=(4,))])
    assert [r.counts["quarantined"] for r in records] == [{}, {}, {"process_crash": 1}, {"process_crash": 1}]
    assert column(run, 1, "value") == [0, 1, 2, 0, 1, 2, 3, 5, 0, 1, 2, 3, 5, 6, 7, 8]


def test_a_wrong_setting_is_the_same_error(cluster, tmp_path):
    with pytest.raises(ConfigError, match=r"^the server refuses the key$"):
        run_ray(cluster, tmp_path, [line(wrong_key=True)])


def test_more_tasks_than_workers_all_come_back(cluster):
    results = dict(cluster.map(toy_stages.square, range(50)))
    assert {task: result[1] for task, result in results.items()} == {n: n * n for n in range(50)}
    assert isinstance(cluster.alone(toy_stages.die, 0), WorkerDied)


def test_an_address_without_a_cluster(cluster):
    with pytest.raises(ConfigError, match="--ray-address"):
        open_engine(EngineConfig(engine="ray", ray_address="127.0.0.1:1"))


def test_the_program_joins_a_cluster_and_makes_the_same_data_set(cluster, tmp_path, photos):
    """Every stage of the default recipe, in workers of the cluster that runs on this machine."""
    pictures = {}
    for name, image in photos.items():
        image = image.convert("RGB")
        for angle in (0, 90):
            pictures[f"{name.split('.')[0]}_{angle}.png"] = encode(
                image.rotate(angle, expand=True).resize((280, 300))
            )
    pictures["again.jpg"] = encode(photos["coffee.png"].convert("RGB").resize((280, 300)), "JPEG")
    source = write_captioned(tmp_path / "in", pictures)
    results = {}
    for engine in ("local", "ray"):
        command = [
            sys.executable,
            "tools/curate.py",
            "--input",
            source,
            "--output",
            tmp_path / engine,
            "--json",
        ]
        command += ["--engine", engine, "--workers", 2, "--max-shard-bytes", 500_000]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        results[engine] = json.loads(done.stdout.splitlines()[-1])
    assert results["ray"]["rejected"] == results["local"]["rejected"]
    assert results["local"]["rejected"]["near_duplicate"] >= 1
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")
