"""Lines up columns of one job that were made at different numbers of rows. Pure; arrays and lists only.

An expanding node makes several rows, or none, of each of its rows; its counts travel with the job as a hidden column
`#<node>`. A column stays as it was made, at its *stack* of expanding nodes, however the rows change later. Who reads it
at another stack gets it grouped (one list or array per row) up to the part that both stacks share, then repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from torchrelay.config.columns import Column, plain_value, row_of_table
from torchrelay.config.device_rows import on_host
from torchrelay.config.ragged import RaggedRows, shown, take_rows
from torchrelay.errors import DecodeError
from torchrelay.queues.job import AT, COUNTS, FROM_INPUT, REJECTED, Origins, is_hidden, shared_length

__all__ = [
    "Levels",
    "ResultTable",
    "RowFailure",
    "failures_of",
    "result_row",
    "result_rows",
    "result_table",
    "stacks_of",
]

Stack = tuple[int, ...]
Counts = np.ndarray[Any, np.dtype[np.int64]]


class RowFailure(NamedTuple):
    """A submitted row that a stage rejected, or on which it raised: `row` counts from 0 in what was submitted."""

    row: int
    stage: str
    error_type: str
    message: str
    attempts: int


class ResultTable(NamedTuple):
    """A table job's result: `source_rows` int64 [N] says which submitted row each of the N rows came from."""

    columns: dict[str, Column]
    source_rows: Counts
    failures: list[RowFailure]


class Levels:
    """The counts of one job's expansions, by node number."""

    def __init__(self, counts: Mapping[int, Counts]) -> None:
        self._counts = dict(counts)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Levels:
        """From decoded hidden columns; raises DecodeError for what are no counts."""
        counts: dict[int, Counts] = {}
        for name, value in values.items():
            if name[0] == COUNTS:
                if not (isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype == np.uint32):
                    raise DecodeError(f"hidden column {name!r} holds no counts")
                counts[int(name[1:])] = value.astype(np.int64)
        return cls(counts)

    def counts(self, node: int) -> Counts:
        """How many rows the node made of each of its rows; raises DecodeError when they are missing."""
        try:
            return self._counts[node]
        except KeyError:
            raise DecodeError(f"the counts of expanding node {node} are missing") from None

    def align(self, column: Column, made_at: Stack, read_at: Stack) -> Column:
        """The column for a reader at another stack. Repeated lists share their values; groups of an array are views.

        Raises DecodeError when the column has another length than the counts say.
        """
        if made_at == read_at:
            return column
        column, shared = on_host(column), shared_length(made_at, read_at)
        for node in reversed(made_at[shared:]):
            column = group(column, self.counts(node))
        if len(read_at) == shared + 1:
            return repeat(column, self.counts(read_at[shared]))
        return column if len(read_at) == shared else take_rows(column, self._sources(read_at[shared:], len(column)))

    def entry_rows(self, stack: Stack, rows: int, entry: Stack = ()) -> Counts:
        """Which row at `entry` (by default: which submitted row) each row at `stack` came from; `rows` is their number
        where the stacks are the same."""
        inner = stack[len(entry) :]
        return self._sources(inner, self.outer_rows(inner, rows))

    def outer_rows(self, inner: Stack, rows: int) -> int:
        """How many rows there were before these expansions; `rows` where there were none."""
        return len(self.counts(inner[0])) if inner else rows

    def _sources(self, stack: Stack, rows: int) -> Counts:
        index = np.arange(rows)
        for node in stack:
            index = np.repeat(index, _fitting(self.counts(node), len(index)))
        return index


def _fitting(counts: Counts, rows: int) -> Counts:
    if len(counts) != rows:
        raise DecodeError(f"an expansion counted {len(counts)} rows where a column holds {rows}")
    return counts


