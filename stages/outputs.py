"""What a stage's `forward` returned, checked and given back to the jobs of the batch.

Promise: order is kept; arrays are views of what the stage returned; rows that the stage rejected are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from torchrelay.config.columns import Column, check_outputs, describe
from torchrelay.config.ragged import RaggedRows, take_rows
from torchrelay.config.types import ColumnType
from torchrelay.errors import InputError

__all__ = [
    "Expand",
    "Made",
    "ReadRows",
    "as_arrays",
    "as_mapping",
    "counts_of",
    "empty_outputs",
    "own",
    "pick",
    "split",
]

Counts = np.ndarray[Any, np.dtype[np.int64]]
MAX_COUNT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Expand:
    """What a stage with `rows: expand` returns: `counts[i]` rows, or none, for row i of its batch.

    `columns` hold the rows of all, one behind the other: arrays or tensors `[sum(counts), ...]`, or lists as long.
    """

    columns: Mapping[str, Any]
    counts: Sequence[int] | Any


@dataclass(frozen=True, slots=True)
class ReadRows(Expand):
    """What the reading node of a run returns: rows of chunks, and what the run wants to know of them.

    `own` are columns of the same rows, `beside` such of the chunks themselves. Their names begin with `@`; nothing
    declares them, and no stage of the user sees them.
    """

    own: Mapping[str, Column]
    beside: Mapping[str, Column]


class Made(NamedTuple):
    """One job's part of what a stage returned.

    `rejected` says why, by the job's row number; those rows are not in `columns`. `counts` is None unless the stage
    expands; it has one entry per row of the job, 0 for a rejected one. `beside`: see ReadRows.
    """

    columns: dict[str, Column]
    counts: Counts | None = None
    rejected: Mapping[int, str] = {}  # never changed
    beside: Mapping[str, Column] = {}


def split(
    outputs: object,
    job_rows: Sequence[int],
    stage: str,
    types: Mapping[str, ColumnType] | None = None,
    *,
    expands: bool = False,
    rejected: Mapping[int, str] | None = None,
) -> list[Made]:
    """Give each job its rows of what `forward` returned.

    Args:
        outputs: column -> ndarray or tensor `[N, ...]` or list of N, or an Expand of such; bfloat16 and float8 tensors
            become arrays of the dtypes of ml_dtypes.
        job_rows: rows of each job; N is their sum.
        stage: named in errors.
        types: the declared outputs; empty if none are declared.
        expands: whether the stage is declared to change the number of rows.
        rejected: rows that it rejected, by their number in the batch.

    Raises:
        InputError: naming the stage and the column whose name, type, shape or number of rows is wrong.
    """
    total = sum(job_rows)
    refused = dict(rejected or {})  # a late rejection must not change what was returned
    if len(refused) == total and total:
        table, counts = empty_outputs(types), np.zeros(total, np.int64) if expands else None
    elif expands:
        table, counts = _expanded(outputs, total, stage, types or {}, refused)
    else:
        table, counts = _same(outputs, total, stage, types or {}, refused), None
    if len(job_rows) == 1:
        return [Made(table, counts, refused, outputs.beside if isinstance(outputs, ReadRows) else {})]
    return _shares(table, counts, job_rows, refused)


def _same(
    outputs: object, total: int, stage: str, types: Mapping[str, ColumnType], refused: Mapping[int, str]
) -> dict[str, Column]:
    plain = as_arrays(outputs, stage)
    if not refused:
        return check_outputs(stage, types, plain, total)
    kept = np.delete(np.arange(total), list(refused))
    return check_outputs(stage, types, {n: pick(stage, n, c, kept, total) for n, c in plain.items()}, len(kept))


def _expanded(
    outputs: object, total: int, stage: str, types: Mapping[str, ColumnType], refused: Mapping[int, str]
) -> tuple[dict[str, Column], Counts]:
    if not isinstance(outputs, Expand):
        raise InputError(
            f"stage {stage!r} is declared `rows: expand` and returned a {type(outputs).__name__}; "
            "return Expand(columns, counts)"
        )
    counts = counts_of(outputs.counts, total, stage)
    plain = as_arrays(outputs.columns, stage)
    made = int(counts.sum())
    if refused and counts[list(refused)].any():
        keep = np.repeat(~np.isin(np.arange(total), list(refused)), counts)
        plain = {n: pick(stage, n, c, np.flatnonzero(keep), made) for n, c in plain.items()}
        counts[list(refused)] = 0
    table = check_outputs(stage, types, plain, int(counts.sum()))
    return ({**table, **outputs.own} if isinstance(outputs, ReadRows) else table), counts


def counts_of(counts: object, total: int, stage: str) -> Counts:
    """What Expand says of `total` rows; raises InputError for anything but a whole number, from 0, for each."""
    listed = counts.tolist() if hasattr(counts, "tolist") else counts
    if not isinstance(listed, list | tuple) or len(listed) != total or not all(map(_is_count, listed)):
        raise InputError(
            f"stage {stage!r}: Expand.counts must hold one whole number from 0 for each of the {total} rows, "
            f"not {counts!r:.80}"
        )
    return np.asarray(listed, np.int64)


def _is_count(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and 0 <= int(value) <= MAX_COUNT


def as_mapping(outputs: object, stage: str) -> Mapping[str, Any]:
    """What a stage returned that keeps its rows; raises InputError for anything but columns."""
    if isinstance(outputs, Expand):
        raise InputError(f"stage {stage!r} returned Expand; declare `rows: expand` for it, or return a mapping")
    if not isinstance(outputs, Mapping):
        raise InputError(
            f"stage {stage!r} returned a {type(outputs).__name__}; return a mapping of column to its values"
        )
    return outputs


def as_arrays(outputs: object, stage: str) -> Mapping[str, Any]:
    """Columns with arrays in place of tensors; raises InputError for what has no rows axis, or is masked."""
    plain = as_mapping(outputs, stage)
    if sys.modules.get("torch") is not None:
        from torchrelay.stages.torch_tensors import numpy_outputs

        plain = numpy_outputs(stage, plain)
    for name, column in plain.items():
        if isinstance(column, np.ma.MaskedArray):
            raise InputError(f"stage {stage!r}: column {name!r}: masks are not carried; fill it first: .filled(0)")
        if isinstance(column, np.ndarray) and not column.ndim:
            raise InputError(f"stage {stage!r}: column {name!r} has no rows axis; return [N, ...]")
    return plain


def pick(stage: str, name: str, column: Any, kept: Counts, total: int) -> Any:
    """The rows that were not rejected; raises InputError for a column that does not hold all of them."""
    if not isinstance(column, Collection) or isinstance(column, str | bytes | Mapping | Set) or len(column) != total:
        came = f"{describe(column)} came"
        raise InputError(f"stage {stage!r}: column {name!r} needs {total} rows, rejected ones included; {came}")
    if sys.modules.get("torch") is not None and isinstance(column, sys.modules["torch"].Tensor):
        return column[kept]
    return take_rows(column if isinstance(column, np.ndarray | RaggedRows) else list(column), kept)


def _shares(
    table: Mapping[str, Column], counts: Counts | None, job_rows: Sequence[int], refused: Mapping[int, str]
) -> list[Made]:
    shares: list[Made] = []
    row = start = 0
    left = sorted(refused, reverse=True)
    for rows in job_rows:
        mine: dict[int, str] = {}
        while left and left[-1] < row + rows:
            number = left.pop()
            mine[number - row] = refused[number]
        part = None if counts is None else counts[row : row + rows]
        end = start + (rows - len(mine) if part is None else int(part.sum()))
        shares.append(Made({name: column[start:end] for name, column in table.items()}, part, mine))
        row, start = row + rows, end
    return shares


def empty_outputs(types: Mapping[str, ColumnType] | None) -> dict[str, Column]:
    """The outputs for a job of 0 rows, for which no stage is called: every declared column, without rows."""
    return {
        name: np.empty((0, *(size for size in t.shape if isinstance(size, int))), t.np_dtype) if t.stacked else []
        for name, t in (types or {}).items()
    }


def own(made: Made) -> Made:
    """A copy: the stage may use its buffers again at the next call."""
    return made._replace(columns={name: _own(column) for name, column in made.columns.items()})


def _own(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, RaggedRows):
        return value  # no buffer of the stage's: its rows were put together here
    if isinstance(value, list | tuple):
        return [_own(v) for v in value]
    if isinstance(value, dict):
        return {k: _own(v) for k, v in value.items()}
    return bytes(value) if isinstance(value, bytearray | memoryview) else value
