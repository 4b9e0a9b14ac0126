"""Ragged columns as one array: fill up to the longest row or a bucket, and say how long each row was."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.config.device_rows import DeviceRows
from torchrelay.config.ragged import RaggedRows
from torchrelay.config.types import ColumnType
from torchrelay.errors import InputError

__all__ = ["Padded", "bucket_of", "mask_of", "pad_rows", "padded_already", "ragged_axes"]

# Up to so many elements a row, one assignment by a mask of all is faster than one assignment each. They fit an int16.
_MASKED_ELEMENTS = 1024
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray]


@dataclass(frozen=True, slots=True)
class Padded:
    """How a column was padded: `lengths` int64 `[N]`, or `[N, k]` over the k ragged `axes` of a row (0-based)."""

    lengths: Any
    axes: tuple[int, ...]


def pad_rows(
    name: str,
    pieces: Sequence[Column],
    declared: ColumnType | None,
    value: float,
    buckets: Sequence[int] = (),
    empty: Allocate = np.empty,
) -> tuple[np.ndarray, Padded]:
    """Join the rows of all pieces into one new array, filled with `value` behind each row's end.

    Args:
        pieces: per job, an ndarray `[n, ...]`, or ragged rows, or a list of n arrays, of equal dtype and number of
            dimensions.
        declared: says which axes are ragged; without it the first one is, and the others must agree.
        buckets: rising sizes; each ragged axis is as long as the smallest that all rows fit. Without any, as the
            longest row.
        empty: makes the array.

    Raises:
        InputError: the rows are not arrays of one dtype, differ in another axis, are longer than the largest bucket,
            or cannot hold `value`.
    """
    rows = _rows(pieces)
    if not len(rows):
        axes = ragged_axes(declared, 1)
        return _nothing(declared), Padded(np.empty((0,) if len(axes) == 1 else (0, len(axes)), np.int64), axes)
    shapes = _shapes(name, rows)
    count, ndim = shapes.shape
    axes = ragged_axes(declared, ndim)
    longest = shapes.max(axis=0)
    fixed = [axis for axis in range(ndim) if axis not in axes]
    if (shapes[:, fixed] != longest[fixed]).any():
        raise InputError(
            f"column {name!r} cannot be padded: its rows differ in a dimension that is not ragged; "
            "declare its shape with * where it is"
        )
    for axis in axes if buckets else ():
        longest[axis] = bucket_of(name, int(longest[axis]), buckets)
    dtype = rows[0].dtype
    full = empty((count, *longest.tolist()), dtype)
    np.copyto(full, _fill(name, value, dtype))
    _place(full, rows)
    lengths = shapes[:, axes[0]] if len(axes) == 1 else shapes[:, list(axes)]
    return full, Padded(np.ascontiguousarray(lengths), axes)


def padded_already(
    name: str, pieces: Sequence[Column], declared: ColumnType | None, value: float, buckets: Sequence[int] = ()
) -> Padded | None:
    """How a column is padded whose rows are all of one shape, and as long as a bucket where there are any: they can be
    put together where they lie, on a device too. None for any other column; arguments and errors as of `pad_rows`."""
    kinds = {(p.dtype, p.shape[1:]) if isinstance(p, np.ndarray | DeviceRows) else None for p in pieces}
    dtype, shape = next(iter(kinds)) or (None, ())
    if len(kinds) != 1 or dtype is None or not shape:
        return None
    axes = ragged_axes(declared, len(shape))
    if any(bucket_of(name, shape[axis], buckets) != shape[axis] for axis in axes if buckets):
        return None
    _fill(name, value, dtype)
    rows = sum(map(len, pieces))
    lengths = np.full((rows, len(axes)), [shape[axis] for axis in axes], np.int64)
    return Padded(lengths[:, 0].copy() if len(axes) == 1 else lengths, axes)


def _rows(pieces: Sequence[Column]) -> RaggedRows | list[Any]:
    joined = RaggedRows.joined([_stacked(piece) for piece in pieces]) if pieces else None
    if joined is not None:
        return joined
    rows = [row for piece in pieces for row in piece]
    return RaggedRows.of(rows, fewest=1) or rows


def _stacked(piece: Column) -> Column:
    """An array of rows as ragged rows that are all as long."""
    if isinstance(piece, np.ndarray) and piece.ndim > 1:
        return RaggedRows.even(piece)
    return piece


def _shapes(name: str, rows: RaggedRows | list[Any]) -> np.ndarray:
    """int64 `[N, ndim]`; raises InputError unless the rows are arrays of one dtype and number of dimensions."""
    if isinstance(rows, RaggedRows):
        return np.stack([rows.sizes(axis) for axis in range(rows.row_ndim)], axis=1)
    first = rows[0]
    for row in rows:
        if not isinstance(row, np.ndarray) or row.dtype != first.dtype or row.ndim != first.ndim or not row.ndim:
            raise InputError(
                f"column {name!r} cannot be padded: it holds {_what(first)} and {_what(row)}; "
                "padding needs arrays of one dtype with at least one dimension"
            )
    return np.array([row.shape for row in rows], np.int64)


def _place(full: np.ndarray, rows: RaggedRows | list[Any]) -> None:
    """Writes each row to the beginning of its place."""
    if isinstance(rows, RaggedRows) and rows.row_shape == full.shape[2:] and full[0].size <= _MASKED_ELEMENTS:
        # One row's elements lie together, whatever its further axes.
        ends = (rows.lengths * math.prod(rows.row_shape)).astype(np.int16)
        places = full.reshape(len(full), -1)
        places[np.arange(places.shape[1], dtype=np.int16) < ends[:, None]] = rows.dense().reshape(-1)
        return
    for place, row in zip(full, rows, strict=True):
        place[tuple(map(slice, row.shape))] = row


def bucket_of(name: str, size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds so much; InputError when none does."""
    at = bisect_left(buckets, size)
    if at == len(buckets):
        raise InputError(
            f"column {name!r}: a row is {size} long, over the largest bucket ({buckets[-1]}); send it shorter, or "
            f"add a larger one to the stage's batch: {{buckets: {{{name}: ...}}}}"
        )
    return buckets[at]


