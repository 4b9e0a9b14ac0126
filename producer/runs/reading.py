"""The rows of a run again, in input order, from the parts that count. Flat in memory: a part at a time is open.

Where rows of a chunk were tried again, its rows lie in several parts; those of such a chunk are read together and put
in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchrelay.config.columns import Column, row_of_table
from torchrelay.config.ragged import take_rows
from torchrelay.errors import ConfigError, DecodeError
from torchrelay.producer.runs.folder import RunFolder, open_existing
from torchrelay.stages.writing.found import Found, Output, load, places_of, read_part
from torchrelay.stages.writing.layout import Array

__all__ = ["batches_of", "chunks_of", "in_order", "rows", "rows_of"]


def rows(
    folder: str, columns: Sequence[str] | None = None, *, format: str | None = None, base_dir: Path = Path()
) -> Iterator[dict[str, Any]]:
    """The rows of a run's output, as mappings, in the order of the input. An unfinished run gives what there is.

    Args:
        folder: the output folder, a path or URL.
        columns: which columns; all by default.
        format, base_dir: for runs that a class of yours wrote: "file.py:Writer", and where the file lies.

    Raises:
        ConfigError: the folder holds no run, or has no such column.
        DecodeError: a part is damaged.
    """
    return rows_of(open_existing(folder, format=format, base_dir=base_dir), columns)


def rows_of(run: RunFolder, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The same, of the parts that `run` found at its last `look` or `find`."""
    for parts in chunks_of(run):
        for batch in batches_of(run.output, parts):
            wanted = batch if columns is None else _picked(batch, columns)
            for i in range(len(next(iter(batch.values())))):
                yield row_of_table(wanted, i)


def _picked(batch: dict[str, Column], columns: Sequence[str]) -> dict[str, Column]:
    for name in columns:
        if name not in batch:
            raise ConfigError(f"the output has no column {name!r:.60}; it has {', '.join(batch)}")
    return {name: batch[name] for name in columns}


def chunks_of(run: RunFolder) -> Iterator[list[Found]]:
    """The parts of each chunk that has rows, by chunk, each in the order of its rounds."""
    group: list[Found] = []
    for (chunk, _), found in sorted(run.parts.items()):
        if group and group[0].record.part.chunk != chunk:
            yield group
            group = []
        if found.record.rows:
            group.append(found)
    if group:
        yield group


def batches_of(output: Output, parts: Sequence[Found]) -> Iterator[dict[str, Column]]:
    """The rows of one chunk, some at a time and in order."""
    if len(parts) == 1:
        yield from read_part(output, load(output, parts[0]))
        return
    loaded = [load(output, part) for part in parts]
    read = [_whole(output, part) for part in loaded]
    order = in_order([places for _, places in read])
    names = list(dict.fromkeys(name for columns, _ in read for name in columns))
    for name in names:
        if any(name not in columns for columns, _ in read):
            raise DecodeError(f"column {name!r} is not in all parts of chunk {parts[0].record.part.chunk}")
    joined = {name: [value for columns, _ in read for value in columns[name]] for name in names}
    yield {name: take_rows(column, order) for name, column in joined.items()}


def in_order(places: Sequence[Array]) -> Array:
    """int64 [N]: the rows of several parts, one behind the other, in the order of the input."""
    source, row, part = np.concatenate(places, axis=1)
    order: Array = np.lexsort((part, row, source))
    return order


def _whole(output: Output, found: Found) -> tuple[dict[str, list[Any]], Array]:
    columns: dict[str, list[Any]] = {}
    places, at = [], 0
    for batch in read_part(output, found):
        places.append(places_of(found.record, batch, at))
        at += len(next(iter(batch.values())))
        for name, column in batch.items():
            columns.setdefault(name, []).extend(column)
    return columns, np.concatenate(places, axis=1)
