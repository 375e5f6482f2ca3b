"""From a checked configuration to a device, a run folder, a model and its encoders."""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

import megatron_nucleus
from megatron_nucleus.core.kernels import resolve_kernels
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelShape, resolve_shape
from megatron_nucleus.data.dataset import Corpus
from megatron_nucleus.data.encoders import (
    LatentCodec,
    TextEncoder,
    build_codec,
    build_text_encoder,
    same_encoder,
)
from megatron_nucleus.data.loader import build_loader
from megatron_nucleus.training.arguments import RunConfig
from megatron_nucleus.utils import config as cfg
from megatron_nucleus.utils.devices import pick_device
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import exclusive, write_atomic

log = logging.getLogger(__name__)

# What may not change within a run: everything that would make "the same run" a different one.
# (section, key) pairs; a changed value needs a new --run-dir.
FROZEN_KEYS = (("training", "seed"), ("data", "resolution_px"))
FROZEN_SECTIONS = ("model", "encoders", "flow")
MOVABLE_KEYS = (("encoders", "codec_path"), ("encoders", "text_encoder_path"))  # a model folder may move


class Encoders(NamedTuple):
    """The frozen encoders of a run.

    codec, text_encoder: None where stored features and no previews leave them nothing to do.
    codec_spec, text_spec: what rebuilds them. latent_channels, text_dim: what they give.
    stride_px: pixels per latent row and column; None where the spec of a codec that was not built does not say.
    """

    codec: LatentCodec | None
    text_encoder: TextEncoder | None
    codec_spec: dict
    text_spec: dict
    latent_channels: int
    text_dim: int
    stride_px: int | None


def initialize(run: RunConfig) -> torch.device:
    """Choose the device, set threads, refuse a launch that this version cannot serve."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != 1:
        raise ConfigError(
            f"WORLD_SIZE={world}: this version trains on one process; start tools/train.py without torchrun"
        )
    device = pick_device(run.training.device)
    if run.training.cpu_threads is not None:
        torch.set_num_threads(run.training.cpu_threads)
    return device


def build_model(run: RunConfig, device: torch.device, encoders: Encoders) -> NucleusTransformer:
    """A freshly initialised model on ``device``, fp32, in training mode; ConfigError if the encoders do not fit."""
    shape = run_shape(run, encoders.text_dim)
    if shape.latent_channels != encoders.latent_channels:
        raise ConfigError(
            f"--latent-channels {shape.latent_channels}: the codec '{encoders.codec_spec['name']}' gives "
            f"{encoders.latent_channels}"
        )
    kernels = resolve_kernels(run.kernels, device.type)
    return NucleusTransformer(shape, kernels, seed=run.training.seed).to(device).train()


def run_shape(run: RunConfig, text_dim: int) -> ModelShape:
    """The architecture, its text width taken from the text encoder unless the configuration names one."""
    config = run.model
    if config.text_dim is None:
        config = dataclasses.replace(config, text_dim=text_dim)
    elif config.text_dim != text_dim:
        raise ConfigError(
            f"--text-dim {config.text_dim}: the text encoder '{run.encoders.text_encoder}' gives {text_dim}"
        )
    return resolve_shape(config)


def build_encoders(run: RunConfig, corpus: Corpus, device: torch.device) -> Encoders:
    """Codec and text encoder of the run. On stored features they are built for previews alone.

    Raises:
        ConfigError: the run's encoders, resolution or patch are not those of the stored features.
        DataError: a damaged encoder folder, or stored features that cannot be read.
    """
    codec_spec, text_spec = run.encoders.codec_spec(), run.encoders.text_spec()
    if corpus.encoded is not None:
        _check_stored(run, corpus.encoded, codec_spec, text_spec)
        codec_spec = _completed(codec_spec, corpus.encoded["codec"])
        text_spec = _completed(text_spec, corpus.encoded["text_encoder"])
        if not run.training.sample_interval:
            channels, text_dim = _stored_widths(run, corpus)
            return Encoders(
                None, None, codec_spec, text_spec, channels, text_dim, codec_spec.get("stride_px")
            )
    codec, text_encoder = build_codec(codec_spec, device), build_text_encoder(text_spec, device)
    return Encoders(
        codec,
        text_encoder,
        codec.spec(),
        text_encoder.spec(),
        codec.channels,
        text_encoder.dim,
        codec.stride_px,
    )


def _check_stored(run: RunConfig, encoded: dict, codec_spec: dict, text_spec: dict) -> None:
    for option, ours in (("codec", codec_spec), ("text_encoder", text_spec)):
        if not same_encoder(encoded[option], ours):
            raise ConfigError(
                f"--data-path holds features of {option} {encoded[option]}, the run is configured for {ours}; "
                "encode again or change the encoders section"
            )
    patch_size = resolve_shape(run.model).patch_size
    for flag, ours, key in (
        ("--resolution-px", run.data.resolution_px, "resolution_px"),
        ("--patch-size", patch_size, "patch_size"),
    ):
        if encoded.get(key, ours) != ours:
            raise ConfigError(f"{flag} {ours}: the stored features were made for {encoded[key]}")


def _completed(configured: dict, stored: dict) -> dict:
    """The stored spec, with what the configuration says of where the encoder lies and how it is run."""
    return {**stored, **{key: value for key, value in configured.items() if value is not None}}


def _stored_widths(run: RunConfig, corpus: Corpus) -> tuple[int, int]:
    """(latent channels, text width) of stored features, from one sample, read as training reads it."""
    config = dataclasses.replace(run.data, num_workers=0)
    with build_loader(
        config, corpus, seed=run.training.seed, global_batch_size=1, micro_batch_size=1
    ) as loader:
        raw = next(loader)
    return raw.latents_BCHW.shape[1], raw.text.features_BLU.shape[2]


@contextmanager
def open_run_folder(run: RunConfig) -> Iterator[None]:
    """Create the run folder and hold it alone; on resume check that it is still the same run.

    Raises:
        ConfigError: the folder belongs to a run with other frozen settings or to another process, or cannot be
            written.
        DataError: its config.yaml cannot be read.
    """
    folder = run.training.run_dir
    if (folder / "config.yaml").is_file():
        _check_same_run(_read_config(folder / "config.yaml"), cfg.to_dict(run), folder)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(folder, "--run-dir"))
        except OSError as error:
            raise _not_writable(folder, error) from error
        yield


def save_config(run: RunConfig) -> None:
    """Write the resolved configuration, commit and versions; ConfigError when the folder cannot be written."""
    document = {"config": cfg.to_dict(run), "git_commit": git_commit(), "versions": versions()}
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    try:
        write_atomic(run.training.run_dir / "config.yaml", text)
    except OSError as error:
        raise _not_writable(run.training.run_dir, error) from error


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


def git_commit() -> str | None:
    """Commit of the source tree this package was imported from, with ``-dirty`` if changed; None outside git."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(megatron_nucleus.__file__).parent, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None


def versions() -> dict[str, str]:
    """Versions that a run's numbers depend on."""
    return {
        "megatron_nucleus": megatron_nucleus.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
