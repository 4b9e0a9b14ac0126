"""The formats of parts: which files a part has, how they are written, and how their columns come back.

Parquet holds its own record; every other format has it beside (`inside` says which). A class of the user's is a
format too (`Writer`).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, Protocol, runtime_checkable

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.config.imports import import_named
from torchrelay.config.ragged import shown
from torchrelay.errors import ConfigError, DecodeError, WorkerError
from torchrelay.stages.writing.arrow import from_arrow, need_arrow, to_table
from torchrelay.stages.writing.layout import Array, Layout, as_elements, as_stack, carried, json_text, restore
from torchrelay.stages.writing.record import PartRecord
from torchrelay.stages.writing.stores import DISK_FULL, LocalStore, Store
from torchrelay.stages.writing.table import PartTable

__all__ = ["Format", "JsonLines", "Parquet", "UserFormat", "Writer", "open_format"]

Make = Callable[[str], Path]
"""Gives a new file whose name ends as it is told."""
BATCH_ROWS: Final = 1024


class Format(Protocol):
    """`suffixes` of a part are what the names of its files end with, in a fixed order."""

    inside: bool
    suffix: str

    def write(self, make: Make, table: PartTable, record: PartRecord) -> list[tuple[str, Path]]:
        """Writes a part's files; (end of the final name, file) of each. May raise OSError and InputError."""

    def read(self, store: Store, record: PartRecord, names: Sequence[str]) -> Iterator[dict[str, Column]]:
        """The columns of a part, some rows at a time. `names` are its files, in the order of `write`."""


@runtime_checkable
class Writer(Protocol):
    """What `--format file.py:NAME` names: a class that is made without arguments.

    `suffix` is what the files' names end with, such as ".npz". `write` makes one file of N rows; a column is an array
    [N, ...] or a list. With a method `read(path)` that gives the columns back, `run.rows()` works too.
    """

    suffix: str

    def write(self, path: str, columns: Mapping[str, Any]) -> None: ...


def open_format(name: str, base_dir: Path) -> Format:
    """The format of this name; a class is looked up beside the pipeline's file. Raises ConfigError."""
    if name == "parquet":
        need_arrow()
        return Parquet()
    if name == "jsonl":
        return JsonLines()
    if name == "npy":
        from torchrelay.stages.writing.npy import Npy

        return Npy()
    return UserFormat(name, base_dir)


def _codecs(schema: Any) -> dict[str, str]:
    """Parquet's path of each column's values -> codec: text shrinks well, and numbers are written as fast as can be."""
    import pyarrow as pa

    found: dict[str, str] = {}
    for column in schema:
        path, kind = column.name, getattr(column.type, "storage_type", column.type)
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            path, kind = f"{path}.list.element", kind.value_type
        numbers = pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        found[path] = "snappy" if numbers else "zstd"
    return found


class Parquet:
    """One file a part, with one row group."""

    inside = True
    suffix = ".parquet"

    def write(self, make: Make, table: PartTable, record: PartRecord) -> list[tuple[str, Path]]:
        from pyarrow import parquet

        arrow = to_table(table.columns, table.layouts)
        # Numbers of a model hardly repeat: looking for a dictionary of them only takes time.
        repeat = [n for n, layout in table.layouts.items() if layout.kind in ("text", "json")]
        path = make(self.suffix)
        codecs = _codecs(arrow.schema)
        level = {leaf: 1 for leaf, codec in codecs.items() if codec == "zstd"}
        options = {"compression": codecs, "compression_level": level, "use_dictionary": repeat or False}
        with parquet.ParquetWriter(str(path), arrow.schema, **options) as writer:
            writer.write_table(arrow)
            # Not in the schema: that is the same in all parts.
            writer.add_key_value_metadata(record.encode())
        return [(self.suffix, path)]

    def read(self, store: Store, record: PartRecord, names: Sequence[str]) -> Iterator[dict[str, Column]]:
        from pyarrow import parquet

        with store.open(names[0]) as file:
            opened = parquet.ParquetFile(file)
            for batch in opened.iter_batches(BATCH_ROWS):
                yield {
                    name: from_arrow(batch.column(i), record.layouts[name]) for i, name in enumerate(batch.schema.names)
                }


def read_footer(store: Store, name: str) -> dict[str, str]:
    """The texts in a Parquet file's footer; raises DecodeError for what is none, or was cut."""
    pa = need_arrow()
    from pyarrow import parquet

    with store.open(name) as file:
        try:
            found = parquet.read_metadata(file)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DecodeError(f"{name} is no whole Parquet file: {error!s:.200}") from error
        texts = {k.decode("utf-8", "replace"): v.decode("utf-8", "replace") for k, v in (found.metadata or {}).items()}
        return texts | {"rows": str(found.num_rows)}


