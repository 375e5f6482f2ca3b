"""What every reject reason, note and measure means, in a sentence for a person who never saw the code."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_nucleus.data.curation.recipe import Line
from megatron_nucleus.data.curation.stage import Stage
from megatron_nucleus.data.curation.stages.score import ScoreConfig

# reason: what it means, and the knobs that govern it. Reasons of the reader and the decoder come from any stage.
_ANYWHERE: dict[str, tuple[str, tuple[str, ...]]] = {
    "empty_file": ("The file has no content at all.", ()),
    "not_an_image": ("The first bytes are not those of any image format, whatever the name says.", ()),
    "unsupported_format": (
        "An image in a format that this program cannot read; convert it to JPEG or PNG.",
        (),
    ),
    "undecodable": ("The image is damaged or cut off: it cannot be decoded to the end.", ()),
    "decompression_bomb": (
        "The header promises more pixels than are allowed; it was not decoded, to protect the memory.",
        ("max_pixels",),
    ),
    "animated": ("An animation; a single picture is needed.", ()),
    "multipage": ("A file of several pages; a single picture is needed.", ()),
    "unsupported_mode": (
        "Pixels of a kind whose range of values is not known (floating-point, 32-bit, LAB).",
        (),
    ),
    "unreadable": ("The system gave an error instead of the bytes.", ()),
    "file_too_large": ("The file is larger than is read.", ("max_file_bytes",)),
    "missing_file": ("A table names a file that is not there.", ()),
    "not_a_file": ("What the name leads to is no plain file.", ()),
    "unsafe_path": ("A table names a path that leads out of the input folder.", ()),
    "bad_row": ("A row of a table that cannot be read as one.", ()),
    "damaged_table": ("The rest of this table cannot be read.", ()),
    "damaged_tar": ("The rest of this tar cannot be read: it is damaged or cut off.", ()),
    "compressed_tar": ("A compressed tar, in which nothing can be found by position; unpack it.", ()),
    "duplicate_member": ("A second file of the same name in one tar.", ()),
    "unsafe_member": ("A file in a tar whose path leads out of it, or that is no plain file.", ()),
    "process_crash": (
        "Handling this image ended the whole process; it was set aside, and the work went on.",
        (),
    ),
}
_BUILT_IN: dict[str, tuple[str, tuple[str, ...]]] = {
    "too_small": ("The shortest side is below the limit.", ("min_side_px",)),
    "too_large": ("The longest side is above the limit.", ("max_side_px",)),
    "extreme_aspect": (
        "Much longer than wide, or wider than long: a crop would lose most of it.",
        ("max_aspect",),
    ),
    "over_compressed": (
        "Compressed so hard that the damage shows.",
        ("min_jpeg_quality", "min_webp_quality"),
    ),
    "bad_caption": (
        "The caption cannot be used: not UTF-8, forbidden characters, too long, or no valid JSON.",
        (),
    ),
    "missing_caption": ("There is no caption, and no stage that writes one.", ("require_captions",)),
    "bad_tier": ("A tier or episode bucket beside the image that does not exist.", ()),
    "exact_duplicate": ("The same bytes as another image, which was kept in its place.", ()),
    "pixel_duplicate": ("The same pixels as another image, in another file.", ()),
    "near_duplicate": (
        "Almost the same picture as another one, which was kept in its place: resized, compressed again, or retouched.",
        ("near_max_bits", "near_verify_bits"),
    ),
    "blank": (
        "Almost nothing to see: one brightness and colour all over.",
        ("min_luma_std", "min_chroma_std"),
    ),
    "near_monochrome": ("Almost all of it is of one colour.", ("max_dominant_share",)),
    "blurry": (
        "Out of focus or enlarged: hardly any fine detail.",
        ("min_laplacian_variance", "min_high_frequency_share"),
    ),
    "low_aesthetic": ("A scorer found it less pleasing than the limit.", ()),
    "unsafe": ("A scorer took it for unsafe.", ()),
    "watermark": ("A scorer saw a watermark.", ()),
    "low_alignment": ("The captions do not fit the picture, a scorer says.", ()),
    "low_score": ("The score lies outside the limits.", ()),
    "below_tiers": ("The score is below that of the lowest tier.", ("tier_scorer", "tier_edges")),
    "unscored": ("There is no score to give it a tier by.", ("tier_scorer",)),
    "captioner_failed": ("The captioner gave no usable answer, after all attempts.", ()),
}
NOTES = {
    "exif_rotated": "stored sideways or mirrored; shown upright, as its EXIF entry says",
    "extension_mismatch": "the name's ending is another format's; the content decided",
    "icc_ignored": "a colour profile that is broken or of another colour space; shown as browsers show it",
    "caption_dropped": "one of several captions could not be used; the others stayed",
}
STAGES = {
    "inspect": "Reads every file once: is it whole, is it an image, is it within the limits of size and shape?",
    "exact_duplicates": "Of files with the same bytes or the same pixels, keeps one.",
    "blank": "Drops pictures that show nothing, or nothing but one colour.",
    "blur": "Drops pictures without fine detail.",
    "near_duplicates": "Of pictures that look almost the same, keeps the best one.",
    "score": "Gives every image a score, and drops those outside its limits.",
    "recaption": "Keeps captions that fit, has others written anew.",
    "tiers": "Gives every image a tier by its score, and a place in the course of training.",
}
VERDICTS = {
    "rejected": "usable, but against the policy",
    "quarantined": "damaged, or something went wrong",
}


class Explanation(NamedTuple):
    """text: a sentence. knobs: (name, value with unit) of what governs it."""

    text: str
    knobs: tuple[tuple[str, str], ...]


def explain(line: Line, reason: str, curation: Any) -> Explanation:
    """What a reason of a recipe's line means.

    line: the line whose stage dropped images for it. curation: the general limits (`settings.CurationConfig`).
    """
    stage, settings = line.load()
    if reason in _ANYWHERE:
        text, names = _ANYWHERE[reason]
    elif reason == f"{stage.name}_failed":
        text, names = (
            "The stage ran into an error on this image; another run with --retry-failed tries it again.",
            (),
        )
    elif reason in _BUILT_IN and _is_built_in(stage):
        text, names = _BUILT_IN[reason]
    else:
        text, names = first_line(stage.function), ()
    return Explanation(text, _knobs(names, settings, curation))


def what_it_does(line: Line) -> str:
    """What the stage of a recipe's line does, in a sentence."""
    stage, _ = line.load()
    if _is_built_in(stage) and stage.name in STAGES:
        return STAGES[stage.name]
    return first_line(stage.function)