def ragged_axes(declared: ColumnType | None, ndim: int) -> tuple[int, ...]:
    """The axes of a row (0-based) that are padded: those without a size, the first one where none is declared so."""
    ragged = () if declared is None else tuple(i for i, size in enumerate(declared.shape) if not isinstance(size, int))
    # A column of fixed shape may be padded too; its lengths then say so.
    return tuple(axis for axis in ragged if axis < ndim) or (0,)


def _nothing(declared: ColumnType | None) -> np.ndarray:
    if declared is None or not declared.is_numeric:
        return np.empty((0, 0))
    return np.empty((0, *(size if isinstance(size, int) else 0 for size in declared.shape)), declared.np_dtype)


def _fill(name: str, value: float, dtype: np.dtype[Any]) -> Any:
    try:
        with np.errstate(all="raise"):
            filled = np.array(value).astype(dtype)
    except (ValueError, OverflowError, FloatingPointError):
        filled = None
    if filled is None or (dtype.kind in "iub" and filled != value):
        raise InputError(f"column {name!r} of dtype {dtype} cannot be padded with {value}")
    return filled


def _what(row: object) -> str:
    return f"{row.dtype}{list(row.shape)}" if isinstance(row, np.ndarray) else f"a {type(row).__name__}"


def mask_of(shape: tuple[int, ...], padded: Padded, arange: Callable[[int], Any]) -> Any:
    """True where data is; works on numpy and torch alike, by the library of `padded.lengths` and `arange`."""
    axes = padded.axes
    lengths = padded.lengths.reshape(shape[0], len(axes))
    mask: Any = None
    for k, axis in enumerate(axes):
        broadcast = [1] * (1 + len(axes))
        broadcast[1 + k] = -1
        per_row = [shape[0]] + [1] * len(axes)
        inside = arange(shape[1 + axis]).reshape(broadcast) < lengths[:, k].reshape(per_row)
        mask = inside if mask is None else mask & inside
    return mask
