"""The key and the kept columns of a run: Arrow arrays, one type per column over the whole run, from reader to writer.

Which types these are is decided once, by the plan (`ReadOptions.kept`, a schema as text). A source with a schema gives
its own. Elsewhere values are Python's, and the field's metadata holds the layout in which they lie. A value that the
type cannot hold as it is costs its row: nothing is rounded, cut or made text of.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np

from torchrelay.config.columns import Column, plain_value
from torchrelay.config.runs import ReadOptions
from torchrelay.errors import DecodeError, InputError
from torchrelay.stages.reading.raw import MISSING, Unreadable
from torchrelay.stages.writing.arrow import layout_in, need_arrow, to_table
from torchrelay.stages.writing.layout import Layout, json_text, layout_of

__all__ = [
    "field_of",
    "kept_names",
    "kept_table",
    "pack_schema",
    "pack_table",
    "seen_layout",
    "unpack_schema",
    "unpack_table",
]

_UNKNOWN = Layout("json")
"""Of a column of which no value was seen: text that holds any value exactly."""


def kept_names(options: ReadOptions) -> list[str]:
    """The dataset columns that go along beside the pipeline's: the key, then the kept ones."""
    return list(dict.fromkeys((*([options.key] if options.key else []), *options.keep)))


def pack_schema(schema: Any) -> str:
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


@functools.lru_cache(32)
def unpack_schema(text: str) -> Any:
    """What `pack_schema` was given; raises DecodeError."""
    pa = need_arrow()
    try:
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text, validate=True)))
    except (ValueError, OSError, pa.ArrowException) as error:
        raise DecodeError(
            f"the types of the kept columns are not readable: {error!s:.100}", length=len(text)
        ) from error


def pack_table(table: Any) -> bytes:
    """An Arrow table as bytes, its types included."""
    pa = need_arrow()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


def unpack_table(data: bytes) -> Any:
    """What `pack_table` was given; raises DecodeError."""
    pa = need_arrow()
    try:
        with pa.ipc.open_stream(pa.py_buffer(data)) as stream:
            return stream.read_all()
    except (ValueError, OSError, pa.ArrowException) as error:
        raise DecodeError(f"the kept columns of a chunk are not readable: {error!s:.100}", length=len(data)) from error


def field_of(name: str, layout: Layout) -> Any:
    """The field of a column of Python's values that lie in this layout."""
    return to_table({name: []}, {name: _UNKNOWN if layout.kind == "null" else layout}).schema.field(0)


def seen_layout(values: Column) -> Layout:
    """How a column lies of which these values were seen. Arrays of rows may have any size, whatever theirs is."""
    layout = layout_of(_present(values))
    return Layout("ragged", layout.dtype, (None,) * len(layout.shape)) if layout.shape else layout


def _present(column: Column) -> Column:
    if not isinstance(column, list):
        return column
    return [v for v in column if v is not None and v is not MISSING and type(v) is not Unreadable]


def kept_table(
    picked: Mapping[str, Any], options: ReadOptions, rows: int, failed: MutableMapping[int, Unreadable]
) -> Any:
    """A pyarrow.Table of the key and the kept columns.

    Args:
        picked: each as the dataset has it, a pyarrow array or a column that may hold MISSING and Unreadable.
        rows: how many there are.
        failed: what is wrong with a row is added here: no key, or a value that does not fit.
    """
    pa = need_arrow()
    schema = unpack_schema(options.kept) if options.kept else None
    arrays, fields = [], []
    for name in kept_names(options):
        what = f"key column {name!r:.60}" if name == options.key else f"column {name!r:.60}"
        column = picked[name]
        is_arrow = isinstance(column, pa.Array | pa.ChunkedArray)
        field = None if schema is None else schema.field(name)
        if field is None:
            field = pa.field(name, column.type) if is_arrow else field_of(name, layout_of(_present(column)))
        array = _cast(column, field, what, failed) if is_arrow else _made(column, field, what, failed)
        if name == options.key:
            _need_values(array, what, failed)
        arrays.append(array)
        fields.append(field)
    return pa.table(arrays, schema=pa.schema(fields))


def _need_values(array: Any, what: str, failed: MutableMapping[int, Unreadable]) -> None:
    if array.null_count:
        for i in np.flatnonzero(array.is_null().to_numpy()).tolist():
            failed.setdefault(i, Unreadable("InputError", f"{what} has no value in this row"))


