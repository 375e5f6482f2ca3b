"""What `tools/sample.py` reads and writes: a file of prompts, and a folder of pictures."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from megatron_nucleus.inference.grid import CELL_PX, contact_sheet, fit
from megatron_nucleus.inference.pipeline import Pipeline
from megatron_nucleus.inference.sampler import OnRouting, SamplerConfig
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import open_atomic, write_atomic
from megatron_nucleus.utils.staging import check_writable, explain_writing

GRID_IMAGES = 64  # pictures on the contact sheet; a person looks at no more
_OURS = re.compile(r"\d{5,}\.png|samples\.jsonl|grid\.png|routing\.json")


class PromptFile(NamedTuple):
    """Prompts of a file in order, and how many blank lines were skipped."""

    prompts: list[str]
    blank_lines: int


def read_prompts(path: str | Path) -> PromptFile:
    """Read a file of prompts: one per line, or with the ending ``.jsonl`` one object per line with "prompt".

    Other keys of an object are ignored, so GenEval's metadata can be read as it is. Blank lines are skipped.

    Raises:
        ConfigError: no such file.
        DataError: not UTF-8, a line that is no such object, or no prompt at all; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"--prompts {path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    numbered = [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path}: holds no prompt; write one per line")
    if path.suffix == ".jsonl":
        prompts = [_prompt_of(line, f"{path}, line {n}") for n, line in numbered]
    else:
        prompts = [line for _, line in numbered]
    return PromptFile(prompts, len(lines) - len(numbered))


def _prompt_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); correct it") from error
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str):
        raise DataError(f'{where}: expected an object with a text "prompt", got {line[:60]!r}; correct it')
    return prompt


def check_folder(folder: str | Path, overwrite: bool) -> list[Path]:
    """Files of an earlier job in the output folder, which a new one replaces; nothing is touched yet.

    Raises:
        ConfigError: there are such files and ``overwrite`` is false, or nothing can be written there.
    """
    folder = Path(folder)
    check_writable(folder)
    with explain_writing(folder, "nothing was changed"):
        if not folder.is_dir():
            return []
        earlier = sorted(p for p in folder.iterdir() if _OURS.fullmatch(p.name))
    if earlier and not overwrite:
        raise ConfigError(
            f"--output {folder}: holds {len(earlier)} files of an earlier job ({earlier[0].name}, ...); choose "
            "another folder, or --overwrite to replace them"
        )
    return earlier


def write_samples(
    pipeline: Pipeline,
    prompts: Sequence[str],
    folder: str | Path,
    *,
    config: SamplerConfig,
    samples_per_prompt: int = 1,
    seed: int = 0,
    negative_prompt: str = "",
    batch_size: int = 16,
    progress: bool = True,
    overwrite: bool = False,
    on_routing: OnRouting | None = None,
) -> dict:
    """Draw pictures and write them as their batches finish: ``00000.png``, ... and a line of ``samples.jsonl`` each.

    Pictures of one prompt follow each other; picture number i uses seed + i. Prompt and seed also stand in the PNG's
    text fields. At the end ``grid.png`` shows the first 64 with their prompts.

    Args:
        config: settings as `Pipeline.settings` returns them.
        overwrite: replace the pictures of an earlier job in ``folder``.
        on_routing: see `Pipeline.stream`.

    Returns:
        {"output", "images", "seconds", "images_per_s", "grid"}; seconds of drawing and writing.

    Raises:
        ConfigError: a bad value, pictures that are already there, or a folder that cannot be written.
        DataError: the disk is full.
    """
    folder = Path(folder)
    if samples_per_prompt < 1:
        raise ConfigError(f"--samples-per-prompt {samples_per_prompt}: must be at least 1")
    each = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    seeds = [seed + i for i in range(len(each))]
    pictures = pipeline.stream(
        each, negative_prompts=negative_prompt, height=config.height, width=config.width, steps=config.steps,
        guidance=config.guidance, shift=config.shift, seeds=seeds, batch_size=batch_size, progress=progress,
        on_routing=on_routing,
    )  # fmt: skip
    start = time.perf_counter()
    first = next(pictures)  # a prompt that is too long shows here, while the earlier pictures still exist
    settings = {"negative_prompt": negative_prompt, "height": config.height, "width": config.width,
                "steps": config.steps, "guidance": config.guidance, "shift": config.shift}  # fmt: skip
    rows = [{"prompt": prompt, "seed": n, **settings} for prompt, n in zip(each, seeds, strict=True)]
    with contextlib.closing(pictures), explain_writing(folder, "the pictures written so far stay there"):
        for path in check_folder(folder, overwrite):
            path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        shown = _write_pictures(itertools.chain([first], pictures), rows, folder)
        seconds = time.perf_counter() - start
        with open_atomic(folder / "grid.png") as file:
            contact_sheet(shown, each[: len(shown)]).save(file, "PNG")
    return {
        "output": str(folder),
        "images": len(each),
        "seconds": seconds,
        "images_per_s": len(each) / seconds,
        "grid": str(folder / "grid.png"),
    }


def _write_pictures(pictures: Iterable[Image.Image], rows: list[dict], folder: Path) -> list[Image.Image]:
    """Write pictures and their list as they come; returns the first ones, small, for the contact sheet."""
    shown: list[Image.Image] = []
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as listing:
        for i, (picture, row) in enumerate(zip(pictures, rows, strict=True)):
            name = f"{i:05d}.png"
            write_atomic(folder / name, _png(picture, row["prompt"], row["seed"]))
            listing.write(json.dumps({"file": name, **row}, ensure_ascii=False) + "\n")
            listing.flush()
            if len(shown) < GRID_IMAGES:
                shown.append(fit(picture, CELL_PX))
    return shown


def _png(picture: Image.Image, prompt: str, seed: int) -> bytes:
    text = PngInfo()
    text.add_itxt("prompt", prompt)  # the field that holds any script
    text.add_text("seed", str(seed))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()
