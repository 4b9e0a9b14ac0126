"""Arrow columns as columns of a table: numbers as arrays, lists of numbers as arrays of their own, text as str."""

from __future__ import annotations

from typing import Any

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.config.ragged import FEWEST_ROWS, MOST_ROW_BYTES, RaggedRows
from torchrelay.stages.reading.files import need
from torchrelay.stages.reading.raw import Unreadable

__all__ = ["IMAGE_KEYS", "column_of_arrow", "holds_images"]

IMAGE_KEYS = ("bytes", "path")
"""The fields of a struct in which Hugging Face keeps an image."""
_INT32_END = 2**31 - 1


def holds_images(kind: Any) -> bool:
    """Whether an Arrow type is Hugging Face's struct of an image's bytes and path."""
    types = need("pyarrow.types", "Parquet and Arrow files")
    return bool(types.is_struct(kind)) and {kind.field(i).name for i in range(kind.num_fields)} == set(IMAGE_KEYS)


def column_of_arrow(column: Any) -> Column:
    """The values of a pyarrow Array or ChunkedArray, N of them.

    Numbers without nulls are an array `[N]`, fixed-size lists and fixed-shape tensors of them `[N, ...]`. Other lists
    of numbers are N arrays. Text, bytes, null and structs are Python's, in a list; decimals are text, and so are times,
    in ISO 8601. Text that is no UTF-8 is Unreadable.
    """
    pa = need("pyarrow", "Parquet and Arrow files")
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # too large for one array
        array = pa.concat_arrays(array.chunks)
    types = pa.types
    if isinstance(array, pa.ExtensionArray):
        if isinstance(array.type, pa.FixedShapeTensorType) and not array.null_count and _numeric(array.type.value_type):
            dense: Column = array.to_numpy_ndarray()
            return dense
        array = array.storage
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if _numeric(kind):
        return _numbers(array)
    if types.is_fixed_size_list(kind):
        return _fixed_lists(array)
    if types.is_list(kind) or types.is_large_list(kind):
        return _lists(array)
    if types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view":
        return _texts(array)
    if types.is_temporal(kind) and not types.is_duration(kind) and not str(kind).endswith("interval"):
        return _iso(pa, array)
    if types.is_decimal(kind):
        return [None if v is None else str(v) for v in array.to_pylist()]
    if types.is_duration(kind):
        return _numbers(array.cast(pa.int64()))
    values: list[Any] = array.to_pylist()
    return values


def _numeric(kind: Any) -> bool:
    types = need("pyarrow.types", "Parquet and Arrow files")
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def _numbers(array: Any) -> Column:
    if not array.null_count:
        dense: Column = array.to_numpy(zero_copy_only=False)
        return dense
    # Values keep their width: a null among float32 does not make the others float64.
    dtype = np.dtype(array.type.to_pandas_dtype())
    return [None if v is None else dtype.type(v) for v in array.to_pylist()]


def _fixed_lists(array: Any) -> Column:
    shape, inner = [len(array)], array
    types = need("pyarrow.types", "Parquet and Arrow files")
    while types.is_fixed_size_list(inner.type):
        if inner.null_count:
            return [_as_array(v, array.type) for v in array.to_pylist()]
        shape.append(inner.type.list_size)
        inner = inner.flatten()
    if not _numeric(inner.type) or inner.null_count:
        return [_as_array(v, array.type) for v in array.to_pylist()]
    dense: Column = inner.to_numpy(zero_copy_only=False).reshape(shape)
    return dense


def _lists(array: Any) -> Column:
    flat = array.flatten()
    if not _numeric(flat.type) or flat.null_count or array.null_count:
        return [_as_array(v, array.type) for v in array.to_pylist()]
    lengths = np.diff(array.offsets.to_numpy()).astype(np.int64)
    values = flat.to_numpy(zero_copy_only=False)
    rows = RaggedRows.adjacent(values, lengths)
    small = values.nbytes <= MOST_ROW_BYTES * len(rows) and (not len(rows) or int(lengths.max()) <= _INT32_END)
    return rows if len(rows) >= FEWEST_ROWS and small else list(rows)


def _as_array(value: Any, kind: Any) -> Any:
    """A (nested) list of numbers as an array of the file's dtype, where it is one; else the list."""
    if value is None:
        return None
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    if not _numeric(kind):
        return value
    try:
        # Not with the dtype at once: that would make NaN of a null.
        array = np.asarray(value)
        return value if array.dtype == object else array.astype(kind.to_pandas_dtype())
    except (TypeError, ValueError):
        return value


def _texts(array: Any) -> Column:
    try:
        values: list[Any] = array.to_pylist()
        return values
    except UnicodeDecodeError:
        pa = need("pyarrow", "Parquet and Arrow files")
        large = array.cast(pa.large_string()) if str(array.type) == "string_view" else array
        raw = large.view(pa.large_binary() if pa.types.is_large_string(large.type) else pa.binary())
        return [_text(v) for v in raw.to_pylist()]


def _text(value: bytes | None) -> str | Unreadable | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError as error:
        return Unreadable.of(error)


def _iso(pa: Any, array: Any) -> list[str | None]:
    """Times in ISO 8601. Python's hold microseconds: the three digits behind them are put in where they are not 0."""
    kind = array.type
    if not (pa.types.is_timestamp(kind) or pa.types.is_time64(kind)) or kind.unit != "ns":
        return [None if v is None else v.isoformat() for v in array.to_pylist()]
    coarse = pa.timestamp("us", kind.tz) if pa.types.is_timestamp(kind) else pa.time64("us")
    counts = array.cast(pa.int64()).to_pylist()
    # Rounded down, so that the digits go on from there before 1970 too.
    whole = pa.array([None if n is None else n // 1000 for n in counts], pa.int64()).cast(coarse).to_pylist()
    texts: list[str | None] = []
    for value, count in zip(whole, counts, strict=True):
        rest = 0 if count is None else count % 1000
        text = None if value is None else value.isoformat(**({"timespec": "microseconds"} if rest else {}))
        if text is not None and rest:
            end = text.index(".") + 7
            text = f"{text[:end]}{rest:03}{text[end:]}"
        texts.append(text)
    return texts
