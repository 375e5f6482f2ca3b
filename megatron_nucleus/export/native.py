"""The layout of a native checkpoint, and what makes one complete.

    RUN/checkpoints/step_00001200/model/*.safetensors       weights, whole or in pieces (`tensor_store`)
                                  optimizer/*.safetensors   state of the optimizer (absent after merge and convert, and
                                                            from older steps that are kept for their weights)
                                  state.json                step, samples seen, architecture, encoders, provenance
                                  manifest.json             size and SHA-256 of every other file
    RUN/checkpoints/latest                                  name of the newest complete checkpoint

A step folder gets its name by a rename after everything in it is on disk, so a named folder was complete once;
`verify` tells whether it still is.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.export.tensor_store import TensorStore
from megatron_nucleus.utils.errors import ConfigError, DataError, UserError
from megatron_nucleus.utils.files import sha256_file, write_atomic, write_json_atomic

FORMAT = 1
_STEP_NAME = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    """Folder name of a step: ``step_00001200``."""
    return f"step_{step:08d}"


def step_number(folder: Path) -> int:
    """Inverse of `step_name` for a step folder."""
    return int(folder.name.removeprefix("step_"))


def list_steps(folder: Path) -> list[Path]:
    """Step folders in a checkpoints folder, oldest first."""
    if not folder.is_dir():
        return []
    steps = [p for p in folder.iterdir() if _STEP_NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(steps, key=step_number)


def is_step_folder(path: Path) -> bool:
    """Whether ``path`` looks like one native checkpoint, whole or damaged."""
    return any((path / name).exists() for name in ("manifest.json", "state.json", "model"))


def checkpoints_folder(path: Path) -> Path | None:
    """The folder of step folders meant by ``path`` (a run folder or the folder itself), or None."""
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and ((folder / "latest").is_file() or list_steps(folder)):
            return folder
    return None


def resolve_checkpoint(path: str | Path) -> Path:
    """Step folder meant by ``path``: a run folder, its checkpoints folder, `latest`, or one checkpoint's folder.

    Raises:
        ConfigError: nothing there, or no checkpoint in it.
        DataError: `latest` names a folder that does not exist.
    """
    path = Path(path)
    if path.is_file() and path.name == "latest":
        path = path.parent
    if not path.exists():
        raise ConfigError(
            f"checkpoint {path}: no such folder; name a run folder, a checkpoint or a diffusers folder"
        )
    if not path.is_dir():
        raise ConfigError(f"checkpoint {path}: is a file; name the folder of the run or of the checkpoint")
    if is_step_folder(path):
        return path
    folder = checkpoints_folder(path)
    if folder is None:
        raise ConfigError(
            f"checkpoint {path}: holds no checkpoint (expected checkpoints/latest, or model/ with state.json, "
            "or a diffusers config.json); name another folder or train first"
        )
    try:
        return newest_checkpoint(folder)
    except DataError as error:
        raise DataError(f"{error}; {advice(folder)}") from error


def newest_checkpoint(folder: Path) -> Path:
    """The step folder that `latest` names; before the first `latest` was written, the newest step folder.

    Raises:
        DataError: `latest` is damaged or names a missing folder.
    """
    pointer = folder / "latest"
    if not pointer.is_file():
        return list_steps(folder)[-1]
    step = _named_by(pointer)
    if not step.is_dir():
        raise DataError(f"{step}: missing although {pointer} names it")
    return step


def resume_order(folder: Path) -> tuple[list[Path], str | None]:
    """Step folders in the order in which a run should try to resume from them, and what is wrong with `latest`.

    First the one that `latest` names, then older ones, newest first. Newer ones stem from before the run went back
    to `latest` and are left out. Where `latest` is missing or damaged: all of them, newest first.
    """
    steps, pointer = list_steps(folder)[::-1], folder / "latest"
    if not pointer.is_file():
        return steps, f"{pointer}: missing"
    try:
        named = _named_by(pointer)
    except DataError as error:
        return steps, str(error)
    problem = None if named.is_dir() else f"{named}: missing although {pointer} names it"
    return [step for step in steps if step_number(step) <= step_number(named)], problem


def _named_by(pointer: Path) -> Path:
    """The step folder, there or not, whose name stands in the file `latest`."""
    try:
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise DataError(f"{pointer}: cannot be read ({error.strerror})") from error
    if not _STEP_NAME.fullmatch(name):
        raise DataError(f"{pointer}: should hold a name such as step_00001200, found {name[:40]!r}")
    return pointer.parent / name


def list_branch(folder: Path) -> list[Path]:
    """Step folders up to the one that `latest` names, oldest first; [] where there are none.

    Newer ones stem from before the run went back to `latest`: they are not of its history.

    Raises:
        DataError: see `newest_checkpoint`.
    """
    steps = list_steps(folder)
    if not steps:
        return []
    newest = step_number(newest_checkpoint(folder))
    return [step for step in steps if step_number(step) <= newest]


def holds_optimizer(folder: Path) -> bool:
    """Whether training can go on from a checkpoint: whether its manifest lists optimizer state.

    Raises:
        DataError: no manifest, or a damaged one.
    """
    return any(name.startswith("optimizer/") for name in read_manifest(folder))


def find_complete(damaged: Path) -> Path | None:
    """The newest complete checkpoint beside ``damaged`` (a step folder or a checkpoints folder), older ones first."""
    named = _STEP_NAME.fullmatch(damaged.name) is not None
    others = [s for s in list_steps(damaged.parent if named else damaged) if s != damaged]
    older = [s for s in others if not named or step_number(s) < step_number(damaged)]
    ordered = [*reversed(older), *(s for s in others if s not in older)]
    return next((step for step in ordered if is_complete(step)), None)


def is_complete(step: Path) -> bool:
    """Whether everything in a step folder is as its manifest says (reads it all)."""
    try:
        verify(step)
    except UserError:
        return False
    return True


def advice(damaged: Path) -> str:
    """What to do about a damaged checkpoint, as the end of a message."""
    step = find_complete(damaged)
    if step is None:
        return "copy it again from where it came from; no other complete checkpoint is beside it"
    return f"use {step}, which is complete"


def write_manifest(folder: Path, files: dict[str, dict]) -> None:
    """Write ``manifest.json``; ``files`` maps relative paths to {"bytes", "sha256"}."""
    write_json_atomic(folder / "manifest.json", {"files": dict(sorted(files.items()))})


def describe_file(path: Path) -> dict:
    """Manifest entry of one file: {"bytes", "sha256"}."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def describe_files(folder: Path) -> dict[str, dict]:
    """Manifest entries of every file under ``folder`` but the manifest, by relative path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    return {p.relative_to(folder).as_posix(): describe_file(p) for p in files}


def read_manifest(folder: Path) -> dict[str, dict]:
    """``{relative path: {"bytes", "sha256"}}``; DataError when missing or damaged."""
    files = read_json(folder / "manifest.json").get("files")
    try:
        valid = all(
            isinstance(e["bytes"], int) and isinstance(e["sha256"], str) and not _escapes(name)
            for name, e in files.items()
        )
    except (AttributeError, KeyError, TypeError):
        valid = False
    if not valid:
        raise DataError(f"{folder / 'manifest.json'}: damaged, no list of files; copy the checkpoint again")
    return files


def verify(
    folder: Path, parts: Iterable[str] = ("model/", "optimizer/", "state.json"), checksums: bool = True
) -> None:
    """Check the files of a checkpoint against its manifest.

    Args:
        parts: path prefixes to check; ``("model/", "state.json")`` is what inference reads.
        checksums: also compare SHA-256 (reads everything once); sizes are always compared.

    Raises:
        DataError: naming the first file that is missing, truncated, altered or unlisted.
    """
    check_files(folder, listed_files(folder, parts), checksums)


def listed_files(
    folder: Path, parts: Iterable[str] = ("model/", "optimizer/", "state.json")
) -> dict[str, dict]:
    """Manifest entries of ``parts``; DataError when a tensor file is there that the manifest does not list.

    Where it lists no optimizer state at all, such files are what a kill left of dropping it, and nobody reads them.
    """
    parts, listed = tuple(parts), read_manifest(folder)
    for part in parts:
        if part == "optimizer/" and not any(name.startswith(part) for name in listed):
            continue
        for path in sorted((folder / part).glob("*.safetensors")) if part.endswith("/") else ():
            if path.relative_to(folder).as_posix() not in listed:
                raise DataError(f"{path}: not in the manifest of its checkpoint; remove it")
    return {name: entry for name, entry in listed.items() if name.startswith(parts)}


def check_files(folder: Path, entries: Mapping[str, dict], checksums: bool = True) -> None:
    """Compare files with their manifest entries: the part of `verify` that takes time, for one rank's share."""
    for name, entry in entries.items():
        path = folder / name
        try:
            if not path.is_file():
                raise DataError(f"{path}: missing")
            if path.stat().st_size != entry["bytes"]:
                raise DataError(
                    f"{path}: has {path.stat().st_size} bytes, its manifest says {entry['bytes']}"
                )
            if checksums and sha256_file(path) != entry["sha256"]:
                raise DataError(f"{path}: altered since it was written (SHA-256 differs from the manifest)")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def verify_or_advise(folder: Path, parts: Iterable[str], checksums: bool = True) -> None:
    """`verify`, with the newest other complete checkpoint in the message."""
    try:
        verify(folder, parts, checksums)
    except DataError as error:
        raise DataError(f"{error}; {advice(folder)}") from error


