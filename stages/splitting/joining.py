"""Some rows of a batch as a batch of their own, and the columns of such groups put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from torchrelay.config.ragged import RaggedRows, take_rows
from torchrelay.config.shards import PADDED, SIZES, STATE
from torchrelay.errors import InputError
from torchrelay.stages.batch import Batch
from torchrelay.stages.outputs import Expand
from torchrelay.stages.padding import Padded

__all__ = ["joined", "rows_of"]


def rows_of(batch: Batch, rows: np.ndarray, sizes: Sequence[int], fill: Mapping[str, float]) -> Batch:
    """These rows without what came from the part before; padded columns as long as `sizes` says.

    Args:
        sizes: of each padded column, by name, and each of its ragged axes.
        fill: what columns are padded with.
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
            column = _as_long(column, 1 + axis, next(left), fill.get(name, 0))
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


def joined(made: Sequence[Any], groups: Sequence[np.ndarray], rows: int) -> Any:
    """What was made of groups of rows, in the order of the rows."""
    if len(made) == 1:
        return made[0]
    if all(isinstance(part, Expand) for part in made):
        return _joined_expands(made, groups, rows)
    if not all(isinstance(part, Mapping) and part.keys() == made[0].keys() for part in made):
        raise InputError("forward returned other columns for other rows of a batch")
    order = np.argsort(np.concatenate(groups))
    return {name: _column([part[name] for part in made], order) for name in made[0]}


def _column(pieces: Sequence[Any], order: np.ndarray) -> Any:
    first = pieces[0]
    if all(isinstance(p, torch.Tensor) and p.ndim and p.shape[1:] == first.shape[1:] for p in pieces):
        whole = torch.cat(list(pieces))
        return whole[torch.from_numpy(order).to(whole.device)]
    if all(isinstance(p, np.ndarray) and p.ndim and p.shape[1:] == first.shape[1:] for p in pieces):
        return np.concatenate(pieces)[order]
    rows = [row for piece in pieces for row in piece]
    return [rows[i] for i in order]


def _joined_expands(made: Sequence[Expand], groups: Sequence[np.ndarray], rows: int) -> Expand:
    counts = np.zeros(rows, np.int64)
    for part, group in zip(made, groups, strict=True):
        counts[group] = np.asarray(part.counts)
    at = np.concatenate([[0], np.cumsum(counts[np.concatenate(groups)])])
    spans = [np.arange(at[i], at[i + 1]) for i in np.argsort(np.concatenate(groups))]
    order = np.concatenate(spans) if spans else np.zeros(0, np.int64)
    return Expand({name: _column([part.columns[name] for part in made], order) for name in made[0].columns}, counts)
