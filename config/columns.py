"""Rows and tables against declared columns. Every check of values happens here, in the producer and in the worker.

A row is {column: value}; a table has the batch axis: an array [N, ...] per stacked column, a list of N values per
other. A list of arrays that differ in their first axis only is held as RaggedRows.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from torchrelay.config.device_rows import DeviceRows
from torchrelay.config.ragged import RaggedRows
from torchrelay.config.types import COLUMN_NAME, ColumnType, parse_type
from torchrelay.errors import InputError

Column = np.ndarray[Any, np.dtype[Any]] | list[Any] | RaggedRows | DeviceRows
Types = Mapping[str, ColumnType]

_TEXT = parse_type("str")


def describe(value: object) -> str:
    """What came, for an error message: a type, with dtype and shape for arrays."""
    if isinstance(value, np.ndarray | DeviceRows):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, str | bytes | list | tuple | dict | RaggedRows):
        kind = "list" if isinstance(value, RaggedRows) else type(value).__name__
        return f"{kind} of length {len(value)}"
    try:
        return f"{type(value).__name__} {value!r:.40}"
    except Exception:  # a stranger's __repr__ may raise anything; the message is still needed
        return type(value).__name__


def _refuse(name: str, kind: ColumnType, value: object, why: str = "") -> InputError:
    return InputError(f"column {name!r}: {kind} is expected, {describe(value)} came{'; ' + why if why else ''}")


def check_value(name: str, kind: ColumnType, value: Any) -> Any:
    """One row's value as the column stores it; raises InputError naming column, expectation and what came."""
    if value is None:
        if kind.nullable:
            return None
        raise _refuse(name, kind, value, "write ? behind the type to allow null")
    dtype = kind.dtype
    if dtype == "str":
        if isinstance(value, str):
            if not value.isascii() and not _travels(value):
                raise _refuse(name, kind, value, "half of a surrogate pair is no text that UTF-8 can hold")
            # Not str(): of a member of an Enum of texts, that is its name.
            return str.__str__(value)
        raise _refuse(name, kind, value)
    if dtype == "bytes":
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        raise _refuse(name, kind, value)
    if dtype == "json":
        return value
    return _number(name, kind, value)


def _check_texts(name: str, values: Sequence[Any]) -> None:
    for i, value in enumerate(values):
        if type(value) is str and not value.isascii():
            _check_row(name, _TEXT, value, i)


