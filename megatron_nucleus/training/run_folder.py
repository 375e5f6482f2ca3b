"""The folder of a run: one run at a time, the same settings on resume, configuration and logs beside the results.

``config.yaml`` says what a run's figures depend on: its settings in force (``config``), and every start that trained
it (``starts``), so that settings or a program that changed part-way leave a record.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import yaml

import megatron_nucleus
from megatron_nucleus.core.collectives import on_first_rank
from megatron_nucleus.core.parallel_state import ParallelState
from megatron_nucleus.data.bucket_report import bucket_report, format_report
from megatron_nucleus.data.dataset import Corpus
from megatron_nucleus.export import native
from megatron_nucleus.training.arguments import RunConfig
from megatron_nucleus.types import TrainState
from megatron_nucleus.utils import config as cfg
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import exclusive, write_atomic, write_json_atomic
from megatron_nucleus.utils.revision import git_commit

log = logging.getLogger(__name__)

# What may not change within a run: everything that would make "the same run" a different one.
# (section, key) pairs; a changed value needs a new --run-dir.
FROZEN_KEYS = (
    ("training", "seed"),
    ("training", "init_from"),
    ("training", "init_optimizer"),
    ("data", "resolution_px"),
    ("data", "bucket_batch_multiple"),
)
FROZEN_SECTIONS = ("model", "encoders", "flow")
MOVABLE_KEYS = (("encoders", "codec_path"), ("encoders", "text_encoder_path"))  # a model folder may move
CONFIG_FILE = "config.yaml"


class _Plain(yaml.SafeDumper):
    """Writes a value that occurs twice twice: no anchors."""

    def ignore_aliases(self, _: object) -> bool:
        return True


@contextmanager
def open_run_folder(run: RunConfig, parallel: ParallelState) -> Iterator[None]:
    """Create the run folder and hold it alone; on resume check that it is still the same run.

    A folder without a checkpoint holds nothing that was trained, so whatever was started there before binds no one.
    Rank 0 does it, and all ranks go on or raise together.

    Raises:
        ConfigError: the folder belongs to a run with other frozen settings or to another process, or cannot be
            written.
        DataError: its config.yaml cannot be read.
    """
    with ExitStack() as stack:
        on_first_rank(lambda: _take_folder(run, stack), parallel.control)
        yield


def _take_folder(run: RunConfig, stack: ExitStack) -> None:
    folder = run.training.run_dir
    try:
        if _has_checkpoint(folder) and (folder / CONFIG_FILE).is_file():
            _check_same_run(_read_document(folder)["config"], cfg.to_dict(run), folder)
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(exclusive(folder, "--run-dir"))
    except OSError as error:
        raise _not_writable(folder, error) from error


@contextmanager
def log_to_folder(run: RunConfig, parallel: ParallelState) -> Iterator[None]:
    """Everything that this process logs, also what its console does not show, in ``logs/rank_00000.log``."""
    path = run.training.run_dir / "logs" / f"rank_{parallel.rank:05d}.log"
    try:
        path.parent.mkdir(exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise _not_writable(path, error) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    experts = parallel.layout.experts_of(parallel.rank)
    log.info(
        "rank %d of %d on %s, %s, stores experts %d to %d of %d",
        *(parallel.rank, parallel.world, platform.node(), parallel.device),
        *(experts[0], experts[-1], parallel.layout.experts),
    )
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def record_start(run: RunConfig, state: TrainState, manifest_hash: str, started_from: dict | None) -> None:
    """Write ``config.yaml``; called when a start is about to take its first step.

    It holds ``config`` (the resolved settings of this start, its seed among them), its ``git_commit`` and
    ``versions``, ``data_manifest_sha256``, ``started_from``, and ``starts``, oldest first: of every start ``step`` and
    ``samples_seen`` that it went on from, ``git_commit``, ``versions``, and ``changed``, which settings differ from
    those of the start before (``section.key`` -> ``{"before", "now"}``). Steps that were lost and taken again belong
    to the last start before them. A start at step 0 begins the list anew: no step of an earlier one is left.

    Args:
        manifest_hash: hex sha256 of the data set's manifest. started_from: see `warm_start.start_from`.

    Raises:
        ConfigError: the folder cannot be written. DataError: its config.yaml is damaged.
    """
    folder, config = run.training.run_dir, cfg.to_dict(run)
    earlier, changed = _history(folder, state.step, config)
    start = {"step": state.step, "samples_seen": state.samples_seen, "git_commit": git_commit()}
    document = {
        "config": config,
        "git_commit": start["git_commit"],
        "versions": versions(),
        "data_manifest_sha256": manifest_hash,
        "started_from": started_from,
        "starts": [*earlier, start | {"versions": versions(), "changed": changed}],
    }
    text = yaml.dump(document, Dumper=_Plain, sort_keys=False, allow_unicode=True)
    try:
        write_atomic(folder / CONFIG_FILE, text)
    except OSError as error:
        raise _not_writable(folder, error) from error


def training_commits(folder: Path) -> list[str | None]:
    """Commits of the program that trained what a run folder holds, in order, each once.

    None stands for a program outside git, or one that is not known. Of a folder from before starts were recorded: the
    commit in its newest checkpoint, whose program trained the last steps.

    Raises:
        ConfigError: no checkpoint there. DataError: a damaged config.yaml or state.json.
    """
    document = _read_document(folder)
    if "starts" not in document:
        return [native.read_state(native.resolve_checkpoint(folder)).get("git_commit")]
    commits, later = [], None
    for start in reversed(document["starts"]):
        step = start["step"] or 0  # not known of starts that were not recorded: they were the first
        if later is None or step < later:  # else its steps were taken again
            commits.append(start["git_commit"])
            later = step
    return list(dict.fromkeys(reversed(commits)))


def save_bucket_report(run: RunConfig, corpus: Corpus, multiple_px: int) -> None:
    """Write ``buckets.json`` and log its table: image sizes, batches, and how much of the images is cropped.

    Reads the whole index, so it is done once: when the run starts.

    Args:
        multiple_px: codec stride x patch size.
    """
    rows = bucket_report(corpus, run.data, multiple_px, run.training.global_batch_size)
    try:
        write_json_atomic(run.training.run_dir / "buckets.json", rows)
    except OSError as error:
        raise _not_writable(run.training.run_dir, error) from error
    log.info("how the images fit their buckets:\n%s", format_report(rows))


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--run-dir {folder}: cannot be written ({error.strerror})")


def _has_checkpoint(folder: Path) -> bool:
    return native.checkpoints_folder(folder / "checkpoints") is not None


def _read_document(folder: Path) -> dict:
    """A run's config.yaml. ``config``: section -> mapping; ``starts``: absent in files from before these were kept."""
    path = folder / CONFIG_FILE
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not all(isinstance(section, dict) for section in document["config"].values()):
            raise TypeError
        if not all({"step", "git_commit"} <= start.keys() for start in document.get("starts", [])):
            raise TypeError
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}); restore it or use a new --run-dir"
        ) from error
    return document


