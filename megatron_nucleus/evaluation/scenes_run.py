"""The embedded benchmark from prompts to scores: generate (or draw the truth, or take a folder), then judge."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from megatron_nucleus.data.scenes import SceneConfig, benchmark_prompts, render_all, scene_for
from megatron_nucleus.evaluation.detector import MIN_SIDE_PX
from megatron_nucleus.evaluation.sample_store import Request, SampleStore, fingerprint
from megatron_nucleus.evaluation.scenes import score_samples, summarise
from megatron_nucleus.utils.config import knob, to_dict
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.files import write_atomic, write_json_atomic
from megatron_nucleus.utils.rng import key64

DTYPES = ("float32", "bfloat16", "float16")
_TRUTH_CHUNK = 256  # scenes drawn at once


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Which prompts, and how many pictures of each (not used with --images)."""

    prompts_per_skill: int = knob(
        50, "prompts of each of the six skills, and of the two held-out-pair skills"
    )
    samples_per_prompt: int = knob(1, "pictures of each prompt")
    seed: int = knob(0, "order of the prompts, and noise of the pictures")
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
    dtype: str | None = knob(None, "precision of the model; none = as stored", choices=DTYPES)
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


Draw = Callable[[list[Request]], Iterator[Image.Image]]


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
        images: score this folder (GenEval's layout) as it is.
        checkpoint: generate with this checkpoint; ``untrained`` draws fresh weights of the same architecture.
        truth: draw scenes of which the prompts are true: the ceiling of the score.
        output: folder for the pictures (kept and continued), ``results.jsonl`` and ``results.json``; None keeps
            nothing.

    Returns:
        `evaluation.scenes.summarise`, with ``source`` and, where pictures were made, ``generated``.

    Raises:
        ConfigError: not exactly one source, settings of another source, or a folder that does not fit.
        DataError: damaged pictures, metadata or checkpoint.
    """
    _check_source(run, images, checkpoint, truth, untrained)
    if images is not None:
        result, rows = _score(Path(images), progress)
        result["source"] = "images"
    else:
        with contextlib.ExitStack() as stack:
            folder = Path(output or stack.enter_context(tempfile.TemporaryDirectory(prefix="scenes-")))
            made = _fill(run, folder, checkpoint, untrained, progress)
            result, rows = _score(folder, progress)
        result["source"] = "truth" if truth else "untrained" if untrained else "checkpoint"
        result["generated"] = made
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
            if getattr(value, field.name) != field.default:
                flag = "--" + field.name.replace("_", "-")
                raise ConfigError(
                    f"{flag} {getattr(value, field.name)}: is used with {owner}, not with {given[0]}"
                )


def _score(folder: Path, progress: bool) -> tuple[dict, list[dict]]:
    scores = score_samples(folder, progress)
    return summarise((s.metadata, s.result.correct) for s in scores), [s.row() for s in scores]


def _fill(run: SceneEvaluation, folder: Path, checkpoint, untrained: bool, progress: bool) -> int:
    """Make the pictures that are missing in ``folder``; returns how many."""
    prompts = run.prompts
    records = benchmark_prompts(prompts.prompts_per_skill, prompts.seed, prompts.max_objects)
    if checkpoint is None:
        settings, draw = _truth(run, records)
    else:
        settings, draw = _model(run, records, checkpoint, untrained)
    settings = {"benchmark": "scenes", "seed": prompts.seed, **settings}
    store = SampleStore(folder, records, prompts.samples_per_prompt, settings)
    missing = store.missing()
    if missing:
        bar = tqdm(draw(missing), "pictures", len(missing), unit="image", disable=None if progress else True)
        for request, picture in zip(missing, bar, strict=True):
            store.add(request, picture)
    return len(missing)


def sample_seed(seed: int, request: Request) -> int:
    """Seed of one picture: depends on neither the number of prompts nor that of samples."""
    return key64(seed, request.prompt, f"evaluate sample {request.sample}")


def _truth(run: SceneEvaluation, records: list[dict]) -> tuple[dict, Draw]:
    config = SceneConfig(
        tier=run.truth.tier, scene_sizes=run.truth.scene_sizes, max_objects=run.prompts.max_objects
    )

    def draw(requests: list[Request]) -> Iterator[Image.Image]:
        for start in range(0, len(requests), _TRUTH_CHUNK):
            chunk = requests[start : start + _TRUTH_CHUNK]
            seed = functools.partial(sample_seed, run.prompts.seed)
            scenes = [scene_for(records[r.prompt], config, seed(r), r.prompt) for r in chunk]
            yield from map(Image.fromarray, render_all(scenes))

    return {"source": "truth", **to_dict(run.truth)}, draw


def _model(run: SceneEvaluation, records: list[dict], checkpoint, untrained: bool) -> tuple[dict, Draw]:
    import torch

    from megatron_nucleus.export.load import read_description
    from megatron_nucleus.inference.pipeline import load_pipeline

    config = run.generation
    dtype = getattr(torch, config.dtype) if config.dtype else None
    pipeline = load_pipeline(
        checkpoint, config.device, dtype, config.codec_path, config.text_encoder_path, untrained=untrained
    )
    names = ("steps", "guidance", "shift", "height", "width")
    sampling = {name: getattr(config, name) for name in names}

    def draw(requests: list[Request]) -> Iterator[Image.Image]:
        return pipeline.stream(
            [records[r.prompt]["prompt"] for r in requests],
            seeds=[sample_seed(run.prompts.seed, r) for r in requests],
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
