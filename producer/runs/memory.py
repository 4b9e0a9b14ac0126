"""Inputs that lie in the driver's memory, as chunks that the driver pushes: no worker could read them.

    for chunk, read in push_chunks(dataset, ReadOptions(), types, ChunkSize()): submit(chunk, read.table)

A torch map-style Dataset, a list, a table {column: values}, a pandas or polars DataFrame, a pyarrow Table or
RecordBatchReader, or any iterable of rows. One chunk is held at a time.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np

from torchrelay.config.columns import Column, Types
from torchrelay.config.ragged import RaggedRows
from torchrelay.config.runs import MEMORY, Chunk, ChunkSize, ReadOptions, Source
from torchrelay.errors import ConfigError, InputError
from torchrelay.producer.runs.rows import RowReader, row_bytes
from torchrelay.stages.reading.choosing import ReadResult, choose
from torchrelay.stages.reading.files import need
from torchrelay.stages.reading.raw import BadRow, Raw, ids
from torchrelay.stages.reading.tables import raw_of_arrow

__all__ = ["is_in_memory", "memory_source", "push_chunks"]

Piece = tuple[int, Raw | None]
"""How many rows, and the rows; None where they are not wanted."""


def is_in_memory(data: object) -> bool:
    """Whether an input is rows rather than the names of files; a list of texts is taken for names."""
    if isinstance(data, str | bytes) or hasattr(data, "__fspath__"):
        return False
    if isinstance(data, list | tuple):
        return not data or not all(isinstance(d, str) or hasattr(d, "__fspath__") for d in data)
    return True


def memory_source(data: Any) -> Source:
    """The one source of an in-memory input. Its fingerprint is its kind and length: its content is not looked at."""
    try:
        length = str(len(next(iter(data.values()), ())) if isinstance(data, Mapping) else len(data))
    except (TypeError, NotImplementedError):
        length = "?"
    return Source(0, MEMORY, MEMORY, 0, f"{type(data).__name__}-{length}")


def push_chunks(
    data: Any,
    options: ReadOptions,
    types: Types | None = None,
    size: ChunkSize | None = None,
    *,
    limit: int | None = None,
    done: Container[int] = (),
) -> Iterator[tuple[Chunk, ReadResult]]:
    """The input as (chunk, its rows), in order.

    Args:
        data: as above. A row is a mapping, or a tuple, whose values are the pipeline's columns in order, or one value
            for a pipeline of one column.
        options, types: as for `read_chunk`.
        size: how much one chunk takes; its bytes are estimated by the first row, so that the same input is cut the
            same way.
        limit: rows to stop after.
        done: numbers of chunks to leave out; a dataset that has an index is not asked for their rows.

    A row on which a dataset's `__getitem__` raises is a bad row. What an iterable raises goes through.
    """
    if limit is not None and (type(limit) is not int or limit < 0):
        raise ConfigError(f"limit is a number of rows from 0, not {limit!r:.40}")
    # A table's columns are known; of rows each has its own.
    format = "table" if isinstance(data, Mapping) or hasattr(data, "__arrow_c_stream__") else MEMORY
    start = 0
    for number, (rows, raw) in enumerate(_pieces(data, size or ChunkSize(), limit, done, RowReader(options, types))):
        if raw is not None and number not in done:
            raw.rows = raw.rows + start
            raw.bad = [BadRow(b.source, b.row + start, b.error, b.text) for b in raw.bad]
            chunk = Chunk(number, 0, MEMORY, MEMORY, start, start + rows, "rows", start)
            yield chunk, choose(raw, format, options, types)
        start += rows


def _pieces(data: Any, size: ChunkSize, limit: int | None, done: Container[int], reader: RowReader) -> Iterator[Piece]:
    if isinstance(data, Mapping):
        return _of_table(data, size, limit)
    if type(data).__module__.partition(".")[0] == "pandas" and hasattr(data, "columns"):
        data = need("pyarrow", "pandas inputs").Table.from_pandas(data, preserve_index=False)
    if hasattr(data, "__arrow_c_stream__"):
        return _of_arrow(data, size, limit)
    if _is_indexed(data):
        return _of_dataset(data, size, limit, done, reader)
    if isinstance(data, Iterable) and not isinstance(data, str | bytes):
        return _of_iterable(data, size, limit, reader)
    raise ConfigError(f"an input is a path, a dataset, a table or an iterable of rows, not {type(data).__name__}")


def _is_indexed(data: Any) -> bool:
    """Whether rows can be had by number. torch's IterableDataset inherits an index that raises."""
    if any(base.__name__ == "IterableDataset" for base in type(data).__mro__) or isinstance(data, str | bytes):
        return False
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _rows_per_chunk(size: ChunkSize, nbytes: float) -> int:
    return max(min(size.rows, int(size.nbytes / max(nbytes, 1))), 1)