class JsonLines:
    """One object a line. Bytes are base64; complex numbers pairs; numbers that JSON has not are "NaN", "Infinity"."""

    inside = False
    suffix = ".jsonl"

    def write(self, make: Make, table: PartTable, record: PartRecord) -> list[tuple[str, Path]]:
        path = make(self.suffix)
        with path.open("wb") as file:
            plain = {n: json_values(c, table.layouts[n]) for n, c in table.columns.items()}
            heads = [json_text(name) + ":" for name in plain]
            for values in zip(*plain.values(), strict=True):
                pairs = (head + json_text(value) for head, value in zip(heads, values, strict=True))
                write_line(file, "{" + ",".join(pairs) + "}")
        return [(self.suffix, path)]

    def read(self, store: Store, record: PartRecord, names: Sequence[str]) -> Iterator[dict[str, Column]]:
        with store.open(names[0]) as file:
            rows: list[dict[str, Any]] = []
            for line in file:
                rows.append(json.loads(line))
                if len(rows) == BATCH_ROWS:
                    yield self._columns(rows, record)
                    rows = []
            if rows:
                yield self._columns(rows, record)

    @staticmethod
    def _columns(rows: list[dict[str, Any]], record: PartRecord) -> dict[str, Column]:
        return {n: from_json([row[n] for row in rows], layout) for n, layout in record.layouts.items()}


def write_line(file: IO[bytes], text: str) -> None:
    try:
        file.write(text.encode() + b"\n")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only name
        file.write(text.encode("utf-8", "backslashreplace") + b"\n")


def json_values(column: Column, layout: Layout) -> list[Any]:
    """Each row's value as what JSON has."""
    if layout.kind in ("text", "json", "null"):
        return list(column)
    if layout.kind == "bytes":
        return [None if v is None else base64.b64encode(bytes(v)).decode() for v in column]
    if layout.kind == "ragged":
        return [None if v is None else _listed(as_elements(v, layout)) for v in column]
    stacked, missing = as_stack(column, layout)
    values: list[Any] = _listed(stacked)
    if missing is not None:
        values = [None if gone else v for v, gone in zip(values, missing.tolist(), strict=True)]
    return values


def _listed(array: Array) -> Any:
    values = array.tolist()
    return values if array.dtype.kind != "f" or np.isfinite(array).all() else _named(values)


def _named(value: Any) -> Any:
    if isinstance(value, list):
        return [_named(v) for v in value]
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def from_json(values: list[Any], layout: Layout) -> Column:
    """The column whose `json_values` these are."""
    if layout.kind in ("text", "json", "null"):
        return values
    if layout.kind == "bytes":
        return [None if v is None else base64.b64decode(v) for v in values]
    if layout.kind == "ragged":
        return [None if v is None else _ragged_row(v, layout) for v in values]
    pairs = (2,) if layout.is_complex else ()
    given = [v for v in values if v is not None]
    array = np.asarray(given, carried(layout)).reshape(len(given), *(n or 0 for n in layout.shape), *pairs)
    present = restore(array, layout)
    if len(given) == len(values):
        return present
    left = iter(present)
    return [None if v is None else next(left) for v in values]


def _ragged_row(value: list[Any], layout: Layout) -> Array:
    array = np.asarray(value, carried(layout))
    ndim = len(layout.shape) + layout.is_complex
    if array.ndim < ndim:  # it has no elements, and an empty list does not tell what it would be a list of
        known = (*layout.shape, 2) if layout.is_complex else layout.shape
        array = array.reshape(*array.shape, *(n or 0 for n in known[array.ndim :]))
    return restore(array, layout)


class UserFormat:
    """One file a part, made by a class of the user's."""

    inside = False

    def __init__(self, use: str, base_dir: Path) -> None:
        found = import_named(use, base_dir, "format ")
        try:
            self._writer = found()
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(f"format {use!r:.120}: making it raised {type(error).__name__}: {error}") from error
        if not isinstance(self._writer, Writer) or not callable(self._writer.write):
            raise ConfigError(f"format {use!r:.120}: a writer has a `suffix` and a method write(path, columns)")
        suffix = self._writer.suffix
        if not isinstance(suffix, str) or not suffix.startswith(".") or not suffix[1:].replace(".", "").isalnum():
            raise ConfigError(f'format {use!r:.120}: suffix {suffix!r:.40} must be like ".npz"')
        self.suffix = suffix
        self._use = use

    def write(self, make: Make, table: PartTable, record: PartRecord) -> list[tuple[str, Path]]:
        path = make(self.suffix)
        try:
            self._writer.write(str(path), {name: shown(column) for name, column in table.columns.items()})
        except Exception as error:  # the user's code may raise anything
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            raise WorkerError(f"format {self._use!r:.120}: write() raised {type(error).__name__}: {error}") from error
        if not path.is_file():
            raise ConfigError(f"format {self._use!r:.120}: write() left no file at the path that it was given")
        return [(self.suffix, path)]

    def read(self, store: Store, record: PartRecord, names: Sequence[str]) -> Iterator[dict[str, Column]]:
        read = getattr(self._writer, "read", None)
        if read is None or not isinstance(store, LocalStore):
            raise ConfigError(
                f"format {self._use!r:.120}: rows can be read back from a local folder, with a method read(path)"
            )
        yield dict(read(str(store.path(names[0]))))
