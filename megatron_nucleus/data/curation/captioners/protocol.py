"""What a captioner is: pictures with a prompt in, texts with their cost out.

One of your own is a class in a file, named in the recipe as ``captioner: FILE.py:CLASS``:

    class Shouting:
        name, revision = "shouting", "1"

        def __init__(self, settings, ledger):
            pass

        def caption(self, requests):
            for number, request in enumerate(requests):
                yield number, Reply("A PICTURE " + "OF SOMETHING " * (request.length != "short"))
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from PIL import Image

MAX_CHARACTERS = 10_000  # own choice: ten times a detailed caption; more is a model that repeats itself
# How instruction-following models open when they decline; own list.
_REFUSALS = (
    *("i'm sorry", "i am sorry", "sorry,", "i apologize", "i apologise", "as an ai", "as a language model"),
    *("i cannot ", "i can't ", "i can not ", "i'm unable", "i am unable", "i'm not able", "i am not able"),
)


class Request(NamedTuple):
    """One caption wanted.

    picture: RGB, upright, longest side at most ``image_side_px``. task: ``refine`` or ``synthesise``. length: one of
    `captions.LENGTH_CLASSES`. caption: the text to refine, else None. prompt: all of it in words (`prompts.render`).
    """

    picture: Image.Image
    task: str
    length: str
    caption: str | None
    prompt: str


class Reply(NamedTuple):
    """What a captioner wrote.

    tokens_in, tokens_out: as its tokenizer counts them, the picture's included; 0 where it has none. revision: what
    the server says it ran, where that is more exact than `Captioner.revision`. complete: False when the longest
    allowed answer cut it off.
    """

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    revision: str | None = None
    complete: bool = True


class Failure(NamedTuple):
    """No caption for this picture. detail: for people. tokens_*: of answers that were paid for all the same."""

    detail: str
    tokens_in: int = 0
    tokens_out: int = 0


class Captioner(Protocol):
    """A model that writes captions; made once per process as ``class(settings, ledger)``.

    name, revision: stored with every caption. Equal requests should give equal texts.
    """

    name: str
    revision: str | None

    def caption(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply | Failure]]:
        """One result per request with its number, in any order, each as soon as it is there: so that what is paid
        for is kept when the process dies before the last.

        Raises:
            ConfigError: what would fail every request, such as a wrong key or an unknown model.
        """
        ...


def checked(reply: Reply) -> Reply | Failure:
    """The reply with white space collapsed, or why it is no caption. Nothing else is repaired."""
    failure = _problem(reply)
    if failure:
        return Failure(failure, reply.tokens_in, reply.tokens_out)
    return reply._replace(text=" ".join(reply.text.split()))


def _problem(reply: Reply) -> str | None:
    text = reply.text.strip()
    if not text:
        return "empty text"
    if len(text) > MAX_CHARACTERS:
        return f"{len(text)} characters, limit {MAX_CHARACTERS}"
    if not reply.complete:
        return f"cut off after {reply.tokens_out} tokens; raise max_new_tokens"
    for character in text:
        kind = unicodedata.category(character)
        if kind in ("Cc", "Cs") and character not in "\t\n\r":
            return f"holds the control character U+{ord(character):04X}"
    if text.lower().replace("’", "'").startswith(_REFUSALS):
        return f"refused: {text[:100]!r}"
    return None
