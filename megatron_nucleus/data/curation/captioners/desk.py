"""Between the stage and a captioner: what is asked, what is known already, what is paid, what is a caption."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from PIL import Image

from megatron_nucleus.data.curation import own_code
from megatron_nucleus.data.curation.captioners import prompts
from megatron_nucleus.data.curation.captioners.ledger import Ledger
from megatron_nucleus.data.curation.captioners.protocol import Captioner, Failure, Reply, Request, checked
from megatron_nucleus.data.curation.captioners.settings import CaptionerConfig
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.files import sha256_file


class Wish(NamedTuple):
    """A caption that the stage wants. image_sha256: of the original bytes, hex. picture: decodes it, RGB, upright;
    called only when no answer is kept. task, length, caption: as in `Request`."""

    image_sha256: str
    picture: Callable[[], Image.Image]
    task: str
    length: str
    caption: str | None = None


class Desk:
    """A captioner with its ledger."""

    def __init__(self, settings: CaptionerConfig, captioner: Captioner, ledger: Ledger):
        self.settings, self.captioner, self.ledger = settings, captioner, ledger

    def answer(self, wishes: Sequence[Wish]) -> list[Reply | Failure]:
        """One answer per wish, in order; from the ledger where it is kept, else from the captioner.

        Raises:
            ConfigError: ``max_cost`` is spent, or what `Captioner.caption` raises; all answers that came are kept.
        """
        texts = [prompts.render(wish.task, wish.length, wish.caption) for wish in wishes]
        keys = [self._key(wish, text) for wish, text in zip(wishes, texts, strict=True)]
        answers: list[Reply | Failure | None] = [self.ledger.find(key) for key in keys]
        open_ones = [at for at, answer in enumerate(answers) if answer is None]
        if open_ones:
            self.ledger.check_budget()
            requests = [self._request(wishes[at], texts[at]) for at in open_ones]
            for number, answer in self.captioner.caption(requests):
                at = open_ones[number]
                if isinstance(answer, Reply):
                    answer = checked(answer)
                self.ledger.record(keys[at], answer)
                answers[at] = answer
        if missing := [at for at, answer in enumerate(answers) if answer is None]:
            raise AssertionError(f"captioner {self.captioner.name} left {len(missing)} requests unanswered")
        return answers  # type: ignore[return-value]

    def _key(self, wish: Wish, prompt: str) -> str:
        """Equal keys, equal answers: all that a captioner sees, and who it is."""
        settings, captioner = self.settings, self.captioner
        seen = (settings.image_side_px, settings.max_new_tokens, settings.temperature, settings.dtype)
        facts = (settings.captioner, captioner.name, captioner.revision, *seen, wish.image_sha256, prompt)
        return hashlib.sha256("\0".join(map(str, facts)).encode()).hexdigest()

    def _request(self, wish: Wish, prompt: str) -> Request:
        picture = shrink(wish.picture(), self.settings.image_side_px)
        return Request(picture, wish.task, wish.length, wish.caption, prompt)


def shrink(picture: Image.Image, side_px: int) -> Image.Image:
    """The picture with its longest side at most ``side_px``; a smaller one stays as it is."""
    scale = side_px / max(picture.size)
    if scale >= 1:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def open_desk(settings: CaptionerConfig) -> Desk | None:
    """The desk of this process, made once per settings; None for captioner ``none``.

    Raises:
        ConfigError: no such class, model or key.
    """
    return None if settings.captioner == "none" else _open_desk(settings, os.getpid())


@functools.lru_cache(maxsize=2)
def _open_desk(settings: CaptionerConfig, process: int) -> Desk:
    # process: connections and models of the parent do not survive a fork.
    ledger = Ledger(settings)
    return Desk(settings, _class_of(settings)(settings, ledger), ledger)


def identity(settings: CaptionerConfig) -> str:
    """What decides the captions besides the settings: a local model's weights, or the file of your own class."""
    if settings.captioner == "transformers":
        from megatron_nucleus.data.curation.captioners.vision_language import revision_of

        return revision_of(settings)
    if ".py:" in settings.captioner:
        return sha256_file(own_code.absolute(settings.captioner, "captioner").rsplit(":", 1)[0])
    return ""


def check(settings: CaptionerConfig) -> None:
    """Find what would fail every caption before there is work; asks no server and opens no model.

    Raises:
        ConfigError: the key's variable is empty, urllib3 is missing, or the file has no such class.
    """
    if settings.captioner == "http":
        from megatron_nucleus.data.curation.captioners.openai_http import check_surroundings

        check_surroundings(settings)
    elif ".py:" in settings.captioner:
        _class_of(settings)


def gpus(settings: CaptionerConfig) -> float:
    """GPUs that one worker needs; ``device: auto`` uses one where there is one and asks for none."""
    return 1.0 if settings.captioner == "transformers" and settings.device == "cuda" else 0.0


def _class_of(settings: CaptionerConfig) -> Any:
    if settings.captioner == "http":
        from megatron_nucleus.data.curation.captioners.openai_http import HttpCaptioner

        return HttpCaptioner
    if settings.captioner == "transformers":
        from megatron_nucleus.data.curation.captioners.vision_language import VisionLanguageCaptioner

        return VisionLanguageCaptioner
    label = f"captioner {settings.captioner}"
    found = own_code.load(settings.captioner, label)
    if found is None:
        place, name = settings.captioner.rsplit(":", 1)
        raise ConfigError(f"{label}: {place} has no {name}")
    return found
