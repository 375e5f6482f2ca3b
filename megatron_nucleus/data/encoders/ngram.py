"""`NgramTextEncoder`: hashed word n-grams as frozen text features. No download, no training.

Every token carries fixed pseudo-random features of the n-grams around it, so "red circle" is one feature.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from megatron_nucleus.types import TextFeatures
from megatron_nucleus.utils.errors import ConfigError

# One slice of the text feature: n-gram of the tokens from ``left`` before to ``right`` after this one.
# ``content`` slices step over the function words below and are zero at them, so that "circle to the left of a
# square" gives "circle left square".
# (left, right, width, content)
NGRAM_SLICES: tuple[tuple[int, int, int, bool], ...] = (
    (0, 0, 48, False),  # the word
    (1, 0, 48, True),  # "red circle", seen at circle
    (0, 1, 40, True),  # "circle left", seen at circle
    (2, 0, 40, True),  # "left blue square", seen at square
    (1, 1, 40, True),  # "red circle left", seen at circle
    (2, 2, 40, True),  # "red circle left blue square", seen at left
)
FUNCTION_WORDS = ("a", "an", "the", "of", "to", "is", "are", "there", "that", "which", "it", "its")

# One CJK character is one token (no spaces there), otherwise runs of letters and digits, otherwise one sign.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_TOKEN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+(?:['’][^\W_{_CJK}]+)*|[^\w\s]|_", re.UNICODE)
_EMPTY, _EDGE = "\x00empty", "\x00edge"  # cannot be produced by the tokeniser


class NgramTextEncoder:
    """Frozen text features: every token carries pseudo-random signs of the word n-grams around it.

    A slice of the feature vector belongs to one window; the n-gram in the window is hashed (SHAKE-256) to a
    vector of signs, so every feature has RMS 1 and two different n-grams are nearly orthogonal. Nothing is
    learned, nothing is stored: equal text gives equal features on every machine.
    The empty caption is one token of its own (not zeros).

    Args:
        slices: (left, right, width, content) per slice, see `NGRAM_SLICES`; widths sum to ``dim``.
        max_tokens: longest text.
        function_words: words which content slices step over.
        cache_size: captions and, times 16, n-grams kept in memory (least recently used captions go first).

    Attributes:
        truncated: captions cut to max_tokens so far by ``encode(truncate=True)``.
    """

    name = "ngram"

    def __init__(
        self,
        slices: Sequence[Sequence] = NGRAM_SLICES,
        max_tokens: int = 128,
        function_words: Sequence[str] = FUNCTION_WORDS,
        cache_size: int = 16384,
        device: str | torch.device = "cpu",
    ):
        self.slices = tuple((int(a), int(b), int(w), bool(c)) for a, b, w, c in slices)
        if not self.slices or any(a < 0 or b < 0 or w < 1 for a, b, w, _ in self.slices):
            raise ConfigError(
                f"ngram text encoder: slices {self.slices} need left, right >= 0 and width >= 1"
            )
        if max_tokens < 1:
            raise ConfigError(f"encoders.max_text_tokens: must be at least 1, got {max_tokens}")
        self.dim = sum(width for _, _, width, _ in self.slices)
        self.max_tokens = max_tokens
        self.function_words = tuple(function_words)
        self.device = torch.device(device)
        self.truncated = 0
        self._skip = frozenset(function_words)
        self._cache_size = cache_size
        self._rows_of: OrderedDict[str, tuple[np.ndarray, bool]] = OrderedDict()
        self._forget_ngrams()

    def tokens(self, text: str) -> list[str]:
        """Lower-cased words and punctuation signs of the text, NFKC-normalised; empty text gives no token."""
        return _TOKEN.findall(unicodedata.normalize("NFKC", text).lower())

    def encode(self, texts: Sequence[str], truncate: bool = False) -> TextFeatures:
        """Features fp32 [B, L, dim], L = longest text of the batch; mask None when all are equally long.

        Args:
            truncate: cut longer texts to ``max_tokens`` and count them in ``truncated`` (training captions);
                otherwise they are errors (prompts).

        Raises:
            ConfigError: a text longer than ``max_tokens``, naming its length and the limit.
        """
        if self._ngrams > 16 * self._cache_size:
            self._forget_ngrams()
        rows = [self._rows(text, truncate) for text in texts]
        lengths = [len(r) for r in rows]
        longest = max(lengths, default=0)
        index_BLN = np.zeros((len(rows), longest, len(self.slices)), np.int32)  # row 0 of a table is zeros
        for i, r in enumerate(rows):
            index_BLN[i, : len(r)] = r
        features_BLU = np.empty((len(rows), longest, self.dim), np.float32)
        start = 0
        for n, (_, _, width, _) in enumerate(self.slices):
            features_BLU[:, :, start : start + width] = self._table[n][index_BLN[:, :, n]]
            start += width
        mask = None
        if len(set(lengths)) > 1:
            mask = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
            mask = mask.to(self.device)
        return TextFeatures(torch.from_numpy(features_BLU).to(self.device), mask)

    def spec(self) -> dict:
        """JSON description that rebuilds this encoder."""
        return {
            "name": self.name,
            "dim": self.dim,
            "max_tokens": self.max_tokens,
            "slices": [list(s) for s in self.slices],
            "function_words": list(self.function_words),
        }

    def _rows(self, text: str, truncate: bool) -> np.ndarray:
        """Table rows [L, slices] of one text."""
        cached = self._rows_of.get(text)
        if cached is None:
            tokens = self.tokens(text)
            cached = (self._lookup(tokens[: self.max_tokens]), len(tokens))
            self._rows_of[text] = cached
            if len(self._rows_of) > self._cache_size:
                self._rows_of.popitem(last=False)
        else:
            self._rows_of.move_to_end(text)
        rows, length = cached
        if length > self.max_tokens:
            if not truncate:
                raise ConfigError(
                    f"a prompt of {length} tokens is longer than the limit of {self.max_tokens}: "
                    f"{text[:60]!r}...; shorten it or raise encoders.max_text_tokens (--max-text-tokens)"
                )
            self.truncated += 1
        return rows

    def _lookup(self, tokens: list[str]) -> np.ndarray:
        if not tokens:
            return np.array([[self._row(n, (_EMPTY,)) for n in range(len(self.slices))]], np.int32)
        content = [t for t in tokens if t not in self._skip]
        rows = np.zeros((len(tokens), len(self.slices)), np.int32)
        for n, (left, right, _, content_only) in enumerate(self.slices):
            words = content if content_only else tokens
            padded = [_EDGE] * left + words + [_EDGE] * right
            at = 0
            for i, token in enumerate(tokens):
                if content_only and token in self._skip:
                    continue
                rows[i, n] = self._row(n, tuple(padded[at : at + left + right + 1]))
                at += 1
        return rows

    def _row(self, n: int, ngram: tuple[str, ...]) -> int:
        """Row of an n-gram in the table of slice ``n``; made on first use."""
        row = self._row_of[n].get(ngram)
        if row is None:
            row = len(self._row_of[n]) + 1
            self._row_of[n][ngram] = row
            self._ngrams += 1
            if row == len(self._table[n]):
                self._table[n] = np.concatenate([self._table[n], np.zeros_like(self._table[n])])
            left, right, width, content = self.slices[n]
            self._table[n][row] = _signs(f"{left},{right},{int(content)}\x1f" + "\x1f".join(ngram), width)
        return row

    def _forget_ngrams(self) -> None:
        self._ngrams = 0
        self._rows_of.clear()
        self._row_of: list[dict[tuple[str, ...], int]] = [{} for _ in self.slices]
        self._table = [np.zeros((256, width), np.int8) for _, _, width, _ in self.slices]


def _signs(key: str, width: int) -> np.ndarray:
    """``width`` signs (-1 or 1, int8), a pure function of the key."""
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(key.encode()).digest((width + 7) // 8), np.uint8))
    return (2 * bits[:width].astype(np.int8)) - 1
