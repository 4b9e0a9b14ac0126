"""Parquet and Arrow files, Hugging Face's `save_to_disk` included: ranges of rows, read forward batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

from torchrelay.config.columns import Column
from torchrelay.config.runs import Chunk
from torchrelay.errors import InputError
from torchrelay.stages.reading.arrow import IMAGE_KEYS, column_of_arrow, holds_images
from torchrelay.stages.reading.cursors import CURSORS
from torchrelay.stages.reading.files import file_below, is_url, need, open_file, shown
from torchrelay.stages.reading.images import file_bytes
from torchrelay.stages.reading.raw import Raw, Unreadable, ids

__all__ = ["arrow_batches", "parquet_file", "raw_of_arrow", "read_arrow", "read_parquet"]

_READ_ROWS = 4096


class _Rows:
    """A forward reader over record batches; `take` gives the rows of a range as one Arrow table."""

    def __init__(self, batches: Iterator[Any], schema: Any, first: int, file: BinaryIO) -> None:
        self.position = first
        self._batches = batches
        self._schema = schema
        self._file = file
        self._held: Any = None

    def close(self) -> None:
        self._held = None
        self._batches = iter(())
        self._file.close()

    def take(self, start: int, end: int) -> Any:
        """Rows `[start, end)` of the file, fewer where it ends; what lies before `start` is passed over."""
        pa = need("pyarrow", "Parquet and Arrow files")
        pieces = []
        while self.position < end:
            if self._held is None or not self._held.num_rows:
                self._held = next(self._batches, None)
                if self._held is None:
                    break
            past = min(max(start - self.position, 0), self._held.num_rows)
            self._held, self.position = self._held.slice(past), self.position + past
            rows = min(end - self.position, self._held.num_rows)
            if rows > 0 and self.position >= start:
                pieces.append(self._held.slice(0, rows))
                self._held, self.position = self._held.slice(rows), self.position + rows
        return pa.Table.from_batches(pieces, schema=self._schema)


def parquet_file(path: str, file: BinaryIO) -> Any:
    """The pyarrow ParquetFile; raises InputError where it is none or its footer is damaged."""
    pq = need("pyarrow.parquet", "Parquet files")
    pa = need("pyarrow", "Parquet files")
    try:
        # Of a remote file the ranges that are needed are fetched together.
        return pq.ParquetFile(file, pre_buffer=is_url(path))
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"{shown(path)} is no Parquet file, or was cut: {error}") from error


def read_parquet(chunk: Chunk, wanted: frozenset[str] | None) -> Raw:
    """Rows of a Parquet chunk. Only the wanted columns are unpacked."""

    def begin() -> _Rows:
        file = open_file(chunk.path, fingerprint)
        try:
            parquet = parquet_file(chunk.path, file)
            schema = parquet.schema_arrow
            names = _chosen(schema, wanted)
            group, first = _group_of(parquet.metadata, chunk.start)
            groups = list(range(group, parquet.metadata.num_row_groups))
            rows = min(max(chunk.end - chunk.start, 1), _READ_ROWS)
            # Threads would unpack columns side by side; workers of the run do that with chunks.
            batches = parquet.iter_batches(rows, groups, names, use_threads=False)
            pa = need("pyarrow", "Parquet files")
            return _Rows(batches, pa.schema([schema.field(n) for n in names]), first, file)
        except BaseException:
            file.close()
            raise

    fingerprint = chunk.options.get("fingerprint")
    return _read(chunk, wanted, begin)


def _chosen(schema: Any, wanted: frozenset[str] | None) -> list[str]:
    """The wanted columns; without any the first, since a table without columns has no rows."""
    chosen = [n for n in schema.names if wanted is None or n in wanted] or schema.names[:1]
    twice = next((n for i, n in enumerate(chosen) if n in chosen[:i]), None)
    if twice is not None:
        raise InputError(f"the file has two columns {twice!r:.60}; write it again with names of their own")
    return chosen


def _group_of(metadata: Any, row: int) -> tuple[int, int]:
    """(row group that holds this row, its first row)."""
    first = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < first + rows:
            return group, first
        first += rows
    return metadata.num_row_groups, first


def arrow_batches(path: str, file: BinaryIO) -> tuple[Any, Iterator[Any]]:
    """(schema, record batches) of an Arrow stream or file; raises InputError where it is neither."""
    pa = need("pyarrow", "Arrow files")
    source = file if is_url(path) else pa.memory_map(path)
    with _arrow_errors(path):
        magic = source.read(6)
        source.seek(0)
        if magic == b"ARROW1":
            whole = pa.ipc.open_file(source)
            return whole.schema, _checked(path, (whole.get_batch(i) for i in range(whole.num_record_batches)))
        stream = pa.ipc.open_stream(source)
        return stream.schema, _checked(path, iter(stream))


def _checked(path: str, batches: Iterator[Any]) -> Iterator[Any]:
    with _arrow_errors(path):
        yield from batches


@contextmanager
def _arrow_errors(path: str) -> Iterator[None]:
    pa = need("pyarrow", "Arrow files")
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"{shown(path)} is no Arrow file, or was cut: {error}") from error


def read_arrow(chunk: Chunk, wanted: frozenset[str] | None) -> Raw:
    """Rows of a chunk of an Arrow file, which is memory-mapped where it is local."""

    def begin() -> _Rows:
        file = open_file(chunk.path, chunk.options.get("fingerprint"))
        try:
            schema, batches = arrow_batches(chunk.path, file)
            pa = need("pyarrow", "Arrow files")
            names = _chosen(schema, wanted)
            chosen = (b.select(names) for b in batches)
            return _Rows(chosen, pa.schema([schema.field(n) for n in names]), 0, file)
        except BaseException:
            file.close()
            raise

    return _read(chunk, wanted, begin)


def _read(chunk: Chunk, wanted: frozenset[str] | None, begin: Any) -> Raw:
    pa = need("pyarrow", "Parquet and Arrow files")
    key = (chunk.path, chunk.format, chunk.options.get("fingerprint"), wanted)
    try:
        with CURSORS.borrow(key, chunk.start, begin) as rows:
            table = rows.take(chunk.start, chunk.end)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        where = f"{shown(chunk.path)}, rows {chunk.start} to {chunk.end}"
        raise InputError(f"{where}: cannot be read: {error}") from error
    if table.num_rows < chunk.end - chunk.start:
        raise InputError(f"{shown(chunk.path)} has fewer than {chunk.end} rows; it was cut after the run was planned")
    return raw_of_arrow(table, chunk.source, chunk.start, chunk.path.rpartition("/")[0])


def raw_of_arrow(table: Any, source: int, first: int, folder: str | None = None) -> Raw:
    """An Arrow table as rows `first`, `first + 1` ... of a source. `folder` is where image files that it names lie."""
    columns = _Columns(table, folder)
    rows = ids(range(first, first + table.num_rows))
    sources = ids([source] * table.num_rows)
    return Raw(sources, rows, columns, nbytes=table.nbytes, images=columns.images, arrow=table)


class _Columns(Mapping[str, Column]):
    """A table's columns, each made when it is asked for: what is only kept stays Arrow's."""

    def __init__(self, table: Any, folder: str | None) -> None:
        self.images = frozenset(f.name for f in table.schema if holds_images(f.type))
        self._table = table
        self._folder = folder
        self._made: dict[str, Column] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.column_names)

    def __len__(self) -> int:
        return len(self._table.column_names)

    def __contains__(self, name: object) -> bool:
        return name in self._table.column_names

    def __getitem__(self, name: str) -> Column:
        if name not in self._made:
            column = column_of_arrow(self._table.column(name))
            if name in self.images:
                column = [None if v is None else _image_bytes(v, self._folder) for v in column]
            self._made[name] = column
        return self._made[name]


def _image_bytes(value: Any, folder: str | None) -> Any:
    """The image of Hugging Face's struct: its bytes, else those of the file at its path."""
    content, path = (value[k] for k in IMAGE_KEYS)
    if content is not None or path is None:
        return content
    below = None if folder is None else file_below(folder, path)
    if below is None:
        # A dataset must not name any file of the machine that reads it.
        return Unreadable("InputError", f"the image is not in the dataset, and {path!r:.200} not below its folder")
    return file_bytes(below)
