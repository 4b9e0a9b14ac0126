"""Which jobs of a window are computed together: rows of like length, within `max_rows` and `max_cost`.

No I/O. `Planner` cuts opened jobs into batches, and a job with more rows than a batch into pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.config.device_rows import DeviceRows
from torchrelay.config.ragged import RaggedRows
from torchrelay.config.spec import BatchSpec
from torchrelay.config.types import ColumnType
from torchrelay.stages.padding import bucket_of, ragged_axes
from torchrelay.workers.row_cap import RowCap
from torchrelay.workers.work import J, Work

__all__ = ["Planner"]

Lengths = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class _Load:
    """What rows weigh: how many, their costs together, the largest cost of one, and what they are sorted by.

    `alone`: they must not hold up others, since no batch can take them.
    """

    rows: int
    cost: int = 0
    largest: int = 0
    order: tuple[int, ...] = ()
    alone: bool = False

    def with_(self, other: _Load) -> _Load:
        largest = max(self.largest, other.largest)
        return _Load(self.rows + other.rows, self.cost + other.cost, largest, alone=self.alone or other.alone)


class Planner(Generic[J]):
    """Cuts the jobs of one stage into batches.

    Args:
        spec: the stage's `batch` entry.
        types: the declared types of the columns that it reads, as far as they are declared.
    """

    def __init__(self, spec: BatchSpec, types: Mapping[str, ColumnType] | None = None) -> None:
        self._spec = spec
        self._types = types or {}
        self._padded = spec.max_cost is not None and spec.max_cost.column in spec.pad
        column = "" if spec.max_cost is None else spec.max_cost.column
        kind = self._types.get(column)
        self._cost_axis = 0 if kind is None else ragged_axes(kind, len(kind.shape))[0]
        self._cost_sizes = np.array(spec.buckets.get(column, ()), np.int64)
        self.cap = RowCap(spec.max_rows)

    @property
    def max_rows(self) -> int:
        """The most rows of one forward: what the stage allows, fewer after the device ran out of memory."""
        return self.cap.rows

    def batches(self, works: Sequence[Work[J]], max_rows: int | None = None) -> list[list[Work[J]]]:
        """The jobs in batches of at most `max_rows` rows (default: `self.max_rows`).

        Jobs are put together by length, and keep their order within a batch. The batch of the first job comes first,
        then that of the first job left, and so on: who is ahead in rank never waits for those behind. A job with more
        rows than a batch holds comes alone.
        """
        limit = max_rows or self.max_rows
        if not self._spec.sorts:
            return _in_order(works, limit)
        loads = [self._load(work.table, work.rows) for work in works]
        groups: list[list[int]] = []
        total = _Load(0)
        for i in sorted(range(len(works)), key=lambda i: loads[i].order):
            both = total.with_(loads[i])
            if groups and not both.alone and self._fits(both, limit):
                groups[-1].append(i)
                total = both
            else:
                groups.append([i])
                total = loads[i]
        return [[works[i] for i in group] for group in sorted(sorted(group) for group in groups)]

    def mixes(self, work: Work[J]) -> bool:
        """Whether the job's rows may be computed in different batches, beside rows of other jobs: those of a stage that
        puts rows of like length together, as far as each fits a batch, and its own code sees them one by one."""
        if not self._spec.sorts or not work.rows:
            return False
        return not self._load(work.table, work.rows).alone

    def row_costs(self, work: Work[J]) -> Lengths:
        """What the rows are sorted by: what each costs, or how long it is as padded."""
        if self._spec.max_cost is not None and self._spec.max_cost.column in work.table:
            return self._costs(work.table[self._spec.max_cost.column])
        name, sizes = next(iter(self._spec.buckets.items()))
        column = work.table.get(name)
        if column is None or not len(column):
            return np.zeros(work.rows, np.int64)
        lengths = _lengths(column, ragged_axes(self._types.get(name), np.ndim(column[0]))[0])
        return np.asarray(sizes)[np.minimum(np.searchsorted(sizes, lengths), len(sizes) - 1)]

    def runs(self, costs: Lengths) -> Iterator[tuple[int, int]]:
        """Rows sorted by cost, in runs that fit a forward: from one to behind the last.

        A run ends where the cost rises, unless little of it is filled yet.
        """
        limit, total = self.max_rows, None if self._spec.max_cost is None else self._spec.max_cost.total
        at = 0
        while at < len(costs):
            part = costs[at : at + limit].astype(np.float64)
            rows = len(part)
            if total is not None:
                totals = part * np.arange(1, rows + 1) if self._padded else np.cumsum(part)
                rows = max(1, int(np.searchsorted(totals, total, side="right")))
            rises = np.flatnonzero(np.diff(part[:rows])) + 1
            full = [int(r) for r in rises if 2 * r > rows]
            rows = full[0] if full else rows
            yield at, at + rows
            at += rows

    def too_large(self, work: Work[J], max_rows: int | None = None) -> bool:
        """Whether the job takes several forwards."""
        if work.rows <= 1 or not self._spec.sorts:
            return work.rows > (max_rows or self.max_rows)
        return not self._fits(self._load(work.table, work.rows), max_rows or self.max_rows)

    def pieces(self, work: Work[J], start: int, end: int, max_rows: int | None = None) -> Iterator[tuple[int, int]]:
        """The job's rows from `start` to `end` in pieces that fit a forward, in their order; each has a row."""
        limit = max_rows or self.max_rows
        cost = self._spec.max_cost
        if cost is None or cost.column not in work.table:
            yield from ((at, min(at + limit, end)) for at in range(start, end, limit))
            return
        # A float holds any sum of them, and those up to 2**53 exactly.
        costs = self._costs(work.table[cost.column][start:end]).astype(np.float64)
        at = 0
        while at < len(costs):
            part = costs[at : at + limit]
            totals = np.maximum.accumulate(part) * np.arange(1, len(part) + 1) if self._padded else np.cumsum(part)
            rows = max(1, int(np.searchsorted(totals, cost.total, side="right")))
            yield start + at, start + at + rows
            at += rows

    def _fits(self, load: _Load, limit: int) -> bool:
        if load.rows > limit:
            return False
        if self._spec.max_cost is None:
            return True
        return (load.rows * load.largest if self._padded else load.cost) <= self._spec.max_cost.total

    def _load(self, table: Mapping[str, Column], rows: int) -> _Load:
        spec = self._spec
        if not rows:
            return _Load(rows)
        order: list[int] = []
        alone = False
        for name, sizes in spec.buckets.items():
            for longest in self._longest(name, table.get(name, [])):
                alone = alone or longest > sizes[-1]
                order.append(longest if longest > sizes[-1] else bucket_of(name, longest, sizes))
        cost = largest = 0
        if spec.max_cost is not None and spec.max_cost.column in table:
            cost, largest = self._cost(table[spec.max_cost.column])
        return _Load(rows, cost, largest, (*order, largest), alone)

    def _longest(self, name: str, column: Column) -> list[int]:
        """The longest row along each axis that is padded."""
        axes = ragged_axes(self._types.get(name), np.ndim(column[0])) if len(column) else ()
        return [int(_lengths(column, axis).max()) for axis in axes]

    def _cost(self, column: Column) -> tuple[int, int]:
        """What the rows cost together, and the largest cost of one."""
        if not self._padded:
            costs = self._costs(column)
            return int(costs.sum(dtype=np.float64)), int(costs.max())
        longest = self._cost_lengths(column).max(keepdims=True)
        largest = int(self._in_buckets(longest)[0])
        return len(column) * largest, largest

    def _costs(self, column: Column) -> Lengths:
        """What each row costs: its length, padded up to a bucket where there are any."""
        return self._in_buckets(self._cost_lengths(column))

    def _cost_lengths(self, column: Column) -> Lengths:
        return _lengths(column, self._cost_axis)

    def _in_buckets(self, lengths: Lengths) -> Lengths:
        sizes = self._cost_sizes
        if not len(sizes):
            return lengths
        # What is over the largest bucket fails by itself.
        at = np.searchsorted(sizes, lengths)
        return np.where(at < len(sizes), sizes[np.minimum(at, len(sizes) - 1)], lengths)


