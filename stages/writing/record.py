"""What a part of a run says about itself: whose it is, how many rows it has, and which of its chunk's rows failed.

In Parquet the record lies in the footer, beside the schema; for other formats in a file of its own. It is three texts,
so that what is seldom wanted need not be unpacked: `torchrelay.part` (JSON), `torchrelay.errors` and
`torchrelay.places` (zlib, base64). Pure.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from torchrelay.errors import ConfigError, DecodeError
from torchrelay.stages.writing.layout import Array, Layout, json_text

__all__ = ["PartFile", "PartId", "PartName", "PartRecord", "RowError", "pack_errors", "pack_places", "parse_name"]

PART_KEY: Final = "torchrelay.part"
ERRORS_KEY: Final = "torchrelay.errors"
PLACES_KEY: Final = "torchrelay.places"
MAX_TEXT = 4000
_FENCE = re.compile(r"[A-Za-z0-9_-]{1,100}")
_NAME = re.compile(r"part-(\d{8,15})(?:-r(\d{1,6}))?(?:-f([A-Za-z0-9_-]{1,100}))?")
_PLACE = re.compile(r"(?:_run/empty/)?part-[^/\\]{1,250}")


@dataclass(frozen=True, order=True, slots=True)
class PartId:
    """Which part of which run. `round` counts how often rows that had failed were tried again; each time makes a part
    with those rows alone."""

    run: str
    chunk: int
    round: int = 0

    @property
    def stem(self) -> str:
        """How the names of its files begin."""
        return f"part-{self.chunk:08d}" + (f"-r{self.round}" if self.round else "")

    def fenced_stem(self, fence: str) -> str:
        """The same where files cannot be made without replacing others: each writer has names of its own."""
        if not _FENCE.fullmatch(fence):
            raise ConfigError(f"a fence is 1 to 100 of A-Za-z0-9_-, not {fence!r:.60}")
        return f"{self.stem}-f{fence}"


class PartName(NamedTuple):
    chunk: int
    round: int
    fence: str  # empty where the name holds none


def parse_name(stem: str) -> PartName | None:
    """What the name of a part says; None for names of other files."""
    match = _NAME.fullmatch(stem)
    return None if match is None else PartName(int(match[1]), int(match[2] or 0), match[3] or "")


@dataclass(frozen=True, slots=True)
class RowError:
    """A row that failed: where it comes from, at which stage, and why. `error` is the name of the error's class."""

    source: int
    row: int
    stage: str
    error: str
    text: str
    attempts: int = 0
    key: Any = None
    """Its value of the key column, where the run has one and the row could be read."""


class PartFile(NamedTuple):
    """One file of a part: its final name, the temporary one it had, and its size."""

    name: str
    made_as: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class PartRecord:
    """`packed_errors` and `packed_places` are texts of `pack_errors` and `pack_places`."""

    part: PartId
    fence: str
    rows: int
    failed: int
    layouts: Mapping[str, Layout]
    files: tuple[PartFile, ...] = ()
    """Where the record lies beside them; a Parquet file holds its own."""
    packed_errors: str = ""
    packed_places: str = field(default="", repr=False)

    def encode(self) -> dict[str, str]:
        part = {
            **asdict(self.part),
            "fence": self.fence,
            "rows": self.rows,
            "failed": self.failed,
            "columns": {name: layout.encode() for name, layout in self.layouts.items()},
            "files": [list(file) for file in self.files],
        }
        texts = {PART_KEY: json.dumps(part), ERRORS_KEY: self.packed_errors, PLACES_KEY: self.packed_places}
        return {key: text for key, text in texts.items() if text}

    @classmethod
    def decode(cls, texts: Mapping[str, str]) -> PartRecord:
        """Raises DecodeError for what is no record."""
        text = texts.get(PART_KEY)
        if not isinstance(text, str):
            raise DecodeError("it holds no record of a torchrelay run")
        try:
            found = json.loads(text)
            return cls(
                PartId(str(found["run"]), int(found["chunk"]), int(found["round"])),
                str(found["fence"]),
                int(found["rows"]),
                int(found["failed"]),
                {name: Layout.decode(packed) for name, packed in found["columns"].items()},
                tuple(map(_part_file, found["files"])),
                texts.get(ERRORS_KEY, ""),
                texts.get(PLACES_KEY, ""),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DecodeError(f"the record of a part is not readable: {error!r:.100}", length=len(text)) from error

    def errors(self) -> list[RowError]:
        """Raises DecodeError."""
        if not self.packed_errors:
            return []
        try:
            return [RowError(*values) for values in json.loads(_unpack(self.packed_errors))]
        except (ValueError, TypeError) as error:
            raise DecodeError(f"the errors of a part are not readable: {error!r:.100}") from error

    def places(self) -> Array | None:
        """int64 [3, N]: source, row and part of each row; None where columns of the part hold them."""
        if not self.packed_places:
            return None
        deltas = np.frombuffer(_unpack(self.packed_places), "<i8")
        if deltas.size != 3 * self.rows:
            raise DecodeError(f"places of {deltas.size / 3:g} rows come with {self.rows} rows")
        places: Array = np.cumsum(deltas.reshape(3, self.rows), axis=1)
        return places


def _part_file(values: Sequence[Any]) -> PartFile:
    name, made_as, nbytes = values
    # Files get these names from here: they must not lead out of the folder.
    if not _PLACE.fullmatch(name) or "/" in made_as or "\\" in made_as:
        raise ValueError(f"{name!r:.60} and {made_as!r:.60} are no files of a part")
    return PartFile(str(name), str(made_as), int(nbytes))


def pack_errors(errors: Iterable[RowError]) -> str:
    rows = [[e.source, e.row, e.stage, e.error, _short(e.text), e.attempts, e.key] for e in errors]
    return _pack(json_text(rows).encode("utf-8", "replace")) if rows else ""


def pack_places(places: Sequence[Array]) -> str:
    """Source, row and part of each row; as differences, which are nearly all the same."""
    stacked = np.asarray(places, np.int64)
    return _pack(np.diff(stacked, axis=1, prepend=0).astype("<i8").tobytes()) if stacked.size else ""


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... ({len(text)} characters)"


def _pack(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 6)).decode()


def _unpack(text: str) -> bytes:
    try:
        return zlib.decompress(base64.b64decode(text, validate=True))
    except (ValueError, zlib.error) as error:
        raise DecodeError(f"the record of a part is damaged: {error}", length=len(text)) from error
