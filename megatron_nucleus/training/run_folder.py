"""The folder of a run: one run at a time, the same settings on resume, configuration and logs beside the results."""

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
from megatron_nucleus.training.arguments import RunConfig
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


@contextmanager
def open_run_folder(run: RunConfig, parallel: ParallelState) -> Iterator[None]:
    """Create the run folder and hold it alone; on resume check that it is still the same run.

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
    if (folder / "config.yaml").is_file():
        _check_same_run(_read_config(folder / "config.yaml"), cfg.to_dict(run), folder)
    try:
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


def save_config(run: RunConfig, manifest_hash: str, started_from: dict | None) -> None:
    """Write what a run's figures depend on: the resolved configuration (its seed among it), commit, versions, data.

    Args:
        manifest_hash: hex sha256 of the data set's manifest. started_from: see `warm_start.start_from`.

    Raises:
        ConfigError: the folder cannot be written.
    """
    document = {
        "config": cfg.to_dict(run),
        "git_commit": git_commit(),
        "versions": versions(),
        "data_manifest_sha256": manifest_hash,
        "started_from": started_from,
    }
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    try:
        write_atomic(run.training.run_dir / "config.yaml", text)
    except OSError as error:
        raise _not_writable(run.training.run_dir, error) from error


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


def _read_config(path: Path) -> dict:
    """Section -> mapping of a run's config.yaml."""
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))["config"]
        if not all(isinstance(section, dict) for section in saved.values()):
            raise TypeError
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}); restore it or use a new --run-dir"
        ) from error
    return saved


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
