"""What a stage of curation is: a function over rows, what it reads and adds, and why it may drop a row.

A *row* is one image on its way through curation: columns in a table, its bytes and pixels on demand. A stage is a
function with a decorator; it needs no knowledge of files, processes or resuming:

    @dataclasses.dataclass(frozen=True)
    class Portraits:
        \"\"\"Which portraits are kept.\"\"\"

        max_height_over_width: float = knob(1.8, "taller images are rejected")

    @row_stage(Portraits, reads=("width_px", "height_px"), rejects=("tall_portrait",))
    def portraits(rows, config):
        return [
            Drop("tall_portrait") if row["height_px"] > config.max_height_over_width * row["width_px"] else {}
            for row in rows
        ]

and one line in a recipe: ``- my_stages.py:portraits``. A *row stage* sees a few rows at a time and no others; a
*corpus stage* sees the columns of all rows (duplicates, ranks). What both promise: equal rows and settings give
equal results, whatever the order of work and the number of processes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pyarrow as pa
from PIL import Image

from megatron_nucleus.data import images
from megatron_nucleus.data.curation import readers
from megatron_nucleus.utils.config import to_dict

REFERENCE_COLUMNS = (
    "item",
    "container",
    "offset",
    "length",
)  # where a row's bytes lie; every stage may use them


@dataclasses.dataclass(frozen=True)
class NoSettings:
    """Of a stage that has none."""


class Drop(NamedTuple):
    """A stage's verdict on a row that ends here. reason: one that the stage declares. detail: for people.

    id, width_px, height_px: what the stage found out about the picture that no stage before wrote, as `inspect` means
    the columns of these names; None: nothing new. So the list of what was not kept knows them.
    """

    reason: str
    detail: str = ""
    id: str | None = None
    width_px: int | None = None
    height_px: int | None = None


class Row(Mapping[str, Any]):
    """The columns that a stage asked for, by name, and the image's bytes and pixels."""

    def __init__(self, values: dict[str, Any], source: PayloadSource):
        self._values, self._source = values, source
        self._payload: bytes | None = None

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def payload(self) -> bytes:
        """The original bytes, read once.

        Raises:
            UnusableImage: they can no longer be read; the runner quarantines the row.
        """
        if self._payload is None:
            self._payload = self._source.read(self._values)
        return self._payload

    def read(self, reference: Mapping[str, Any], max_bytes: int) -> bytes:
        """Other bytes of the input, such as a caption file's. reference: with container, offset and length.

        Raises:
            UnusableImage: they cannot be read, or are more than ``max_bytes``.
        """
        return self._source._replace(max_file_bytes=max_bytes).read(reference)

    def open(self) -> Image.Image:
        """The header: format, and size as stored; `images.decode_opened` goes on from there.

        Raises:
            UnusableImage: the bytes cannot be read, or are no image.
        """
        return images.open_image(self.payload(), self._source.max_pixels)

    def picture(self, side_px: int | None = None) -> Image.Image:
        """The picture in sRGB, upright. side_px: a size that is enough; a JPEG is then decoded at a fraction of its
        size (shortest side at least ``side_px`` where the original has that), which is several times faster.

        Raises:
            UnusableImage: it cannot be decoded; the runner quarantines the row.
        """
        return self._source.decode(self.payload(), side_px)


class PayloadSource(NamedTuple):
    """Where rows find their bytes. root: the input folder. max_*: limits as in `CurationConfig`."""

    root: str
    max_file_bytes: int
    max_pixels: int

    def read(self, row: Mapping[str, Any]) -> bytes:
        """Bytes that a row's reference columns point to."""
        reference = readers.Reference(row["container"], row["offset"], row["length"])
        return readers.read_reference(self.root, reference, self.max_file_bytes)

    def decode(self, payload: bytes, side_px: int | None) -> Image.Image:
        """Decode as `Row.picture` says."""
        opened = images.open_image(payload, self.max_pixels)
        draft_px = None
        if side_px is not None:
            scale = side_px / min(opened.size)
            # Rounded down: one pixel too many makes Pillow decode at the next larger fraction.
            draft_px = (int(opened.width * scale), int(opened.height * scale)) if scale < 1 else None
        return images.decode_opened(opened, draft_px).image


