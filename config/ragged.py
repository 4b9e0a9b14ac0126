"""Rows of unequal length in one array, so that no step of a row's way loops over rows in Python.

A column of N arrays of one dtype that differ in their first axis only is held as their elements, one row behind the
other, and where each row begins and ends. Stages and clients get a list of arrays; this is what lies between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, overload

import numpy as np

from torchrelay.config.device_rows import on_host
from torchrelay.config.types import NUMERIC

__all__ = ["FEWEST_ROWS", "MOST_ROW_BYTES", "RaggedRows", "shown", "take_rows"]

# One array in place of several pays from here on.
FEWEST_ROWS: Final = 4
# Putting together rows that are larger than this on average takes longer than handling them one by one.
MOST_ROW_BYTES: Final = 16 << 10
_MOST_LENGTH = 2**31 - 1
_DTYPES = frozenset(NUMERIC.values())

Array = np.ndarray[Any, np.dtype[Any]]
Index = np.ndarray[Any, np.dtype[np.int64]]


class RaggedRows(Sequence[Array]):
    """N arrays `[length, *row_shape]` of one dtype, which are read-only views.

    Args:
        flat: `[total, *row_shape]`, which holds all rows. It must not change while this lives.
        starts, lengths: int64 `[N]`; row i is `flat[starts[i] : starts[i] + lengths[i]]`. Rows may lie in any order,
            and share elements.
    """

    __slots__ = ("flat", "lengths", "starts")

    def __init__(self, flat: Array, starts: Index, lengths: Index) -> None:
        if flat.flags.writeable:
            flat = flat.view()
            flat.flags.writeable = False
        self.flat = flat
        self.starts = starts
        self.lengths = lengths

    @classmethod
    def even(cls, rows: np.ndarray) -> RaggedRows:
        """The rows of an array `[n, length, ...]`, which are all as long; a view of it where it is dense."""
        count, length, *more = rows.shape
        return cls.adjacent(rows.reshape(count * length, *more), np.full(count, length, np.int64))

    @classmethod
    def adjacent(cls, flat: Array, lengths: Index) -> RaggedRows:
        """Rows that lie one behind the other and fill `flat`."""
        return cls(flat, np.cumsum(lengths) - lengths, lengths)

    @classmethod
    def of(cls, rows: Sequence[Any], fewest: int = FEWEST_ROWS) -> RaggedRows | None:
        """A copy of these rows; None where they are no arrays of one carried dtype and row shape, or fewer than
        `fewest`, or large."""
        if len(rows) < max(fewest, 1) or type(rows[0]) is not np.ndarray or set(map(type, rows)) != {np.ndarray}:
            return None
        first = rows[0]
        if first.dtype not in _DTYPES or not first.ndim:
            return None
        try:
            lengths = np.fromiter(map(len, rows), np.int64, len(rows))
            if (
                int(lengths.sum()) * _item_bytes(first) > MOST_ROW_BYTES * len(rows)
                or int(lengths.max()) > _MOST_LENGTH
            ):
                return None
            # It looks at dtypes and shapes itself, and faster.
            flat: Array = np.concatenate(rows, dtype=first.dtype, casting="no")
        except (TypeError, ValueError):
            return None
        return cls.adjacent(flat, lengths)

    @classmethod
    def joined(cls, pieces: Sequence[Any]) -> RaggedRows | None:
        """The rows of all pieces; None where one is no RaggedRows, they differ in dtype or row shape, or are large.

        One piece is given back as it is, of several the elements are copied.
        """
        first = pieces[0]
        for piece in pieces:
            if type(piece) is not cls or piece.dtype != first.dtype or piece.row_shape != first.row_shape:
                return None
        if len(pieces) == 1:
            return first if type(first) is cls else None
        lengths: Index = np.concatenate([piece.lengths for piece in pieces])
        if int(lengths.sum()) * _item_bytes(first.flat) > MOST_ROW_BYTES * len(lengths):
            return None
        return cls.adjacent(np.concatenate([piece.dense() for piece in pieces]), lengths)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.flat.dtype

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The axes of a row but for its first."""
        shape: tuple[int, ...] = self.flat.shape[1:]
        return shape

    @property
    def row_ndim(self) -> int:
        return self.flat.ndim

    def sizes(self, axis: int) -> Index:
        """Per row, its size along an axis (0-based, of the row): int64 `[N]`."""
        return self.lengths if axis == 0 else np.full(len(self), self.flat.shape[axis], np.int64)

    def dense(self) -> Array:
        """All rows one behind the other; only copied where they do not lie so."""
        starts, lengths = self.starts, self.lengths
        if not len(starts):
            return self.flat[:0]
        if (starts[1:] == starts[:-1] + lengths[:-1]).all():
            return self.flat[int(starts[0]) : int(starts[-1] + lengths[-1])]
        places: Index = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
        places += np.arange(len(places))
        gathered: Array = self.flat[places]
        return gathered

    def take(self, index: Index) -> RaggedRows:
        """The rows of these numbers, in this order; their elements are not copied."""
        return RaggedRows(self.flat, self.starts[index], self.lengths[index])

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, at: int) -> Array: ...
    @overload
    def __getitem__(self, at: slice) -> RaggedRows: ...
    def __getitem__(self, at: int | slice) -> Array | RaggedRows:
        if isinstance(at, slice):
            return RaggedRows(self.flat, self.starts[at], self.lengths[at])
        start = int(self.starts[at])
        return self.flat[start : start + int(self.lengths[at])]

    def __iter__(self) -> Iterator[Array]:
        flat = self.flat
        bounds = zip(self.starts.tolist(), (self.starts + self.lengths).tolist(), strict=True)
        return iter([flat[start:end] for start, end in bounds])

    def __repr__(self) -> str:
        return f"<RaggedRows of {len(self)} rows {self.dtype}[*{''.join(f', {n}' for n in self.row_shape)}]>"


def _item_bytes(array: Array) -> int:
    """Bytes of one element of the first axis."""
    shape: tuple[int, ...] = array.shape[1:]
    return math.prod(shape) * array.itemsize


def shown(column: Any) -> Any:
    """A column as stages and clients see it: an array, or a list."""
    return list(column) if type(column) is RaggedRows else column


def take_rows(column: Any, index: Index) -> Any:
    """The rows of a column with these numbers, in this order."""
    column = on_host(column)
    if isinstance(column, np.ndarray):
        return column[index]
    return column.take(index) if isinstance(column, RaggedRows) else [column[i] for i in index.tolist()]
