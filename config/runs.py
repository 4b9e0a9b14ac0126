"""What the parts of a dataset run tell each other: sources, chunks, and how to read and write.

A run puts a dataset through a pipeline in chunks, each of which is one job. The planner makes `Source`s and `Chunk`s, a
chunk travels to the worker that reads it, and the manifest keeps both. Plain values that can be JSON: no pyarrow here.

A row of the dataset is known by (source, row): the number of its file in the plan, and where it stands in that file.
`row` is the row's number from 0 where files have rows or samples (Parquet, Arrow, NumPy, tar), and the offset of its
first byte in the unpacked text where they have lines (text, JSONL, CSV). So an id never depends on how a file was cut.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, get_args

from torchrelay.errors import ConfigError, DecodeError

__all__ = [
    "CHUNK_BYTES",
    "CHUNK_ROWS",
    "MEMORY",
    "Chunk",
    "ChunkSize",
    "ReadOptions",
    "Source",
    "Unit",
    "WriteOptions",
]

CHUNK_ROWS = 1024
CHUNK_BYTES = 32 << 20
MEMORY = "memory"
"""The format of a source whose rows the driver itself pushes."""
Unit = Literal["rows", "bytes"]
_MOST = 2**63 - 1


class _Message:
    """A frozen dataclass with `encode` and `decode` as JSON; unknown, missing and mistyped fields are refused."""

    def encode(self) -> str:
        """One line of ASCII, the same for equal values. File names need not be UTF-8, and pass it all the same."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))  # type: ignore[call-overload]

    @classmethod
    def decode(cls, text: str) -> Self:
        """The value that `encode` wrote; raises DecodeError."""
        name = cls.__name__.lower()
        try:
            values = json.loads(text)
        except (ValueError, RecursionError, TypeError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else None
            raise DecodeError(f"a {name} is JSON, {text!r:.60} is not", length=len(text), offset=at) from error
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        if not isinstance(values, dict) or values.keys() != known:
            raise DecodeError(f"a {name} has the fields {', '.join(sorted(known))}, not {text!r:.80}", length=len(text))
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except (ConfigError, TypeError, ValueError) as error:
            raise DecodeError(f"a {name}: {error}", length=len(text)) from error


def _need(ok: bool, what: str) -> None:
    if not ok:
        raise ConfigError(what)


def _number(value: object, least: int = 0) -> bool:
    return type(value) is int and least <= value <= _MOST


@dataclass(frozen=True, slots=True)
class Source(_Message):
    """One file of the input as it was planned, or an input that lies in the driver's memory."""

    number: int
    """Its place in the plan, from 0; part of each row's id."""
    path: str
    """An absolute local path, or a URL that fsspec opens; `memory` where the driver pushes the rows."""
    format: str
    """parquet, arrow, jsonl, csv, tsv, text, npy, npz, tar, image or memory."""
    nbytes: int
    """Size of the file."""
    fingerprint: str
    """What tells that the file changed: its size with its time of change or ETag."""

    def __post_init__(self) -> None:
        _need(_number(self.number), f"a source's number is an integer from 0, not {self.number!r:.40}")
        _need(_number(self.nbytes), f"a source's nbytes is an integer from 0, not {self.nbytes!r:.40}")
        for name in ("path", "format", "fingerprint"):
            value = getattr(self, name)
            _need(isinstance(value, str), f"a source's {name} is a text, not {value!r:.40}")
        _need(bool(self.path and self.format), "a source has a path and a format")


@dataclass(frozen=True, slots=True)
class Chunk(_Message):
    """The part of a source that one job reads. It never changes once it is planned."""

    number: int
    """Its place in the plan, from 0: names the part that is written."""
    source: int
    """Number of its source. Of images, each of which is a source, that of the first; the others follow it."""
    path: str
    """Of the source; of images the folder that all of them lie in."""
    format: str
    start: int
    end: int
    """First and last but one, in `unit`: rows, or bytes of the file as it is stored. A line, a record or a sample
    belongs to the chunk in which its first byte lies."""
    unit: Unit
    first_row: int | None = None
    """The number of its first row, where the plan knows it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else the reader needs: `fingerprint` of the source, `max_rows` to end early, `files` of images (below
    `path`), `compression` gz or zst, `delimiter` of CSV."""

    def __post_init__(self) -> None:
        for name in ("number", "source", "start"):
            value = getattr(self, name)
            _need(_number(value), f"a chunk's {name} is an integer from 0, not {value!r:.40}")
        _need(_number(self.end, self.start), f"a chunk's end is an integer from its start, not {self.end!r:.40}")
        _need(self.unit in get_args(Unit), f"a chunk's unit is rows or bytes, not {self.unit!r:.40}")
        _need(self.first_row is None or _number(self.first_row), "a chunk's first_row is null or an integer from 0")
        _need(isinstance(self.options, Mapping), f"a chunk's options are a mapping, not {self.options!r:.40}")
        for name in ("path", "format"):
            value = getattr(self, name)
            _need(isinstance(value, str) and bool(value), f"a chunk's {name} is a text, not {value!r:.40}")


@dataclass(frozen=True, slots=True)
class ChunkSize(_Message):
    """How much of a dataset one job takes at most, once unpacked; a single row may be larger. Both are estimates where
    only reading would tell: rows of lines, bytes of what is compressed."""

    rows: int = CHUNK_ROWS
    nbytes: int = CHUNK_BYTES

    def __post_init__(self) -> None:
        for name in ("rows", "nbytes"):
            value = getattr(self, name)
            _need(_number(value, 1), f"a chunk's {name} is an integer from 1, not {value!r:.40}")


@dataclass(frozen=True, slots=True)
class ReadOptions(_Message):
    """Which columns of the dataset become which columns of the pipeline, and what goes along to the output."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Pipeline column to dataset column; a pipeline column that is not here is looked for under its own name."""
    key: str | None = None
    """Dataset column that identifies a row in the output."""
    keep: tuple[str, ...] = ()
    """Dataset columns that the output repeats."""
    kept: str = ""
    """The Arrow schema of key and kept columns, serialised, in base64: what the plan decided that they are in the whole
    run. Without it each chunk decides by its own rows."""
    delimiter: str | None = None
    """What separates the fields of CSV; None looks at the header."""
    image_side: int | None = None
    """JPEG images are decoded at 1/2, 1/4 or 1/8 of their size where both sides stay at least this many pixels, which
    is several times quicker than decoding all of it to shrink it then. None decodes all."""

    def __post_init__(self) -> None:
        ok = self.image_side is None or _number(self.image_side, 1)
        _need(ok, f"image_side is a number of pixels from 1, not {self.image_side!r:.40}")
        mark = self.delimiter
        # Records are cut by their bytes, of which it is one.
        ok = mark is None or (isinstance(mark, str) and len(mark) == 1 and mark.isascii() and mark not in '\0"\r\n')
        _need(ok, f"delimiter is one ASCII character, no quote and no line break, not {mark!r:.40}")
        _need(isinstance(self.columns, Mapping), f"columns is a mapping, not {self.columns!r:.60}")
        for name, column in self.columns.items():
            ok = isinstance(name, str) and isinstance(column, str) and bool(name and column)
            _need(ok, f"columns maps a pipeline column to a dataset column, not {name!r:.40} to {column!r:.40}")
        ok = self.key is None or (isinstance(self.key, str) and bool(self.key))
        _need(ok, f"key is the name of a dataset column, not {self.key!r:.40}")
        ok = isinstance(self.keep, tuple) and all(isinstance(k, str) and k for k in self.keep)
        _need(ok, f"keep is a tuple of dataset columns, not {self.keep!r:.60}")
        twice = next((k for i, k in enumerate(self.keep) if k in self.keep[:i]), None)
        _need(twice is None, f"keep names {twice!r:.60} twice")


@dataclass(frozen=True, slots=True)
class WriteOptions(_Message):
    """Where results go, in what format, and what identifies their rows."""

    folder: str
    """An absolute local path, or a URL that fsspec opens."""
    format: str = "parquet"
    """parquet, jsonl, npy, or `file.py:Writer` for a class of the user's."""
    key: str | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("folder", "format"):
            value = getattr(self, name)
            _need(isinstance(value, str) and bool(value), f"{name} is a text, not {value!r:.60}")
        ok = self.format in ("parquet", "jsonl", "npy") or ":" in self.format
        _need(ok, f'format {self.format!r:.60} is none of parquet, jsonl, npy; a class of yours is "file.py:Writer"')
        ok = self.key is None or (isinstance(self.key, str) and bool(self.key))
        _need(ok, f"key is the name of a column, not {self.key!r:.40}")
        ok = isinstance(self.keep, tuple) and all(isinstance(k, str) and k for k in self.keep)
        _need(ok, f"keep is a tuple of columns, not {self.keep!r:.60}")