def _history(folder: Path, step: int, config: dict) -> tuple[list[dict], dict[str, dict]]:
    """The starts before one that goes on from ``step``, and what of ``config`` differs from the last of them."""
    path = folder / CONFIG_FILE
    if not step:
        return [], {}
    if not path.is_file():
        log.warning("%s: missing; what trained the run up to step %d is not known", path, step)
        return [_unrecorded_start({})], {}
    before = _read_document(folder)
    changed = _changes(before["config"], config)
    for name, was in changed.items():
        log.info("from step %d on %s is %s (before: %s)", step, name, was["now"], was["before"])
    return before["starts"] if "starts" in before else [_unrecorded_start(before)], changed


def _unrecorded_start(document: dict) -> dict:
    """Stands for all starts of a file from before these were kept, which names the last one's program alone.

    Without a file ({}) nothing is known of them.
    """
    return {
        "step": None,
        "samples_seen": None,
        "git_commit": document.get("git_commit"),
        "versions": document.get("versions"),
        "changed": {},
    }


def _changes(before: dict, now: dict) -> dict[str, dict]:
    """``section.key`` -> {"before", "now"} of all settings that differ; one that a version does not know is None."""
    changed = {}
    for section in dict.fromkeys((*now, *before)):
        was, is_now = before.get(section, {}), now.get(section, {})
        for key in dict.fromkeys((*is_now, *was)):
            if was.get(key) != is_now.get(key):
                changed[f"{section}.{key}"] = {"before": was.get(key), "now": is_now.get(key)}
    return changed


def _check_same_run(saved: dict, resolved: dict, folder: Path) -> None:
    keys = [*FROZEN_KEYS, *((s, k) for s in FROZEN_SECTIONS for k in resolved[s])]
    for section, key in keys:
        before, now = saved.get(section, {}).get(key), resolved[section][key]
        if before != now and (section, key) not in MOVABLE_KEYS:
            raise ConfigError(
                f"--run-dir {folder} holds a run with {section}.{key} = {before}, now it is {now}; "
                f"keep {before} to resume it or choose another --run-dir"
            )


def versions() -> dict[str, str]:
    """Versions that a run's numbers depend on."""
    return {
        "megatron_nucleus": megatron_nucleus.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
