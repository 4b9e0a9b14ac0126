"""From a dataset's rows to a pipeline's: its columns under its names, checked row by row against its types.

What is wrong with one row costs that row alone: it goes to `bad` with the reason, and its neighbours stay.
"""

from __future__ import annotations

import copy
import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from torchrelay.config.columns import Column, Types, check_table, fit_numbers, table_of_row
from torchrelay.config.ragged import RaggedRows, take_rows
from torchrelay.config.runs import ReadOptions
from torchrelay.config.types import COLUMN_NAME, ColumnType
from torchrelay.errors import InputError
from torchrelay.stages.reading.arrays import ARRAY_COLUMN
from torchrelay.stages.reading.images import IMAGE_COLUMN, decode_column
from torchrelay.stages.reading.kept import kept_names, kept_table
from torchrelay.stages.reading.raw import MISSING, BadRow, Ids, Raw, Unreadable
from torchrelay.stages.reading.texts import TEXT_COLUMN

__all__ = ["OPEN_FORMATS", "ReadResult", "choose", "resolve", "wanted_columns"]

MAIN_COLUMN: Final = {"text": TEXT_COLUMN, "npy": ARRAY_COLUMN, "image": IMAGE_COLUMN}
"""The column of formats that have but one; a pipeline's only column takes it under any name."""
OPEN_FORMATS: Final = frozenset({"jsonl", "tar", "memory"})
"""Formats in which each row says itself which columns it has."""
_OR = ";"
_WORDS: Final = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class ReadResult:
    """The N rows of a chunk that can enter the pipeline, and those that cannot."""

    table: dict[str, Column]
    """The pipeline's input columns, each N long."""
    sources: Ids
    """Per row, the number of its source: int64 `[N]`."""
    rows: Ids
    """Per row, where it stands in its source: int64 `[N]`."""
    kept: Any = None
    """A pyarrow.Table of the key and the columns that the output repeats, under the dataset's names; None for none."""
    bad: tuple[BadRow, ...] = ()
    nbytes: int = 0
    """Bytes that were read."""

    def __len__(self) -> int:
        return len(self.rows)


def wanted_columns(format: str, options: ReadOptions, types: Types | None) -> frozenset[str] | None:
    """The dataset columns that have to be read; None for all."""
    names = list(types or options.columns)
    if not names:
        return None
    asked = [options.columns.get(name, name) for name in names] + list(options.keep)
    asked += [options.key] if options.key else []
    main = MAIN_COLUMN.get(format)
    return frozenset([part for name in asked for part in name.split(_OR)] + ([main] if main else []))


def resolve(format: str, available: Iterable[str] | None, options: ReadOptions, types: Types | None) -> dict[str, str]:
    """Pipeline column to dataset column.

    `available` are the dataset's columns, None where each row has its own. Raises InputError where a column that must
    be there is not, with what to write.
    """
    known = None if available is None else list(available)
    unknown = [n for n in options.columns if types and n not in types]
    if unknown:
        raise InputError(f"columns: the pipeline has no input {unknown[0]!r:.60}; it has {', '.join(types or ())}")
    if not types and not options.columns:
        return {name: name for name in _variables(known or ())}
    names = list(types or options.columns)
    chosen = {name: options.columns.get(name, name) for name in names}
    if known is None:
        return chosen
    lost = [n for n, column in chosen.items() if not set(column.split(_OR)) & set(known)]
    main = MAIN_COLUMN.get(format)
    needed = [n for n in lost if not _optional(types, n) or n in options.columns]
    if main and len(needed) == 1 and needed[0] not in options.columns and main not in chosen.values():
        chosen[needed.pop()] = main
    missing = [chosen[n] for n in needed] + [c for c in (*options.keep, options.key) if c and c not in known]
    if missing:
        raise InputError(
            f"the dataset has no column {missing[0]!r:.60}; it has {', '.join(known)[:300]}; "
            f"say which column is meant: columns={{pipeline column: dataset column}}{_looks_like(missing[0], known)}"
        )
    return {n: c for n, c in chosen.items() if n not in lost or c == main}


def _looks_like(name: str, known: Iterable[str]) -> str:
    """A hint where a column's name only looks the same: accents may be spelled as one character or as two."""
    plain = unicodedata.normalize("NFC", name)
    other = next((n for n in known if n != name and unicodedata.normalize("NFC", n) == plain), None)
    return "" if other is None else f"; {other!a:.80} there is spelled in the other Unicode form, {name!a:.80} came"


def _optional(types: Types | None, name: str) -> bool:
    kind = (types or {}).get(name)
    return kind is not None and (kind.nullable or kind.has_default)


def _variables(names: Iterable[str]) -> list[str]:
    listed = list(names)
    for name in listed:
        if not COLUMN_NAME.fullmatch(name):
            raise InputError(
                f"the dataset's column {name!r:.60} is not named like a variable; say which columns the "
                "pipeline gets: columns={pipeline column: dataset column}"
            )
    return listed


