"""Decides, before a run begins, what type its key and kept columns have in every part.

    Parquet, Arrow, tables    the files' own; where files differ, the narrowest that holds both
    .npy, .npz                the arrays'
    CSV, text, images         text as it stands; bytes of image files
    JSONL, tar, rows          what the rows that are looked at hold: numbers, text, else JSON as text

What does not fit later costs its row. A run that goes on keeps the types that it began with.
"""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, Final

import numpy as np

from torchrelay.config.columns import Types
from torchrelay.config.runs import ReadOptions, Source
from torchrelay.config.types import NUMERIC
from torchrelay.errors import ConfigError, InputError
from torchrelay.producer.runs.rows import RowReader
from torchrelay.producer.runs.sampling import values_of_lines, values_of_tars
from torchrelay.stages.reading.arrays import array_headers
from torchrelay.stages.reading.files import open_file, shown
from torchrelay.stages.reading.images import IMAGE_COLUMN
from torchrelay.stages.reading.kept import field_of, kept_names, pack_schema, seen_layout, unpack_schema
from torchrelay.stages.reading.tables import arrow_batches, parquet_file
from torchrelay.stages.writing.arrow import LAYOUT_KEY, need_arrow
from torchrelay.stages.writing.joining import joined
from torchrelay.stages.writing.layout import Layout, layout_of

__all__ = ["kept_differences", "kept_of_memory", "kept_of_sources"]

Named = Mapping[str, str]
"""Kept column to str, bytes, json or a numeric dtype: the user's word where no file says it."""
_KINDS: Final = {"str": "text", "bytes": "bytes", "json": "json"}
_TIMES: Final = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)
_READERS = 16
_ROWS_SEEN = 64
_LIST_ROWS_SEEN = 100_000
_OPEN = ("jsonl", "tar")


def kept_of_sources(
    sources: Sequence[Source], read: ReadOptions, named: Named | None = None, output: str = "parquet"
) -> str:
    """The schema of the key and kept columns of files, as `ReadOptions.kept` holds it; "" where there are none.

    Raises ConfigError where a file lacks one, two have types that no type holds both, or the output cannot hold one.
    """
    names = kept_names(read)
    if not names or not sources:
        return ""
    format = sources[0].format
    given = _given(names, named or {}, format in _OPEN)
    if format in ("parquet", "arrow"):
        return pack_schema(_held(_of_schemas(sources, names), output))
    if format in ("npy", "npz"):
        return _of_layouts(names, (_array_layouts(s) for s in sources), {})
    if format in _OPEN:
        values = values_of_tars(sources, names) if format == "tar" else values_of_lines(sources, names)
        return _of_layouts(names, [{n: seen_layout(v) for n, v in values.items()}], given)
    kinds = {n: Layout("bytes" if format == "image" and n == IMAGE_COLUMN else "text") for n in names}
    return _of_layouts(names, [kinds], {})


def kept_of_memory(
    data: Any, read: ReadOptions, types: Types | None, named: Named | None = None, output: str = "parquet"
) -> tuple[str, Any]:
    """(the schema of the key and kept columns of an input in memory, the input): rows that come but once are put back
    before the others."""
    names = kept_names(read)
    if not names:
        return "", data
    if type(data).__module__.partition(".")[0] == "pandas" and hasattr(data, "columns"):
        there = [n for n in names if n in data.columns]
        schema = need_arrow().Table.from_pandas(data[there], preserve_index=False).schema
        return _of_stream(schema, names, output), data
    if hasattr(data, "__arrow_c_stream__"):
        reader = need_arrow().RecordBatchReader.from_stream(data)
        return _of_stream(reader.schema, names, output), reader
    if isinstance(data, Mapping):
        seen = {n: list(data[n]) for n in names if isinstance(data.get(n), list | tuple)}
        layouts = {n: _table_layout(data[n]) for n in names if n in data}
    else:
        rows, data = _first_rows(data)
        seen = _seen(rows, names, RowReader(read, types))
        layouts = {n: seen_layout(v) for n, v in seen.items()}
    given = _given(names, named or {}, True)
    return _of_layouts(names, [layouts], given, {n: t for n, t in _arrow_types(seen).items() if n not in given}), data


