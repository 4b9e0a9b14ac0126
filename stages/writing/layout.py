"""How the values of a column lie in a part file, whatever its format. Pure: numpy alone.

A layout follows from the column's declared type, else from its values in such a way that the parts of one run agree:
what differs from chunk to chunk (lengths, sizes of images) never decides it. It is stored beside the column, so that
reading gives back the dtype and shape that were written.

number   one number a row                     fixed   arrays of one shape
ragged   arrays of one dtype and ndim         text, bytes, json (as text), null (no row has a value)
arrow    a kept column, which has its type from the dataset and is no column of ours
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.config.ragged import RaggedRows
from torchrelay.config.types import NUMERIC, ColumnType
from torchrelay.errors import DecodeError

__all__ = [
    "ARROW",
    "Array",
    "Layout",
    "as_elements",
    "as_flat",
    "as_stack",
    "carried",
    "json_text",
    "layout_of",
    "restore",
]

Array = np.ndarray[Any, np.dtype[Any]]
_NAMES = {dtype: name for name, dtype in NUMERIC.items()}
_KINDS: Final = ("number", "fixed", "ragged", "text", "bytes", "json", "null", "arrow")
_EXACT_FLOAT = 2**53
# float16 holds all values of the 8-bit floats but those of e8m0, whose exponents need float32.
_CARRIED: Final[dict[str, str]] = {
    **{name: "float16" for name in NUMERIC if name.startswith("float8_")},
    "float8_e8m0fnu": "float32",
    "bfloat16": "float32",
    "complex64": "float32",
    "complex128": "float64",
}


@dataclass(frozen=True)
class Layout:
    """`dtype` is numpy's name of a numeric column. `shape` is the shape of each row of a fixed one; of a ragged one the
    sizes per axis on which all rows of the part agree, None for the others: lists do not tell how wide an array without
    rows is, so that of arrays [0, 3] and [2, 4] the first comes back as [0, 0]."""

    kind: str
    dtype: str = ""
    shape: tuple[int | None, ...] = ()

    @property
    def np_dtype(self) -> np.dtype[Any]:
        return NUMERIC[self.dtype]

    @property
    def is_complex(self) -> bool:
        """Complex numbers are carried as a last axis of two."""
        return self.dtype.startswith("complex")

    def encode(self) -> str:
        return json.dumps({"kind": self.kind, "dtype": self.dtype, "shape": list(self.shape)})

    @classmethod
    def decode(cls, text: str | bytes) -> Layout:
        """Raises DecodeError."""
        try:
            found = json.loads(text)
            layout = cls(found["kind"], found["dtype"], tuple(found["shape"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DecodeError(f"a column's layout is not readable: {error!r:.100}", length=len(text)) from error
        whole = all(n is None or (type(n) is int and n >= 0) for n in layout.shape)
        if layout.kind not in _KINDS or not whole or (layout.dtype not in NUMERIC) != (layout.kind in _KINDS[3:]):
            raise DecodeError(f"a column's layout {text!r:.100} is unknown; is this file of a newer torchrelay?")
        return layout


ARROW: Final = Layout("arrow")


def carried(layout: Layout) -> np.dtype[Any]:
    """The dtype in which files carry the numbers of a layout: its own, or the nearest that holds every value."""
    return np.dtype(_CARRIED.get(layout.dtype, layout.dtype))


def layout_of(column: Column, declared: ColumnType | None = None) -> Layout:
    """The layout of N values. A declared type that the values do not have (rows were regrouped, say) is ignored."""
    if isinstance(column, RaggedRows):
        return Layout("ragged", _NAMES[column.dtype], (None, *column.row_shape))
    if isinstance(column, np.ndarray) and column.dtype in _NAMES:
        dtype, shape = _NAMES[column.dtype], column.shape[1:]
        if declared is not None and len(declared.shape) == len(shape) and not _is_fixed(declared):
            return Layout("ragged", dtype, shape)
        return _array_layout(dtype, shape)
    values = column.tolist() if isinstance(column, np.ndarray) else column
    kinds = set(map(type, values)) - {type(None)}
    if declared is not None and _fits(declared, values, kinds):
        return _declared_layout(declared, values)
    return _inferred(values, kinds)


def _is_fixed(declared: ColumnType) -> bool:
    return all(isinstance(size, int) for size in declared.shape)


def _array_layout(dtype: str, shape: tuple[int, ...]) -> Layout:
    # Lists of no element are of no fixed size in Parquet.
    kind = "number" if not shape else "fixed" if math.prod(shape) else "ragged"
    return Layout(kind, dtype, shape)


def _fits(declared: ColumnType, values: Sequence[Any], kinds: set[type]) -> bool:
    if declared.dtype in ("str", "bytes"):
        return kinds <= ({str} if declared.dtype == "str" else {bytes})
    if declared.dtype == "json":
        return True
    if not declared.shape:
        return all(np.ndim(v) == 0 and not isinstance(v, str | bytes | Mapping) for v in values if v is not None)
    if not kinds <= {np.ndarray}:
        return False
    given = [v for v in values if v is not None]
    if any(v.dtype != declared.np_dtype or v.ndim != len(declared.shape) for v in given):
        return False
    return not _is_fixed(declared) or all(v.shape == declared.shape for v in given)


def _declared_layout(declared: ColumnType, values: Sequence[Any]) -> Layout:
    if not declared.is_numeric:
        return Layout({"str": "text", "bytes": "bytes", "json": "json"}[declared.dtype])
    if _is_fixed(declared):
        return _array_layout(declared.dtype, tuple(n for n in declared.shape if isinstance(n, int)))
    return Layout("ragged", declared.dtype, _common([v.shape for v in values if v is not None], len(declared.shape)))


def _inferred(values: Sequence[Any], kinds: set[type]) -> Layout:
    if not kinds:
        return Layout("null")
    if kinds == {str} or kinds == {bytes}:
        return Layout("text" if kinds == {str} else "bytes")
    if kinds == {bool}:
        return Layout("number", "bool")
    if kinds == {int} and all(-(2**63) <= v < 2**63 for v in values if v is not None):
        return Layout("number", "int64")
    if kinds == {int} and all(0 <= v < 2**64 for v in values if v is not None):
        return Layout("number", "uint64")
    if kinds == {float}:
        return Layout("number", "float64")
    if kinds == {int, float} and all(abs(v) <= _EXACT_FLOAT for v in values if isinstance(v, int)):
        return Layout("number", "float64")
    given = [v for v in values if v is not None]
    if all(isinstance(v, np.ndarray | np.generic) for v in given):
        dtypes, ndims = {v.dtype for v in given}, {v.ndim for v in given}
        if len(dtypes) == len(ndims) == 1 and given[0].dtype in _NAMES:
            shape = _common([v.shape for v in given], given[0].ndim)
            return Layout("ragged" if shape else "number", _NAMES[given[0].dtype], shape)
    return Layout("json")


def _common(shapes: Sequence[tuple[int, ...]], ndim: int) -> tuple[int | None, ...]:
    sizes = [{shape[axis] for shape in shapes} for axis in range(ndim)]
    return tuple(next(iter(s)) if len(s) == 1 else None for s in sizes)


def as_stack(column: Column, layout: Layout) -> tuple[Array, Array | None]:
    """(values [N, *shape] as they are carried, bool [N] that is True where a row has no value, or None)."""
    if isinstance(column, np.ndarray) and column.dtype != object:
        return as_elements(column, layout), None
    missing = _missing(column)
    dtype = layout.np_dtype
    out: Array = np.zeros((len(column), *(n or 0 for n in layout.shape)), dtype)
    for i, value in enumerate(column):
        if value is not None:
            out[i] = value
    return as_elements(out, layout), missing


def as_flat(column: Column, layout: Layout) -> tuple[Array, Array, Array | None]:
    """A ragged column as (all elements [total] as carried, the shape of each row int64 [N, ndim], missing rows)."""
    ndim = len(layout.shape)
    if isinstance(column, RaggedRows):
        shapes = np.stack([column.sizes(axis) for axis in range(ndim)], axis=1)
        return as_elements(column.dense().reshape(-1), layout), shapes, None
    if isinstance(column, np.ndarray):
        shapes = np.tile(np.asarray(column.shape[1:], np.int64), (len(column), 1))
        return as_elements(column.reshape(-1), layout), shapes, None
    rows = [v for v in column if v is not None]
    flat = np.concatenate([v.reshape(-1) for v in rows]) if rows else np.empty(0, layout.np_dtype)
    shapes = np.zeros((len(column), ndim), np.int64)
    shapes[[i for i, v in enumerate(column) if v is not None]] = np.reshape([v.shape for v in rows], (len(rows), ndim))
    return as_elements(flat, layout), shapes, _missing(column)


def as_elements(array: Array, layout: Layout) -> Array:
    """An array in the dtype that files carry; complex numbers get a last axis of two."""
    dtype = carried(layout)
    if not layout.is_complex:
        return np.ascontiguousarray(array).astype(dtype, copy=False)
    # A row's view has no place for the last axis where there is no axis at all.
    return np.ascontiguousarray(array).reshape(-1).view(dtype).reshape(*array.shape, 2)


def restore(array: Array, layout: Layout) -> Array:
    """What `as_elements` was given."""
    if layout.is_complex:
        pairs: Array = np.ascontiguousarray(array).reshape(-1).view(layout.np_dtype)
        return pairs.reshape(array.shape[:-1])
    with np.errstate(all="ignore"):  # NaN casts with a warning to some of the small floats
        return array.astype(layout.np_dtype, copy=False)


def _missing(column: Sequence[Any] | Array) -> Array | None:
    found = np.fromiter((v is None for v in column), bool, len(column))
    return found if found.any() else None


def json_text(value: Any) -> str:
    """A value as JSON that every reader takes: NaN and infinities, which JSON has not, become null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain, separators=(",", ":"))
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, default=_plain, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return _finite(value.tolist())
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    return list(value) if isinstance(value, set | frozenset) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return _finite(_plain(value)) if isinstance(value, np.ndarray | np.generic) else value
