"""Models with one tower for pictures and one for texts (SigLIP, SigLIP 2, CLIP), through transformers.

torch and transformers are imported when a model is opened, not before. torchvision is never used: pictures are
prepared by transformers' Pillow processors, so the vectors do not depend on what else is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from megatron_nucleus.data.curation.scorers import model_files
from megatron_nucleus.data.curation.scorers.protocol import Scored
from megatron_nucleus.utils.errors import ConfigError, DataError, nearest

_PROCESSORS = {
    "siglip": "SiglipImageProcessorPil",
    "siglip2": "Siglip2ImageProcessorPil",
    "clip": "CLIPImageProcessorPil",
}
MODEL_TYPES = tuple(_PROCESSORS)
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
GPU_BATCH = 32  # own choice; a batch of the stage that calls has as many


class DualEncoder:
    """`FeatureModel` over a SigLIP, SigLIP 2 or CLIP model, with its text tower.

    On a CPU pictures and texts go one by one: batches are no faster there (SigLIP base, one thread: about 0.7 s a
    picture either way), and a vector that never meets others does not change with them by a bit.
    On a GPU batches of up to 32 agree with that to rounding.

    Args:
        model: folder as transformers saves it, or a hub id. revision: the commit of a hub id.
        device: auto (CUDA where it is there), cpu or cuda.
        dtype: of the network; auto is float32 on a CPU and float16 on a GPU (finer than bfloat16 at the same speed;
            an overflow is not finite, and then the score is refused). Vectors are normalised in float32.

    Raises:
        ConfigError: no such model, transformers is missing, or a model of another kind.
        DataError: a damaged folder, or weights that do not fit.
    """

    def __init__(self, model: str, revision: str = "", device: str = "auto", dtype: str = "auto"):
        files = model_files.locate(model, revision)
        self.name, self.revision, self.checksum = files.name, files.revision, files.checksum
        self._folder = files.folder
        self._torch, self._transformers = _libraries(model)
        self.family = _model_type(files)
        self._device = choose_device(device)
        self._dtype = _dtype(self._torch, dtype, self._device)
        self._batch_size = GPU_BATCH if self._device == "cuda" else 1
        self._network = self._load_network()
        self._processor = self._load_processor()
        self._tokenizer: Any = None
        self.side_px = _side_px(self._processor, files)
        config = self._network.config
        self.dim = int(config.projection_dim if self.family == "clip" else config.vision_config.hidden_size)

    def embed(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors of pictures, float32 [pictures, dim]."""
        return self._in_batches(pictures, self._picture_features)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts, float32 [texts, dim]. What is longer than the text tower is cut (SigLIP: 64 tokens).

        Raises:
            ConfigError: the model's tokenizer cannot be opened.
        """
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return self._in_batches(texts, self._text_features)

    def logits(self, cosines: np.ndarray) -> np.ndarray:
        """Cosines -> the logits that the model was trained on, float64 of the same shape."""
        return math.exp(self._scale) * cosines.astype(np.float64) + self._bias

    def alignments(self, cosines: np.ndarray) -> np.ndarray:
        """Cosines -> how well picture and text agree, of the same shape.

        SigLIP: the probability that they belong together, sigmoid(scale * cosine + bias). CLIP was trained on
        comparisons within a batch and has no such probability: its cosine, as it is.
        """
        if self.family == "clip":
            return cosines
        return 1 / (1 + np.exp(-self.logits(cosines)))

    def _in_batches(self, items: Sequence[Any], features: Any) -> np.ndarray:
        size = self._batch_size
        if not items:
            return np.zeros((0, self.dim), dtype=np.float32)
        with self._torch.inference_mode():
            batches = [features(items[i : i + size]) for i in range(0, len(items), size)]
            vectors = self._torch.cat(batches)
            return (vectors / vectors.norm(dim=-1, keepdim=True)).cpu().numpy()

    def _picture_features(self, pictures: Sequence[Image.Image]) -> Any:
        batch = self._processor(images=list(pictures), return_tensors="pt").to(self._device)
        batch["pixel_values"] = batch["pixel_values"].to(self._dtype)
        return _pooled(self._network.get_image_features(**batch)).float()

    def _text_features(self, texts: Sequence[str]) -> Any:
        limit = int(self._network.config.text_config.max_position_embeddings)
        common = {"truncation": True, "max_length": limit, "padding_side": "right", "return_tensors": "pt"}
        if self.family == "clip":
            batch = self._tokenizer(list(texts), padding=True, **common)
            mask = {"attention_mask": batch["attention_mask"].to(self._device)}
        else:
            # SigLIP was trained on lower-case texts, padded on the right to the full length; it sees the padding.
            texts = [text.lower() for text in texts]
            batch, mask = self._tokenizer(texts, padding="max_length", **common), {}
        ids = batch["input_ids"].to(self._device)
        return _pooled(self._network.get_text_features(input_ids=ids, **mask)).float()

    def _load_network(self) -> Any:
        try:
            with _no_bars(self._transformers):
                network, loaded = self._transformers.AutoModel.from_pretrained(
                    self._folder,
                    dtype=self._torch.float32,
                    local_files_only=True,
                    use_safetensors=True,
                    output_loading_info=True,
                )
        except Exception as error:  # transformers raises many types on damaged folders
            raise DataError(
                f"{self._folder}: cannot be opened ({_first_line(error)}); copy it again"
            ) from error
        wrong = sorted(
            str(key) for kind in ("missing_keys", "mismatched_keys") for key in loaded.get(kind, ())
        )
        if wrong:  # transformers would fill them with random numbers
            raise DataError(
                f"{self._folder}: {len(wrong)} weights are missing or misshapen, {wrong[0]} first"
            )
        self._scale = network.logit_scale.item()
        self._bias = 0.0 if self.family == "clip" else network.logit_bias.item()
        return network.eval().to(device=self._device, dtype=self._dtype)

    def _load_processor(self) -> Any:
        # By name: AutoImageProcessor asks for torchvision in some versions.
        try:
            processor = getattr(self._transformers, _PROCESSORS[self.family])
            return processor.from_pretrained(self._folder, local_files_only=True)
        except Exception as error:
            raise DataError(
                f"{self._folder}: its preprocessor_config.json cannot be used ({_first_line(error)})"
            ) from error

    def _load_tokenizer(self) -> Any:
        try:
            return self._transformers.AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        except Exception as error:
            raise ConfigError(
                f"the tokenizer of {self._folder} cannot be opened ({_first_line(error)}); texts need it. "
                "One kept as spiece.model needs the package sentencepiece"
            ) from error


class PromptScorer:
    """`Scorer` without training: the probability that a picture fits ``prompts`` rather than ``against``.

    The softmax over the model's logits of all prompts, summed over the first group: in [0, 1].
    """

    def __init__(self, encoder: DualEncoder, prompts: Sequence[str], against: Sequence[str]):
        self._encoder, self._wanted = encoder, len(prompts)
        self._texts = encoder.embed_texts([*prompts, *against])
        texts = hashlib.sha256(json.dumps([list(prompts), list(against)]).encode()).hexdigest()[:8]
        self.name, self.revision, self.side_px = (
            encoder.name,
            f"{encoder.revision}+prompts:{texts}",
            encoder.side_px,
        )

    def score(self, pictures: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> list[Scored]:
        """See `Scorer`; captions are not looked at."""
        logits = self._encoder.logits(_cosines(self._encoder.embed(pictures), self._texts))
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares = weights[:, : self._wanted].sum(axis=1) / weights.sum(axis=1)
        return [Scored(float(share)) for share in shares]


class AlignmentScorer:
    """`Scorer` of how well captions fit their picture (`DualEncoder.alignments`); an image's value is its best one."""

    def __init__(self, encoder: DualEncoder):
        self._encoder = encoder
        self.name, self.revision, self.side_px = encoder.name, encoder.revision, encoder.side_px

    def score(self, pictures: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> list[Scored]:
        """See `Scorer`; an image without captions has no value."""
        vectors = self._encoder.embed(pictures)
        texts = self._encoder.embed_texts([text for own in captions for text in own])
        results, start = [], 0
        for vector, own in zip(vectors, captions, strict=True):
            cosines = _cosines(vector[None], texts[start : start + len(own)])[0]
            start += len(own)
            fits = tuple(float(fit) for fit in self._encoder.alignments(cosines))
            results.append(Scored(max(fits, default=None), fits))
        return results


def choose_device(name: str) -> str:
    """``cpu`` or ``cuda``. Raises ConfigError where cuda is asked for and absent."""
    import torch

    if name not in DEVICES:
        raise ConfigError(f"device {name}: one of {', '.join(DEVICES)}{nearest(name, DEVICES)}")
    if name == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if name == "cuda":
        raise ConfigError("device cuda: torch finds no CUDA device here; use auto or cpu")
    return "cpu"


def _cosines(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """float32 [pictures, texts] of unit vectors; element by element, so that no pair depends on the others."""
    return (pictures[:, None, :] * texts[None, :, :]).sum(axis=-1)


def _libraries(model: str) -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except Exception as error:  # a broken optional package may raise anything at import
        raise ConfigError(
            f"model {model} needs the packages torch and transformers: {_first_line(error)}"
        ) from error
    return torch, transformers


@contextlib.contextmanager
def _no_bars(transformers: Any) -> Iterator[None]:
    """Every worker of a pool opens the model: without a progress bar each."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _dtype(torch: Any, name: str, device: str) -> Any:
    if name not in DTYPES:
        raise ConfigError(f"dtype {name}: one of {', '.join(DTYPES)}{nearest(name, DTYPES)}")
    return getattr(torch, {"cpu": "float32", "cuda": "float16"}[device] if name == "auto" else name)


def _model_type(files: model_files.ModelFiles) -> str:
    found = model_files.read_config(files.folder).get("model_type")
    if found not in MODEL_TYPES:
        raise ConfigError(
            f"model {files.name}: its model_type is {found!r}, known are {', '.join(MODEL_TYPES)}; "
            "for others write a scorer of your own (kind: FILE.py:CLASS)"
        )
    return found


def _side_px(processor: Any, files: model_files.ModelFiles) -> int:
    """Twice the side that the model sees: a draft decode then leaves the last factor of two to a good filter."""
    size = getattr(processor, "size", None) or {}
    sides = [size.get(key) for key in ("height", "width", "shortest_edge")]
    patches = getattr(processor, "max_num_patches", None)
    if patches:  # SigLIP 2 with free aspect: as many pixels as that many patches have
        sides.append(math.ceil(math.sqrt(patches)) * processor.patch_size)
    known = [int(side) for side in sides if side]
    if not known:
        raise DataError(f"{files.folder}: its image processor names no size")
    return 2 * max(known)


def _pooled(output: Any) -> Any:
    """The vectors; transformers before 5 gave them bare."""
    return getattr(output, "pooler_output", output)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
