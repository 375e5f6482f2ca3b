"""Captions from a vision-language model of the transformers library, run in this process.

Any model of `AutoModelForImageTextToText` that follows a chat template: a local folder, or a hub id with the commit
to use. Decoding is greedy. torchvision is not needed: transformers prepares pixels with Pillow where it is absent,
for all models but those whose processor also takes videos (Qwen-VL, SmolVLM, InternVL, LLaVA-OneVision); serve those
over http.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_nucleus.data.curation.captioners.ledger import Ledger
from megatron_nucleus.data.curation.captioners.protocol import Failure, Reply, Request
from megatron_nucleus.data.curation.captioners.settings import CaptionerConfig
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.files import sha256_file

_COMMIT = re.compile(r"[0-9a-f]{40}")


class VisionLanguageCaptioner:
    """See the module docstring."""

    def __init__(self, settings: CaptionerConfig, ledger: Ledger):
        """Loads the model. ledger: not used, an own model keeps its own pace.

        Raises:
            ConfigError: no such model, one that cannot be loaded here, or one without a chat template.
        """
        assert settings.model is not None
        local = Path(settings.model).is_dir()
        self.name = Path(settings.model).resolve().name if local else settings.model
        self.revision: str | None = revision_of(settings)
        self._settings = settings
        self._processor, self._model = _load(settings, None if local else settings.model_revision)
        self._device = next(self._model.parameters()).device
        tokenizer = self._processor.tokenizer
        self._specials = tuple(
            {*tokenizer.all_special_tokens, getattr(self._processor, "image_token", None)} - {None}
        )
        ends = self._model.generation_config.eos_token_id
        self._ends = tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)

    def caption(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply | Failure]]:
        """As in `Captioner`, ``captioner_batch`` pictures at a time."""
        numbers = []
        for number, request in enumerate(requests):
            # Inside a caption such a text would be read as the token itself: a second picture, the end of a turn.
            if found := [token for token in self._specials if token in request.prompt]:
                yield number, Failure(f"the caption to refine holds {found[0]!r}, a mark of this model")
            else:
                numbers.append(number)
        for start in range(0, len(numbers), self._settings.captioner_batch):
            batch = numbers[start : start + self._settings.captioner_batch]
            yield from zip(batch, self._generate([requests[n] for n in batch]), strict=True)

    def _generate(self, requests: Sequence[Request]) -> list[Reply]:
        import torch

        inputs = self._inputs(requests)
        with torch.inference_mode():
            ids_BL = self._model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=self._settings.max_new_tokens,
                pad_token_id=self._processor.tokenizer.pad_token_id,
            )
        replies = []
        new_BL = ids_BL[:, inputs["input_ids"].shape[1] :].tolist()
        for new, prompt_tokens in zip(new_BL, inputs["attention_mask"].sum(dim=1).tolist(), strict=True):
            end = next((at for at, token in enumerate(new) if token in self._ends), None)
            new = new if end is None else new[: end + 1]
            text = self._processor.tokenizer.decode(new, skip_special_tokens=True)
            replies.append(Reply(text, prompt_tokens, len(new), self.revision, complete=end is not None))
        return replies

    def _inputs(self, requests: Sequence[Request]) -> Any:
        """Token ids and masks [B, L], padded on the left so that all answers begin at one place, and pixels."""
        talks = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": request.picture},
                        {"type": "text", "text": request.prompt},
                    ],
                }
            ]
            for request in requests
        ]
        inputs = self._processor.apply_chat_template(
            talks,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"return_tensors": "pt", "padding": True, "padding_side": "left"},
        )
        return inputs.to(self._device, dtype=self._model.dtype)  # ids stay whole numbers


def _load(settings: CaptionerConfig, revision: str | None) -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(f"captioner transformers: {error}; pip install 'megatron-nucleus[hf]'") from error
    from megatron_nucleus.utils.devices import DTYPES, pick_device

    device = pick_device(settings.device)
    kind = settings.dtype
    dtype = DTYPES[kind] if kind != "auto" else torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        processor = transformers.AutoProcessor.from_pretrained(settings.model, revision=revision)
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            settings.model, revision=revision, dtype=dtype
        )
    except Exception as error:  # the library raises nearly any type for a missing file or package
        reason = " ".join(str(error).split())[:200]
        hint = "; its processor also takes videos: serve it over http" if "orchvision" in reason else ""
        raise ConfigError(f"model {settings.model}: cannot be loaded ({reason}){hint}") from error
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or not getattr(processor, "chat_template", None):
        raise ConfigError(
            f"model {settings.model}: no chat template, so it cannot be told what to write; take a model that "
            "follows instructions"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked: any token will do
    return processor, model.to(device).eval()


def revision_of(settings: CaptionerConfig) -> str:
    """The commit of a hub model; of a local folder ``sha256:`` and 16 hex digits over its files' content.

    Raises:
        ConfigError: a folder with a ``model_revision``, which would hide other weights in it; or a hub id without a
            full commit, since a branch moves, and with it what captions say.
    """
    assert settings.model is not None
    folder, revision = Path(settings.model), settings.model_revision
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(
                f"model_revision {revision}: {settings.model} is a folder, whose revision is its checksum; leave it out"
            )
        return f"sha256:{_content_hash(str(folder.resolve()), _stamp(folder))}"
    if revision is None or not _COMMIT.fullmatch(revision):
        raise ConfigError(
            f"model {settings.model}: no such folder here; for a model of the hub set model_revision to the commit "
            "to use (40 hex digits)"
        )
    return revision


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@functools.lru_cache(maxsize=8)
def _content_hash(folder: str, stamp: tuple[tuple[str, int, int], ...]) -> str:
    """stamp: names, sizes and times of change: the key of the cache, since weights take a while to read."""
    digest = hashlib.sha256()
    for name, _, _ in stamp:
        digest.update(f"{name}\0{sha256_file(Path(folder) / name)}\n".encode())
    return digest.hexdigest()[:16]
