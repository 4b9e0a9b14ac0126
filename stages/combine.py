"""What stands behind the shards of a gathered stage: it puts together, row by row, what each of them returned.

It runs on processors, with numpy alone. Whatever shard is slow or was killed, the same bytes come of the same parts:
they are taken in the order of the shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from torchrelay.errors import ConfigError
from torchrelay.stages.batch import Batch
from torchrelay.stages.stage import Stage

__all__ = ["Combine"]

Array = np.ndarray[Any, np.dtype[Any]]
_KEPT = frozenset(np.dtype(name) for name in ("float32", "float64", "complex64", "complex128", "int64", "uint64"))


class Combine(Stage):
    """Concatenates or sums the columns of all shards.

    Column `c` of shard i comes as `c:i`. A row whose parts do not fit together is rejected, with their shapes; its
    neighbours go on.

    Args:
        stage: the stage as its pipeline names it, for errors.
        shards: how many.
        rules: of each column the dimension, of a row's value, along which it is concatenated; None where it is summed.
            float16, bfloat16 and the 8-bit floats are added up in float32, and rounded once; short integers in 64 bits,
            and a sum that its type cannot hold rejects the row. float32, float64 and complex numbers are added in
            their own type, shard by shard; 64-bit integers too, and wrap around.
    """

    def __init__(self, stage: str, shards: int, rules: Mapping[str, int | None]) -> None:
        if shards < 2 or not rules:
            raise ConfigError(f"stage {stage!r}: two shards or more are combined, and a column or more of each")
        self._stage = stage
        self._shards = shards
        self._rules = dict(rules)

    def forward(self, batch: Batch) -> Mapping[str, Any]:
        """Of each column, the rows of all shards combined."""
        return {column: self._column(batch, column, dim) for column, dim in self._rules.items()}

    def _column(self, batch: Batch, column: str, dim: int | None) -> Any:
        parts = [batch[f"{column}:{shard}"] for shard in range(self._shards)]
        if all(isinstance(part, np.ndarray) for part in parts) and not _unlike(parts, _axis(dim, batched=True)):
            whole, bad = _put_together(parts, _axis(dim, batched=True))
            for row in bad if bad is not None else ():
                batch.reject(int(row), self._too_large(column, parts[0].dtype))
            return whole
        return [self._row(batch, row, column, values, dim) for row, values in enumerate(zip(*parts, strict=True))]

    def _row(self, batch: Batch, row: int, column: str, values: Sequence[Any], dim: int | None) -> Any:
        without = [shard for shard, value in enumerate(values) if value is None]
        if len(without) == len(values):
            return None
        if without:
            batch.reject(
                row, f"{self._who(column)} is null in shard {without[0]} and not in all; return it in all or none"
            )
            return None
        parts = [np.asarray(value) for value in values]
        if _unlike(parts, _axis(dim)):
            batch.reject(row, self._uneven(column, parts, dim))
            return None
        whole, bad = _put_together(parts, _axis(dim))
        if bad is not None and len(bad):
            batch.reject(row, self._too_large(column, parts[0].dtype))
        return whole if whole.ndim else whole[()]

    def _who(self, column: str) -> str:
        return f"stage {self._stage!r}: column {column!r}"

    def _too_large(self, column: str, dtype: np.dtype[Any]) -> str:
        return f"{self._who(column)}: the sum of all shards is more than {dtype} holds; return a wider type"

    def _uneven(self, column: str, parts: Sequence[Array], dim: int | None) -> str:
        shown = ", ".join(f"{part.dtype}{list(part.shape)} from shard {shard}" for shard, part in enumerate(parts))
        if dim is None:
            what = "cannot be summed; each shard must return the whole shape, with its share of the value"
            other = f"write combine: {{{column}: {{concat: DIMENSION}}}} if each returns a piece of it"
        else:
            what = f"cannot be concatenated along dimension {dim}; in all others they must be equal"
            other = "cut the layer that makes it alike in each shard, or name another dimension in shards.combine"
        return f"{self._who(column)}: the parts of a row, {shown}, {what}: {other}"


def _axis(dim: int | None, *, batched: bool = False) -> int | None:
    """The axis of an array with or without a batch axis, for a dimension of a row's value."""
    return dim + 1 if dim is not None and dim >= 0 and batched else dim


def _unlike(parts: Sequence[Array], axis: int | None) -> bool:
    """Whether these cannot be put together."""
    first = parts[0]
    if any(part.dtype != first.dtype or part.ndim != first.ndim for part in parts):
        return True
    if axis is None:
        return any(part.shape != first.shape for part in parts)
    if not -first.ndim <= axis < first.ndim:
        return True
    at = axis % first.ndim
    others = [part.shape[:at] + part.shape[at + 1 :] for part in parts]
    return any(shape != others[0] for shape in others)


def _put_together(parts: Sequence[Array], axis: int | None) -> tuple[Array, Array | None]:
    """The whole, and the numbers of the rows whose sum does not fit, where that can be."""
    if axis is not None:
        return np.concatenate(parts, axis=axis), None
    dtype = parts[0].dtype
    wide = dtype if dtype in _KEPT else np.dtype({"i": "int64", "u": "uint64"}.get(dtype.kind, "float32"))
    total = parts[0].astype(wide)
    for part in parts[1:]:
        # Not `total += part`: numpy has no loop for the sum of two types of which it does not know one.
        np.add(total, part if part.dtype == wide else part.astype(wide), out=total)
    if wide == dtype:
        return total, None
    bad = None
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        over = (total < limits.min) | (total > limits.max)
        bad = np.flatnonzero(over.reshape(len(over), -1).any(axis=1)) if over.ndim else np.flatnonzero(over)
    with np.errstate(over="ignore"):
        return total.astype(dtype), bad
