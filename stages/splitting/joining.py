"""Some rows of a batch as a batch of their own, and the columns of such groups put together again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from torchrelay.config.columns import describe
from torchrelay.config.ragged import RaggedRows, take_rows
from torchrelay.config.shards import PADDED, SIZES, STATE
from torchrelay.errors import DecodeError, InputError
from torchrelay.stages.batch import Batch
from torchrelay.stages.outputs import Expand, counts_of
from torchrelay.stages.padding import Padded

__all__ = ["joined", "rows_of"]


def rows_of(batch: Batch, rows: np.ndarray, sizes: Sequence[int], fill: Mapping[str, float]) -> Batch:
    """These rows without what came from the part before; padded columns as long as `sizes` says.

    Args:
        sizes: of each padded column, by name, and each of its ragged axes.
        fill: what columns are padded with.

    Raises DecodeError for sizes that are not of these columns.
    """
    left = iter(sizes)
    whole = len(rows) == len(batch)
    columns: dict[str, Any] = {}
    padded: dict[str, Padded] = {}
    names = [name for name in batch.columns if name not in (STATE, SIZES, PADDED)]
    for name in sorted(name for name in names if name in (batch.padded or {})):
        how = (batch.padded or {})[name]
        column = _taken(batch.columns[name], rows, whole)
        for axis in how.axes:
            size = next(left, -1)
            if size < 0:
                raise DecodeError(f"what came from the first part does not say how column {name!r} was padded")
            column = _as_long(column, 1 + axis, size, fill.get(name, 0))
        columns[name], padded[name] = column, Padded(_taken(how.lengths, rows, whole), how.axes)
    columns.update((name, _taken(batch[name], rows, whole)) for name in names if name not in columns)
    in_order = {name: columns[name] for name in names}
    if whole:
        return Batch(in_order, batch.job_rows, batch.job_meta, padded, batch.fresh, batch.arange, {}, batch.ended)
    meta = batch.meta
    ended = None if batch.ended is None else lambda: [batch.cancelled[row] for row in rows]
    return Batch(
        in_order, (1,) * len(rows), tuple(meta[row] for row in rows), padded, batch.fresh, batch.arange, {}, ended
    )


def _taken(column: Any, rows: np.ndarray, whole: bool) -> Any:
    if whole:
        return column
    if isinstance(column, torch.Tensor):
        return column[torch.from_numpy(rows).to(column.device)]
    if isinstance(column, np.ndarray | RaggedRows):
        return take_rows(column, rows)
    return [column[row] for row in rows]


def _as_long(column: Any, axis: int, size: int, value: float) -> Any:
    short = size - column.shape[axis]
    if not short:
        return column
    if short < 0:
        return column.narrow(axis, 0, size)
    around = [0, 0] * (column.ndim - axis - 1) + [0, short]
    return F.pad(column, around, value=value)


def joined(
    made: Sequence[Any], groups: Sequence[np.ndarray], rows: int, stage: str, refused: Collection[int] = ()
) -> Any:
    """What was made of groups of rows, in the order of the rows.

    Args:
        made: of each group, what a forward returned.
        groups: the numbers of each group's rows.
        rows: of all groups together.
        stage: named in errors.
        refused: rows that were rejected. What was made of a group of none but these is not looked at.

    Raises InputError where the groups do not fit together, or one has not the rows that it should have.
    """
    if len(made) == 1:
        return made[0]
    gone = set(refused)
    kept = [(part, group) for part, group in zip(made, groups, strict=True) if not gone.issuperset(group.tolist())]
    if not kept:
        return made[0]
    parts, groups = [part for part, _ in kept], [group for _, group in kept]
    if all(isinstance(part, Expand) and part.columns.keys() == parts[0].columns.keys() for part in parts):
        return _joined_expands(parts, groups, rows, stage)
    if not all(isinstance(part, Mapping) and part.keys() == parts[0].keys() for part in parts):
        raise InputError(f"stage {stage!r}: forward returned other columns for other rows of a batch")
    # Rows of groups that are left out are any rows.
    order = np.zeros(rows, np.int64)
    order[np.concatenate(groups)] = np.arange(sum(map(len, groups)))
    counts = list(map(len, groups))
    return {name: _column(stage, name, [part[name] for part in parts], counts, order) for name in parts[0]}


def _column(stage: str, name: str, pieces: Sequence[Any], counts: Sequence[int], order: np.ndarray) -> Any:
    for piece, count in zip(pieces, counts, strict=True):
        if not _is_column(piece) or len(piece) != count:
            raise InputError(f"stage {stage!r}: column {name!r} needs {count} rows; {describe(piece)} came")
    first = pieces[0]
    for kind, together in ((torch.Tensor, torch.cat), (np.ndarray, np.concatenate)):
        # Dtypes too, as they would be brought to one without a word.
        if all(isinstance(p, kind) and p.dtype == first.dtype and p.shape[1:] == first.shape[1:] for p in pieces):
            whole = together(list(pieces))
            return whole[torch.from_numpy(order).to(whole.device)] if isinstance(whole, torch.Tensor) else whole[order]
    rows = [row for piece in pieces for row in piece]
    return [rows[i] for i in order]


def _is_column(value: Any) -> bool:
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.ndim > 0
    return isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping | Set)


def _joined_expands(made: Sequence[Expand], groups: Sequence[np.ndarray], rows: int, stage: str) -> Expand:
    counts = np.zeros(rows, np.int64)
    for part, group in zip(made, groups, strict=True):
        counts[group] = counts_of(part.counts, len(group), stage)
    sums = [int(counts[group].sum()) for group in groups]
    at = np.zeros(rows, np.int64)
    behind = np.concatenate(groups)
    at[behind] = np.concatenate([[0], np.cumsum(counts[behind])[:-1]])
    order = np.concatenate([np.arange(start, start + n) for start, n in zip(at, counts, strict=True)])
    columns = {n: _column(stage, n, [part.columns[n] for part in made], sums, order) for n in made[0].columns}
    return Expand(columns, counts)
