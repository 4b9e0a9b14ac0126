"""Rows as tables for `run_local`: checked and encoded as a client does it, but many rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np

from torchrelay.config.columns import Column, Types, check_table, describe, table_of_row
from torchrelay.errors import InputError
from torchrelay.queues import codec
from torchrelay.stages.batch import join_rows

__all__ = ["Chunk", "Intake"]

_ROWS = 1024
_BYTES = 64 << 20
_SAMPLE = 8


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows as encoded columns; `first` is the number of the first."""

    first: int
    rows: int
    columns: Mapping[str, bytes]

    def part(self, start: int, end: int) -> Chunk:
        """Some of its rows."""
        tables: dict[str, Any] = {name: codec.decode(data) for name, data in self.columns.items()}
        part = {name: codec.encode(column[start:end]) for name, column in tables.items()}
        return Chunk(self.first + start, end - start, part)


class Intake:
    """Makes chunks of rows: full batches of `batch_rows`, as many as about 1024 rows or 64 MiB hold."""

    def __init__(self, types: Types, batch_rows: int) -> None:
        self._types = types
        self._batch_rows = batch_rows

    def chunks(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Chunk]:
        """Raises InputError that names the row which does not fit."""
        if isinstance(rows, Mapping | str | bytes) or not isinstance(rows, Iterable):
            raise InputError(f"rows are a list of mappings of column to value, {describe(rows)} came")
        source, first = iter(rows), 0
        while part := self._take(source):
            for alike in self._alike(part):
                yield from self._encoded(self._table(alike, first), first, len(alike))
                first += len(alike)

    def _take(self, source: Iterator[Any]) -> list[Any]:
        part: list[Any] = []
        nbytes = 0
        while more := list(islice(source, self._batch_rows)):
            part += more
            some = more[:: max(1, len(more) // _SAMPLE)]
            nbytes += sum(map(_size, some)) * len(more) // len(some)
            if len(part) + self._batch_rows > _ROWS or nbytes + nbytes * len(more) // len(part) > _BYTES:
                break
        return part

    def _alike(self, rows: list[Any]) -> Iterator[list[Any]]:
        """Runs of rows whose columns are of one kind. Where types are declared, the checks see to that."""
        if self._types:
            yield rows
            return
        start, last = 0, None
        for i, row in enumerate(rows):
            kind = _kind(row)
            if i and kind != last:
                yield rows[start:i]
                start = i
            last = kind
        yield rows[start:]

    def _table(self, rows: list[Any], first: int) -> dict[str, Column]:
        names = rows[0].keys() if type(rows[0]) is dict else ()
        if names and set(map(type, rows)) == {dict} and set(map(len, rows)) == {len(names)}:
            try:
                return check_table(self._types, {n: self._column(n, rows) for n in names})[0]
            except (InputError, KeyError):
                pass  # below each row is looked at, and the one that does not fit is named
        tables: list[dict[str, Column]] = []
        for number, row in enumerate(rows, first):
            try:
                tables.append(table_of_row(self._types, row))
            except InputError as error:
                raise InputError(f"row {number}: {error}") from error
        return {name: join_rows([table[name] for table in tables]) for name in tables[0]}

    def _column(self, name: str, rows: list[Any]) -> Column:
        """Arrays of one dtype and shape as one array: it is then checked as a whole."""
        values = list(map(itemgetter(name), rows))
        head, kind = values[0], self._types.get(name)
        if type(head) is np.ndarray and (kind.stacked if kind else head.dtype != object) and _same_arrays(values):
            return np.concatenate(values).reshape(len(values), *head.shape) if head.ndim else np.stack(values)
        return values

    def _encoded(self, table: Mapping[str, Column], first: int, rows: int) -> Iterator[Chunk]:
        """One chunk, or several where its columns are too large for one message; finds the row that cannot travel."""
        columns: dict[str, bytes] = {}
        for name, column in table.items():
            try:
                columns[name] = codec.encode(column)
            except InputError as error:
                if rows == 1:
                    raise InputError(f"row {first}: column {name!r}: {error}") from error
                middle = rows // 2
                yield from self._encoded({n: c[:middle] for n, c in table.items()}, first, middle)
                yield from self._encoded({n: c[middle:] for n, c in table.items()}, first + middle, rows - middle)
                return
        yield Chunk(first, rows, columns)


_FORM = attrgetter("dtype", "shape")


def _same_arrays(values: Sequence[Any]) -> bool:
    return set(map(type, values)) == {np.ndarray} and len(set(map(_FORM, values))) == 1


def _kind(row: Any) -> object:
    if not isinstance(row, Mapping):
        return None
    arrays = {n: (v.dtype, v.shape) for n, v in row.items() if isinstance(v, np.ndarray) and v.dtype != object}
    return (list(row), arrays)


def _size(row: Any) -> int:
    """About how many bytes a row takes."""
    if not isinstance(row, dict):
        return 0
    return sum(
        v.nbytes if isinstance(v, np.ndarray) else len(v) if isinstance(v, str | bytes) else 8 for v in row.values()
    )
