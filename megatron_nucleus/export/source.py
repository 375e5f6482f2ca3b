"""Open any checkpoint (run folder, step folder, merged folder, diffusers folder or pipeline) under native names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.export import hf_keys, native
from megatron_nucleus.export.safetensors_header import TensorInfo
from megatron_nucleus.export.tensor_store import TensorStore
from megatron_nucleus.utils.errors import DataError

WEIGHTS_NAME = "diffusion_pytorch_model"
INDEX_NAME = f"{WEIGHTS_NAME}.safetensors.index.json"
SIDE_FILE = "nucleus.json"  # what config.json has no room for: encoders, sampling defaults, provenance
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class CheckpointDescription:
    """What a checkpoint is, without its weights.

    kind: ``native`` or ``diffusers``. codec, text_encoder: encoder specs (`data/encoders.py`) or None when the
    folder does not say. sampling: defaults {"steps", "guidance", "shift", "height", "width"}, possibly empty.
    step: optimizer steps behind the weights, None when unknown. path: folder that holds the weights.
    provenance: the other entries of state.json (seed, data, versions, merged, ...).
    """

    kind: str
    shape: ModelShape
    codec: dict | None
    text_encoder: dict | None
    sampling: dict
    step: int | None
    path: Path
    provenance: dict


class Weights:
    """Lazy, native view of the parameters: every name of `hf_keys.keys`, checked for presence and shape.

    Raises (constructor): DataError naming a missing, unexpected, wrongly shaped or non-floating tensor.
    """

    def __init__(self, shape: ModelShape, store: TensorStore, diffusers: bool, where: Path):
        self._store = store
        self.keys = {key.native: key for key in hf_keys.keys(shape)}
        self._stored = {k.native: k.diffusers if diffusers else k.native for k in self.keys.values()}
        self._swapped = {k.native for k in self.keys.values() if diffusers and k.swap_halves}
        known = set(self._stored.values())
        for name in store.names():
            if name not in known:
                raise DataError(
                    f"{store.files(name)[0]}: unexpected tensor {name}; this architecture has no such tensor"
                )
        for key in self.keys.values():
            name = self._stored[key.native]
            if name not in store:
                raise DataError(
                    f"{where}: tensor {name} is missing; copy the checkpoint again, with all of its files"
                )
            info = store.info(name)
            if info.shape != key.shape:
                raise DataError(
                    f"{store.files(name)[0]}: tensor {name} has shape {list(info.shape)}, the architecture needs "
                    f"{list(key.shape)}; the weights and the description belong to different models"
                )
            if info.dtype not in _FLOATS:
                raise DataError(
                    f"{store.files(name)[0]}: tensor {name} has dtype {info.dtype}; weights must be floating"
                )

    def info(self, name: str) -> TensorInfo:
        """Shape and stored dtype of a native name."""
        return self._store.info(self._stored[name])

    def file(self, name: str) -> Path:
        """A file that holds the tensor, for messages."""
        return self._store.files(self._stored[name])[0]

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` in native order."""
        stored = self._stored[name]
        if name not in self._swapped:
            return self._store.read_rows(stored, start, stop)
        rows = self.info(name).shape[0]
        parts = [self._store.read_rows(stored, a, b) for a, b in swapped_ranges(rows, start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        return self.read_rows(name, 0, self.info(name).shape[0])


def swapped_ranges(rows: int, start: int, stop: int) -> list[tuple[int, int]]:
    """Where rows ``start:stop`` lie after the two halves of ``rows`` rows changed places."""
    half = rows // 2
    out = []
    if start < half:
        out.append((start + half, min(stop, half) + half))
    if stop > half:
        out.append((max(start, half) - half, stop - half))
    return out


def describe(path: str | Path) -> CheckpointDescription:
    """Read the description of a checkpoint; see `open_checkpoint` for ``path`` and errors."""
    path = Path(path)
    transformer = find_transformer(path)
    if transformer is not None:
        return _describe_diffusers(path, transformer)
    folder = native.resolve_checkpoint(path)
    try:
        state = native.read_state(folder)
        shape = native.shape_from_dict(state.get("model"), folder / "state.json")
    except DataError as error:
        raise DataError(f"{error}; {native.advice(folder)}") from error
    return CheckpointDescription(
        kind="native",
        shape=shape,
        codec=state.get("codec"),
        text_encoder=state.get("text_encoder"),
        sampling=state.get("sampling") or {},
        step=state.get("step"),
        path=folder,
        provenance={k: v for k, v in state.items() if k not in _DESCRIBED},
    )


_DESCRIBED = ("format", "model", "codec", "text_encoder", "sampling", "step", "optimizer")


def open_checkpoint(path: str | Path, checksums: bool = True) -> tuple[CheckpointDescription, Weights]:
    """Open the weights of a native checkpoint or a diffusers folder (also a pipeline with ``transformer/`` inside).

    Args:
        path: run folder, checkpoints folder, step folder, merged folder, or diffusers folder.
        checksums: compare the SHA-256 of native weight files with the manifest before anything is used; sizes
            are always compared. Costs one read of the weights.

    Raises:
        ConfigError: nothing there that could be a checkpoint.
        DataError: a file or tensor is missing, truncated, altered, unexpected or of the wrong shape.
    """
    description = describe(path)
    if description.kind == "diffusers":
        store = TensorStore(_diffusers_files(description.path))
        return description, Weights(description.shape, store, True, description.path)
    folder = description.path
    native.verify_or_advise(folder, ("model/", "state.json"), checksums)
    return description, Weights(description.shape, native.open_tensors(folder), False, folder / "model")


def find_transformer(path: Path) -> Path | None:
    """The folder with diffusers' ``config.json`` of the transformer: ``path`` itself or its ``transformer/``."""
    if (path / "model_index.json").is_file() or (path / "transformer" / "config.json").is_file():
        return path / "transformer"
    return path if (path / "config.json").is_file() else None


def _describe_diffusers(path: Path, folder: Path) -> CheckpointDescription:
    config = native.read_json(folder / "config.json")
    side = native.read_json(folder / SIDE_FILE) if (folder / SIDE_FILE).is_file() else _pipeline_side(path)
    provenance = side.get("provenance") or {}
    return CheckpointDescription(
        kind="diffusers",
        shape=hf_keys.from_diffusers_config(config, str(folder / "config.json")),
        codec=side.get("codec"),
        text_encoder=side.get("text_encoder"),
        sampling=side.get("sampling") or {},
        step=provenance.get("step"),
        path=folder,
        provenance={k: v for k, v in provenance.items() if k != "step"},
    )


def _pipeline_side(path: Path) -> dict:
    """Encoders and published sampling settings of a diffusers pipeline folder (its VAE and Qwen3-VL)."""
    side: dict = {}
    if (path / "vae" / "config.json").is_file():
        side["codec"] = {"name": "qwen_image_vae", "path": str(path)}
    if (path / "text_encoder" / "config.json").is_file():
        side["text_encoder"] = {"name": "qwen3_vl", "path": str(path)}
    if side:  # defaults of NucleusMoEImagePipeline
        side["sampling"] = {"steps": 50, "guidance": 4.0, "shift": 1.0, "height": 1024, "width": 1024}
    return side


def _diffusers_files(folder: Path) -> list[Path]:
    """Weight files of a diffusers folder: those its index names, or the single unsharded file."""
    index = folder / INDEX_NAME
    single = folder / f"{WEIGHTS_NAME}.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            bad = [n for n in names if Path(n).name != n]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{index}: damaged ({' '.join(str(error).split())}); copy it again") from error
        if bad:
            raise DataError(
                f"{index}: names the file {bad[0]!r} outside of its folder; do not use this checkpoint"
            )
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    pickles = sorted(p.name for p in folder.glob("*.bin"))
    if pickles:
        raise DataError(
            f"{folder / pickles[0]}: pickled weights are never read; save the model as safetensors"
        )
    raise DataError(f"{single}: missing; copy the folder again, with its safetensors files and their index")