def _seen(rows: Iterable[Any], names: Sequence[str], reader: RowReader) -> dict[str, list[Any]]:
    seen: dict[str, list[Any]] = {n: [] for n in names}
    for value in rows:
        try:
            row = reader.row(value, copy=True)
        except InputError:
            continue  # a bad row, of which its chunk will tell
        for name in names:
            seen[name].append(row.get(name))
    return seen


def _arrow_types(seen: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Of columns of Python's times and decimals, which JSON has not."""
    pa = need_arrow()
    found = {}
    for name, values in seen.items():
        given = [v for v in values if v is not None]
        if given and all(isinstance(v, _TIMES) for v in given):
            try:
                kind = pa.infer_type(given)
            except pa.ArrowException:
                continue  # of several kinds
            found[name] = pa.decimal128(38, kind.scale) if pa.types.is_decimal128(kind) else kind
    return found


def kept_differences(known: str, asked: str) -> list[str]:
    """What hinders a run from going on: the types of files that were added do not fit into those that it began with."""
    if not known or not asked or known == asked:
        return []
    pa = need_arrow()
    before, now, found = unpack_schema(known), unpack_schema(asked), []
    for field in before:
        other = now.field(field.name) if field.name in now.names else field
        if LAYOUT_KEY in (field.metadata or {}) or field.type == other.type:
            continue
        try:
            both = _unified(field, other).type
        except pa.ArrowException:
            both = None
        if both != field.type:
            found.append(f"type of column {field.name!r:.60} was {field.type}, and added files have {other.type}")
    return found


def _given(names: Sequence[str], named: Named, possible: bool) -> dict[str, Layout]:
    found: dict[str, Layout] = {}
    for name, kind in named.items():
        if not possible:
            raise ConfigError(f"keep_types {name!r:.60}: in this format the files say the types; leave it out")
        if name not in names:
            raise ConfigError(f"keep_types {name!r:.60} is neither the key nor kept; those are {', '.join(names)}")
        if kind not in _KINDS and kind not in NUMERIC:
            raise ConfigError(f"keep_types {name!r:.60}: {kind!r:.40} is none of {', '.join((*_KINDS, *NUMERIC))}")
        found[name] = Layout(_KINDS[kind]) if kind in _KINDS else Layout("number", kind)
    return found


def _of_schemas(sources: Sequence[Source], names: Sequence[str]) -> Any:
    """The files' types; each file's footer is read."""
    pa = need_arrow()
    fields: dict[str, Any] = {}
    with ThreadPoolExecutor(_READERS) as readers:
        for source, schema in zip(sources, readers.map(_schema_of, sources), strict=True):
            for name in names if schema is not None else ():
                if name not in schema.names:
                    raise ConfigError(f"{shown(source.path)} has no column {name!r:.60}, which is to be kept")
                own = _plain_field(schema.field(name))
                try:
                    fields[name] = own if name not in fields else _unified(fields[name], own)
                except pa.ArrowException as error:
                    raise ConfigError(
                        f"column {name!r:.60} is {own.type} in {shown(source.path)} and {fields[name].type} in files "
                        "before it, which no type holds both; convert one of them, or leave it out of keep"
                    ) from error
    missing = [n for n in names if n not in fields]
    return pa.schema([fields.get(n) or field_of(n, Layout("null")) for n in (*fields, *missing)])


def _schema_of(source: Source) -> Any:
    """None where the file cannot be read: planning says so."""
    try:
        with open_file(source.path, source.fingerprint) as file:
            if source.format == "parquet":
                return parquet_file(source.path, file).schema_arrow
            return arrow_batches(source.path, file)[0]
    except (InputError, OSError):
        return None


def _plain_field(field: Any) -> Any:
    """Without the file's own notes, but for those that name a type that pyarrow does not know."""
    pa = need_arrow()
    notes = {k: v for k, v in (field.metadata or {}).items() if k.startswith(b"ARROW:")}
    # Views are another way of storing the same values, of which pyarrow cannot take some.
    plain = {"string_view": pa.string(), "binary_view": pa.binary()}.get(str(field.type), field.type)
    return pa.field(field.name, plain, metadata=notes or None)


def _held(schema: Any, output: str) -> Any:
    """The schema; raises ConfigError where rows of a type cannot be chosen, or the output's format cannot hold it."""
    pa = need_arrow()
    from pyarrow import parquet

    for field in schema:
        try:
            table = pa.table([pa.nulls(1, field.type)], schema=pa.schema([field])).take([0])
            if output == "parquet":
                parquet.write_table(table, pa.BufferOutputStream())
        except (pa.ArrowException, NotImplementedError) as error:
            raise ConfigError(
                f"column {field.name!r:.60} is {field.type!s:.100}, which {output} output cannot hold: {error!s:.100}; "
                "leave it out of keep, or convert it"
            ) from error
    return schema


def _unified(a: Any, b: Any) -> Any:
    """The field whose type holds the values of both; raises ArrowException."""
    pa = need_arrow()
    if a.type == b.type:
        return a
    for one, other in ((a, b), (b, a)):
        # A dictionary is a way of storing values, not another type of them.
        if pa.types.is_dictionary(one.type) and not pa.types.is_dictionary(other.type):
            return _unified(one.with_type(one.type.value_type), other)
    both = pa.unify_schemas([pa.schema([a]), pa.schema([b])], promote_options="permissive").field(0)
    for field in (a, b):
        try:
            pa.array([], field.type).cast(both.type)
        except NotImplementedError as error:
            raise pa.ArrowTypeError(str(error)) from error
    return both


def _of_stream(schema: Any, names: Sequence[str], output: str) -> str:
    there = [_plain_field(schema.field(n)) for n in names if n in schema.names]
    # A column that is not there is refused where all are chosen.
    rest = [field_of(n, Layout("null")) for n in names if n not in schema.names]
    return pack_schema(_held(need_arrow().schema([*there, *rest]), output))


def _of_layouts(
    names: Sequence[str],
    found: Iterable[Mapping[str, Layout]],
    given: Mapping[str, Layout],
    arrow: Mapping[str, Any] | None = None,
) -> str:
    layouts = dict.fromkeys(names, Layout("null"))
    for one in found:
        layouts |= {n: joined(layouts[n], layout) for n, layout in one.items() if n in layouts}
    layouts |= given
    pa, known = need_arrow(), arrow or {}
    fields = [pa.field(n, known[n]) if n in known else field_of(n, layout) for n, layout in layouts.items()]
    return pack_schema(pa.schema(fields))


def _array_layouts(source: Source) -> dict[str, Layout]:
    try:
        with open_file(source.path, source.fingerprint) as file:
            headers = array_headers(source.path, source.format, file)
    except (InputError, OSError):
        return {}  # planning says what is wrong with it
    found: dict[str, Layout] = {}
    for name, header in headers.items():
        parts = [(n, header.dtype[n]) for n in header.dtype.names] if header.dtype.names else [(name, header.dtype)]
        for column, dtype in parts:
            empty = np.empty((0, *header.shape[1:], *dtype.shape), dtype.base.newbyteorder("="))
            text = {"S": Layout("bytes"), "U": Layout("text")}.get(dtype.base.kind)
            found[column] = text or layout_of(empty)
    return found


def _table_layout(column: Any) -> Layout:
    if hasattr(column, "detach"):
        column = column.detach().cpu().numpy()
    is_array = isinstance(column, np.ndarray) and column.dtype != object
    return layout_of(column) if is_array else seen_layout(list(column))


def _first_rows(data: Any) -> tuple[list[Any], Any]:
    """(rows to look at, the input again)."""
    if isinstance(data, list | tuple):
        return list(data[:: max(len(data) // _LIST_ROWS_SEEN, 1)]), data
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return list(_rows_at(data, range(min(len(data), _ROWS_SEEN)))), data
    rows = iter(data)
    first = list(islice(rows, _ROWS_SEEN))
    return first, chain(first, rows) if rows is data else data


def _rows_at(data: Any, places: Iterable[int]) -> Iterator[Any]:
    for i in places:
        try:
            yield data[i]
        except Exception:  # the dataset is the user's; the row will be a bad one
            continue
