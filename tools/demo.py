"""The whole system on this machine: corpus -> curate -> shards -> train -> merge -> convert -> sample -> score.

Every stage is one of the programs in tools/, run with the command that is printed before it. Finished stages are
remembered, so the same command again continues where it was stopped. With --data the corpus is your own folder of
captioned images instead of the embedded scenes; such pictures have no programmatic score. With several configurations
each is a training of its own that starts from the one before; the last one is merged, drawn and scored.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_nucleus.data.dataset import Corpus, open_corpus
from megatron_nucleus.data.scenes import benchmark_prompts
from megatron_nucleus.training.arguments import RunConfig, parse_run
from megatron_nucleus.utils import cli
from megatron_nucleus.utils.config import Parser
from megatron_nucleus.utils.config_files import read_yaml
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.stages import Runner, Stage

ROOT = Path(__file__).resolve().parents[1]
SCENES_CONFIG = ROOT / "examples" / "demo_cpu.yaml"
PHOTOS_CONFIG = ROOT / "examples" / "demo_photos_cpu.yaml"
SKILLS = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")
PICTURES_PER_SKILL = 4  # of the six skills, in the picture grid
PICTURES_OF_PHOTOS = 12
PROMPT_WORDS = 60  # captions longer than this are not used as prompts (the text encoder takes 128 tokens)
PREVIEWS = 6  # prompts drawn while training


def prepare_stages(out: Path, data: str | None, count: int, scene_sizes: Sequence[str]) -> list[Stage]:
    """From pictures to a data set folder: the embedded scenes, or the user's own folder."""
    if data is None:
        sizes = ("--scene-sizes", *scene_sizes) if scene_sizes else ()
        flags = ("--output", f"{out}/corpus", "--count", str(count), *sizes)
        draw = Stage("draw the corpus", ("tools/make_scenes.py", *flags), fresh=(out / "corpus",))
        return [draw, curate_stage(out, f"{out}/corpus", "--config", "examples/scenes/curate.yaml")]
    return [curate_stage(out, str(Path(data).resolve()), "--min-side-px", "64")]


def curate_stage(out: Path, source: str, *settings: str) -> Stage:
    """Full decode, limits, duplicates, scores, aspect buckets -> shards and index."""
    return Stage("curate", ("tools/curate.py", "--input", source, "--output", f"{out}/data", *settings))


def configurations(args: argparse.Namespace) -> list[Path]:
    """The training configurations, each checked before anything runs."""
    given = args.config or [PHOTOS_CONFIG if args.data else SCENES_CONFIG]
    configs = [Path(config).resolve() for config in given]
    if len({config.stem for config in configs}) < len(configs):
        raise ConfigError(
            f"--config {' '.join(given)}: file names must differ; run folders are called after them"
        )
    for config in configs:
        read_config(config)
    return configs


def read_config(config: Path) -> RunConfig:
    """A configuration as a training will read it, with placeholders for what the demo gives."""
    given = ("--data-path", "given later", "--sample-prompts", "given later")
    return parse_run(["--config", str(config), *given], Parser(prog="tools/train.py"))[0]


def run_folders(out: Path, configs: Sequence[Path]) -> list[Path]:
    """Run folder of each training: ``train``, or ``train_<name of the configuration>`` of several."""
    return [out / ("train" if len(configs) == 1 else f"train_{config.stem}") for config in configs]