def _in_order(works: Sequence[Work[J]], limit: int) -> list[list[Work[J]]]:
    """By their rows alone; a window may hold thousands of jobs of one row."""
    batches: list[list[Work[J]]] = []
    left = 0
    for work in works:
        if not batches or work.rows > left:
            batches.append([])
            left = limit
        batches[-1].append(work)
        left -= work.rows
    return batches


def _lengths(column: Column, axis: int) -> Lengths:
    """Per row, its length along an axis, or the number itself where a row is one."""
    if isinstance(column, RaggedRows):
        return column.sizes(min(axis, column.row_ndim - 1))
    if isinstance(column, DeviceRows) and column.ndim == 1:
        column = np.asarray(column)
    if isinstance(column, DeviceRows):
        return np.full(len(column), column.shape[1 + min(axis, column.ndim - 2)], np.int64)
    if isinstance(column, np.ndarray) and column.dtype != object:
        if column.ndim > 1:
            return np.full(len(column), column.shape[1 + min(axis, column.ndim - 2)], np.int64)
        return np.array([_length(value, axis) for value in column.tolist()], np.int64)
    return np.array([_length(value, axis) for value in column], np.int64)


def _length(value: Any, axis: int) -> int:
    shape = getattr(value, "shape", ())
    if shape:
        return int(shape[min(axis, len(shape) - 1)])
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        # Of a number that is none, or has no end, nothing better is known than that it is a row.
        return min(max(math.ceil(value), 0), 2**53) if math.isfinite(value) else 1
    try:
        return len(value)
    except TypeError:
        return 1  # null, a truth value
