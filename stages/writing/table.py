"""What one part holds: the pipeline's result beside what identifies its rows, and the rows that failed. Pure.

Each row carries `_source`, `_row` and `_part` (the file of the input, the row in it, and the number among the rows that
stages made of it), or the user's key column in their place; then the columns that the user keeps; then the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from torchrelay.config.columns import Column
from torchrelay.config.runs import WriteOptions
from torchrelay.config.types import ColumnType
from torchrelay.errors import ConfigError, InputError
from torchrelay.stages.writing.arrow import layout_in
from torchrelay.stages.writing.layout import Array, Layout, layout_of
from torchrelay.stages.writing.plain import plain_column
from torchrelay.stages.writing.record import RowError, pack_places

__all__ = ["ID_COLUMNS", "PartRows", "PartTable", "assemble", "check_names"]

ID_COLUMNS = ("_source", "_row", "_part")


@dataclass(frozen=True)
class PartRows:
    """The rows of one chunk, N of them, in the order of the input.

    Args:
        columns: the pipeline's result.
        sources, rows, parts: int64 [N], the id of each row.
        kept: the key column, where the run has one, and the kept columns, by their names in the dataset; a
            pyarrow.Table.
        extra: the same as columns, where they are no table.
        errors: rows of the chunk that failed; they are not among the N.
        types: declared types of result columns, as far as there are any.
    """

    columns: Mapping[str, Column]
    sources: Array
    rows: Array
    parts: Array
    kept: Any = None
    extra: Mapping[str, Column] = field(default_factory=dict)
    errors: Sequence[RowError] = ()
    types: Mapping[str, ColumnType] = field(default_factory=dict)


class PartTable(NamedTuple):
    """Columns as they are written, each with its layout; in Parquet, kept ones are pyarrow's. `places` is for the
    record, where no column holds the ids."""

    columns: dict[str, Any]
    layouts: dict[str, Layout]
    rows: int
    places: str


def check_names(result: Iterable[str], key: str | None, keep: Sequence[str]) -> None:
    """Raises ConfigError where a result column would meet another column of the output."""
    ids = ID_COLUMNS if key is None else (key,)
    for name in result:
        if name in ids:
            what = "the key column" if key is not None else "a column that identifies rows"
            raise ConfigError(f"result column {name!r} has the name of {what}; rename it in the stage that makes it")
        if name in keep:
            raise ConfigError(
                f"result column {name!r} has the name of a kept column; leave it out of keep, or rename the result"
            )
    taken = next((name for name in keep if name in ids and name != key), None)
    if taken is not None:
        raise ConfigError(f"kept column {taken!r} has the name of a column that identifies rows; give a key instead")


def assemble(given: PartRows, options: WriteOptions) -> PartTable:
    """The columns of a part in their order.

    Raises:
        ConfigError: two columns would have one name.
        InputError: a column has not as many rows as there are ids, or is missing.
    """
    check_names(given.columns, options.key, options.keep)
    ids = [np.asarray(a, np.int64) for a in (given.sources, given.rows, given.parts)]
    columns: dict[str, Any] = {}
    layouts: dict[str, Layout] = {}
    if options.key is None:
        columns.update(zip(ID_COLUMNS, ids, strict=True))
    wanted = [*([options.key] if options.key is not None else ()), *options.keep]
    for name in wanted:
        if given.kept is not None and name in given.kept.column_names:
            columns[name], layouts[name] = _of_kept(given.kept, name, options.format)
        elif name in given.extra:
            columns[name] = given.extra[name]
        else:
            raise InputError(f"column {name!r} did not come along with the chunk's rows")
    columns.update(given.columns)
    rows = len(ids[1])
    for name, column in [*columns.items(), *zip(ID_COLUMNS, ids, strict=True)]:
        if len(column) != rows:
            raise InputError(f"column {name!r} has {len(column)} rows, {rows} are to be written")
    for name, column in columns.items():
        if name not in layouts:
            layouts[name] = layout_of(column, given.types.get(name))
    return PartTable(columns, layouts, rows, "" if options.key is None else pack_places(ids))


def _of_kept(table: Any, name: str, format: str) -> tuple[Any, Layout]:
    layout = layout_in(table.schema.field(name))
    return (table.column(name), layout) if format == "parquet" else plain_column(table.column(name), layout)