RowFunction = Callable[[Sequence[Row], Any], Sequence["Mapping[str, Any] | Drop"]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A declared stage; made by `row_stage` or `corpus_stage`.

    Attributes:
        name: of the function. function: what the author wrote. kind: ``rows`` or ``corpus``.
        settings: frozen dataclass of knobs. reads: columns that it needs from the stages before it.
        adds: columns that it adds or replaces, with their types.
        rejects: reasons for images that are usable but against the policy. quarantines: for damaged ones.
        failures: for what may work another time (a model's server that does not answer); quarantined, and tried
            again by ``--retry-failed``. Every row stage has ``<name>_failed`` (its function raised on the row) and
            ``unreadable`` (the system gave an error instead of bytes).
        batch_rows: how many rows a call gets at most.
        identity: settings -> what else decides the result (revision of a model, checksum of a file of weights).
        gpus: settings -> GPUs that one worker needs.
        modules: modules and packages whose code the stage relies on, besides its own; it is part of its version.
        check: called once with the settings before any stage runs; raises ConfigError where something is missing
            that every row would need (a key in the environment). Quick, and asks no server.
        writes_scores: settings -> names of the entries that it adds to ``scores``; None where they show only in the
            rows. needs_scores: settings -> {setting: name of the score}, which a stage before it must write.
    """

    name: str
    function: Callable[..., Any]
    kind: str
    settings: type
    reads: tuple[str, ...]
    adds: pa.Schema
    rejects: tuple[str, ...]
    quarantines: tuple[str, ...]
    failures: tuple[str, ...]
    batch_rows: int
    identity: Callable[[Any], str]
    gpus: Callable[[Any], float]
    modules: tuple[ModuleType, ...]
    check: Callable[[Any], None]
    writes_scores: Callable[[Any], tuple[str, ...] | None]
    needs_scores: Callable[[Any], Mapping[str, str]]

    def declares(self, reason: str) -> bool:
        """Whether the stage may drop a row for this."""
        return reason in self.rejects or reason in {
            *self.quarantines,
            *self.failures,
            *images.UNUSABLE_REASONS,
            *readers.READ_REASONS,
        }

    def verdict(self, reason: str) -> str:
        """``rejected`` or ``quarantined``."""
        return "rejected" if reason in self.rejects else "quarantined"

    def version(self, settings: Any) -> str:
        """Hash of all that decides what the stage makes of its input: code, schema and `deciding` settings."""
        facts = [
            self.name,
            json.dumps(deciding(settings), sort_keys=True),
            repr([(field.name, str(field.type)) for field in self.adds]),
            repr((self.reads, self.rejects, self.quarantines, self.failures)),
            self.identity(settings),
        ]
        sources = [_source(module) for module in (sys.modules[self.function.__module__], *self.modules)]
        return hashlib.sha256("\0".join(facts + sources).encode()).hexdigest()[:16]


def deciding(settings: Any) -> dict[str, Any]:
    """A stage's settings as plain values, without those that its class lists in ``EXECUTION``: they decide how fast
    and where the work is done, not what comes out."""
    execution = getattr(settings, "EXECUTION", ())
    return {name: value for name, value in to_dict(settings).items() if name not in execution}


def _check_nothing(settings: Any) -> None:
    """Of a stage that needs nothing but rows."""


def _no_scores(settings: Any) -> Mapping[str, str]:
    """Of a stage that needs no score."""
    return {}


def _scores_unless_declared(adds: Mapping[str, pa.DataType]) -> Callable[[Any], tuple[str, ...] | None]:
    """Of a stage that does not say which scores it writes: none, or unknown ones where it writes that column."""
    names = None if "scores" in adds else ()
    return lambda settings: names


@functools.cache
def _source(module: ModuleType) -> str:
    """Source of a module; of a package that of all modules in it. Read once, near the time of the import."""
    if not hasattr(module, "__path__"):
        return inspect.getsource(module)
    files = sorted(file for folder in module.__path__ for file in Path(folder).glob("*.py"))
    return "\0".join(file.read_text(encoding="utf-8") for file in files)


def row_stage(
    settings: type = NoSettings,
    *,
    reads: tuple[str, ...] = (),
    adds: Mapping[str, pa.DataType] | None = None,
    rejects: tuple[str, ...] = (),
    quarantines: tuple[str, ...] = (),
    failures: tuple[str, ...] = (),
    batch_rows: int = 1,
    identity: Callable[[Any], str] = lambda settings: "",
    gpus: Callable[[Any], float] = lambda settings: 0.0,
    modules: tuple[ModuleType, ...] = (),
    check: Callable[[Any], None] = _check_nothing,
    writes_scores: Callable[[Any], tuple[str, ...] | None] | None = None,
    needs_scores: Callable[[Any], Mapping[str, str]] = _no_scores,
) -> Callable[[RowFunction], Stage]:
    """Declare a stage that looks at rows one by one or in small batches.

    The function is called as ``function(rows, settings)`` with 1 to ``batch_rows`` rows and returns one result per
    row: a mapping with exactly the columns of ``adds``, or a `Drop`. When it raises on a batch, each row is tried
    alone; a row on which it raises again is quarantined as ``<name>_failed`` (`UnusableImage`: with its own reason),
    and the work goes on.
    """

    if batch_rows < 1:
        raise ValueError(f"batch_rows {batch_rows}: at least 1")

    def declare(function: RowFunction) -> Stage:
        name = function.__name__
        return Stage(
            name=name,
            function=function,
            kind="rows",
            settings=settings,
            reads=reads,
            adds=pa.schema(dict(adds or {})),
            rejects=rejects,
            quarantines=quarantines,
            failures=(*failures, f"{name}_failed", "unreadable"),
            batch_rows=batch_rows,
            identity=identity,
            gpus=gpus,
            modules=modules,
            check=check,
            writes_scores=writes_scores or _scores_unless_declared(adds or {}),
            needs_scores=needs_scores,
        )

    return declare


class Update(NamedTuple):
    """What a corpus stage says about the rows of one part.

    drops: position [int32], reason, detail [string] of the rows that end here.
    changes: position and the columns of ``adds``; rows that are not listed keep the column they have, or get null.
    Both sorted by position, which is the column ``position`` of `Corpus.read`.
    """

    drops: pa.Table
    changes: pa.Table


DROPS_SCHEMA = pa.schema([("position", pa.int32()), ("reason", pa.string()), ("detail", pa.string())])


def corpus_stage(
    settings: type = NoSettings,
    *,
    reads: tuple[str, ...] = (),
    adds: Mapping[str, pa.DataType] | None = None,
    rejects: tuple[str, ...] = (),
    identity: Callable[[Any], str] = lambda settings: "",
    modules: tuple[ModuleType, ...] = (),
    check: Callable[[Any], None] = _check_nothing,
    writes_scores: Callable[[Any], tuple[str, ...] | None] | None = None,
    needs_scores: Callable[[Any], Mapping[str, str]] = _no_scores,
) -> Callable[[Callable[[Any, Any], Iterator[Update]]], Stage]:
    """Declare a stage that needs all rows at once, such as a search for duplicates.

    The function is called as ``function(corpus, settings)`` with a `store.Corpus` and yields one `Update` per part,
    in the order of ``corpus.parts``. It keeps memory bounded by the columns it reads, not by the images. An update that
    breaks the declaration (a reason, a column, a position of no row) stops the job with an error that names the stage,
    and so does what a function of your own raises. A row whose task of ``corpus.map`` ended its process may be dropped
    as ``process_crash``: it is quarantined, and ``--retry-failed`` runs the stage again.
    """

    def declare(function: Callable[[Any, Any], Iterator[Update]]) -> Stage:
        return Stage(
            name=function.__name__,
            function=function,
            kind="corpus",
            settings=settings,
            reads=reads,
            adds=pa.schema(dict(adds or {})),
            rejects=rejects,
            quarantines=(),
            failures=(),
            batch_rows=0,
            identity=identity,
            gpus=lambda settings: 0.0,
            modules=modules,
            check=check,
            writes_scores=writes_scores or _scores_unless_declared(adds or {}),
            needs_scores=needs_scores,
        )

    return declare