def train_stages(out: Path, configs: Sequence[Path], prompts: Path) -> list[Stage]:
    """One training for each configuration. Whether a later one takes the optimizer state along, it says itself."""
    lines = prompts.read_text(encoding="utf-8").splitlines()
    preview = lines[:: max(1, len(lines) // PREVIEWS)][:PREVIEWS]
    folders, stages = run_folders(out, configs), []
    for number, (config, folder) in enumerate(zip(configs, folders, strict=True)):
        name = "train" if len(configs) == 1 else f"train {config.stem}"
        start = ("--init-from", str(folders[number - 1])) if number else ()
        flags = ("--config", str(config), "--data-path", f"{out}/data", "--run-dir", str(folder), *start)
        reads = (config, *sorted({Path(file) for file in read_yaml(config).origins.values()} - {config}))
        argv = ("tools/train.py", *flags, "--sample-prompts", *preview)
        stages.append(Stage(name, argv, reads=reads, fresh=tuple(folders[number + 1 :])))
    return stages


def model_stages(out: Path, run: Path, prompts: Path, merge_last: int) -> list[Stage]:
    """Merge the last checkpoints, export to diffusers, draw pictures with the exported model."""
    return [
        Stage("merge", ("tools/merge_checkpoints.py", "--checkpoints", f"{run}/checkpoints",
                        "--last", str(merge_last), "--weights", "inverse_sqrt", "--output", f"{out}/merged"),
              fresh=(out / "merged",)),
        Stage("convert", ("tools/convert_checkpoint.py", "--input", f"{out}/merged", "--output", f"{out}/hf",
                          "--to", "hf"), fresh=(out / "hf",)),
        Stage("sample", ("tools/sample.py", "--checkpoint", f"{out}/hf", "--prompts", str(prompts),
                         "--output", f"{out}/pictures", "--overwrite")),
    ]  # fmt: skip


def score_stages(out: Path, run: Path, prompts_per_skill: int, truth_size: str | None) -> dict[str, Stage]:
    """The embedded benchmark on the merged model, the last checkpoint, an untrained model and true renderings.

    truth_size: WIDTHxHEIGHT of the renderings; None = the scorer's default.
    """
    sources = {
        "merged": ("--checkpoint", f"{out}/hf"),
        "last": ("--checkpoint", str(run)),
        "untrained": ("--checkpoint", f"{out}/hf", "--untrained"),
        "truth": ("--truth", *(("--scene-sizes", truth_size) if truth_size else ())),
    }
    return {
        name: Stage(
            f"score: {name}",
            ("tools/evaluate.py", "scenes", *source, "--prompts-per-skill", str(prompts_per_skill),
             "--output", f"{out}/scores/{name}"),
            fresh=(out / "scores" / name,),
        )
        for name, source in sources.items()
    }  # fmt: skip


def write_prompts(out: Path, data: str | None) -> Path:
    """One prompt per line: benchmark prompts that hold what training never showed together, or the user's captions."""
    if data is None:
        records = benchmark_prompts(PICTURES_PER_SKILL)
        prompts = [r["prompt"] for r in records if not r.get("split")]
    else:
        prompts = photo_prompts(open_corpus(out / "data"))
    path = out / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return path


def photo_prompts(corpus: Corpus) -> list[str]:
    """Captions spread over the corpus: of each picture the shortest, where it is short enough for a prompt."""
    rows = range(0, len(corpus), max(1, len(corpus) // PICTURES_OF_PHOTOS))
    shortest = [min((" ".join(c.text.split()) for c in corpus.read(row).captions), key=len) for row in rows]
    prompts = [text for text in shortest if text and len(text.split()) <= PROMPT_WORDS]
    if not prompts:
        raise ConfigError(
            f"--data: no caption of at most {PROMPT_WORDS} words among {len(shortest)} that were looked at"
        )
    return prompts[:PICTURES_OF_PHOTOS]


def write_report(
    out: Path, run: Path, args: argparse.Namespace, runner: Runner, scores: dict[str, dict]
) -> Path:
    """``OUTPUT/report.html`` from what the stages left behind."""
    from megatron_nucleus.evaluation.report import build_report

    timings = runner.seconds()
    if args.install_seconds is not None:
        timings = {"install (before the demo)": args.install_seconds, **timings}
    names = {"merged": "merged model", "last": "last checkpoint", "untrained": "untrained model",
             "truth": "true renderings"}  # fmt: skip
    return build_report(
        out / "report.html",
        title="Megatron-Nucleus demo",
        summary="A sparse mixture-of-experts diffusion transformer, trained, merged, exported and sampled here.",
        run_dir=run,
        samples_dir=out / "pictures",
        checkpoint=out / "hf",
        scores={names[k]: v for k, v in scores.items()} or None,
        scores_note="Two-object, position and attribution prompts name pairs that training never showed together.",
        timings=timings,
        commands=runner.commands(),
    )


def print_summary(
    out: Path, runner: Runner, scores: dict[str, dict], report: Path, install_s: float | None
) -> None:
    """The time table, the score table and where things are."""
    print("\nwall time")
    if install_s is not None:
        print(f"  {'install (not in the total)':<28}{install_s:>8.0f} s")
    for name, seconds in runner.seconds().items():
        print(f"  {name:<28}{seconds:>8.0f} s")
    print(f"  {'total':<28}{sum(runner.seconds().values()):>8.0f} s")
    if scores:
        print("\nscore" + " " * 18 + "".join(f"{name:>12}" for name in scores))
        for key in ("mean", *SKILLS):
            print(f"  {key:<21}" + "".join(f"{value[key]:>12.3f}" for value in scores.values()))
    places = {"pictures": out / "pictures" / "grid.png", "diffusers folder": out / "hf", "report": report}
    print("\n" + "\n".join(f"{what:<20}{place}" for what, place in places.items()))


def main(argv: Sequence[str] | None = None) -> None:
    """Run every stage, then write the report and print where things are."""
    parser = Parser(prog="tools/demo.py", description=__doc__)
    parser.add_argument(
        "--output", default="runs/demo", metavar="DIR", help="folder of the demo [default runs/demo]"
    )
    parser.add_argument(
        "--data", metavar="DIR", help="your captioned images or WebDataset tars instead of the scenes"
    )
    parser.add_argument(
        "--config", nargs="+", metavar="FILE",
        help="training configuration, or several, each starting from the one before [default examples/demo_cpu.yaml]",
    )  # fmt: skip
    parser.add_argument(
        "--scene-sizes",
        nargs="+",
        metavar="WxH",
        help="sizes of the embedded scenes [as tools/make_scenes.py]",
    )
    parser.add_argument(
        "--scenes", type=int, default=40000, metavar="N", help="size of the embedded corpus [40000]"
    )
    parser.add_argument("--merge-last", type=int, default=8, metavar="N", help="checkpoints to average [8]")
    parser.add_argument(
        "--prompts-per-skill", type=int, default=100, metavar="N", help="prompts of each skill [100]"
    )
    parser.add_argument("--install-seconds", type=float, metavar="S", help="shown in the time table")
    cli.add_json_flag(parser)
    args = parser.parse_args(argv)
    if args.data is not None and not Path(args.data).is_dir():
        raise ConfigError(
            f"--data {args.data}: no such folder; give a folder of images with captions, or of tars"
        )
    if args.data is not None and args.scene_sizes is not None:
        raise ConfigError("--scene-sizes: is used for the embedded scenes, not with --data")
    out = Path(args.output).resolve()
    out.mkdir(parents=True, exist_ok=True)
    configs = configurations(args)
    last = run_folders(out, configs)[-1]

    prepare = prepare_stages(out, args.data, args.scenes, args.scene_sizes or ())
    side = read_config(configs[-1]).data.resolution_px
    truth_size = f"{side}x{side}" if args.scene_sizes else None
    scores = {} if args.data else score_stages(out, last, args.prompts_per_skill, truth_size)
    runner = Runner(out, ROOT, total=len(prepare) + len(configs) + 3 + len(scores))
    for stage in prepare:
        runner.run(stage)
    prompts = write_prompts(out, args.data)
    for stage in [*train_stages(out, configs, prompts), *model_stages(out, last, prompts, args.merge_last)]:
        runner.run(stage)
    results = {name: runner.run(stage) for name, stage in scores.items()}
    report = write_report(out, last, args, runner, results)
    print_summary(out, runner, results, report, args.install_seconds)
    if args.json:
        cli.print_json(
            {
                "output": str(out),
                "run_dir": str(last),
                "report": str(report),
                "scores": results,
                "seconds": runner.seconds(),
            }
        )


if __name__ == "__main__":
    cli.run(main)