def _is_built_in(stage: Stage) -> bool:
    return stage.function.__module__.startswith("megatron_nucleus.")


def first_line(function: Any) -> str:
    """First sentence of a function's documentation, or that there is none."""
    text = inspect.getdoc(function) or ""
    return (
        text.split("\n\n")[0].replace("\n", " ").replace("`", "").strip()
        or "A stage of your own, without a description."
    )


def setting_text(settings: Any, name: str) -> str:
    """A knob's value with its unit."""
    field = next(f for f in dataclasses.fields(settings) if f.name == name)
    value, unit = getattr(settings, name), field.metadata.get("unit", "")
    if isinstance(value, (tuple, list)):
        text = ", ".join(plain_number(v) for v in value)
    else:
        text = plain_number(value)
    if any(c.isdigit() for c in unit):  # a range
        return f"{text} ({unit})"
    return f"{text} {unit}".strip()


def plain_number(value: Any) -> str:
    """A setting's value as people write it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _knobs(names: Sequence[str], settings: Any, curation: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(settings, ScoreConfig) and not names:
        return tuple(
            (n, f"{v:g}") for n, v in zip(("min", "max"), settings.limits, strict=True) if v is not None
        )
    found = []
    for name in names:
        for owner in (settings, curation):
            if name in {f.name for f in dataclasses.fields(owner)}:
                found.append((name, setting_text(owner, name)))
                break
    return tuple(found)