def _of_dataset(
    data: Any, size: ChunkSize, limit: int | None, done: Container[int], reader: RowReader
) -> Iterator[Piece]:
    total = len(data) if limit is None else min(len(data), limit)
    if not total:
        return
    try:
        first = row_bytes(reader.row(data[0]))
    except Exception:  # whatever it raised, it will again, and then the row is bad
        first = 0
    per = _rows_per_chunk(size, first)
    for number, start in enumerate(range(0, total, per)):
        end = min(start + per, total)
        yield end - start, None if number in done else _indexed_rows(data, start, end, reader)


def _indexed_rows(data: Any, start: int, end: int, reader: RowReader) -> Raw:
    read: list[dict[str, Any] | BadRow] = []
    for i in range(start, end):
        try:
            read.append(reader.row(data[i]))
        except Exception as error:  # the dataset is the user's: one row must not cost the others
            read.append(BadRow(0, i - start, type(error).__name__, str(error)[:2000]))
    return reader.table(read)


def _of_iterable(data: Iterable[Any], size: ChunkSize, limit: int | None, reader: RowReader) -> Iterator[Piece]:
    drawn = _drawn(data if limit is None else islice(data, limit), reader)
    first = next(drawn, None)
    if first is None:
        return
    per = _rows_per_chunk(size, 0 if isinstance(first, BadRow) else row_bytes(first))
    rest = chain([first], drawn)
    while rows := list(islice(rest, per)):
        yield len(rows), reader.table(rows)


def _drawn(data: Iterable[Any], reader: RowReader) -> Iterator[dict[str, Any] | BadRow]:
    for value in data:
        try:
            # An iterator may fill one buffer again and again.
            yield reader.row(value, copy=True)
        except InputError as error:
            yield BadRow(0, 0, type(error).__name__, str(error))


def _of_table(table: Mapping[str, Any], size: ChunkSize, limit: int | None) -> Iterator[Piece]:
    """A table {column: N values}, sliced."""
    columns = {str(name): _column(values) for name, values in table.items()}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"the columns of the input differ in their length: {lengths}")
    total = next(iter(lengths.values()), 0)
    total = total if limit is None else min(total, limit)
    if not total:
        return
    per = _rows_per_chunk(size, row_bytes({name: column[0] for name, column in columns.items()}))
    for start in range(0, total, per):
        rows = min(per, total - start)
        part: dict[str, Column] = {name: column[start : start + rows] for name, column in columns.items()}
        yield rows, Raw(ids([0] * rows), ids(range(rows)), part)


def _column(values: Any) -> Column:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    if isinstance(values, np.ndarray) and values.dtype != object:
        return values
    return values if isinstance(values, RaggedRows) else list(values)


def _of_arrow(data: Any, size: ChunkSize, limit: int | None) -> Iterator[Piece]:
    """Anything that gives an Arrow stream, batch by batch."""
    pa = need("pyarrow", "tables")
    reader = pa.RecordBatchReader.from_stream(data)
    left = limit
    held: list[Any] = []
    count, per = 0, 0
    for batch in reader:
        if left is not None:
            batch = batch.slice(0, left)
            left -= batch.num_rows
        if not batch.num_rows:
            continue
        per = per or _rows_per_chunk(size, batch.nbytes / batch.num_rows)
        held.append(batch)
        count += batch.num_rows
        while count >= per:
            table = pa.Table.from_batches(held)
            yield per, raw_of_arrow(table.slice(0, per), 0, 0)
            held, count = table.slice(per).to_batches(), count - per
    if count:
        yield count, raw_of_arrow(pa.Table.from_batches(held), 0, 0)
