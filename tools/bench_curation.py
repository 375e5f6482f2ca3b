"""Curate a corpus made on the spot and write how fast every stage went.

The corpus is half scenes from the embedded generator, half crops of photographs with planted copies, blurred, blank,
truncated and over-compressed pictures. By default the photographs are those that scikit-image ships. Then
tools/curate.py runs on it with the default recipe, and the first stage is compared with a loop that only decodes.

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

from megatron_nucleus.data.curation.bench import inspect_ratio
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
RATIO_FILES = 64
FIGURES = ("seen", "kept", "rejected", "quarantined", "stages", "wall_s", "images_per_s")
CORPUS_STAGES = ("exact_duplicates", "near_duplicates", "tiers")


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
    corpus = make_corpus(work / f"corpus-{count}-{seed}", photographs, count, seed, workers)
    shutil.rmtree(work / "out", ignore_errors=True)
    command = [
        "tools/curate.py",
        "--input",
        str(corpus),
        "--output",
        str(work / "out"),
        "--workers",
        str(workers),
    ]
    result = _program(command)
    figures = {
        "command": shlex.join(["python", "tools/bench_curation.py", *(argv or sys.argv[1:])]),
        "hardware": hardware(),
        "versions": {name: versions()[name] for name in ("megatron_nucleus", "python")},
        "commit": git_commit(),
        "workers": workers,
        "corpus_bytes": sum(path.stat().st_size for path in corpus.rglob("*") if path.is_file()),
        "largest_process_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "curate": {key: result[key] for key in FIGURES},
        "inspect_over_bare_decode": inspect_ratio(_jpegs(corpus / "photographs"), rounds=5),
    }
    text = describe(figures)
    print(text)
    if args.report:
        write_atomic(args.report, text)
        write_json_atomic(Path(args.report).with_suffix(".json"), figures)
    if args.json:
        cli.print_json(figures)


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
    curate, ratio, workers = figures["curate"], figures["inspect_over_bare_decode"], figures["workers"]
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
        "| stage | images in | kept | wall s | images/s | images/s per core |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for stage in curate["stages"]:
        cores = 1 if stage["stage"] in CORPUS_STAGES else workers
        lines.append(
            f"| {stage['stage']} | {stage['in']:,} | {stage['kept']:,} | {stage['wall_s']:.1f} | "
            f"{stage['images_per_s']:,.0f} | {stage['images_per_s'] / cores:,.0f} |"
        )
    dropped = {**curate["rejected"], **curate["quarantined"]}
    lines += [
        "",
        f"{', '.join(CORPUS_STAGES)} need all rows at once and are counted on one core. The rest of the wall time is "
        "starting processes, packing, and the report.",
        "",
        "Not kept: " + ", ".join(f"{number:,} {reason}" for reason, number in sorted(dropped.items())) + ".",
        "",
        "## The first stage beside a loop that only decodes",
        "",
        f"`inspect` (header, limits, captions, decode, hashes, sharpness and colour measures, sha256) took "
        f"{ratio['ratio']:.2f} times as long as `Image.open; draft; load` of Pillow at the same draft size on the same "
        f"{ratio['files']} JPEGs of {ratio['mean_bytes'] / 1e3:.0f} kB (median over turns; "
        f"{ratio['bare_images_per_s']:.0f} and {ratio['inspect_images_per_s']:.0f} images/s on one core).",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, "a finished corpus is kept")
