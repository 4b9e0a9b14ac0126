"""The shapes that a stage can get, as tables of zeros: they are run once before the first job. Imports no torch."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice, product
from typing import NamedTuple

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.config.spec import BatchSpec
from torchrelay.config.types import ColumnType
from torchrelay.stages.padding import ragged_axes

__all__ = ["Shapes", "Unknown", "row_bucket", "row_buckets", "shapes_of", "table_of"]

MAX_SHAPES = 64


class Unknown(Exception):
    """The shapes of a stage's batches cannot be told beforehand; its text says why."""


class Shapes(NamedTuple):
    """What is run: rows of the batch, and for each column the shape of a row. `left_out`: there are more."""

    batches: list[tuple[int, dict[str, tuple[int, ...]]]]
    left_out: bool


def row_bucket(rows: int, buckets: Sequence[int]) -> int:
    """So many rows a batch is padded to: the smallest bucket that holds it, else a power of two."""
    at = bisect_left(buckets, rows)
    return buckets[at] if at < len(buckets) else 1 << max(rows - 1, 0).bit_length()


def row_buckets(spec: BatchSpec) -> tuple[int, ...]:
    """The numbers of rows that a compiled or recorded model sees, rising: those given, else powers of two; the last is
    `max_rows`."""
    given = spec.row_buckets or [1 << i for i in range(spec.max_rows.bit_length())]
    return (*(n for n in given if n < spec.max_rows), spec.max_rows)


def shapes_of(names: Collection[str] | None, types: Mapping[str, ColumnType], spec: BatchSpec) -> Shapes:
    """The shapes that batches can have after padding, the largest first, 64 at most.

    Args:
        names: the columns that the stage reads; None where they are not known.
        types: their declared types.
        spec: how batches are put together.

    Raises:
        Unknown: a column can have any shape, or is no array.
    """
    if names is None:
        raise Unknown("what it reads is not declared; add inputs, or declare the pipeline's input and all outputs")
    options = {name: _options(name, types.get(name), spec) for name in names}
    found = list(islice(_batches(options, types, spec), MAX_SHAPES + 1))
    return Shapes(found[:MAX_SHAPES], len(found) > MAX_SHAPES)


def _options(name: str, kind: ColumnType | None, spec: BatchSpec) -> list[tuple[int, ...]]:
    """The shapes of a padded row, the largest first."""
    if kind is None:
        raise Unknown(f"column {name!r} has no declared type")
    if not kind.is_numeric or kind.nullable:
        raise Unknown(f"column {name!r} is {kind}, and no array of known shape")
    if not kind.stacked and not spec.buckets.get(name):
        raise Unknown(f"column {name!r} is {kind}; add pad and buckets for it")
    axes = [[size] if isinstance(size, int) else sorted(spec.buckets[name], reverse=True) for size in kind.shape]
    return list(islice(product(*axes), MAX_SHAPES))


def _batches(
    options: Mapping[str, Sequence[tuple[int, ...]]], types: Mapping[str, ColumnType], spec: BatchSpec
) -> Iterator[tuple[int, dict[str, tuple[int, ...]]]]:
    buckets = row_buckets(spec)
    for i, rows in reversed(list(enumerate(buckets))):
        # Padded to so many rows are batches of more than the bucket below.
        fewest = buckets[i - 1] + 1 if i else 1
        for shapes in product(*options.values()):
            batch = dict(zip(options, shapes, strict=True))
            if rows == 1 or fewest * _cost(batch, types, spec) <= _total(spec):
                yield rows, batch


def _total(spec: BatchSpec) -> float:
    return math.inf if spec.max_cost is None else spec.max_cost.total


def _cost(batch: Mapping[str, tuple[int, ...]], types: Mapping[str, ColumnType], spec: BatchSpec) -> int:
    """What a row of these shapes costs; nothing where that is a number that nobody knows yet."""
    name = "" if spec.max_cost is None else spec.max_cost.column
    shape = batch.get(name, ())
    return shape[ragged_axes(types[name], len(shape))[0]] if shape else 0


def table_of(rows: int, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, ColumnType]) -> dict[str, Column]:
    """Zeros of these shapes, as the column of a job holds them."""
    table: dict[str, Column] = {}
    for name, shape in shapes.items():
        zeros = np.zeros((rows, *shape), types[name].np_dtype)
        table[name] = zeros if types[name].stacked else list(zeros)
    return table