def _cast(array: Any, field: Any, what: str, failed: MutableMapping[int, Unreadable]) -> Any:
    """A dataset's array in the run's type, which may be wider; text that is no UTF-8 costs its row."""
    pa = need_arrow()

    def fitted(values: Any) -> Any:
        cast = values if values.type == field.type else values.cast(field.type)
        cast.validate(full=True)
        return cast

    try:
        return fitted(array)
    except (pa.ArrowException, UnicodeDecodeError):
        pass  # row by row, to find which
    pieces: list[Any] = []
    for i in range(len(array)):
        try:
            piece = fitted(array.slice(i, 1))
        except (pa.ArrowException, UnicodeDecodeError) as error:
            failed.setdefault(i, Unreadable("InputError", f"{what} is {field.type} in this run: {error!s:.200}"))
            piece = pa.nulls(1, field.type)
        pieces += piece.chunks if isinstance(piece, pa.ChunkedArray) else [piece]
    return pa.chunked_array(pieces, field.type)


def _made(column: Column, field: Any, what: str, failed: MutableMapping[int, Unreadable]) -> Any:
    """Python's values as an array of the run's type."""
    layout = layout_in(field)
    fitting = _fitting if layout.kind != "arrow" else _fitting_arrow
    if isinstance(column, np.ndarray) and layout.kind in ("number", "fixed") and layout_of(column) == layout:
        return to_table({field.name: column}, {field.name: layout}).column(0)
    values: list[Any] = []
    for i, value in enumerate(column):
        if value is None or value is MISSING:
            values.append(None)
            continue
        try:
            if type(value) is Unreadable:
                raise InputError(value.text)
            values.append(fitting(value, field))
        except (InputError, ValueError, TypeError, OverflowError, RecursionError) as error:
            kind = error.__class__.__name__ if type(value) is not Unreadable else value.error
            values.append(None)
            failed.setdefault(i, Unreadable(kind, f"{what}: {error!s:.400}"))
    if layout.kind == "arrow":
        return need_arrow().array(values, field.type)
    if layout.kind == "json":
        layout = Layout("text")  # it is text by now
    return to_table({field.name: values}, {field.name: layout}).column(0)


def _fitting_arrow(value: Any, field: Any) -> Any:
    """The value, where the type holds it as it is."""
    pa = need_arrow()
    try:
        same = bool(pa.scalar(value, field.type).as_py() == value)
    except (pa.ArrowException, TypeError):
        same = False
    if not same:
        raise InputError(f"it is {field.type} in this run, by the first rows of the input, and {value!r:.60} came")
    return value


def _fitting(value: Any, field: Any) -> Any:
    """The value as the field's layout holds it; raises InputError where it does not as it is."""
    layout = layout_in(field)
    kind = layout.kind
    if kind == "json":
        return _encodable(value)
    if kind in ("text", "null") and isinstance(value, str):
        value.encode()
        return value
    if kind == "bytes" and isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if kind == "number" and _is_same(plain_value(value), layout):
        return value
    if kind in ("fixed", "ragged") and _is_alike(value, layout):
        return value
    is_now = f"it is {layout.dtype or layout.kind} in this run, by the first rows of the input"
    raise InputError(f"{is_now}, and {value!r:.60} came; name its type: keep_types={{column: type}}")


def _is_alike(value: Any, layout: Layout) -> bool:
    if not isinstance(value, np.ndarray) or value.dtype != layout.np_dtype or value.ndim != len(layout.shape):
        return False
    return layout.kind == "ragged" or value.shape == layout.shape


def _encodable(value: Any) -> str:
    try:
        # NaN stays what it is where the dataset has it, though it is no JSON.
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError):
        text = json_text(value)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only name
        return json.dumps(json.loads(text))
    return text


def _is_same(value: Any, layout: Layout) -> bool:
    """Whether a number is the same one in the layout's dtype."""
    want = layout.np_dtype
    if want.kind == "b" or isinstance(value, bool):
        return want.kind == "b" and isinstance(value, bool)
    if want.kind in "iu":
        limits = np.iinfo(want)
        return isinstance(value, int) and limits.min <= value <= limits.max
    if not isinstance(value, int | float | complex) or (isinstance(value, complex) and want.kind != "c"):
        return False
    with np.errstate(all="ignore"):
        held = np.asarray(value).astype(want).item() if not isinstance(value, int) else want.type(float(value)).item()
    return bool(held == value or value != value)
