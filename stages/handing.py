"""What one stage returned, checked for a stage that runs behind it in the same process. Tensors stay where they are."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from torchrelay.config.columns import check_outputs
from torchrelay.config.ragged import RaggedRows, take_rows
from torchrelay.config.types import ColumnType
from torchrelay.stages.batch import join_rows
from torchrelay.stages.outputs import as_arrays, as_mapping, pick

__all__ = ["handed_over", "join_columns", "own_column", "rows_of", "without_tensors"]

Rows = np.ndarray[Any, np.dtype[np.int64]]


def handed_over(outputs: object, stage: str, types: Mapping[str, ColumnType], total: int, left: Rows) -> dict[str, Any]:
    """The columns that a stage returned, checked as `outputs.split` checks them.

    A tensor is judged by its dtype and shape, without reading it; where its values must be looked at, or it is to be
    converted, an array takes its place.

    Args:
        outputs: what `forward` returned for `total` rows.
        stage: named in errors.
        types: the declared outputs.
        left: int64 `[n]`, the rows that were not rejected; the others are left out.

    Raises InputError naming the stage and the column whose name, type, shape or number of rows is wrong.
    """
    if not len(left):
        return {}
    named = as_mapping(outputs, stage)
    if len(left) < total:
        named = {name: pick(stage, name, column, left, total) for name, column in named.items()}
    if not _torch():
        return dict(check_outputs(stage, types, as_arrays(named, stage), len(left)))
    from torchrelay.stages.torch_tensors import real, stand_ins

    standing = stand_ins(stage, named)
    checked = check_outputs(stage, types, as_arrays(standing, stage), len(left))
    found = {name: real(named[name], standing[name], column) for name, column in checked.items()}
    if any(column is None for column in found.values()):
        plain = check_outputs(stage, types, as_arrays(named, stage), len(left))
        found = {name: plain[name] if column is None else column for name, column in found.items()}
    return found


def _torch() -> bool:
    return sys.modules.get("torch") is not None


def without_tensors(stage: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays in place of tensors, also in lists, which are copied; waits for a device once."""
    plain = dict(columns)
    if _torch():
        from torchrelay.stages.torch_tensors import numpy_outputs

        plain = numpy_outputs(stage, columns)
    return {name: list(column) if isinstance(column, list) else column for name, column in plain.items()}


def rows_of(column: Any, rows: Any) -> Any:
    """These rows of an array, a tensor or a list."""
    if isinstance(column, np.ndarray | list | RaggedRows):
        return take_rows(column, np.asarray(rows, np.int64))
    from torchrelay.stages.torch_tensors import tensor_rows

    return tensor_rows(column, rows)


def own_column(column: Any) -> Any:
    """A copy of an array, a tensor, or of those in a list."""
    if isinstance(column, list):
        return [own_column(value) for value in column]
    if isinstance(column, np.ndarray):
        return column.copy()
    return column.clone() if _torch() and isinstance(column, sys.modules["torch"].Tensor) else column


def join_columns(parts: Sequence[Any]) -> Any:
    """Rows behind rows: tensors as one tensor, arrays as one array, else a list."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, np.ndarray | list | RaggedRows) for part in parts):
        return join_rows(parts)
    from torchrelay.stages.torch_tensors import join_tensors

    return join_tensors(parts)
