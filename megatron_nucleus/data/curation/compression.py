"""How hard a lossy file was compressed, from its header: the quantiser, not the size.

Bits per pixel do not tell: among the photographs of the tests, one takes fewer bits in a JPEG of quality 30 than
another of quality 10, and a clean diagram fewer than both. What makes blocks visible is the step by which coefficients
are rounded, and JPEG and lossy WebP have it in their headers. It is given as the quality setting (1..100) of the
reference encoder that uses this step. AVIF and JPEG 2000 keep it in the compressed stream, out of cheap reach.
A picture that was compressed hard once and saved again with care is not found.
"""

from __future__ import annotations

import struct

from PIL import Image

_JPEG_LOW = [
    8 * v + u for v in range(5) for u in range(5 - v)
]  # the 15 lowest frequencies make blocks visible
_JPEG_MEAN_AT_50 = 226 / 15  # of these entries of Table K.1, ITU-T T.81, which libjpeg scales by the quality
_VP8_MAX_QUANTISER = 127  # RFC 6386, 9.6


def quality(header: Image.Image, payload: bytes) -> float | None:
    """Quality of an opened file, 0..100; None where the format does not tell or is lossless.

    header: what `images.open_image` gives. payload: the whole file.
    """
    if header.format in ("JPEG", "MPO"):
        return _jpeg_quality(getattr(header, "quantization", {}))
    if header.format == "WEBP":
        quantiser = vp8_quantiser(payload)
        return None if quantiser is None else _webp_quality(quantiser)
    return None


def _jpeg_quality(tables: dict[int, list[int]]) -> float | None:
    """From the luminance table as libjpeg makes it: Table K.1 times 50 / quality, or times 2 - quality / 50."""
    table = tables.get(0)
    if table is None or len(table) != 64:
        return None
    scale = sum(table[i] for i in _JPEG_LOW) / len(_JPEG_LOW) / _JPEG_MEAN_AT_50
    return 50 / scale if scale > 1 else 100 - 50 * scale


def _webp_quality(quantiser: float) -> float:
    """As libwebp maps it: quantiser = 127 * (1 - (2/3 quality)^(1/3)) up to quality 0.75, then 2 * quality - 1."""
    linear = (1 - quantiser / _VP8_MAX_QUANTISER) ** 3
    return 100 * (1.5 * linear if linear < 0.5 else (linear + 1) / 2)


def vp8_quantiser(payload: bytes) -> float | None:
    """Quantiser index (0..127, mean over the segments) of a lossy WebP; None for others and for damaged headers."""
    start, length = _vp8_frame(payload)
    if length < 10 or payload[start] & 1 or payload[start + 3 : start + 6] != b"\x9d\x01\x2a":
        return None
    return _Bits(payload[start + 10 : start + length]).quantiser()


def _vp8_frame(payload: bytes) -> tuple[int, int]:
    """Offset and length of the chunk ``VP8 `` (WebP container specification); (0, 0) when there is none."""
    at = 12
    while at + 8 <= len(payload):
        kind, length = payload[at : at + 4], struct.unpack_from("<I", payload, at + 4)[0]
        if kind == b"VP8 ":
            return at + 8, min(length, len(payload) - at - 8)
        at += 8 + length + length % 2
    return 0, 0


class _Bits:
    """The first fields of a VP8 frame header (RFC 6386, 9.2-9.6): bits of even odds from the boolean decoder (7.3)."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 2
        self._value = int.from_bytes(data[:2].ljust(2, b"\0"), "big")
        self._range, self._shift = 255, 0

    def _bit(self) -> int:
        split = 1 + ((self._range - 1) >> 1)
        bit = int(self._value >= split << 8)
        if bit:
            self._value -= split << 8
            self._range -= split
        else:
            self._range = split
        while self._range < 128:
            self._value, self._range, self._shift = self._value << 1, self._range << 1, self._shift + 1
            if self._shift == 8:
                self._shift = 0
                self._value |= self._data[self._at] if self._at < len(self._data) else 0
                self._at += 1
        return bit

    def _number(self, bits: int) -> int:
        value = 0
        for _ in range(bits):
            value = value << 1 | self._bit()
        return value

    def _optional(self, bits: int) -> int | None:
        """A flag, then magnitude and sign where it is set."""
        if not self._bit():
            return None
        magnitude = self._number(bits)
        return -magnitude if self._bit() else magnitude

    def quantiser(self) -> float:
        self._number(2)  # colour space, clamping
        segments, absolute = self._segments()
        self._number(1 + 6 + 3)  # loop filter: type, level, sharpness
        if self._bit() and self._bit():  # adjustments by reference and mode, updated here
            for _ in range(8):
                self._optional(6)
        self._number(2)  # number of partitions
        base = self._number(7)
        steps = [value if absolute else base + value for value in segments] or [base]
        return sum(min(max(step, 0), _VP8_MAX_QUANTISER) for step in steps) / len(steps)

    def _segments(self) -> tuple[list[int], bool]:
        """Quantisers of the segments and whether they replace the base one; none when there are no segments."""
        if not self._bit():
            return [], False
        new_map, new_values = self._bit(), self._bit()
        values, absolute = [], False
        if new_values:
            absolute = bool(self._bit())
            values = [self._optional(7) or 0 for _ in range(4)]
            for _ in range(4):
                self._optional(6)  # loop filter
        if new_map:
            for _ in range(3):
                if self._bit():
                    self._number(8)
        return values, absolute
