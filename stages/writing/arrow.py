"""Columns as Arrow arrays and back. Each field's metadata holds the column's layout.

number           the Arrow type of the same name
fixed            fixed-size lists where a row has one axis, else Arrow's fixed_shape_tensor extension
ragged           lists, nested as deep as a row has axes
text bytes json  string, binary, string
null             string
arrow            as the dataset has it
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.errors import ConfigError, DecodeError, InputError
from torchrelay.stages.writing.layout import (
    ARROW,
    Array,
    Layout,
    as_flat,
    as_stack,
    carried,
    json_text,
    restore,
)

__all__ = ["LAYOUT_KEY", "from_arrow", "layout_in", "need_arrow", "to_field", "to_table"]

LAYOUT_KEY = b"torchrelay.column"
_MOST_ITEMS = 2**31 - 1


def need_arrow() -> Any:
    """The module pyarrow; raises ConfigError that says what to install."""
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError('dataset runs need pyarrow: pip install "torchrelay[runs]"') from error
    return pyarrow


def to_table(columns: Mapping[str, Any], layouts: Mapping[str, Layout]) -> Any:
    """A pyarrow.Table of columns of one length, some of which may be Arrow's; raises InputError naming the column that
    Arrow does not take."""
    pa = need_arrow()
    arrays, fields = [], []
    for name, column in columns.items():
        try:
            is_arrow = isinstance(column, pa.Array | pa.ChunkedArray)
            array = column if is_arrow else _to_arrow(column, layouts[name])
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise InputError(f"column {name!r} cannot be written as {layouts[name].kind}: {error}") from error
        arrays.append(array)
        fields.append(to_field(name, layouts[name], array.type))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def to_field(name: str, layout: Layout, kind: Any) -> Any:
    return need_arrow().field(name, kind, metadata={LAYOUT_KEY: layout.encode()})


def layout_in(field: Any) -> Layout:
    """How the values of a field are to be read: its own layout, or as Arrow has them."""
    packed = (field.metadata or {}).get(LAYOUT_KEY)
    return ARROW if packed is None else Layout.decode(packed)


def _to_arrow(column: Column, layout: Layout) -> Any:
    pa = need_arrow()
    if layout.kind == "null":
        # Readers of a folder take the first part's schema: they fit most things into text, nothing into nulls.
        return pa.nulls(len(column), pa.string())
    if layout.kind == "ragged":
        return _nested(*as_flat(column, layout))
    if layout.kind in ("number", "fixed"):
        return _stacked(*as_stack(column, layout))
    if layout.kind == "json":
        return pa.array([None if v is None else json_text(v) for v in column], pa.string())
    return pa.array(column, pa.string() if layout.kind == "text" else pa.binary())


def _stacked(values: Array, missing: Array | None) -> Any:
    pa = need_arrow()
    if values.ndim == 1:
        return pa.array(values, mask=missing)
    shape = values.shape[1:]
    mask = None if missing is None else pa.array(missing)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), math.prod(shape), mask=mask)
    if len(shape) == 1:
        return lists
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(lists.type.value_type, shape), lists)


def _nested(flat: Array, shapes: Array, missing: Array | None) -> Any:
    pa = need_arrow()
    if flat.size > _MOST_ITEMS:
        raise ValueError(f"its {flat.size} elements are over 2**31 in one part; make chunks smaller")
    array = pa.array(flat.reshape(-1))
    if flat.ndim == 2:  # complex
        array = pa.FixedSizeListArray.from_arrays(array, 2)
    lists = np.ones(len(shapes), np.int64)
    counts = []
    for axis in range(shapes.shape[1]):
        # As many lists as the axes before make of each row, each as long as the row is along this axis.
        counts.append(np.repeat(shapes[:, axis], lists))
        lists = lists * shapes[:, axis]
    for axis in reversed(range(len(counts))):
        offsets = np.concatenate([[0], np.cumsum(counts[axis])]).astype(np.int32)
        mask = pa.array(missing) if axis == 0 and missing is not None else None
        array = pa.ListArray.from_arrays(pa.array(offsets), array, mask=mask)
    return array


def from_arrow(array: Any, layout: Layout) -> Column:
    """The column that was written, of an Array or ChunkedArray: an array [N, ...], or a list that may hold None."""
    pa = need_arrow()
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
        array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    try:
        return _from_arrow(array, layout)
    except (pa.ArrowException, ValueError, AttributeError, TypeError) as error:
        raise DecodeError(f"a column of {array.type} does not hold {layout.kind} {layout.dtype}: {error}") from error


def _from_arrow(array: Any, layout: Layout) -> Column:
    if layout.kind == "arrow":
        return _as_python(array)
    if layout.kind in ("text", "bytes", "null"):
        values: list[Any] = array.to_pylist()
        return values
    if layout.kind == "json":
        return [None if text is None else json.loads(text) for text in array.to_pylist()]
    missing = None if array.null_count == 0 else array.is_null().to_numpy(zero_copy_only=False)
    if layout.kind == "ragged":
        return _unnested(array, layout, missing)
    pairs = (2,) if layout.is_complex else ()
    if missing is not None:
        array = array.drop_null()
    flat = array if not layout.shape and not pairs else array.flatten()
    present = restore(_numbers(flat).reshape(len(array), *layout.shape, *pairs), layout)
    return present if missing is None else _with_nulls(list(present), missing)


def _as_python(array: Any) -> list[Any]:
    """Python's values; without pandas, nobody holds nanoseconds, and times are given in microseconds."""
    pa = need_arrow()
    try:
        values: list[Any] = array.to_pylist()
    except ValueError:
        kind = array.type
        coarse = pa.timestamp("us", kind.tz) if pa.types.is_timestamp(kind) else pa.time64("us")
        values = array.cast(coarse, safe=False).to_pylist()
    return values


def _numbers(array: Any) -> Array:
    found: Array = array.to_numpy(zero_copy_only=False)
    return found


def _with_nulls(present: list[Any], missing: Array) -> list[Any]:
    left = iter(present)
    return [None if gone else next(left) for gone in missing.tolist()]


def _unnested(array: Any, layout: Layout, missing: Array | None) -> list[Any]:
    if missing is not None:
        array = array.drop_null()
    rows, ndim = len(array), len(layout.shape)
    # The sizes of rows along the axes so far, and how many lists they make of each.
    shapes = np.zeros((rows, ndim), np.int64)
    lists = np.ones(rows, np.int64)
    for axis in range(ndim):
        lengths = array.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        first = np.cumsum(lists) - lists
        has = lists > 0
        shapes[has, axis] = lengths[first[has]]
        shapes[~has, axis] = layout.shape[axis] or 0
        lists = lists * shapes[:, axis]
        array = array.flatten()
    flat = _numbers(array.flatten()).reshape(-1, 2) if layout.is_complex else _numbers(array)
    ends = np.cumsum(lists)
    starts = (ends - lists).tolist()
    values = restore(flat.astype(carried(layout), copy=False), layout)
    present = [values[a:b].reshape(s) for a, b, s in zip(starts, ends.tolist(), shapes.tolist(), strict=True)]
    return present if missing is None else _with_nulls(present, missing)
