"""A column of all rows from some, and what a column tells of its rows. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.config.device_rows import DeviceRows, on_host
from torchrelay.config.ragged import RaggedRows
from torchrelay.errors import DecodeError
from torchrelay.workers.work import Index


def spread_rows(column: Column, kept: Index, total: int, before: Column | None, *, nulls: bool) -> Column:
    """A column of `total` rows with the given ones at `kept`; the others have the value before, else null or zeros."""
    column, base = on_host(column), on_host(before)
    if isinstance(column, np.ndarray):
        row = column.shape[1:]
        if base is None and not nulls:
            base = np.zeros((total, *row), column.dtype)
        if isinstance(base, np.ndarray) and base.dtype == column.dtype and base.shape[1:] == row:
            whole = base.copy()
            whole[kept] = column
            return whole
    both = None if base is None else RaggedRows.joined([base, column])
    if both is not None:
        index = np.arange(total)
        index[kept] = np.arange(total, total + len(kept))
        return both.take(index)
    values: list[Any] = [None] * total if base is None else list(base)
    for i, value in zip(kept.tolist(), column, strict=True):
        values[i] = value
    return values


def is_column(value: object) -> bool:
    """Whether it has one value per row."""
    return type(value) in (list, RaggedRows, DeviceRows) or (type(value) is np.ndarray and value.ndim > 0)


def truth(column: Column) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows a column of `when` lets in; raises DecodeError for arrays, which are neither."""
    column = on_host(column)
    if isinstance(column, np.ndarray):
        if column.ndim != 1:
            raise DecodeError("the column of `when` holds arrays, which are neither true nor false")
        return column.astype(bool)
    if isinstance(column, RaggedRows) or any(isinstance(value, np.ndarray) and value.ndim for value in column):
        raise DecodeError("the column of `when` holds arrays, which are neither true nor false")
    return np.fromiter((bool(value) for value in column), bool, len(column))
