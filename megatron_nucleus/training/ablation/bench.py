"""Runs what a plan asks for: corpora, trainings, merges and scores, several side by side, each once.

Folders of an output:

    rows.jsonl                                   results (`rows.py`)
    corpora/HASH/{scenes,data}                   one corpus for all suites that describe the same
    runs/SUITE/ARM-HASH/seed0/part1/             run folder of an arm's training (part2 ... where it has stages)
    runs/SUITE/ARM-HASH/seed0/DERIVED-HASH/      merged weights, their validation and scores
    runs/SUITE/ARM-HASH/seed0/scores-HASH/       pictures and scores

HASH covers every setting in the file, so changed settings are another folder and another row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from megatron_nucleus.training.ablation.rows import Rows, last_validation, make_row
from megatron_nucleus.training.ablation.suites import Arm, Corpus, Sections, Suite, digest
from megatron_nucleus.utils.errors import UserError
from megatron_nucleus.utils.files import write_atomic
from megatron_nucleus.utils.stages import Call, Job, run_side_by_side, shown

# Added to the seed of the k-th part of a chained arm, so that it draws other images than the parts before.
PART_SEED = 1000
# Side by side each program has one core; idle threads must not take the others'.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


class Bench:
    """All jobs of some suites in an output folder.

    Args:
        root: folder that holds tools/; the commands run there. output: absolute.
    """

    def __init__(self, output: Path, root: Path):
        self.output, self.root = output, root
        self.rows = Rows(output)

    def run(
        self, suites: Sequence[Suite], arms: Sequence[str] | None, slots: int, end: float | None
    ) -> dict[str, UserError]:
        """Everything that has no row yet, seed by seed; returns the errors of what failed.

        arms: names to run (of derived arms, what they derive from, too); None = all.

        Raises:
            UserError: a corpus could not be made. StoppedError: see `run_side_by_side`.
        """
        corpora = {suite.corpus.key: suite.corpus for suite in suites if self._unfinished(suite, arms)}
        jobs = [(f"corpus {key}", self._corpus_job(corpus)) for key, corpus in corpora.items()]
        where = {"root": self.root, "environment": ENVIRONMENT, "end": end}
        for error in run_side_by_side(jobs, slots, **where).values():
            raise error
        jobs = [
            (f"{suite.name}: {arm.name}, seed {seed}", self._arm_job(suite, arm, seed, derived))
            for suite in suites
            for seed, arm, derived in self._unfinished(suite, arms)
        ]
        return run_side_by_side(jobs, slots, **where)

    def _unfinished(self, suite: Suite, arms: Sequence[str] | None) -> list[tuple[int, Arm, list[Arm]]]:
        """(seed, trained arm, its derived arms without a row) of everything left to do."""
        out = []
        for seed in suite.seeds:
            for arm in suite.arms.values():
                if arm.source:
                    continue
                derived = [
                    d
                    for d in suite.derived(arm.name)
                    if (arms is None or d.name in arms) and not self.rows.find(suite, d, seed)
                ]
                wanted = arms is None or arm.name in arms
                if derived or (wanted and not self.rows.find(suite, arm, seed)):
                    out.append((seed, arm, derived))
        return out

    def _corpus_job(self, corpus: Corpus) -> Job:
        folder = self.output / "corpora" / corpus.key
        scenes = _config(folder / "scenes.yaml", {"scenes": corpus.scenes})
        curation = _config(folder / "curation.yaml", corpus.curation)
        log = folder / "log.txt"
        if not (folder / "scenes").exists():  # it appears when it is complete
            yield self._call(
                log, "make_scenes", "--config", scenes, "--output", folder / "scenes", "--count", corpus.count,
                "--seed", corpus.seed,
            )  # fmt: skip
        yield self._call(
            log, "curate", "--config", curation, "--input", folder / "scenes", "--output", self._data(corpus)
        )

    def _arm_job(self, suite: Suite, arm: Arm, seed: int, derived: list[Arm]) -> Job:
        folder = self.output / "runs" / suite.name / f"{arm.name}-{suite.run_key(arm)}" / f"seed{seed}"
        log, commands, runs = folder / "log.txt", [], []
        for call in self._training(suite, arm, seed, folder):
            yield call
            commands.append(shown(call.argv))
            runs.append(folder / f"part{len(runs) + 1}")
        if not self.rows.find(suite, arm, seed):
            call = self._scores(suite, runs[-1], folder, log)
            scores = yield call
            self._finish(
                suite, arm, seed, runs, last_validation(runs[-1]), scores, [*commands, shown(call.argv)]
            )
        for other in derived:
            yield from self._derived_job(suite, other, seed, folder, runs, commands)

    def _training(self, suite: Suite, arm: Arm, seed: int, folder: Path) -> Iterator[Call]:
        for number, part in enumerate(arm.parts):
            start = ("--init-from", folder / f"part{number}", "--init-optimizer") if number else ()
            flags = ("--seed", seed + PART_SEED * number, "--train-steps", part.steps, *start)
            yield self._train(suite, part.values, folder, f"part{number + 1}", *flags)

    def _train(self, suite: Suite, values: Sections, folder: Path, name: str, *flags: object) -> Call:
        """A training in ``folder/name`` with its configuration beside it."""
        words = (
            "--config",
            _config(folder / f"{name}.yaml", values),
            "--data-path",
            self._data(suite.corpus),
        )
        return self._call(folder / "log.txt", "train", *words, "--run-dir", folder / name, *flags)

    def _data(self, corpus: Corpus) -> Path:
        return self.output / "corpora" / corpus.key / "data"

    def _scores(self, suite: Suite, checkpoint: Path, folder: Path, log: Path) -> Call:
        key = digest(suite.evaluate)
        config = _config(folder / f"scores-{key}.yaml", suite.evaluate)
        return self._call(
            log, "evaluate", "scenes", "--config", config, "--checkpoint", checkpoint,
            "--output", folder / f"scores-{key}",
        )  # fmt: skip

    def _derived_job(
        self, suite: Suite, arm: Arm, seed: int, source: Path, runs: list[Path], commands: list[str]
    ) -> Job:
        """Merge, validate, score."""
        folder = source / f"{arm.name}-{digest(dataclasses.asdict(arm.merge))}"
        log, merged, last = folder / "log.txt", folder / "merged", suite.trained(arm).parts[-1]
        decay = ("--ema-decay", arm.merge.ema_decay) if arm.merge.ema_decay is not None else ()
        flags = ("--last", arm.merge.last, "--weights", arm.merge.weights, *decay, "--output", merged)
        calls = [self._call(log, "merge_checkpoints", "--checkpoints", runs[-1], *flags)]
        if not merged.exists():  # it appears when it is complete
            yield calls[0]
        # One step at learning rate 0 changes no weight, and the last step of a run is always validated.
        flags = ("--seed", seed, "--train-steps", 1, "--lr", 0, "--init-from", merged)
        calls.append(self._train(suite, last.values, folder, "validation", *flags))
        yield calls[-1]
        calls.append(self._scores(suite, merged, folder, log))
        scores = yield calls[-1]
        validated = last_validation(folder / "validation")
        self._finish(
            suite, arm, seed, runs, validated, scores, [*commands, *(shown(call.argv) for call in calls)]
        )

    def _finish(self, suite, arm, seed, runs, validated, scores, commands) -> None:
        row = make_row(suite, arm, seed, runs=runs, validated=validated, scores=scores, commands=commands)
        self.rows.add(row)
        done = sum(len(self.rows.of(suite, a)) for a in suite.arms.values())
        print(
            f"[{suite.name} {done}/{len(suite.arms) * len(suite.seeds)}] {arm.name}, seed {seed}: "
            f"validation loss {row['valid_loss']:.4f}, score {scores['mean']:.3f}, trained {row['train_s']:.0f} s",
            flush=True,
        )

    def _call(self, log: Path, program: str, *words: object) -> Call:
        """A call whose paths below the root are written relative to it, as one would type them."""
        argv = [f"tools/{program}.py"]
        for word in words:
            inside = isinstance(word, Path) and word.is_relative_to(self.root)
            argv.append(str(word.relative_to(self.root) if inside else word))
        return Call(tuple(argv), log)


def _config(path: Path, values: dict) -> Path:
    """Write a configuration file for a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, yaml.safe_dump(values, sort_keys=False))
    return path