def choose(raw: Raw, format: str, options: ReadOptions, types: Types | None) -> ReadResult:
    """The pipeline's columns, key and kept columns of these rows; raises InputError where a whole column is not there.

    A value that is missing is the declared default, else null where that is allowed, else its row is bad.
    """
    rows = len(raw.rows)
    open_columns = format in OPEN_FORMATS and bool(types or options.columns)
    given = resolve(format, None if open_columns else raw.columns, options, types)
    failed: dict[int, Unreadable] = {}
    strict = bool(types or options.columns)
    table: dict[str, Column] = {}
    for name, column in given.items():
        kind = (types or {}).get(name)
        values = _prepared(name, kind, _pick(raw, column, rows), raw, column, options.image_side)
        table[name] = _filled(values, kind, f"column {column!r:.60}", strict, failed)
    names = kept_names(options)
    kept = kept_table({n: _as_it_is(raw, n, rows) for n in names}, options, rows, failed) if names else None
    good = _rest(rows, failed)
    table = {name: take_rows(column, good) for name, column in table.items()} if failed else table
    if types:
        table, good = _checked(types, table, good, failed)
    if failed and kept is not None:
        kept = kept.take(good)
    bad = [BadRow(int(raw.sources[i]), int(raw.rows[i]), f.error, f.text) for i, f in failed.items()]
    bad = sorted([*raw.bad, *bad], key=lambda b: (b.source, b.row))
    return ReadResult(table, raw.sources[good], raw.rows[good], kept, tuple(bad), raw.nbytes)


def _as_it_is(raw: Raw, column: str, rows: int) -> Any:
    known = raw.arrow is not None and column in raw.arrow.column_names
    return raw.arrow.column(column) if known else _pick(raw, column, rows)


def _rest(rows: int, failed: Mapping[int, Unreadable]) -> Ids:
    keep = np.ones(rows, np.bool_)
    keep[list(failed)] = False
    return np.flatnonzero(keep)


def _pick(raw: Raw, column: str, rows: int) -> Column:
    """A dataset column; of `jpg;png` the first that a row has."""
    found = [raw.columns[part] for part in column.split(_OR) if part in raw.columns]
    if not found:
        return [MISSING] * rows
    picked = found[0]
    for other in found[1:]:
        picked = [b if a is MISSING else a for a, b in zip(picked, other, strict=True)]
    return picked


def _prepared(name: str, kind: ColumnType | None, values: Column, raw: Raw, column: str, side: int | None) -> Column:
    """Values as the declared type wants them where a file cannot hold them so: images decoded, numbers of text read."""
    encoded = not raw.images.isdisjoint(column.split(_OR))
    if kind is None:
        return decode_column(values, side=side) if encoded and isinstance(values, list) else values
    if kind.dtype == "uint8" and len(kind.shape) in (2, 3) and isinstance(values, list):
        return decode_column(values, len(kind.shape) == 2, side)
    if raw.as_text and isinstance(values, list):
        return [_of_text(kind, v) for v in values]
    return _fitted(name, kind, values) if kind.is_numeric else values


def _of_text(kind: ColumnType, value: Any) -> Any:
    """A cell of CSV; an empty one is no value, but of a text column the empty text."""
    if not isinstance(value, str) or kind.dtype == "str":
        return value
    if not value.strip():
        return MISSING
    try:
        if kind.dtype == "bytes":
            return value.encode()
        if kind.dtype == "json" or kind.shape:
            return json.loads(value)
        if kind.dtype == "bool":
            return _WORDS[value.strip().lower()]
        if kind.np_dtype.kind in "iu":
            return int(value)
        return complex(value) if kind.np_dtype.kind == "c" else float(value)
    except (ValueError, KeyError, RecursionError):
        return Unreadable("InputError", f"{kind} is expected, {value!r:.60} came")


def _fitted(name: str, kind: ColumnType, values: Column) -> Column:
    """Arrays of a file in the declared width: a file's float64 is read as float32 as a Python float is."""

    def one(value: Any) -> Any:
        if not isinstance(value, np.ndarray | np.generic) or value.dtype == kind.np_dtype:
            return value
        try:
            return fit_numbers(name, kind, value)
        except InputError as error:
            return Unreadable.of(error)

    if isinstance(values, np.ndarray | RaggedRows):
        if values.dtype == kind.np_dtype:
            return values
        try:
            if isinstance(values, np.ndarray):
                whole: Column = fit_numbers(name, kind, values)
                return whole
            return RaggedRows(fit_numbers(name, kind, values.flat), values.starts, values.lengths)
        except InputError:
            pass  # one by one, to find which
    return [one(value) for value in values]


def _filled(values: Column, kind: ColumnType | None, what: str, strict: bool, failed: dict[int, Unreadable]) -> Column:
    """Values without MISSING and Unreadable: defaults in their place, or null, and their rows in `failed`."""
    if not isinstance(values, list) or not any(v is MISSING or type(v) is Unreadable for v in values):
        return values
    out = []
    for i, value in enumerate(values):
        if type(value) is Unreadable:
            failed.setdefault(i, Unreadable(value.error, f"{what}: {value.text}"))
            value = None
        elif value is MISSING:
            value = None
            if kind is not None and kind.has_default:
                value = copy.deepcopy(kind.default)
            elif strict and not (kind is not None and kind.nullable):
                failed.setdefault(i, Unreadable("InputError", f"{what} has no value in this row"))
        out.append(value)
    return out


def _checked(
    types: Types, table: dict[str, Column], good: Ids, failed: dict[int, Unreadable]
) -> tuple[dict[str, Column], Ids]:
    """The table against its declared types, rows that do not fit taken out; with the numbers of those that do."""
    if not table:
        # Of a pipeline whose columns are all optional, a dataset may have none.
        table = {next(iter(types)): [next(iter(types.values())).default] * len(good)}
    try:
        return check_table(types, table)[0], good
    except InputError:
        pass  # row by row, to find which
    fits: list[int] = []
    for at, i in enumerate(good.tolist()):
        try:
            table_of_row(types, {name: column[at] for name, column in table.items()})
        except InputError as error:
            failed[i] = Unreadable.of(error)
        else:
            fits.append(at)
    index = np.asarray(fits, np.int64)
    rest = {name: take_rows(column, index) for name, column in table.items()}
    return check_table(types, rest)[0], good[index]
