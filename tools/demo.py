"""The whole system on this machine: corpus -> curate -> shards -> train -> merge -> convert -> sample -> score.

Every stage is one of the programs in tools/, run with the command that is printed before it. Finished stages are
remembered, so the same command again continues where it was stopped. With --data the corpus is your own folder of
captioned images instead of the embedded scenes; such pictures have no programmatic score.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_nucleus.data.dataset import Corpus, open_corpus
from megatron_nucleus.data.scenes import benchmark_prompts
from megatron_nucleus.utils import cli
from megatron_nucleus.utils.config import Parser
from megatron_nucleus.utils.errors import ConfigError, DataError, StoppedError, UserError
from megatron_nucleus.utils.files import sha256_file, write_json_atomic

ROOT = Path(__file__).resolve().parents[1]
SCENES_CONFIG = ROOT / "examples" / "demo_cpu.yaml"
PHOTOS_CONFIG = ROOT / "examples" / "demo_photos_cpu.yaml"
ERRORS = {error.exit_code: error for error in (ConfigError, DataError, StoppedError)}
SKILLS = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")
PICTURES_PER_SKILL = 4  # of the six skills, in the picture grid
PICTURES_OF_PHOTOS = 12
PROMPT_WORDS = 60  # captions longer than this are not used as prompts (the text encoder takes 128 tokens)
PREVIEWS = 6  # prompts drawn while training


@dataclasses.dataclass(frozen=True)
class Stage:
    """One program call.

    name: key in steps.json and in the time table. argv: tools/<program> and its flags.
    reads: file whose content is part of the call, as its flags are.
    fresh: folder that an unfinished call may have left, and that the program would refuse to write into again.
    """

    name: str
    argv: tuple[str, ...]
    reads: Path | None = None
    fresh: Path | None = None

    def key(self) -> dict:
        """What must be equal for a finished call to stand for this one."""
        return {"command": [*self.argv, "--json"], "reads": sha256_file(self.reads) if self.reads else None}


class Runner:
    """Runs stages in order and remembers them in ``OUTPUT/steps.json``.

    A stage that finished with the same command is not run again; once one runs, all after it run, too.
    """

    def __init__(self, output: Path, total: int):
        self.path, self.total, self.count = output / "steps.json", total, 0
        memory = (
            json.loads(self.path.read_text()) if self.path.is_file() else {"finished": {}, "unfinished_s": {}}
        )
        self.finished, self.unfinished_s = memory["finished"], memory["unfinished_s"]

    def run(self, stage: Stage) -> dict:
        """The stage's ``--json`` object.

        Raises:
            UserError: the stage ended with an error (its own message is above); same exit code as the stage.
        """
        self.count += 1
        key = stage.key()
        print(
            f"\n[{self.count}/{self.total}] {stage.name}\n  $ python {shlex.join(key['command'])}", flush=True
        )
        before = self.finished.get(stage.name)
        if before and before["key"] == key:
            print(f"  finished before in {before['seconds']:.0f} s")
            return before["result"]
        self._forget_from(stage)
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *key["command"]], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        with signals_left_to(process):
            output, _ = process.communicate()
        seconds = time.monotonic() - start + self.unfinished_s.pop(stage.name, 0.0)
        lines = output.strip().splitlines()
        if process.returncode:
            self.unfinished_s[stage.name] = seconds
            self._remember()
            print("\n".join(lines))
            kind = ERRORS.get(process.returncode, UserError)
            raise kind(
                f"stage '{stage.name}' ended with code {process.returncode}; the same command continues there"
            )
        print("\n".join(f"  {line}" for line in lines[:-1]))
        result = json.loads(lines[-1])
        self.finished[stage.name] = {"key": key, "seconds": seconds, "result": result}
        self._remember()
        return result

    def seconds(self) -> dict[str, float]:
        """Wall time of every finished stage, interrupted calls included."""
        return {name: entry["seconds"] for name, entry in self.finished.items()}

    def commands(self) -> list[str]:
        """The finished stages' commands, in order."""
        return [f"python {shlex.join(entry['key']['command'])}" for entry in self.finished.values()]

    def _forget_from(self, stage: Stage) -> None:
        """This stage and every later one will run: what they left is no longer current."""
        names = list(self.finished)
        if stage.name in names:
            for name in names[names.index(stage.name) :]:
                del self.finished[name]
        self._remember()
        if stage.fresh is not None and stage.fresh.exists():
            shutil.rmtree(stage.fresh)

    def _remember(self) -> None:
        write_json_atomic(self.path, {"finished": self.finished, "unfinished_s": self.unfinished_s})


