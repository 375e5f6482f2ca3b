"""The embedded benchmark from prompts to scores: generate (or draw the truth, or take a folder), then judge."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from megatron_nucleus.data.scenes import SceneConfig, benchmark_prompts, render_all, scene_for
from megatron_nucleus.evaluation.detector import MIN_SIDE_PX
from megatron_nucleus.evaluation.sample_store import Request, fingerprint, open_stores, seed_folders
from megatron_nucleus.evaluation.scenes import by_prompt, score_samples, summarise, summarise_seeds
from megatron_nucleus.utils.config import knob, to_dict
from megatron_nucleus.utils.devices import DTYPES
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.files import write_atomic, write_json_atomic
from megatron_nucleus.utils.rng import key64

_TRUTH_CHUNK = 256  # scenes drawn at once


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Which prompts, and how many pictures of each (not used with --images)."""

    prompts_per_skill: int = knob(
        50, "prompts of each of the six skills, and of the two held-out-pair skills"
    )
    samples_per_prompt: int = knob(1, "pictures of each prompt")
    # Both, so that a seed repeats the whole evaluation: error bars are about the model, not about one list of prompts.
    seeds: tuple[int, ...] = knob(
        (0,), "each draws the order of the prompts and the noise of the pictures anew"
    )
    max_objects: int = knob(4, "largest number that counting asks for", unit="objects")


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How pictures are generated (with --checkpoint); none = as the checkpoint says."""

    steps: int | None = knob(None, "denoising steps", unit="steps")
    guidance: float | None = knob(None, "classifier-free guidance scale; 1 or less = none")
    shift: float | None = knob(None, "shift of the noise levels")
    height: int | None = knob(None, "height of the pictures", unit="px")
    width: int | None = knob(None, "width of the pictures", unit="px")
    batch_size: int = knob(64, "pictures drawn at once")
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    dtype: str | None = knob(None, "precision of the model; none = as stored", choices=tuple(DTYPES))
    codec_path: str | None = knob(None, "folder or hub id of the VAE, where the checkpoint does not say")
    text_encoder_path: str | None = knob(None, "folder or hub id of the text encoder, likewise")


@dataclasses.dataclass(frozen=True)
class TruthConfig:
    """How the true scenes are drawn (with --truth)."""

    tier: str = knob("grid", "difficulty", choices=("grid", "free"))
    scene_sizes: tuple[str, ...] = knob(("32x32",), "picture sizes WIDTHxHEIGHT", unit="px")


@dataclasses.dataclass(frozen=True)
class SceneEvaluation:
    """Sections of the configuration."""

    prompts: PromptConfig
    generation: GenerationConfig
    truth: TruthConfig


# (the prompts' records, seed, pictures that are wanted) -> these pictures
Draw = Callable[[list[dict], int, list[Request]], Iterator[Image.Image]]


def evaluate_scenes(
    run: SceneEvaluation,
    *,
    images: str | Path | None = None,
    checkpoint: str | Path | None = None,
    truth: bool = False,
    untrained: bool = False,
    output: str | Path | None = None,
    progress: bool = True,
) -> dict:
    """Score one source of pictures.

    Args:
        images: score this folder as it is: GenEval's layout, or the ``output`` of an earlier call with its seeds.
        checkpoint: generate with this checkpoint; ``untrained`` draws fresh weights of the same architecture.
        truth: draw scenes of which the prompts are true: the ceiling of the score.
        output: folder for the pictures (kept and continued, each seed's in its own folder; more seeds may follow
            later), ``results.jsonl`` and ``results.json`` of the seeds of this call; None keeps nothing.

    Returns:
        `evaluation.scenes.summarise_seeds` (without seeds in ``images``: `summarise`, ``seeds`` and
        ``std_over_seeds`` None, ``per_seed`` []), with ``source`` and, where pictures were made, ``generated``.

    Raises:
        ConfigError: not exactly one source, settings of another source, or a folder that does not fit.
        DataError: damaged pictures, metadata or checkpoint.
    """
    _check_source(run, images, checkpoint, truth, untrained)
    with contextlib.ExitStack() as stack:
        if images is not None:
            folders = seed_folders(Path(images)) or {None: Path(images)}
            facts = {"source": "images"}
        else:
            folder = Path(output or stack.enter_context(tempfile.TemporaryDirectory(prefix="scenes-")))
            folders, made = _fill(run, folder, checkpoint, untrained, progress)
            facts = {
                "source": "truth" if truth else "untrained" if untrained else "checkpoint",
                "generated": made,
            }
        result, rows = _score(folders, progress)
    result |= facts
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
        write_atomic(Path(output) / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_json_atomic(Path(output) / "results.json", result)
    return result


def _check_source(run: SceneEvaluation, images, checkpoint, truth: bool, untrained: bool) -> None:
    given = [
        n for n, v in (("--images", images), ("--checkpoint", checkpoint), ("--truth", truth or None)) if v
    ]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ConfigError(f"give exactly one of --images DIR, --checkpoint PATH and --truth; got {found}")
    if untrained and checkpoint is None:
        raise ConfigError(f"--untrained needs --checkpoint PATH, whose architecture it takes; got {given[0]}")
    owners = {"generation": "--checkpoint", "truth": "--truth", "prompts": "--checkpoint or --truth"}
    for section, owner in owners.items():
        if given[0] in owner.split(" or "):
            continue
        value = getattr(run, section)
        for field in dataclasses.fields(value):
            setting = getattr(value, field.name)
            if setting != field.default:
                flag = "--" + field.name.replace("_", "-")
                shown = " ".join(map(str, setting)) if isinstance(setting, tuple) else setting
                raise ConfigError(f"{flag} {shown}: is used with {owner}, not with {given[0]}")


def _score(folders: Mapping[int | None, Path], progress: bool) -> tuple[dict, list[dict]]:
    """The result and the rows of all pictures; None stands for a folder that knows no seeds."""
    scores = {seed: score_samples(folder, progress) for seed, folder in folders.items()}
    rows = []
    for seed, folder in folders.items():
        inside = "" if seed is None else f"{folder.name}/"
        rows += [row | {"filename": inside + row["filename"]} for row in (s.row() for s in scores[seed])]
    if None in folders:
        result = summarise(by_prompt(scores[None])) | {"seeds": None, "std_over_seeds": None, "per_seed": []}
    else:
        result = summarise_seeds({seed: by_prompt(of_seed) for seed, of_seed in scores.items()})
    return result, rows


def _fill(
    run: SceneEvaluation, folder: Path, checkpoint, untrained: bool, progress: bool
) -> tuple[dict[int, Path], int]:
    """Make the pictures that are missing in ``folder``; returns the seeds' folders and how many were made."""
    prompts = run.prompts
    records = {
        seed: benchmark_prompts(prompts.prompts_per_skill, seed, prompts.max_objects)
        for seed in _checked_seeds(prompts.seeds)
    }
    settings, draw = _truth(run) if checkpoint is None else _model(run, checkpoint, untrained)
    asked = {"prompts_per_skill": prompts.prompts_per_skill, "max_objects": prompts.max_objects}
    settings = {"benchmark": "scenes", **asked, **settings}
    stores = open_stores(folder, records, prompts.samples_per_prompt, settings)
    made = 0
    for seed, store in stores.items():
        missing = store.missing()
        if missing:
            pictures = draw(store.records, seed, missing)
            title = f"pictures, seed {seed}"
            bar = tqdm(pictures, title, len(missing), unit="image", disable=None if progress else True)
            for request, picture in zip(missing, bar, strict=True):
                store.add(request, picture)
        made += len(missing)
    return {seed: store.folder for seed, store in stores.items()}, made


