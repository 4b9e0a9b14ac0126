"""All rows of a chunk as one, for the node that ends a run and writes them to a file. Pure; no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from torchrelay.config.columns import Column, plain_value
from torchrelay.config.graph import is_runs
from torchrelay.config.ragged import take_rows
from torchrelay.errors import DecodeError
from torchrelay.queues.levels import Levels, RowFailure

__all__ = ["FAILED", "PARTS", "FailedRow", "gathered"]

PARTS, FAILED = "@part", "@failed"
"""Columns that are made here: per row, which it is of those made of one row that was read; and the rows that failed."""


class FailedRow(NamedTuple):
    """A row that was read and that a stage rejected, or on which it raised. `of` holds the run's own values of it, such
    as its number and its key."""

    why: RowFailure
    of: Mapping[str, Any]


def gathered(
    levels: Levels,
    columns: Mapping[str, tuple[Any, tuple[int, ...]]],
    failures: Sequence[RowFailure],
    entry: tuple[int, ...],
    end: tuple[int, ...],
) -> dict[str, Column]:
    """A table of one row, whose values are whole columns, of the rows that did not fail.

    Args:
        columns: each with the stack at which it was made. What was made before the rows were read is taken as it is.
        failures: by the number of the row that was read.
        entry: the stack of the rows that were read.
        end: that of the rows that are written.

    Raises DecodeError where the columns do not belong together.
    """
    read = levels.counts(entry[-1])
    if len(read) != 1:
        raise DecodeError(f"a job of a run is one chunk, this one has {len(read)}")
    total = int(levels.counts(end[-1]).sum())
    base = levels.entry_rows(end, total, entry)
    failed = [f.row for f in failures]
    alive = np.flatnonzero(~np.isin(base, failed)) if failed else None
    table: dict[str, Column] = {}
    own: dict[str, Column] = {}
    for name, (value, stack) in columns.items():
        if not stack:
            table[name] = value
            continue
        if is_runs(name):
            own[name] = value
        table[name] = [_kept(_lined_up(name, levels.align(value, stack, end), total), alive)]
    table[PARTS] = [_kept(np.arange(total) - np.searchsorted(base, base), alive)]
    table[FAILED] = [[FailedRow(f, {n: _value(c, f.row) for n, c in own.items()}) for f in failures]]
    return table


def _lined_up(name: str, column: Any, rows: int) -> Any:
    if len(column) != rows:
        raise DecodeError(f"column {name!r} holds {len(column)} rows of {rows} that are to be written")
    return column


def _kept(column: Any, alive: np.ndarray[Any, np.dtype[np.int64]] | None) -> Any:
    return column if alive is None else take_rows(column, alive)


def _value(column: Column, row: int) -> Any:
    if not 0 <= row < len(column):
        raise DecodeError(f"row {row} failed, of {len(column)} that were read")
    return plain_value(column[row])