@contextlib.contextmanager
def signals_left_to(process: subprocess.Popen) -> Iterator[None]:
    """The running stage saves and ends on Ctrl-C, which reaches it by itself, and on SIGTERM, which is passed on.

    Without this the demo would die first, and kill the stage while it saves.
    """
    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: process.terminate()}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare_stages(out: Path, data: str | None, count: int) -> list[Stage]:
    """From pictures to a data set folder: the embedded scenes, or the user's own folder."""
    if data is None:
        flags = ("--output", f"{out}/corpus", "--count", str(count))
        draw = Stage("draw the corpus", ("tools/make_scenes.py", *flags), fresh=out / "corpus")
        return [draw, curate_stage(out, f"{out}/corpus", min_side_px=32)]
    return [curate_stage(out, str(Path(data).resolve()), min_side_px=64)]


def curate_stage(out: Path, source: str, min_side_px: int) -> Stage:
    """Full decode, size limits, duplicates, aspect buckets -> shards and index."""
    flags = ("--input", source, "--output", f"{out}/data", "--min-side-px", str(min_side_px))
    return Stage("curate", ("tools/curate.py", *flags))


def model_stages(out: Path, config: Path, prompts: Path, merge_last: int) -> list[Stage]:
    """Train, merge the last checkpoints, export to diffusers, draw pictures with the exported model."""
    lines = prompts.read_text(encoding="utf-8").splitlines()
    preview = lines[:: max(1, len(lines) // PREVIEWS)][:PREVIEWS]
    return [
        Stage("train", ("tools/train.py", "--config", str(config), "--data-path", f"{out}/data",
                        "--run-dir", f"{out}/train", "--sample-prompts", *preview), reads=config),
        Stage("merge", ("tools/merge_checkpoints.py", "--checkpoints", f"{out}/train/checkpoints",
                        "--last", str(merge_last), "--weights", "inverse_sqrt", "--output", f"{out}/merged"),
              fresh=out / "merged"),
        Stage("convert", ("tools/convert_checkpoint.py", "--input", f"{out}/merged", "--output", f"{out}/hf",
                          "--to", "hf"), fresh=out / "hf"),
        Stage("sample", ("tools/sample.py", "--checkpoint", f"{out}/hf", "--prompts", str(prompts),
                         "--output", f"{out}/pictures", "--overwrite")),
    ]  # fmt: skip


def score_stages(out: Path, prompts_per_skill: int) -> dict[str, Stage]:
    """The embedded benchmark on the merged model, the last checkpoint, an untrained model and true renderings."""
    sources = {
        "merged": ("--checkpoint", f"{out}/hf"),
        "last": ("--checkpoint", f"{out}/train"),
        "untrained": ("--checkpoint", f"{out}/hf", "--untrained"),
        "truth": ("--truth",),
    }
    return {
        name: Stage(
            f"score: {name}",
            ("tools/evaluate.py", "scenes", *source, "--prompts-per-skill", str(prompts_per_skill),
             "--output", f"{out}/scores/{name}"),
            fresh=out / "scores" / name,
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


def write_report(out: Path, args: argparse.Namespace, runner: Runner, scores: dict[str, dict]) -> Path:
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
        run_dir=out / "train",
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
        "--config", metavar="FILE", help="training configuration [default examples/demo_cpu.yaml]"
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
    out = Path(args.output).resolve()
    out.mkdir(parents=True, exist_ok=True)
    config = Path(args.config).resolve() if args.config else (PHOTOS_CONFIG if args.data else SCENES_CONFIG)
    if not config.is_file():
        raise ConfigError(f"--config {args.config}: no such file")

    prepare = prepare_stages(out, args.data, args.scenes)
    scores = {} if args.data else score_stages(out, args.prompts_per_skill)
    runner = Runner(out, total=len(prepare) + 4 + len(scores))
    for stage in prepare:
        runner.run(stage)
    for stage in model_stages(out, config, write_prompts(out, args.data), args.merge_last):
        runner.run(stage)
    results = {name: runner.run(stage) for name, stage in scores.items()}
    report = write_report(out, args, runner, results)
    print_summary(out, runner, results, report, args.install_seconds)
    if args.json:
        cli.print_json(
            {"output": str(out), "report": str(report), "scores": results, "seconds": runner.seconds()}
        )


if __name__ == "__main__":
    cli.run(main)