def _checked_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    shown = " ".join(map(str, seeds))
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {shown}: name at least one seed, each once")
    for seed in seeds:
        if not -(1 << 63) <= seed < 1 << 63:
            raise ConfigError(f"--seeds {shown}: each must be a 64-bit number")
    return seeds


def sample_seed(seed: int, request: Request) -> int:
    """Seed of one picture: depends on neither the number of prompts nor that of samples."""
    return key64(seed, request.prompt, f"evaluate sample {request.sample}")


def _truth(run: SceneEvaluation) -> tuple[dict, Draw]:
    config = SceneConfig(
        tier=run.truth.tier, scene_sizes=run.truth.scene_sizes, max_objects=run.prompts.max_objects
    )

    def draw(records: list[dict], seed: int, requests: list[Request]) -> Iterator[Image.Image]:
        for start in range(0, len(requests), _TRUTH_CHUNK):
            chunk = requests[start : start + _TRUTH_CHUNK]
            scenes = [scene_for(records[r.prompt], config, sample_seed(seed, r), r.prompt) for r in chunk]
            yield from map(Image.fromarray, render_all(scenes))

    return {"source": "truth", **to_dict(run.truth)}, draw


def _model(run: SceneEvaluation, checkpoint, untrained: bool) -> tuple[dict, Draw]:
    from megatron_nucleus.export.load import read_description
    from megatron_nucleus.inference.pipeline import load_pipeline

    config = run.generation
    dtype = DTYPES[config.dtype] if config.dtype else None
    pipeline = load_pipeline(
        checkpoint, config.device, dtype, config.codec_path, config.text_encoder_path, untrained=untrained
    )
    names = ("steps", "guidance", "shift", "height", "width")
    sampling = {name: getattr(config, name) for name in names}

    def draw(records: list[dict], seed: int, requests: list[Request]) -> Iterator[Image.Image]:
        return pipeline.stream(
            [records[r.prompt]["prompt"] for r in requests],
            seeds=[sample_seed(seed, r) for r in requests],
            batch_size=config.batch_size,
            progress=False,
            **sampling,
        )

    resolved = dataclasses.asdict(pipeline.settings(**sampling))
    for name in ("height", "width"):
        if resolved[name] < MIN_SIDE_PX:
            raise ConfigError(f"--{name} {resolved[name]}: the scorer needs at least {MIN_SIDE_PX} px")
    settings = {
        "source": "untrained" if untrained else "checkpoint",
        "checkpoint": fingerprint(read_description(checkpoint).path),
        "dtype": str(next(pipeline.model.parameters()).dtype).removeprefix("torch."),
        **{name: resolved[name] for name in names},
    }
    return settings, draw