def open_tensors(folder: Path, part: str = "model") -> TensorStore:
    """Lazy reader of the ``model`` or ``optimizer`` tensors that the manifest lists."""
    return TensorStore(part_files(folder, part))


def part_files(folder: Path, part: str) -> list[Path]:
    """Files of the ``model`` or ``optimizer`` tensors that the manifest lists; DataError when there are none."""
    names = [n for n in read_manifest(folder) if n.startswith(part + "/") and n.endswith(".safetensors")]
    if not names:
        raise DataError(f"{folder / part}: holds no tensors; copy the checkpoint again")
    return [folder / name for name in names]


def read_state(folder: Path) -> dict:
    """``state.json``; DataError when missing, damaged or of a newer format."""
    state = read_json(folder / "state.json")
    if state.get("format") != FORMAT:
        raise DataError(
            f"{folder / 'state.json'}: format {state.get('format')!r}, this version reads {FORMAT}"
        )
    return state


def shape_to_dict(shape: ModelShape) -> dict:
    """JSON form of an architecture (tuples as lists)."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(shape).items()}


def shape_from_dict(values: dict, where: Path) -> ModelShape:
    """Inverse of `shape_to_dict`; DataError naming ``where`` when it is no architecture."""
    try:
        return ModelShape(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except (TypeError, AttributeError) as error:
        raise DataError(f"{where}: 'model' is no architecture of this version ({error})") from error
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from error


def set_latest(folder: Path, step: Path) -> None:
    """Point `latest` at ``step``, atomically."""
    write_atomic(folder / "latest", step.name + "\n")


def read_json(path: Path) -> dict:
    """A JSON object from a file; DataError when missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: missing, so this checkpoint is not complete") from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: damaged ({' '.join(str(error).split())}); copy the checkpoint again"
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: damaged, expected a JSON object; copy the checkpoint again")
    return value


def _escapes(name: str) -> bool:
    path = Path(name)
    return path.is_absolute() or ".." in path.parts
