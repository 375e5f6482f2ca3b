"""Curate a corpus made on the spot and write how fast every stage went.

The corpus is half scenes from the embedded generator, half crops of photographs with planted copies, blurred, blank,
truncated and over-compressed pictures. By default the photographs are those that scikit-image ships. Then
tools/curate.py runs on it with the default recipe, the shards are packed a second time by themselves, the stages that
need models run on the photographs with stand-ins for the models, and the first stage is compared with a loop that only
decodes.

  tools/bench_curation.py --count 20000 --report benchmarks/curation.md
"""

from __future__ import annotations

import importlib.util
import json
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_nucleus.data.curation import bench_models
from megatron_nucleus.data.curation.bench import inspect_ratio, pack_again
from megatron_nucleus.data.curation.bench_corpus import find_photographs, write_corpus
from megatron_nucleus.data.curation.engines import EngineConfig
from megatron_nucleus.training.run_folder import versions
from megatron_nucleus.utils import cli
from megatron_nucleus.utils.config import Parser, coerce
from megatron_nucleus.utils.errors import ConfigError, UserError
from megatron_nucleus.utils.files import write_atomic, write_json_atomic
from megatron_nucleus.utils.hardware import hardware
from megatron_nucleus.utils.revision import git_commit

ROOT = Path(__file__).resolve().parents[1]
SCENE_SIZES = ("320x320", "384x288", "288x384", "448x256")
RATIO_FILES, ROUNDS = 64, 9
FIGURES = ("seen", "kept", "rejected", "quarantined", "stages", "wall_s", "images_per_s")
CORPUS_STAGES = ("exact_duplicates", "near_duplicates", "tiers")
MODEL_STAGES = ("alignment", "recaption")
TABLE_HEAD = (
    "| stage | images in | kept | wall s | images/s | images/s per core |",
    "|---|---:|---:|---:|---:|---:|",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the corpus, curate, compare, write."""
    parser = Parser(prog="tools/bench_curation.py", description=__doc__)
    parser.add_argument("--count", default="20000", metavar="N", help="images of the corpus [20000]")
    parser.add_argument("--photos", metavar="DIR", help="folder of photographs [scikit-image's]")
    parser.add_argument("--work", default="runs/bench_curation", metavar="DIR", help="corpus and output")
    parser.add_argument("--workers", default="0", metavar="N", help="processes; 0: one per core [0]")
    parser.add_argument("--seed", default="0", metavar="N", help="of the corpus [0]")
    parser.add_argument(
        "--report", metavar="FILE", help="Markdown to write; FILE.json beside it has all figures"
    )
    cli.add_json_flag(parser)
    args = parser.parse_args(argv)
    count, seed = coerce(args.count, int, "--count"), coerce(args.seed, int, "--seed")
    if count < 2:
        raise ConfigError(f"--count {count}: at least 2")
    workers = EngineConfig(workers=coerce(args.workers, int, "--workers")).worker_count()
    photographs = find_photographs(Path(args.photos) if args.photos else _scikit_images())
    work = Path(args.work)
    _check_packages()
    corpus = make_corpus(work / f"corpus-{count}-{seed}", photographs, count, seed, workers)
    result = curate(corpus, fresh(work / "out"), workers)
    largest_process_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    packed = pack_again(corpus, work / "out", fresh(work / "packed"), workers)
    shutil.rmtree(work / "packed")
    figures = {
        "command": shlex.join(["python", "tools/bench_curation.py", *(argv or sys.argv[1:])]),
        "hardware": hardware(),
        "versions": {name: versions()[name] for name in ("megatron_nucleus", "python")},
        "commit": git_commit(),
        "workers": workers,
        "corpus_bytes": sum(path.stat().st_size for path in corpus.rglob("*") if path.is_file()),
        "largest_process_bytes": largest_process_bytes,
        "curate": {key: result[key] for key in FIGURES},
        "pack": packed,
        "stages_with_stand_ins": model_stages(corpus / "photographs", work, workers),
        "inspect_over_bare_decode": inspect_ratio(_jpegs(corpus / "photographs"), rounds=ROUNDS),
    }
    text = describe(figures)
    print(text)
    if args.report:
        write_atomic(args.report, text)
        write_json_atomic(Path(args.report).with_suffix(".json"), figures)
    if args.json:
        cli.print_json(figures)


def _check_packages() -> None:
    """At once, not after minutes of work. They are imported late: this process counts in its children's memory."""
    missing = [name for name in bench_models.PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"stages that need models are measured too: install {', '.join(missing)}")


def fresh(folder: Path) -> Path:
    """A new empty folder in place of what an earlier run left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def curate(source: Path, output: Path, workers: int, *more: str) -> dict:
    """What tools/curate.py prints with --json."""
    folders = ["--input", str(source), "--output", str(output)]
    return _program(["tools/curate.py", *folders, "--workers", str(workers), *more])


def model_stages(photographs: Path, work: Path, workers: int) -> list[dict]:
    """Figures of the stages that need models, with stand-ins for the models; see `bench_models`."""
    model = bench_models.write_siglip(fresh(work / "stand_in"))
    config = work / "stand_ins.yaml"
    write_atomic(config, yaml.safe_dump({"recipe": {"stages": bench_models.stages(model)}}))
    result = curate(photographs, fresh(work / "out_stand_ins"), workers, "--config", str(config))
    return [stage for stage in result["stages"] if stage["stage"] in MODEL_STAGES]


def _scikit_images() -> Path:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "--photos: scikit-image, whose photographs are the default, is not installed; give a folder"
        )
    return Path(spec.origin).parent / "data"


def make_corpus(folder: Path, photographs: list[Path], count: int, seed: int, workers: int) -> Path:
    """Scenes and photographs; a finished corpus of the same count and seed is used again."""
    if not folder.is_dir():
        draft = folder.with_name(f"{folder.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        scenes = ["tools/make_scenes.py", "--output", str(draft / "scenes"), "--count", str(count // 2)]
        _program([*scenes, "--seed", str(seed), "--scene-sizes", *SCENE_SIZES], json_flag=False)
        write_corpus(photographs, draft / "photographs", count - count // 2, seed, workers)
        draft.rename(folder)
    return folder


def _program(command: list[str], json_flag: bool = True) -> dict:
    process = subprocess.run(
        [sys.executable, str(ROOT / command[0]), *command[1:], *(["--json"] if json_flag else [])],
        stdout=subprocess.PIPE,
        text=True,
    )
    if process.returncode:
        raise UserError(f"{shlex.join(command)} ended with code {process.returncode}; its message is above")
    return json.loads(process.stdout.strip().splitlines()[-1]) if json_flag else {}


def _jpegs(folder: Path) -> list[bytes]:
    """The largest undamaged JPEGs of the corpus: about a megapixel each."""
    whole = [path for path in folder.glob("*.jpg") if path.read_bytes().endswith(b"\xff\xd9")]
    largest = sorted(whole, key=lambda path: (-path.stat().st_size, path.name))[:RATIO_FILES]
    return [path.read_bytes() for path in largest]


def describe(figures: dict) -> str:
    """The report as Markdown."""
    curate, pack, workers = figures["curate"], figures["pack"], figures["workers"]
    packing = {
        "stage": "pack",
        "in": pack["images"],
        "kept": pack["images"],
        "wall_s": pack["wall_s"],
        "images_per_s": pack["images"] / pack["wall_s"],
    }
    dropped = {**curate["rejected"], **curate["quarantined"]}
    lines = [
        "# Curation: images per second",
        "",
        f"`{figures['command']}`, {figures['hardware']}, Python {figures['versions']['python']}, commit "
        f"{figures['commit']}.",
        "",
        f"{curate['seen']:,} images ({figures['corpus_bytes'] / 1e9:.2f} GB: half scenes, half crops of photos "
        f"with planted flaws) in {curate['wall_s']:.0f} s, {curate['images_per_s']:.0f} images/s with {workers} "
        f"processes; {curate['kept']:,} kept. The largest process held "
        f"{figures['largest_process_bytes'] / 1e6:.0f} MB.",
        "",
        *TABLE_HEAD,
        *(stage_line(stage, workers) for stage in [*curate["stages"], packing]),
        "",
        f"{', '.join(CORPUS_STAGES)} need all rows at once and are counted on one core. pack was timed by itself, "
        f"writing the same shards ({pack['bytes'] / 1e9:.2f} GB) once more. The rest of the wall time is starting "
        "processes, the index, and the report.",
        "",
        "Not kept: " + ", ".join(f"{number:,} {reason}" for reason, number in sorted(dropped.items())) + ".",
        "",
        *model_lines(figures["stages_with_stand_ins"], workers),
        *ratio_lines(figures["inspect_over_bare_decode"]),
    ]
    return "\n".join(lines)


def stage_line(stage: dict, workers: int) -> str:
    """One stage as a row of `TABLE_HEAD`."""
    cores = 1 if stage["stage"] in CORPUS_STAGES else workers
    return (
        f"| {stage['stage']} | {stage['in']:,} | {stage['kept']:,} | {stage['wall_s']:.1f} | "
        f"{stage['images_per_s']:,.0f} | {stage['images_per_s'] / cores:,.0f} |"
    )


def model_lines(stages: Sequence[dict], workers: int) -> list[str]:
    """The stages that need models."""
    return [
        "## Stages that need models, without the models",
        "",
        *TABLE_HEAD,
        *(stage_line(stage, workers) for stage in stages),
        "",
        "On the photographs alone. This is what the stages cost by themselves, importing torch included; a model's "
        f"time comes on top. alignment decodes a picture, shrinks it to {bench_models.SIDE_PX} px and compares it with "
        "its caption, on a CPU, by a SigLIP with random weights of one layer per tower: the path, not the model (base "
        "size takes some 0.7 s per picture and core). recaption decodes and shrinks a picture as for a captioner, "
        "and asks for three captions; they come at once from a class that answers every request with fixed words, so "
        "neither a server nor the encoding of pictures for one is in it.",
        "",
    ]


def ratio_lines(ratio: dict) -> list[str]:
    """The first stage beside the bare loop; `inspect_ratio` says what is measured."""
    return [
        "## The first stage beside a loop that only decodes",
        "",
        f"`inspect` (header, limits, captions, decode, hashes, sharpness and colour measures, sha256) took "
        f"{ratio['ratio']:.2f} times as long as `Image.open; draft; load` of Pillow at the same draft size on the same "
        f"{ratio['files']} JPEGs of {ratio['mean_bytes'] / 1e3:.0f} kB: {ratio['inspect_images_per_s']:.0f} and "
        f"{ratio['bare_images_per_s']:.0f} images/s on one core, both from medians over {ratio['rounds']} turns.",
        "",
    ]


if __name__ == "__main__":
    cli.run(main, "a finished corpus is kept")