def repeat(column: Column, counts: Counts) -> Column:
    """Each row as often as its count says; one row's array is shared, not copied."""
    _fitting(counts, len(column))
    if isinstance(column, np.ndarray):
        if len(counts) == 1:
            return np.broadcast_to(column, (int(counts[0]), *column.shape[1:]))
        return np.repeat(column, counts, axis=0)
    if isinstance(column, RaggedRows):
        return column.take(np.repeat(np.arange(len(column)), counts))
    return [value for value, count in zip(column, counts.tolist(), strict=True) for _ in range(count)]


def group(column: Column, counts: Counts) -> Column:
    """Consecutive rows as one value per source row: arrays `[count, ...]` or lists."""
    ends = np.cumsum(counts).tolist()
    if (ends[-1] if ends else 0) != len(column):
        raise DecodeError(f"an expansion made {ends[-1] if ends else 0} rows where a column holds {len(column)}")
    if isinstance(column, np.ndarray):
        return RaggedRows.adjacent(column, counts)
    starts = [0, *ends[:-1]]
    whole = shown(column)
    return [whole[a:b] for a, b in zip(starts, ends, strict=False)]


def stacks_of(origins: Origins) -> set[int]:
    """Every expanding node whose counts are needed to line up these columns."""
    return {node for origin in origins.values() for node in origin[1:]}


def failures_of(values: Mapping[str, Any]) -> list[RowFailure]:
    """Every rejected row that the hidden columns tell of, in order; raises DecodeError."""
    found: dict[int, RowFailure] = {}
    for name in sorted(n for n in values if n[0] == REJECTED):
        try:
            for parts in values[name]:
                failure = RowFailure(*parts)
                found.setdefault(int(failure.row), failure)
        except TypeError as error:
            raise DecodeError(f"hidden column {name!r} holds no rejected rows") from error
    return [found[row] for row in sorted(found)]


def encode_failures(failures: Sequence[RowFailure]) -> list[list[Any]]:
    """As the codec carries them."""
    return [list(f) for f in failures]


def result_row(values: Mapping[str, Any], origins: Origins) -> dict[str, Any]:
    """The result of a job of one row: what an expansion made of it and no stage regrouped comes as a list."""
    if not origins:
        return row_of_table(values)  # a plain chain, which rejects no row of a job that goes on
    levels = Levels.of(values)
    return row_of_table(
        {n: levels.align(c, origins.get(n, FROM_INPUT)[1:], ()) for n, c in values.items() if not is_hidden(n)}
    )


def result_rows(values: Mapping[str, Any], origins: Origins, rows: int) -> list[dict[str, Any]]:
    """Per submitted row of a table job what `result_row` gives for it alone; `rows` is their number."""
    levels = Levels.of(values)
    columns = {
        n: _row_values(levels.align(c, origins.get(n, FROM_INPUT)[1:], ()))
        for n, c in values.items()
        if not is_hidden(n)
    }
    if not columns:
        return [{} for _ in range(rows)]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _row_values(column: Column) -> list[Any]:
    """What `row_of_table` gives for each row."""
    if not isinstance(column, np.ndarray):
        return [plain_value(value) for value in column]
    if column.ndim > 1:
        return list(column)
    return column.tolist() if column.dtype.isbuiltin == 1 else [value.item() for value in column]


def result_table(values: Mapping[str, Any], origins: Origins) -> ResultTable:
    """The result of a table job, without the rows that were rejected."""
    levels = Levels.of(values)
    at = origins.get(AT, FROM_INPUT)[1:]
    columns = {n: levels.align(c, origins.get(n, FROM_INPUT)[1:], at) for n, c in values.items() if not is_hidden(n)}
    rows = next(iter(map(len, columns.values())), 0)
    source_rows = levels.entry_rows(at, rows)
    failures = failures_of(values)
    if failures:
        kept = np.flatnonzero(~np.isin(source_rows, [f.row for f in failures]))
        columns, source_rows = {n: take_rows(c, kept) for n, c in columns.items()}, source_rows[kept]
    return ResultTable({n: shown(c) for n, c in columns.items()}, source_rows, failures)
