"""Text, JSONL and CSV: the rows of a chunk, each parsed by itself, so that a broken one costs only itself."""

from __future__ import annotations

import csv
import functools
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torchrelay.config.runs import Chunk
from torchrelay.errors import DecodeError, InputError
from torchrelay.stages.reading.cursors import CURSORS
from torchrelay.stages.reading.files import open_file, shown
from torchrelay.stages.reading.raw import MISSING, BadRow, Raw, ids, plain_numbers
from torchrelay.stages.reading.records import MOST_RECORD_BYTES, Record, Records, lines_of

__all__ = ["DELIMITERS", "TEXT_COLUMN", "csv_header", "delimiter_of", "other_delimiter", "read_text", "records_of"]

TEXT_COLUMN = "text"
"""The one column of a text file."""
DELIMITERS = {"csv": ",", "tsv": "\t"}
_BOM = b"\xef\xbb\xbf"


def records_of(chunk: Chunk) -> Iterator[Record]:
    """The rows of a chunk as bytes, blank lines and CSV's header left out, at most `max_rows`; iterate to the end."""
    most = chunk.options.get("max_rows")
    # In a text file an empty line is a row; in CSV one of tabs or spaces is a row of empty fields.
    blank = {"text": None, "jsonl": b" \t\r\n"}.get(chunk.format, b"\r\n")
    given = 0
    for offset, record in _all_records(chunk):
        if most is not None and given >= most:
            # What was read ahead must not be lost to a kept reader, so iteration goes on.
            continue
        if offset == 0 and isinstance(record, bytes):
            record = record.removeprefix(_BOM)
            if chunk.format in DELIMITERS:
                continue
        if blank is not None and isinstance(record, bytes) and not record.strip(blank):
            continue
        given += 1
        yield offset, record


def _all_records(chunk: Chunk) -> Iterator[Record]:
    compression, delimiter = chunk.options.get("compression", ""), _delimiter(chunk)
    fingerprint = chunk.options.get("fingerprint")
    if not compression and not delimiter:
        with open_file(chunk.path, fingerprint) as file:
            yield from lines_of(file, chunk.start, chunk.end)
        return

    def begin() -> Records:
        return Records(open_file(chunk.path, fingerprint), compression, delimiter)

    with CURSORS.borrow((chunk.path, chunk.format, fingerprint), chunk.start, begin) as records:
        yield from records.take(chunk.start, chunk.end)


def read_text(chunk: Chunk) -> Raw:
    """The rows of a chunk of text, JSONL or CSV; `row` is the offset of a row's first byte in the unpacked text."""
    bad: list[BadRow] = []
    rows: list[int] = []
    values: list[Any] = []
    nbytes = 0
    header = _header_of(chunk) if chunk.format in DELIMITERS else []
    parse = {"text": _line, "jsonl": _object}.get(chunk.format) or _Record(header, _delimiter(chunk))
    for offset, record in records_of(chunk):
        try:
            if isinstance(record, DecodeError):
                raise record
            nbytes += len(record)
            values.append(parse(record))
        except (InputError, DecodeError, ValueError, RecursionError, csv.Error) as error:
            bad.append(BadRow(chunk.source, offset, type(error).__name__, str(error)[:2000]))
        else:
            rows.append(offset)
    if chunk.format == "text":
        columns: dict[str, Any] = {TEXT_COLUMN: values}
    elif chunk.format == "jsonl":
        columns = _by_name(values)
    else:
        columns = {name: [v[i] for v in values] for i, name in enumerate(header)}
    sources = ids([chunk.source] * len(rows))
    return Raw(sources, ids(rows), columns, bad, nbytes, as_text=chunk.format in DELIMITERS)


def _line(record: bytes) -> str:
    return record.removesuffix(b"\n").removesuffix(b"\r").decode()


def _object(record: bytes) -> dict[str, Any]:
    value = json.loads(record.decode())
    if not isinstance(value, dict):
        raise InputError(f"a JSON object is expected in each line, {record[:40]!r} came")
    return value


class _Record:
    """Parses one CSV record into the header's fields."""

    def __init__(self, header: list[str], delimiter: str) -> None:
        self._fields = len(header)
        self._delimiter = delimiter
        if csv.field_size_limit() < MOST_RECORD_BYTES:
            csv.field_size_limit(MOST_RECORD_BYTES)

    def __call__(self, record: bytes) -> list[str]:
        fields = _fields(record, self._delimiter)
        if len(fields) != self._fields:
            raise InputError(f"{self._fields} fields are expected, as in the header, {len(fields)} came")
        return fields


def _fields(record: bytes, delimiter: str) -> list[str]:
    text = record.removesuffix(b"\n").removesuffix(b"\r").decode()
    rows = list(csv.reader([text], delimiter=delimiter, strict=True))
    if len(rows) != 1:
        raise InputError(f"one record is expected, {len(rows)} came")
    return rows[0]


def _delimiter(chunk: Chunk) -> str:
    return str(chunk.options.get("delimiter") or DELIMITERS.get(chunk.format, ""))


def delimiter_of(format: str, head: bytes) -> str:
    """What separates the fields of a CSV or TSV file that begins so: of CSV, `;` or tabs where its header has those and
    no comma."""
    line = head.partition(b"\n")[0]
    if format == "csv" and b"," not in line:
        return next((mark for mark in ";\t" if mark.encode() in line), ",")
    return DELIMITERS[format]


def other_delimiter(header: list[str], delimiter: str, wanted: Iterable[str]) -> str | None:
    """What separates the fields of a header more likely, where the given delimiter leaves columns unnamed."""
    line, names = delimiter.join(header), set(wanted)
    for mark in [m for m in ",;\t|:" if m != delimiter and m in line]:
        if names & {name.strip().strip('"') for name in line.split(mark)}:
            return mark
    return next((m for m in ",;\t|" if m in line), None) if len(header) == 1 else None


def _header_of(chunk: Chunk) -> list[str]:
    options = chunk.options
    return csv_header(chunk.path, _delimiter(chunk), options.get("compression", ""), options.get("fingerprint"))


def csv_header(path: str, delimiter: str, compression: str = "", fingerprint: str | None = None) -> list[str]:
    """The names in the first record; raises InputError where there is none, or one is empty or stands there twice."""
    return list((_kept_header if fingerprint else _read_header)(path, delimiter, compression, fingerprint))


def _read_header(path: str, delimiter: str, compression: str, fingerprint: str | None) -> list[str]:
    records = Records(open_file(path, fingerprint), compression, delimiter)
    try:
        # Of a packed file even the first row lies somewhere behind the first byte.
        first = next(records.take(0, sys.maxsize), (0, b""))[1]
    finally:
        records.close()
    if isinstance(first, DecodeError):
        raise InputError(f"{shown(path)}: the header cannot be read: {first}")
    try:
        names = [n.strip() for n in _fields(first.removeprefix(_BOM), delimiter)] if first.strip() else []
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{shown(path)}: the header cannot be read: {error}") from error
    if not names or not all(names) or len(set(names)) < len(names):
        raise InputError(
            f"{shown(path)}: the first line must name each column once, {first[:80]!r} came; "
            "a file without names can be read as text"
        )
    return names


_kept_header = functools.lru_cache(64)(_read_header)


def _by_name(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names: dict[str, None] = dict.fromkeys(_names(rows))
    return {name: plain_numbers([row.get(name, MISSING) for row in rows]) for name in names}


def _names(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    last: tuple[str, ...] = ()
    for row in rows:
        names = tuple(row)
        if names != last:
            last = names
            yield from names