def _travels(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number(name: str, kind: ColumnType, value: Any) -> Any:
    if type(value) is not np.ndarray and isinstance(value, np.ma.MaskedArray):
        raise _refuse(name, kind, value, "masks are not carried; fill it first: .filled(0)")
    if isinstance(value, np.ndarray) and value.dtype == kind.np_dtype:
        array = value
    else:
        if isinstance(value, str | bytes | dict | set):
            raise _refuse(name, kind, value)
        if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**64:
            raise _refuse(name, kind, value, "it does not fit 64 bits")
        if not isinstance(value, np.ndarray | np.generic):
            value = fit_numbers(name, kind, value)
        array = _cast(name, kind, np.asarray(value))
    if array.ndim != len(kind.shape):
        raise _refuse(name, kind, array, f"it has {array.ndim} dims, not {len(kind.shape)}")
    for have, want in zip(array.shape, kind.shape, strict=True):
        if isinstance(want, int) and have != want:
            raise _refuse(name, kind, array)
    if not kind.shape and not kind.stacked:
        return array[()].item() if kind.dtype in ("bool", "int64", "float64") else array[()]
    return array


def fit_numbers(name: str, kind: ColumnType, value: Any) -> Any:
    """Numbers whose own width does not count, such as Python's or a file's, as an array of the column's dtype.

    Integers must fit and floats may round; what needs another kind of number is given back as an array unchanged.
    Raises InputError where a value does not fit.
    """
    try:
        array = np.asarray(value)
    except Exception as error:  # a stranger's __array__ may raise anything
        raise _refuse(name, kind, value, str(error)) from error
    if array.dtype == object:
        raise _refuse(name, kind, value, "it is ragged or holds other things than numbers")
    if array.size == 0 and array.dtype == np.float64:
        return array.astype(kind.np_dtype)
    # Python's numbers have no width of their own: what the column's dtype can hold is taken, and floats may round.
    want, have = kind.np_dtype, array.dtype.kind
    if have in "iu" and want.kind in "iu":
        limits = np.iinfo(want)
        if array.size and not (limits.min <= int(array.min()) and int(array.max()) <= limits.max):
            raise _refuse(name, kind, value, f"it does not fit {kind.dtype}")
        return array.astype(want)
    if want.kind in "biu" or have not in "iufc" or (have == "c" and want.kind != "c"):
        return array
    with np.errstate(all="ignore"):
        cast = array.astype(want)
    if have in "iu" and not _same_ints(cast, array):
        raise _refuse(name, kind, value, f"{kind.dtype} cannot hold it exactly; pass a float if rounding is meant")
    if have in "fc" and not np.isfinite(_wide(cast))[np.isfinite(array)].all():
        raise _refuse(name, kind, value, f"it does not fit {kind.dtype}")
    return cast


def _wide(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _same_ints(cast: np.ndarray[Any, Any], ints: np.ndarray[Any, Any]) -> bool:
    back = _wide(cast).real
    if ints.size == 0 or max(-int(ints.min()), int(ints.max())) <= 2**53:
        return np.array_equal(back, ints)
    # Beyond 2**53 numpy compares after rounding; Python compares an int with a float exactly.
    return bool(back.ravel().tolist() == ints.ravel().tolist())


def _cast(name: str, kind: ColumnType, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    want = kind.np_dtype
    if array.dtype == want:
        return array
    if array.dtype.newbyteorder("=") == want:
        return array.astype(want)
    same_kind = (array.dtype.kind == "b") == (want.kind == "b")
    if not same_kind or not np.can_cast(array.dtype, want, casting="safe"):
        raise _refuse(name, kind, array, f"convert it yourself: .astype({kind.dtype!r})")
    cast = array.astype(want)
    if array.dtype.kind in "iu" and want.kind not in "iu" and not _same_ints(cast, array):
        raise _refuse(name, kind, array, f"{kind.dtype} cannot hold it exactly")
    return cast


def _named_dims(types: Types, values: Mapping[str, Any], row: int | None = None) -> None:
    seen: dict[str, tuple[str, int]] = {}
    for name, kind in types.items():
        value = values.get(name)
        if not kind.shape or value is None:
            continue
        for dim, size in zip(kind.shape, np.shape(value), strict=True):
            if isinstance(dim, str):
                first, known = seen.setdefault(dim, (name, size))
                if known != size:
                    where = "" if row is None else f"row {row}: "
                    raise InputError(f"{where}column {name!r}: {dim} is {size} here and {known} in {first!r}")


def _has_names(types: Types) -> bool:
    return any(isinstance(d, str) for kind in types.values() for d in kind.shape)


def _check_named(types: Types, table: Mapping[str, Column], rows: int) -> None:
    if _has_names(types) and not _names_agree(types, table):
        # The others need not be looked at: they may lie on a device.
        named = {n: c for n, c in table.items() if n in types and _has_names({n: types[n]})}
        for i in range(rows):
            _named_dims(types, {n: c[i] for n, c in named.items()}, i)


def _names_agree(types: Types, table: Mapping[str, Column]) -> bool:
    """Whether each name is one size within every row, as far as that can be told of whole columns."""
    seen: dict[str, Any] = {}
    for name, kind in types.items():
        column = table.get(name)
        for axis, dim in enumerate(kind.shape):
            if isinstance(dim, str):
                if not isinstance(column, RaggedRows):
                    return False
                sizes = column.sizes(axis)
                if not np.array_equal(seen.setdefault(dim, sizes), sizes):
                    return False
    return True


def _check_names(types: Types, given: Mapping[str, Any], what: str) -> None:
    for name in given:
        if name not in types:
            near = difflib.get_close_matches(str(name), list(types), 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it declares {', '.join(types)}"
            raise InputError(f"{what} has no column {name!r:.60}{hint}")


def table_of_row(types: Types | None, row: Mapping[str, Any]) -> dict[str, Column]:
    """One row as a table of N = 1. Without declared types, arrays get a batch axis and all else a list.

    Raises InputError naming the column, what came and what was expected.
    """
    if type(row) is not dict and not isinstance(row, Mapping):
        raise InputError(f"a row is a mapping of column to value, {describe(row)} came")
    if not types:
        if not row or not all(isinstance(n, str) and COLUMN_NAME.fullmatch(n) for n in row):
            raise InputError(f"a row needs columns named like variables, not {list(row)!r:.80}")
        return {n: v[None] if isinstance(v, np.ndarray) and v.dtype != object else [v] for n, v in row.items()}
    table: dict[str, Column] = {}
    for name, kind in types.items():
        if name in row:
            value = row[name]
            if type(value) is not str or kind.dtype != "str":
                value = check_value(name, kind, value)
        elif kind.has_default:
            value = copy.deepcopy(kind.default) if kind.dtype == "json" else kind.default
        elif kind.nullable:
            value = None
        else:
            _check_names(types, row, "the pipeline's input")
            raise InputError(f"column {name!r} is missing; {kind} is expected")
        table[name] = np.asarray(value)[None] if kind.stacked else [value]
    if len(row) > len(types) or not row.keys() <= types.keys():
        _check_names(types, row, "the pipeline's input")
    if _has_names(types):
        _named_dims(types, {n: c[0] for n, c in table.items()})
    return table


def _length(name: str, column: Any) -> int:
    """N of a column; raises InputError for what is no column, such as one text or a 0-d array."""
    if hasattr(column, "__len__") and not isinstance(column, str | bytes | bytearray | Mapping | Set):
        try:
            return len(column)
        except TypeError:
            pass  # a 0-d array has the method and no length
    raise InputError(f"column {name!r}: an array or a list of one value per row is expected, {describe(column)} came")


def check_column(name: str, kind: ColumnType, column: Any, rows: int | None) -> Column:
    """A column of N values, stacked or a list; raises InputError with the row where one value does not fit."""
    length = _length(name, column)
    if rows is not None and length != rows:
        raise InputError(f"column {name!r}: {rows} rows are expected, {length} came")
    if isinstance(column, DeviceRows):
        if fits_as_it_is(name, kind, column.dtype, column.shape[1:]):
            return column
        column = np.asarray(column)
    if not kind.stacked:
        ragged = _ragged(name, kind, column)
        if ragged is not None:
            return ragged
        return [_check_row(name, kind, value, i) for i, value in enumerate(column)]
    whole = ColumnType(kind.dtype, (length, *kind.shape))
    if isinstance(column, np.ndarray):
        if column.shape != whole.shape:
            came = f"{column.dtype}{list(column.shape[1:])}"
            raise InputError(f"column {name!r}: {kind} is expected in each of {length} rows, {came} came")
        return _cast(name, whole, column)
    if not kind.shape and set(map(type, column)) in ({int}, {float}, {bool}):
        try:
            return np.asarray(check_value(name, whole, column))
        except InputError:
            pass  # the loop below finds the row
    values = [_check_row(name, kind, value, i) for i, value in enumerate(column)]
    return np.stack(values) if values else np.empty((0, *_ints(kind)), kind.np_dtype)


def fits_as_it_is(name: str, kind: ColumnType, dtype: np.dtype[Any], row_shape: tuple[int, ...]) -> bool:
    """Whether rows of this dtype and shape are what is declared, without being looked at or converted.

    A ragged column does not stay one array, as its reader gets a list; but what goes between parts of a model is always
    padded by its reader (`%state`, config/shards.py).
    """
    if not (kind.stacked or name.startswith("%")) or dtype != kind.np_dtype or len(row_shape) != len(kind.shape):
        return False
    return all(own == size for own, size in zip(row_shape, kind.shape, strict=True) if isinstance(size, int))


def _as_ragged(column: Any) -> RaggedRows | None:
    if isinstance(column, np.ndarray) and column.ndim > 1 and column.dtype != object:
        return RaggedRows.even(column)
    return column if isinstance(column, RaggedRows) else RaggedRows.of(column) if type(column) is list else None


def _ragged(name: str, kind: ColumnType, column: Any) -> RaggedRows | None:
    """The column as it is checked in one go; None where it cannot be, or does not fit."""
    if not kind.is_numeric or not kind.shape:
        return None
    ragged = _as_ragged(column)
    if ragged is None or ragged.row_ndim != len(kind.shape):
        return None
    if ragged.dtype != kind.np_dtype:
        try:
            ragged = RaggedRows(_cast(name, kind, ragged.flat), ragged.starts, ragged.lengths)
        except InputError:
            return None  # whoever looks at the rows finds which
    fits = all((ragged.sizes(axis) == size).all() for axis, size in enumerate(kind.shape) if isinstance(size, int))
    return ragged if fits else None


def _check_row(name: str, kind: ColumnType, value: Any, i: int) -> Any:
    try:
        return check_value(name, kind, value)
    except InputError as error:
        raise InputError(f"row {i}: {error}") from None


def _ints(kind: ColumnType) -> tuple[int, ...]:
    return tuple(d for d in kind.shape if isinstance(d, int))


def check_table(types: Types | None, table: Mapping[str, Any]) -> tuple[dict[str, Column], int]:
    """(columns, N) of a table, every column N long; raises InputError."""
    if not isinstance(table, Mapping):
        raise InputError(f"a table is a mapping of column to N values, {describe(table)} came")
    lengths = {name: _length(name, c) for name, c in table.items()}
    rows = next(iter(lengths.values()), 0)
    for name, length in lengths.items():
        if length != rows:
            raise InputError(f"column {name!r} has {length} rows, {next(iter(lengths))!r} has {rows}")
    if not types:
        for name in table:
            if not isinstance(name, str) or not COLUMN_NAME.fullmatch(name):
                raise InputError(f"columns are named like variables, not {name!r:.80}")
        return {n: _kept(c) for n, c in table.items()}, rows
    _check_names(types, table, "the pipeline's input")
    out: dict[str, Column] = {}
    for name, kind in types.items():
        if name in table:
            out[name] = check_column(name, kind, table[name], rows)
        elif kind.has_default or kind.nullable:
            out[name] = check_column(name, kind, [kind.default] * rows, rows)
        else:
            raise InputError(f"column {name!r} is missing; {kind} is expected")
    _check_named(types, out, rows)
    return out, rows


def _kept(column: Any) -> Column:
    return column if isinstance(column, np.ndarray | RaggedRows | DeviceRows) else list(column)


def check_outputs(stage: str, types: Types, outputs: object, rows: int) -> dict[str, Column]:
    """What a stage returned, checked where its columns are declared; raises InputError naming stage and column."""
    if not isinstance(outputs, Mapping):
        raise InputError(
            f"stage {stage!r} returned {type(outputs).__name__}; a mapping of column to values is expected"
        )
    out: dict[str, Column] = {}
    for name, column in outputs.items():
        if not isinstance(name, str) or not (name in types or COLUMN_NAME.fullmatch(name)):
            raise InputError(f"stage {stage!r} returned a column named {name!r:.60}; names are like variables")
        try:
            if _length(name, column) != rows:
                raise InputError(f"column {name!r} needs {rows} rows, {describe(column)} came")
            if name in types:
                column = check_column(name, types[name], column, rows)
            elif types:
                near = difflib.get_close_matches(name, list(types), 1)
                hint = f"; did you mean {near[0]!r}?" if near else "; declare it under outputs"
                raise InputError(f"column {name!r} is not declared{hint}")
            elif type(column) is list:
                _check_texts(name, column)
        except InputError as error:
            raise InputError(f"stage {stage!r}: {error}") from None
        out[name] = _kept(column)
    for name in types:
        if name not in out:
            raise InputError(f"stage {stage!r} did not return column {name!r}, which it declares")
    try:
        _check_named(types, out, rows)
    except InputError as error:
        raise InputError(f"stage {stage!r}: {error}") from None
    return out


def row_of_table(table: Mapping[str, Sequence[Any] | Column], i: int = 0) -> dict[str, Any]:
    """One row of a table: arrays lose their batch axis, and what is left without dims becomes a Python scalar."""
    row: dict[str, Any] = {}
    for name, column in table.items():
        row[name] = plain_value(column[i])
    return row


def plain_value(value: Any) -> Any:
    """A number as Python has it, where it came as a numpy scalar or an array without dims."""
    return value.item() if isinstance(value, np.generic | np.ndarray) and value.ndim == 0 else value
